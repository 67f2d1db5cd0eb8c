"""The handlers of the Responses API: references to stored responses, and access to them.

A response is stored when it ends, unless ``store`` is false. What a request refers to counts like
its body: in size, and in the memory that clients may fill.
"""

import asyncio
import functools
from collections.abc import Sequence

import msgspec
from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from s1engine.checks import shown
from s1engine.errors import RequestError
from s1engine.server.api.body import JsonObjects
from s1engine.server.api.response_formatter import Json, error_object
from s1engine.server.api.response_tools import ResponseTools
from s1engine.server.api.responses import ResponsesRequest
from s1engine.server.api.responses_formatter import ResponsesFormatter
from s1engine.server.body_route import LARGE_BODY_BYTES
from s1engine.server.generation import Generation, client_of
from s1engine.server.json_pieces import JsonResponse
from s1engine.server.response_store import ResponseStore, StoredResponse, parsed_bytes

REFERENCE = "item_reference"


class ResponseRoutes:
    """The handlers, over one store.

    Args:
        max_bytes: of what one request refers to.
    """

    def __init__(self, generation: Generation, store: ResponseStore, max_bytes: int) -> None:
        self._generation = generation
        self._store = store
        self._max_bytes = max_bytes

    async def respond(self, body: ResponsesRequest, http: Request) -> Response:
        """Answer in the format of OpenAI's Responses API."""
        client = client_of(http)
        earlier = await self.resolve(client, body, http)
        tools = ResponseTools(body.tools or ())
        chat = body.to_chat(tools, earlier)
        chat.use_tool_format(self._generation.tool_format)
        keeps = body.store is not False and self._store.max_bytes > 0
        formatter = functools.partial(
            ResponsesFormatter,
            body=body,
            tools=tools,
            parser=chat.create_parser(),
            store=functools.partial(self._keep, client, body) if keeps else None,
        )
        return await self._generation.generate_response(chat, http, "resp_", formatter)

    def _keep(self, client: str, body: ResponsesRequest, response: Json) -> None:
        self._store.add(client, response["id"], StoredResponse.of(response, body.items))

    async def resolve(self, client: str, body: ResponsesRequest, http: Request) -> JsonObjects:
        """Replace the references of the input by their items and return the items before it.

        Raises RequestError and NotAdmitted.
        """
        items, previous = body.items, body.previous_response_id
        references = {
            i: self._store.item(client, item.get("id"), f"input[{i}]")
            for i, item in enumerate(items)
            if item.get("type") == REFERENCE
        }
        chain: list[StoredResponse] = []
        if previous is not None:
            chain = self._store.conversation(client, previous, self._max_bytes)
        texts = [text for stored in chain for text in (stored.input, *stored.output)]
        texts += references.values()
        if not texts:
            return []
        size = sum(map(len, texts))
        if size > self._max_bytes:
            message = f"input: its references have more than {self._max_bytes} bytes"
            raise RequestError(message, param="input")
        http.scope["state"]["lease"].reserve(parsed_bytes(texts))
        if size > LARGE_BODY_BYTES:
            return await asyncio.to_thread(_expand, chain, references, items)
        return _expand(chain, references, items)

    # --- access ---

    async def retrieve(self, name: str, http: Request) -> Response:
        """Return a stored response."""
        stored = self._store.get(client_of(http), name)
        return _not_found(name) if stored is None else JsonResponse(stored.to_json())

    async def delete(self, name: str, http: Request) -> Response:
        """Forget a stored response."""
        if not self._store.remove(client_of(http), name):
            return _not_found(name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    async def input_items(self, name: str, http: Request) -> Response:
        """List the items of a stored response's input."""
        stored = self._store.get(client_of(http), name)
        if stored is None:
            return _not_found(name)
        return JsonResponse(_item_list(name, stored, http.query_params.get("order", "desc")))

    async def cancel(self, name: str, http: Request) -> Response:
        """Refuse: only responses in the background can be cancelled."""
        raise RequestError(
            "only responses in the background can be cancelled; there are none: close the "
            "connection of a response to end it",
            param="name",
        )


def _expand(
    chain: Sequence[StoredResponse], references: dict[int, bytes], items: JsonObjects
) -> JsonObjects:
    for i, text in references.items():
        items[i] = msgspec.json.decode(text)
    return [item for stored in chain for item in stored.items()]


def _item_list(name: str, stored: StoredResponse, order: str) -> Json:
    own = msgspec.json.decode(stored.input)
    data = [{"id": f"in_{name}_{i}", "type": "message", **item} for i, item in enumerate(own)]
    if order != "asc":
        data.reverse()
    ids = [item["id"] for item in data]
    return {
        "object": "list",
        "data": data,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": False,
    }


def _not_found(name: str) -> Response:
    message = f"nothing is stored as {shown(name)}"
    error = error_object(message, "invalid_request_error", "name", "not_found")
    return JSONResponse(error, status_code=404)

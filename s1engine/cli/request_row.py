"""From a row of request fields, given by flags or a file, to the arguments of a request."""

from typing import Any

from pydantic import ValidationError

from s1engine.engine.llm import LLM
from s1engine.errors import RequestError
from s1engine.options import Prompt
from s1engine.sampling_params import SamplingParams
from s1engine.server.api.request_fields import GenerationFields, request_error


class Row(GenerationFields):
    """Fields of the HTTP API, and ``prompt`` or ``messages``; ``id`` is copied to the output."""

    id: str | int | None = None
    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    logprobs: int | None = None

    def requested_logprobs(self) -> int | None:
        return self.logprobs


def parse_row(
    llm: LLM, fields: dict[str, Any], where: str, *, raw: bool
) -> tuple[Prompt, SamplingParams, dict[str, Any]]:
    """Prompt, params and options for ``LLMEngine.make_request``. Raises RequestError whose message
    begins with ``where``."""
    try:
        try:
            row = Row.model_validate(fields)
        except ValidationError as error:
            raise request_error(error) from error
        if (row.prompt is None) == (row.messages is None):
            raise RequestError("a request has either prompt or messages", param="prompt")
        try:
            params = row.sampling_params(llm.compiler.default_sampling())
            return _prompt(row, raw), params, row.options()
        except RequestError as error:
            raise row.renamed_error(error) from error
    except RequestError as error:
        text = f"{where}: {error}" if where else str(error)
        raise RequestError(text, param=error.param, code=error.code) from error


def _prompt(row: Row, raw: bool) -> Prompt:
    if row.messages is not None:
        return row.messages
    assert row.prompt is not None
    if raw or isinstance(row.prompt, list):
        return row.prompt
    return [{"role": "user", "content": row.prompt}]

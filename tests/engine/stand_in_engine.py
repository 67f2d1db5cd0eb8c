"""``python -m tests.engine.stand_in_engine FD``: an engine process without a model, which starts in
a moment. It answers a request with a failure, or dies of it, as the request's priority says. Knows
only the bytes of the messages, so that it loads nothing else."""

import os
import signal
import socket
import struct
import sys
import threading
import time
from typing import Any

import msgspec

ANSWER, KILLED, FAILED, GARBAGE, ENDLESS, STALLED = range(6)
LOADS = "STAND_IN_LOADS"  # names a file with a line for each load: "works", "fails" or "hangs"
STATS = """num_blocks num_free_blocks num_pinned_blocks num_running num_waiting num_preemptions
num_computed_tokens num_sampled_tokens num_drafts num_draft_tokens num_accepted_tokens num_undrafted
prefix_queries prefix_hits"""


class Client:
    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self.stalled = 0.0

    def send(self, kind: str, **fields: Any) -> None:
        body = msgspec.msgpack.encode({"type": kind, **fields})
        self._socket.sendall(struct.pack("<I", len(body)) + body)

    def send_garbage(self) -> None:
        self._socket.sendall(b"\2\0\0\0\xc1\xc1")

    def receive(self) -> Any:
        head = self._socket.recv(4, socket.MSG_WAITALL)
        if not head:
            raise SystemExit(0)
        (size,) = struct.unpack("<I", head)
        return msgspec.msgpack.decode(self._socket.recv(size, socket.MSG_WAITALL))


def load(client: Client) -> None:
    with open(os.environ[LOADS], "r+") as file:
        first, *rest = file.read().split() or ["works"]
        file.seek(0)
        file.truncate()
        file.write("\n".join(rest))
    if first == "fails":
        client.send("LoadFailed", message="no such model", param=None, of_model=True)
        raise SystemExit(0)
    if first == "hangs":
        client.receive()
    stats = dict.fromkeys(STATS.split(), 1)
    client.send("Ready", max_model_len=512, device="cpu", stats=stats)
    threading.Thread(target=beat, args=(client,), daemon=True).start()


def beat(client: Client) -> None:
    while True:
        client.send("Heartbeat", stalled=client.stalled)
        time.sleep(1)


def handle(client: Client, request: dict[str, Any]) -> None:
    match request["priority"]:
        case 0:
            client.send("RequestFailed", number=request["number"], message="answered")
        case 1:
            os.kill(os.getpid(), signal.SIGKILL)
        case 2:
            client.send("EngineDied", message="Bug")
            raise SystemExit(1)
        case 3:
            client.send_garbage()
        case 5:
            client.stalled = 1e4


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    client = Client(socket.socket(fileno=int(sys.argv[1])))
    while True:
        message = client.receive()
        if message["type"] == "Start":
            load(client)
        elif message["type"] == "AddRequest":
            handle(client, message["request"])


if __name__ == "__main__":
    main()

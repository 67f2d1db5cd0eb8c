"""``s1engine serve``: one model behind OpenAI's API."""

import argparse
import os
import signal

from s1engine.config import EngineConfig, check_int
from s1engine.flags import add_flags, given

API_KEY_VARIABLE = "S1ENGINE_API_KEY"
LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")
GRACE_S = 10  # seconds that open streams get at the end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the server, then those of the engine."""
    parser.add_argument("model", nargs="?", help="directory or hub id; default: bundled s1-nano")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any free one")
    parser.add_argument(
        "--api-key",
        default=os.environ.get(API_KEY_VARIABLE),
        help=f"bearer token that clients must bring (default: ${API_KEY_VARIABLE}, else none)",
    )
    parser.add_argument(
        "--reasoning-effort-budgets",
        metavar="NAME=N,...",
        help="thinking tokens of each reasoning_effort, 'none' for no limit; default: "
        "minimal=512,low=1024,medium=4096,high=16384,xhigh=none",
    )
    parser.add_argument("--uvicorn-log-level", choices=LOG_LEVELS, default="info")
    add_flags(parser.add_argument_group("engine"), EngineConfig, skip=("model",))


def run(args: argparse.Namespace) -> int:
    """Serves until told to stop; 1 if the port is taken or the engine has died."""
    check_int("port", args.port, 0, 2**16 - 1)
    options = given(args, EngineConfig)
    if options.get("model") is None:
        options.pop("model", None)
    config = EngineConfig(**options)

    import uvicorn

    from s1engine.engine.async_engine import AsyncLLMEngine
    from s1engine.server.app import create_app
    from s1engine.server.thinking import EFFORTS, parse_efforts

    text = args.reasoning_effort_budgets
    efforts = EFFORTS if text is None else parse_efforts(text)
    engine = AsyncLLMEngine(config, progress=True)
    app = create_app(engine, api_key=args.api_key or None, efforts=efforts)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=args.host,
            port=args.port,
            log_level=args.uvicorn_log_level,
            timeout_graceful_shutdown=GRACE_S,
        )
    )
    # uvicorn shuts down in order and then raises the signal again, for which there is no use.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server.run()
    return 0 if server.started and engine.failure is None else 1

"""``s1engine serve``: one model behind OpenAI's API."""

import argparse
import os

from s1engine.config import EngineConfig, check_float, check_int
from s1engine.flags import add_flags, given

API_KEY_VARIABLE = "S1ENGINE_API_KEY"
LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")
CLOSE_S = 1  # that connections get to close after requests had --shutdown-timeout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the server, then those of the engine."""
    parser.add_argument("model", nargs="?", help="directory or hub id; default: bundled s1-nano")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any free one")
    parser.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="bearer token that clients must bring; may be given several times, and each key gets "
        f"its fair share (default: ${API_KEY_VARIABLE}, else none)",
    )
    parser.add_argument(
        "--reasoning-effort-budgets",
        metavar="NAME=N,...",
        help="thinking tokens of each reasoning_effort, 'none' for no limit; default: "
        "minimal=512,low=1024,medium=4096,high=16384,xhigh=none",
    )
    parser.add_argument(
        "--max-queued-requests",
        type=int,
        metavar="N",
        help="samples that may wait while --max-num-seqs run; more are refused with 429 "
        "(default: 1024)",
    )
    parser.add_argument(
        "--request-timeout",
        type=float,
        metavar="S",
        help="seconds that a request may take if it does not say so itself (default: no limit)",
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=float,
        default=10,
        metavar="S",
        help="seconds that open requests get after SIGTERM; 0 aborts them (default: 10)",
    )
    parser.add_argument("--uvicorn-log-level", choices=LOG_LEVELS, default="info")
    add_flags(parser.add_argument_group("engine"), EngineConfig, skip=("model",))


def run(args: argparse.Namespace) -> int:
    """Serves until told to stop; 1 if the port is taken or the engine has died."""
    check_int("port", args.port, 0, 2**16 - 1)
    check_float("shutdown_timeout", args.shutdown_timeout, 0, 2**31)
    if args.request_timeout is not None:
        check_float("request_timeout", args.request_timeout, 1e-3, 2**31)
    options = given(args, EngineConfig)
    if options.get("model") is None:
        options.pop("model", None)
    config = EngineConfig(**options)

    import uvicorn

    from s1engine.engine.remote_engine import RemoteLLMEngine
    from s1engine.server.admission import MAX_QUEUED, Admission
    from s1engine.server.app import create_app
    from s1engine.server.serving import BoundedProtocol, Server
    from s1engine.server.thinking import EFFORTS, parse_efforts

    queued = MAX_QUEUED if args.max_queued_requests is None else args.max_queued_requests
    check_int("max_queued_requests", queued, 0, 2**20)
    text = args.reasoning_effort_budgets
    efforts = EFFORTS if text is None else parse_efforts(text)
    engine = RemoteLLMEngine(config, progress=True)
    admission = Admission(config.max_num_seqs + queued)
    app = create_app(
        engine,
        admission=admission,
        api_keys=args.api_key or list(filter(None, [os.environ.get(API_KEY_VARIABLE)])),
        efforts=efforts,
        timeout=args.request_timeout,
    )
    server = Server(
        uvicorn.Config(
            app,
            host=args.host,
            port=args.port,
            http=BoundedProtocol,
            log_level=args.uvicorn_log_level,
            timeout_graceful_shutdown=CLOSE_S,
        ),
        engine,
        admission,
        args.shutdown_timeout,
    )
    server.run()
    return 0 if server.started and engine.failure is None else 1

"""``s1engine serve``: one model behind OpenAI's API."""

import argparse
import contextlib
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from s1engine.checks import check_float, check_int
from s1engine.cli import DONE, ENGINE_DIED, FAILED
from s1engine.cli.api_keys import (
    API_KEY_VARIABLE,
    api_keys,
    client_limits,
    is_loopback,
    read_keys,
)
from s1engine.cli.engine_options import engine_options
from s1engine.cli.other_flags import add_other_flags
from s1engine.config import EngineConfig, parse_speculative_config
from s1engine.engine.spawning import SpawnedProcess, spawn_engine
from s1engine.engine.supervision import Supervision
from s1engine.errors import RequestError
from s1engine.flags import add_flags, given_values
from s1engine.logs import detach_output, open_standard_descriptors

if TYPE_CHECKING:
    from s1engine.server.admission import Admission, ClientLimits
    from s1engine.server.router.deployment import ReplicaPoolOptions
    from s1engine.server.serving import MonitoredBackend

    Service = tuple[Any, MonitoredBackend, Admission]  # application, engine or pool

LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")
BACKLOG = 2048  # connections that wait to be accepted
CLOSE_S = 1  # for connections to close, after --shutdown-timeout for requests


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the server, then those of the engine."""
    parser.add_argument("model", nargs="?", help="directory, GGUF file or hub id; default: s1-nano")
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any free one")
    parser.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="bearer token that clients must send; repeatable, and each key gets its fair share "
        f"(default: --api-key-file, else ${API_KEY_VARIABLE}, else none). Other users of the "
        "machine can read it in the list of processes",
    )
    parser.add_argument("--api-key-file", metavar="FILE", help="a file with one key a line")
    parser.add_argument(
        "--priority-key-file",
        metavar="FILE",
        help="a file with more keys, whose requests may have a priority below 0 (default: with "
        "several keys none may, with one or none all)",
    )
    parser.add_argument(
        "--allow-no-api-key",
        action="store_true",
        help="serve beyond this machine (--host) without any key",
    )
    parser.add_argument(
        "--share-prefixes",
        action="store_true",
        help="let an API key hit prefixes that another key has cached; its answers' times then "
        "tell what others asked",
    )
    parser.add_argument(
        "--max-body-mb",
        type=float,
        default=4,
        metavar="MIB",
        help="largest body of a request (default: 4)",
    )
    parser.add_argument(
        "--max-buffered-mb",
        type=float,
        default=1024,
        metavar="MIB",
        help="bodies, parsed or not, and log-probabilities that the server holds for all clients "
        "together; beyond, a request is refused with 503 (default: 1024)",
    )
    parser.add_argument(
        "--response-store-mb",
        type=float,
        default=64,
        metavar="MIB",
        help="finished responses of /v1/responses that clients may refer to by id; 0: none "
        "(default: 64; with replicas 0)",
    )
    parser.add_argument(
        "--reasoning-effort-budgets",
        metavar="NAME=N,...",
        help="thinking tokens of each reasoning_effort, 'none' for no limit; default: "
        "minimal=512,low=1024,medium=4096,high=16384,xhigh=none,max=none",
    )
    parser.add_argument(
        "--max-queued-requests",
        type=int,
        metavar="N",
        help="sequences (samples, and their answers at checkpoints) that may wait while "
        "--max-num-seqs run; more are rejected with 429 (default: 1024)",
    )
    parser.add_argument(
        "--max-sequences-per-key",
        type=int,
        metavar="N",
        help="sequences that one API key may have running or waiting (default: all; with several "
        "keys as many as are free, so that each finds room)",
    )
    parser.add_argument(
        "--max-sequences-per-request",
        type=int,
        metavar="N",
        help="prompts x n x (1 + thinking_checkpoints); a request for more is a 400 "
        "(default: 1024)",
    )
    parser.add_argument(
        "--request-timeout",
        type=float,
        metavar="S",
        help="seconds that a request may take if it has no timeout of its own (default: no limit)",
    )
    parser.add_argument(
        "--strict-fields",
        action="store_true",
        help="refuse a request with an unknown field (default: ignore the field unless its name is "
        "close to a known one, and name it in the header x-s1engine-ignored and in the log)",
    )
    parser.add_argument(
        "--allowed-origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="web pages that may ask from a browser, such as https://chat.example.com; '*': all "
        "(default: only the playground)",
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=float,
        default=10,
        metavar="S",
        help="seconds that open requests get after SIGTERM; 0 aborts them (default: 10)",
    )
    parser.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="send an OpenTelemetry span of each request to this collector (OTLP over HTTP); "
        "needs s1engine[otel]",
    )
    parser.add_argument(
        "--speculative-config",
        metavar="JSON",
        help="the same as --num-speculative-tokens in vLLM's spelling: "
        '{"method": "ngram", "num_speculative_tokens": N}',
    )
    add_flags(parser.add_argument_group("supervision of the engine's process"), Supervision)
    _add_replica_flags(parser.add_argument_group("replicas, on Ray Serve"))
    parser.add_argument("--uvicorn-log-level", choices=LOG_LEVELS, default="info")
    add_flags(parser.add_argument_group("engine"), EngineConfig, skip=("model",))
    add_other_flags(parser)


def _add_replica_flags(group: Any) -> None:
    group.add_argument(
        "--replicas", type=int, metavar="N", help="number of engines, each with its own model"
    )
    group.add_argument(
        "--min-replicas", type=int, metavar="N", help="with --max-replicas (default: 1)"
    )
    group.add_argument(
        "--max-replicas", type=int, metavar="N", help="scale their number with the requests"
    )
    group.add_argument(
        "--target-ongoing-requests",
        type=int,
        metavar="N",
        help="requests per replica that scaling aims at (default: --max-num-seqs)",
    )
    group.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="of a Ray cluster, or auto (default: Ray is started on this machine)",
    )


def run(args: argparse.Namespace) -> int:
    """Serves until a signal. Returns an exit status of ``s1engine.cli``: FAILED if it could not
    start, ENGINE_DIED if the last engine has died. Raises OSError if the port is in use."""
    open_standard_descriptors()
    check_int("port", args.port, 0, 2**16 - 1)
    check_float("shutdown_timeout", args.shutdown_timeout, 0, 2**31)
    check_float("max_body_mb", args.max_body_mb, 0.001, 1024)
    check_float("max_buffered_mb", args.max_buffered_mb, 0.001, 2**20)
    check_float("response_store_mb", args.response_store_mb, 0, 2**20)
    if args.request_timeout is not None:
        check_float("request_timeout", args.request_timeout, 1e-3, 2**31)
    options = engine_options(args)
    if args.speculative_config is not None:
        options["num_speculative_tokens"] = _speculative_tokens(args.speculative_config, options)
    config = EngineConfig(**options)
    supervision = Supervision(**given_values(args, Supervision))
    replicas = _replica_options(args)

    signal.signal(signal.SIGTERM, _end_while_loading)
    # The engine's process imports torch while this one imports the server.
    spawned = spawn_engine() if replicas is None else None
    try:
        listeners, service = _prepare(args, config, supervision, replicas, spawned)
    except BaseException:
        if spawned is not None:
            spawned.discard()
        raise
    return _run_server(args, listeners, *service)


def _prepare(
    args: argparse.Namespace,
    config: EngineConfig,
    supervision: Supervision,
    replicas: "ReplicaPoolOptions | None",
    spawned: SpawnedProcess | None,
) -> "tuple[list[socket.socket], Service]":
    """Checks the other flags, takes the port and loads the model."""
    from s1engine.server.api.thinking_fields import EFFORTS, parse_efforts

    text = args.reasoning_effort_budgets
    efforts = EFFORTS if text is None else parse_efforts(text)
    keys = api_keys(args.api_key, args.api_key_file)
    priority_keys = read_keys("priority_key_file", args.priority_key_file)
    limits = client_limits(args, config, keys, priority_keys)
    keys += priority_keys
    if not (keys or args.allow_no_api_key or is_loopback(args.host)):
        raise RequestError(
            f"host {args.host} serves other machines without a key: set --api-key-file or "
            f"${API_KEY_VARIABLE}, or pass --allow-no-api-key",
            param="host",
        )
    listeners = listen(args.host, args.port)
    if replicas is None:
        return listeners, _create_single(args, config, supervision, limits, efforts, keys, spawned)
    supervision = replace(supervision, engine_restarts=0)  # Ray replaces dead replicas
    return listeners, _create_router(args, config, supervision, limits, efforts, keys, replicas)


def listen(host: str, port: int) -> list[socket.socket]:
    """Return listening sockets of all addresses of a host, on one port. Raises OSError.

    The port is taken before the model loads. Until the server runs, connections wait.
    """
    listeners: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in found:
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            same_port = listeners[0].getsockname()[1] or address[1]
            listener.bind((address[0], same_port, *address[2:]))
            listener.listen(BACKLOG)
    except OSError as error:
        for listener in listeners:
            listener.close()
        raise OSError(error.errno, f"cannot listen on {host} port {port}: {error}") from error
    return listeners


def _end_while_loading(*_: object) -> NoReturn:
    """Handles SIGTERM until the server runs: the engine's process ends with this one."""
    raise SystemExit(DONE)


def _create_single(
    args: argparse.Namespace,
    config: EngineConfig,
    supervision: Supervision,
    limits: "ClientLimits",
    efforts: Mapping[str, int | None],
    keys: Sequence[str],
    spawned: SpawnedProcess | None,
) -> "Service":
    """One engine behind one application."""
    from s1engine.engine.process_client import ProcessEngineClient
    from s1engine.server.admission import Admission
    from s1engine.server.app import create_app
    from s1engine.server.tracing import Tracing, tracing_to

    endpoint = args.otlp_traces_endpoint
    tracing = Tracing() if endpoint is None else tracing_to(endpoint)
    engine = ProcessEngineClient(config, progress=True, supervision=supervision, spawned=spawned)
    admission = Admission(limits)
    app = create_app(
        engine,
        admission=admission,
        api_keys=keys,
        max_body_bytes=_num_bytes(args.max_body_mb),
        max_buffered_bytes=_num_bytes(args.max_buffered_mb),
        private_prefixes=_private_prefixes(args, keys),
        efforts=efforts,
        timeout=args.request_timeout,
        tracing=tracing,
        strict_fields=args.strict_fields,
        allowed_origins=args.allowed_origins,
        max_stored_bytes=_num_bytes(args.response_store_mb),
    )
    return app, engine, admission


def _create_router(
    args: argparse.Namespace,
    config: EngineConfig,
    supervision: Supervision,
    limits: "ClientLimits",
    efforts: Mapping[str, int | None],
    keys: Sequence[str],
    replicas: "ReplicaPoolOptions",
) -> "Service":
    """A pool of replicas behind a router."""
    from s1engine.models.implementation import read_facts
    from s1engine.models.model_path import resolve_model
    from s1engine.models.shard import check_tensor_parallel
    from s1engine.runner.resolved_config import resolve_config
    from s1engine.server.admission import Admission
    from s1engine.server.router.replica import ReplicaOptions
    from s1engine.server.router.replica_pool import RayReplicaPool
    from s1engine.server.router.router import LIMITS, create_router
    from s1engine.server.tracing import tracing_to

    options = ReplicaOptions(
        config=config,
        supervision=supervision,
        limits=limits,
        efforts=dict(efforts),
        timeout=args.request_timeout,
        traces_endpoint=args.otlp_traces_endpoint,
        max_body_bytes=_num_bytes(args.max_body_mb),
        max_buffered_bytes=_num_bytes(args.max_buffered_mb),
        private_prefixes=_private_prefixes(args, keys),
        strict_fields=args.strict_fields,
    )
    if options.traces_endpoint is not None:
        tracing_to(options.traces_endpoint)  # a wrong endpoint is reported before Ray starts
    if replicas.address is None:
        # Wrong options are reported before Ray starts.
        model = read_facts(resolve_model(config.model), config.model_impl)
        check_tensor_parallel(model, config.tensor_parallel_size)
        resolve_config(config)
    pool = RayReplicaPool(replicas, options)
    admission = Admission(LIMITS)
    router = create_router(
        pool,
        admission,
        keys,
        options.max_body_bytes,
        options.max_buffered_bytes,
        args.allowed_origins,
    )
    return router, pool, admission


def _num_bytes(mib: float) -> int:
    return int(mib * 2**20)


def _private_prefixes(args: argparse.Namespace, keys: Sequence[str]) -> bool:
    return len(keys) > 1 and not args.share_prefixes


def _run_server(
    args: argparse.Namespace,
    listeners: Sequence[socket.socket],
    app: Any,
    backend: "MonitoredBackend",
    admission: "Admission",
) -> int:
    import uvicorn

    from s1engine.server.http_protocol import KEEP_ALIVE_S, BoundedProtocol
    from s1engine.server.serving import DrainingServer

    detach_output()
    server = DrainingServer(
        uvicorn.Config(
            app,
            host=args.host,
            port=listeners[0].getsockname()[1],
            backlog=BACKLOG,
            http=BoundedProtocol,
            log_level=args.uvicorn_log_level,
            proxy_headers=False,  # any client could write X-Forwarded-For into the access log
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=CLOSE_S,
        ),
        backend,
        admission,
        args.shutdown_timeout,
    )
    with contextlib.suppress(SystemExit):  # of uvicorn, which has logged why it cannot start
        server.run(sockets=[*listeners])
    if not server.started:
        return FAILED
    return DONE if backend.failure is None else ENGINE_DIED


def _speculative_tokens(text: str, options: dict[str, Any]) -> int:
    """The value of ``--speculative-config``, which must agree with the plain flag."""
    tokens = parse_speculative_config(text)
    if options.get("num_speculative_tokens", tokens) != tokens:
        raise RequestError(
            "num_speculative_tokens and speculative_config differ", param="speculative_config"
        )
    return tokens


def _replica_options(args: argparse.Namespace) -> "ReplicaPoolOptions | None":
    """The flags of replicas; None if there are none."""
    flags = ("replicas", "min_replicas", "max_replicas", "target_ongoing_requests", "ray_address")
    names = [name for name in flags if getattr(args, name) is not None]
    if not names:
        return None
    autoscaled = args.max_replicas is not None
    if autoscaled == (args.replicas is not None):
        raise RequestError(f"{names[0]}: give either --replicas or --max-replicas", param=names[0])
    for name in ("min_replicas", "target_ongoing_requests"):
        if name in names and not autoscaled:
            raise RequestError(f"{name} needs --max-replicas", param=name)
    if not autoscaled:
        check_int("replicas", args.replicas, 1, 4096)

    from s1engine.server.router.deployment import ReplicaPoolOptions

    minimum = args.replicas or (1 if args.min_replicas is None else args.min_replicas)
    return ReplicaPoolOptions(
        min_replicas=minimum,
        max_replicas=args.max_replicas or minimum,
        target=args.target_ongoing_requests,
        address=args.ray_address,
    )

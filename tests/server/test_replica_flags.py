"""The flags for replicas, and which of them exclude each other; Ray is not started."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from s1engine.cli import WRONG_USAGE, main
from s1engine.engine.ray_cluster import PROBE_CALL, check_cluster, connect
from s1engine.errors import RequestError
from s1engine.server.router.deployment import ReplicaPoolOptions


@pytest.mark.parametrize(
    ("flags", "param"),
    [
        ("--replicas 2 --max-replicas 3", "replicas"),
        ("--min-replicas 2", "min_replicas"),
        ("--ray-address auto", "ray_address"),
        ("--replicas 2 --min-replicas 1", "min_replicas"),
        ("--replicas 2 --target-ongoing-requests 9", "target_ongoing_requests"),
        ("--replicas 0", "replicas"),
        ("--max-replicas 2 --min-replicas 3", "max_replicas"),
        ("--max-replicas 2 --target-ongoing-requests 0", "target_ongoing_requests"),
        ("--replicas 2 --ray-address ray://host:1", "ray_address"),
        ("--replicas 2 --tensor-parallel-size 3", "tensor_parallel_size"),
    ],
)
def test_wrong_flags_are_one_line(
    flags: str, param: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *flags.split()]) == WRONG_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert param in line


def test_without_ray_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # an import of it fails
    assert main(["serve", "--replicas", "2"]) == WRONG_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 's1engine[ray]'" in line
    with pytest.raises(RequestError):
        connect(None, 1)


def test_replicas_are_as_many_as_asked_or_between() -> None:
    assert ReplicaPoolOptions(min_replicas=1, max_replicas=1).target is None
    with pytest.raises(RequestError):
        ReplicaPoolOptions(min_replicas=2)


# --- clusters: something that answers Ray's first call ---


@pytest.fixture
def cluster() -> Iterator[str]:
    """Address of a server that accepts the token "right"."""
    grpc = pytest.importorskip("grpc", reason="replicas need Ray: pip install 's1engine[ray]'")
    pytest.importorskip("ray")

    def answer(request: bytes, context: Any) -> bytes:
        if ("authorization", "Bearer right") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no")
        return b""

    class Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, call: Any) -> Any:
            return (
                grpc.unary_unary_rpc_method_handler(answer) if call.method == PROBE_CALL else None
            )

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Handler()])
    port = server.add_insecure_port("[::]:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Set the variables that Ray reads its token from; none of them by default."""
    ray = pytest.importorskip("ray._raylet")
    monkeypatch.setenv("HOME", str(tmp_path))

    def use(**variables: str) -> None:
        for name in ("MODE", "TOKEN", "TOKEN_PATH"):
            monkeypatch.setenv(f"RAY_AUTH_{name}", "")  # so that monkeypatch restores it
            monkeypatch.delenv(f"RAY_AUTH_{name}")
        for name, value in variables.items():
            monkeypatch.setenv(f"RAY_AUTH_{name}", value)
        ray.AuthenticationTokenLoader.instance().reset_cache()

    yield use
    monkeypatch.undo()
    ray.AuthenticationTokenLoader.instance().reset_cache()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"TOKEN": "right"}, None),
        ({"TOKEN": "right", "MODE": "token"}, None),
        ({}, "RAY_AUTH_TOKEN"),
        ({"TOKEN": "wrong"}, "does not accept"),
        ({"TOKEN": "right", "MODE": "disabled"}, "RAY_AUTH_MODE"),
    ],
)
def test_a_cluster_that_wants_a_token_gets_ours_or_it_is_said_what_to_set(
    variables: dict[str, str], said: str | None, cluster: str, token: Any
) -> None:
    token(**variables)
    if said is None:
        check_cluster(cluster)
    else:
        with pytest.raises(RequestError, match=said) as refused:
            check_cluster(cluster)
        assert cluster in str(refused.value) and "\n" not in str(refused.value)


def test_a_token_in_a_file_is_found(cluster: str, token: Any, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("right")
    token(TOKEN_PATH=str(tmp_path / "secret"))
    check_cluster(cluster)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:65534", "nonsense", "", "no host:7"])
def test_an_address_where_no_cluster_is_makes_one_line(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("ray")
    assert main(["serve", "--replicas", "2", "--ray-address", address]) == WRONG_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert "ray_address" in line

"""What the flags of replicas mean, and which do not go together; Ray is not started."""

import sys

import pytest

from s1engine.cli import WRONG_USAGE, main
from s1engine.engine.ray_cluster import connect
from s1engine.errors import RequestError
from s1engine.server.fleet import FleetOptions


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
    ],
)
def test_wrong_flags_are_one_line(
    flags: str, param: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *flags.split()]) == WRONG_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert param in line


def test_without_ray_it_is_said_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # an import of it fails
    assert main(["serve", "--replicas", "2"]) == WRONG_USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 's1engine[ray]'" in line
    with pytest.raises(RequestError):
        connect(None, 1)


def test_replicas_are_as_many_as_asked_or_between() -> None:
    assert FleetOptions(min_replicas=1, max_replicas=1).target is None
    with pytest.raises(RequestError):
        FleetOptions(min_replicas=2)

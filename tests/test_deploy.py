"""examples/deploy/: the files agree with the code, with constraints.txt and with each other."""

import argparse
import configparser
import fnmatch
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from s1engine.cli import serve
from s1engine.server.http_protocol import KEEP_ALIVE_S, MAX_CONNECTIONS, READ_PAUSE_S
from s1engine.server.middleware import MAX_BODY_BYTES

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "examples" / "deploy"
SECTION = re.compile(r"^# for (\w+):", re.MULTILINE)
COMPILERS = re.compile(r"\b(g\+\+|gcc|build-essential|python3-dev|clang)\b")


def read(name: str) -> str:
    return (DEPLOY / name).read_text()


def serve_options(words: list[str]) -> argparse.Namespace:
    """Parse what follows "s1engine serve"; an unknown flag is an error."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    serve.add_arguments(parser)
    return parser.parse_args(words)


# --- Dockerfile ---


def instructions() -> list[tuple[str, str]]:
    """Keyword and arguments of each instruction, continuations joined, without comments."""
    lines = [line for line in read("Dockerfile").splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(w[0], w[1]) for line in joined.splitlines() if (w := line.split(None, 1))]


def final_stage() -> list[tuple[str, str]]:
    starts = [i for i, (keyword, _) in enumerate(instructions()) if keyword == "FROM"]
    assert len(starts) == 2
    return instructions()[starts[-1] :]


def ignored(path: str) -> bool:
    """Does Dockerfile.dockerignore leave this path out? The last rule that matches decides."""
    result = False
    for rule in read("Dockerfile.dockerignore").splitlines():
        pattern = rule.lstrip("!").removeprefix("**/")
        parts = [path, *map(str, Path(path).parents), Path(path).name]
        if rule and not rule.startswith("#") and any(fnmatch.fnmatch(p, pattern) for p in parts):
            result = not rule.startswith("!")
    return result


def test_the_image_is_built_from_what_is_there() -> None:
    sources = [
        name
        for keyword, words in instructions()
        if keyword == "COPY" and "--from" not in words
        for name in words.split()[:-1]
    ]
    assert {"constraints.txt", "pyproject.toml", "setup.py", "s1engine", "csrc"} <= set(sources)
    assert [name for name in sources if not (ROOT / name).exists() or ignored(name)] == []


@pytest.mark.parametrize(
    "path", [".git", ".venv", "examples/deploy/secrets/keys", "bench/results/cpu.json", "build"]
)
def test_the_image_holds_no_secret_and_no_waste(path: str) -> None:
    assert ignored(path) and not ignored("s1engine/config.py")


def test_the_image_installs_by_hash_sections_that_exist() -> None:
    run = " && ".join(words for keyword, words in instructions() if keyword == "RUN")
    sections = {
        name for names in re.findall(r"&& section ([\w ]+) >", run) for name in names.split()
    }
    assert {"server", "torch", "cuda"} <= sections
    assert sections <= set(SECTION.findall((ROOT / "constraints.txt").read_text()))
    installs = re.findall(r"pip install ([^&;]+)", run)
    assert len(installs) == 4
    for options in installs:
        own, torch_for_cpus = options.strip() == "--no-deps --no-build-isolation .", "TORCH_INDEX"
        assert "--require-hashes --no-deps" in options or own or torch_for_cpus in options


def test_the_image_has_no_rights_and_no_compiler() -> None:
    stage = dict(final_stage())
    assert stage["USER"].split(":")[0].isdigit() and int(stage["USER"]) > 0
    assert "urlopen('http://127.0.0.1:8000/health'" in stage["HEALTHCHECK"]
    assert not COMPILERS.search(" ".join(stage.values()))
    command = yaml.safe_load(stage["CMD"])
    assert stage["ENTRYPOINT"] == '["s1engine"]' and command[0] == "serve"
    assert serve_options(command[1:]).api_key is None  # and so it refuses to start without one


# --- Compose ---


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(read("compose.yaml"))
    return loaded


def test_compose_names_what_is_there() -> None:
    services = compose()["services"]
    for service in services.values():
        assert set(service["secrets"]) <= set(compose()["secrets"])
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            if source.startswith("."):
                assert source == "./models" or (DEPLOY / source).exists(), source
            else:
                assert source in compose()["volumes"]
    build = services["s1engine"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")


def test_compose_gives_no_rights_and_no_ports() -> None:
    for service in compose()["services"].values():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["mem_limit"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        assert not re.search("KEY|PASSWORD(?!__FILE)", str(service.get("environment", "")))


def test_compose_stops_after_the_server_has_drained() -> None:
    service = compose()["services"]["s1engine"]
    options = serve_options(service["command"][1:])
    assert options.api_key_file == "/run/secrets/keys"
    assert int(service["stop_grace_period"].rstrip("s")) > options.shutdown_timeout + 10
    assert service["ulimits"]["nofile"] > MAX_CONNECTIONS


def test_prometheus_and_grafana_find_their_files() -> None:
    services = compose()["services"]
    config = yaml.safe_load(read("prometheus.yml"))
    (job,) = config["scrape_configs"]
    host, _, port = job["static_configs"][0]["targets"][0].partition(":")
    assert host in services and f"EXPOSE {port}" in read("Dockerfile")
    assert Path(job["authorization"]["credentials_file"]).name in services["prometheus"]["secrets"]
    mounts = [mount.split(":")[1] for mount in services["prometheus"]["volumes"]]
    assert [f"/etc/prometheus/{name}" for name in config["rule_files"]] == [
        mount for mount in mounts if "alerts" in mount
    ]
    (source,) = yaml.safe_load(read("grafana/datasources/prometheus.yaml"))["datasources"]
    assert source["url"] == "http://prometheus:9090" and source["isDefault"]
    (provider,) = yaml.safe_load(read("grafana/dashboards/s1engine.yaml"))["providers"]
    board = next(m for m in services["grafana"]["volumes"] if "grafana.json" in m)
    assert board.split(":")[1].startswith(provider["options"]["path"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_alerts_fire_when_they_should() -> None:
    command = ["promtool", "test", "rules", str(ROOT / "tests" / "alerts_test.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- systemd ---


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / "s1engine.service")
    return parser


def test_the_unit_starts_a_server_with_a_key_and_lets_it_drain() -> None:
    service = unit()["Service"]
    program, command, *words = shlex.split(service["ExecStart"])
    assert program.endswith("/s1engine") and command == "serve"
    options = serve_options(words)
    name, _, source = service["LoadCredential"].partition(":")
    assert options.api_key_file == f"%d/{name}" and source.startswith("/etc/")
    assert int(service["TimeoutStopSec"]) > options.shutdown_timeout + 10
    assert int(service["LimitNOFILE"]) > MAX_CONNECTIONS


def test_the_unit_has_no_rights() -> None:
    service = unit()["Service"]
    wanted = {"DynamicUser": "yes", "NoNewPrivileges": "yes", "ProtectSystem": "strict"}
    wanted |= {"CapabilityBoundingSet": "", "ProtectHome": "yes", "PrivateTmp": "yes"}
    assert {name: service[name] for name in wanted} == wanted and service["MemoryMax"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_knows_every_line_of_the_unit(tmp_path: Path) -> None:
    text = read("s1engine.service").replace("/opt/s1engine/bin/s1engine", "/bin/true")
    (tmp_path / "s1engine.service").write_text(text)
    command = ["systemd-analyze", "verify", str(tmp_path / "s1engine.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "s1engine.service" not in done.stderr, done.stderr


# --- proxies ---


def seconds(text: str, setting: str) -> float:
    match = re.search(rf"^\s*{setting} (\d+)s", text, re.MULTILINE)
    assert match, setting
    return float(match[1])


def test_proxies_keep_the_limits_of_the_server() -> None:
    nginx, caddy = read("nginx.conf"), read("Caddyfile")
    assert f"client_max_body_size {MAX_BODY_BYTES // 2**20}m;" in nginx
    assert f"max_size {MAX_BODY_BYTES // 2**20}MiB" in caddy
    assert "proxy_buffering off;" in nginx and "flush_interval -1" in caddy
    assert seconds(nginx, "keepalive_timeout") < KEEP_ALIVE_S
    assert seconds(caddy, "keepalive") < KEEP_ALIVE_S
    assert seconds(nginx, "proxy_send_timeout") <= READ_PAUSE_S


def test_proxies_wait_longer_than_the_longest_request() -> None:
    _, _, *words = shlex.split(unit()["Service"]["ExecStart"])
    longest = serve_options(words).request_timeout
    assert seconds(read("nginx.conf"), "proxy_read_timeout") > longest
    assert seconds(read("Caddyfile"), "response_header_timeout") > longest

"""Costly grammars slow their own requests alone: the canary is answered in time, other answers stay
the same, and each attack ends visibly."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hostile.conftest import Target

PATH = "/v1/chat/completions"
PLAIN: dict[str, Any] = {
    "messages": [{"role": "user", "content": "a=3 b=a+4 c=b*2 c?"}],
    "temperature": 0,
    "max_tokens": 60,
}
MAX_FAMILY_GROWTH_MIB = 512.0  # of engine and grammar worker, each
OUTCOMES = {400, 429, 500, 503}  # besides 200; a grammar that fails midway is a 500

COUNTS = st.sampled_from([9, 99, 999, 9999, 99_999, 999_999])
REGEXES = st.builds(
    lambda pattern, n, m: pattern.replace("N", str(n)).replace("M", str(m)),
    st.sampled_from(
        (
            *("a{N}", "[ab]{M}a{N}", "(a|b){N}c", "(a?){N}a{N}", r"(\w{1,M} ){N}"),
            *("((a{9}b){M}c?){N}", r"(\p{L}|\p{N}){N}", ".*a.{N}b", "(a{N}){M}", "(a|aa|aaa){N}"),
        )
    ),
    COUNTS,
    st.integers(1, 40),
).map(lambda regex: {"regex": regex})
SCHEMAS = st.one_of(
    COUNTS.map(lambda n: {"type": "array", "items": {"type": "integer"}, "minItems": n}),
    COUNTS.map(lambda n: {"type": "string", "maxLength": n, "minLength": n // 2}),
    st.integers(1, 1200).map(
        lambda n: {"properties": {f"p{i}": {"type": "boolean"} for i in range(n)}}
    ),
    st.integers(4, 30).map(
        lambda n: {"allOf": [{"pattern": f".*a.{{{i}}}b"} for i in range(n)], "type": "string"}
    ),
    st.just({"$defs": {"n": {"items": {"$ref": "#/$defs/n"}}}, "$ref": "#/$defs/n"}),
).map(lambda schema: {"json": schema})
CHOICES = st.builds(
    lambda count, length: {"choice": [f"{i}" + "ab" * length for i in range(count)]},
    st.integers(1, 1000),
    st.integers(1, 25),
)
ATTACKS = st.one_of(REGEXES, SCHEMAS, CHOICES)


def peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def family_peak_mib(pid: int) -> dict[int, float]:
    """Peak resident memory of each child of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child): peak_mib(int(child)) for child in children}


def answer(target: Target) -> str:
    whole = target.http.post(PATH, json=PLAIN)
    assert whole.status_code == 200, whole.text
    content: str = whole.json()["choices"][0]["message"]["content"]
    return content


def attack(target: Target, structure: dict[str, Any]) -> None:
    body = {**PLAIN, "temperature": 2, "n": 3, "max_tokens": 30, "timeout": 30}
    body["structured_outputs"] = structure
    reply = target.http.post(PATH, json={**body, "enable_thinking": False})
    if reply.status_code != 200:
        assert reply.status_code in OUTCOMES and reply.json()["error"]["message"], reply.text
    if reply.status_code == 500:
        assert "too costly after" in reply.json()["error"]["message"]


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(ATTACKS, min_size=4, max_size=4, unique_by=repr))
def test_costly_grammars_harm_only_themselves(
    target: Target, structures: list[dict[str, Any]]
) -> None:
    expected = answer(target)
    before = family_peak_mib(target.pid)
    with target.watched(), ThreadPoolExecutor(len(structures)) as clients:
        attacks = [clients.submit(attack, target, structure) for structure in structures]
        assert answer(target) == expected
        for ended in attacks:
            ended.result()
    after = family_peak_mib(target.pid)
    assert all(after[pid] - before[pid] < MAX_FAMILY_GROWTH_MIB for pid in before.keys() & after)
    assert answer(target) == expected

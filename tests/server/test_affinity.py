"""Routing: by prefix while loads are even, else to the least loaded replica."""

import json

from hypothesis import given
from hypothesis import strategies as st

from s1engine.server.router.affinity import MAX_STEPS, SHARE, SLACK, STEP, PrefixMap, prefix_hashes

NAMES = ["a", "b", "c"]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=3 * STEP)
TURNS = st.lists(TEXTS, min_size=1, max_size=6)


def chat(*turns: str, **fields: object) -> bytes:
    messages = [{"role": "user", "content": turn} for turn in turns]
    return json.dumps({"messages": messages, **fields}).encode()


@given(TURNS, TURNS)
def test_a_longer_conversation_keeps_the_hashes_of_its_beginning(
    first: list[str], more: list[str]
) -> None:
    """Other fields of the bodies do not matter."""
    begun = prefix_hashes(chat(*first, max_tokens=5))
    assert prefix_hashes(chat(*first, *more, temperature=1))[: len(begun)] == begun


@given(TURNS, TURNS)
def test_hashes_differ_where_texts_differ(one: list[str], other: list[str]) -> None:
    pairs = zip(prefix_hashes(chat(*one)), prefix_hashes(chat(*other)), strict=False)
    shared = sum(a == b for a, b in pairs)
    if one != other:
        assert shared < max(len(prefix_hashes(chat(*one))), len(prefix_hashes(chat(*other))))


@given(st.text(st.characters(codec="ascii"), min_size=2 * STEP, max_size=4 * STEP))
def test_long_messages_share_their_beginning(text: str) -> None:
    common = prefix_hashes(chat(text + "x" * STEP))[0]
    assert prefix_hashes(chat(text + "y" * STEP))[0] == common


@given(st.binary(max_size=200) | st.builds(lambda v: json.dumps(v).encode(), st.integers()))
def test_a_body_that_is_not_a_request_has_no_hashes(body: bytes) -> None:
    assert prefix_hashes(body) == [] or body.lstrip()[:1] == b"{"


def test_the_number_of_hashes_is_bounded() -> None:
    assert len(prefix_hashes(chat("x" * (MAX_STEPS + 9) * STEP))) == MAX_STEPS


def test_bodies_of_every_api_have_hashes() -> None:
    for body in ({"prompt": "hello"}, {"prompt": [1, 2, 3]}, {"input": "hi"}, {"system": "be"}):
        assert prefix_hashes(json.dumps(body).encode()), body


@given(TURNS, st.fixed_dictionaries({name: st.integers(0, 99) for name in NAMES}))
def test_every_replica_is_ranked_once_and_the_least_loaded_is_first(
    turns: list[str], loads: dict[str, int]
) -> None:
    ranked = PrefixMap().rank(prefix_hashes(chat(*turns)), loads)
    assert sorted(ranked) == NAMES and loads[ranked[0]] == min(loads.values())


@given(TURNS, TURNS, st.integers(0, 2 * SLACK))
def test_a_prefix_stays_with_its_replica_unless_that_is_too_busy(
    first: list[str], more: list[str], load: int
) -> None:
    prefixes = PrefixMap()
    begun, hashes = prefix_hashes(chat(*first)), prefix_hashes(chat(*first, *more))
    (home, *_) = prefixes.rank(begun, dict.fromkeys(NAMES, 0))
    known = begun[-1][0] >= SHARE * hashes[-1][0]
    (place, *_) = prefixes.rank(hashes, {name: load * (name == home) for name in NAMES})
    if load > SLACK:
        assert place != home
    elif known:
        assert place == home


def test_prefixes_of_a_lost_replica_move_to_another_and_stay_there() -> None:
    prefixes, hashes = PrefixMap(), prefix_hashes(chat("hello"))
    (home, *_) = prefixes.rank(hashes, dict.fromkeys(NAMES, 0))
    others = {name: SLACK - i for i, name in enumerate(NAMES) if name != home}
    (second, *_) = prefixes.rank(hashes, others)
    assert second == min(others, key=lambda name: others[name])
    assert prefixes.rank(hashes, dict.fromkeys(NAMES, 0))[0] == second


def test_different_conversations_are_spread() -> None:
    prefixes = PrefixMap()
    loads = dict.fromkeys(NAMES, 0)
    for i in range(90):
        (name, *_) = prefixes.rank(prefix_hashes(chat(f"question {i}")), loads)
        loads[name] += 1
    assert set(loads.values()) == {30}


def test_every_router_breaks_ties_alike() -> None:
    requests = [prefix_hashes(chat(f"question {i}")) for i in range(50)]
    idle = dict.fromkeys(NAMES, 0)
    chosen = [PrefixMap().rank(hashes, idle)[0] for hashes in requests]
    assert chosen == [PrefixMap().rank(hashes, idle)[0] for hashes in requests]
    assert set(chosen) == set(NAMES)

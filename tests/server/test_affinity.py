"""Where requests go: by prefix while loads are even, to the idlest where they are not."""

import json

from hypothesis import given
from hypothesis import strategies as st

from s1engine.server.router.affinity import MAX_STEPS, SHARE, SLACK, STEP, PrefixMap, trail

NAMES = ["a", "b", "c"]
TEXTS = st.text(st.characters(codec="utf-8"), max_size=3 * STEP)
TURNS = st.lists(TEXTS, min_size=1, max_size=6)


def chat(*turns: str, **fields: object) -> bytes:
    messages = [{"role": "user", "content": turn} for turn in turns]
    return json.dumps({"messages": messages, **fields}).encode()


@given(TURNS, TURNS)
def test_a_conversation_that_goes_on_keeps_its_trail(first: list[str], more: list[str]) -> None:
    """The trail of its beginning is the beginning of its trail, whatever else the bodies say."""
    begun = trail(chat(*first, max_tokens=5))
    assert trail(chat(*first, *more, temperature=1))[: len(begun)] == begun


@given(TURNS, TURNS)
def test_trails_part_where_texts_do(one: list[str], other: list[str]) -> None:
    pairs = zip(trail(chat(*one)), trail(chat(*other)), strict=False)
    shared = sum(a == b for a, b in pairs)
    if one != other:
        assert shared < max(len(trail(chat(*one))), len(trail(chat(*other))))


@given(st.text(st.characters(codec="ascii"), min_size=2 * STEP, max_size=4 * STEP))
def test_long_messages_share_their_beginning(text: str) -> None:
    common = trail(chat(text + "x" * STEP))[0]
    assert trail(chat(text + "y" * STEP))[0] == common


@given(st.binary(max_size=200) | st.builds(lambda v: json.dumps(v).encode(), st.integers()))
def test_what_is_no_request_has_no_trail(body: bytes) -> None:
    assert trail(body) == [] or body.lstrip()[:1] == b"{"


def test_a_trail_is_bounded() -> None:
    assert len(trail(chat("x" * (MAX_STEPS + 9) * STEP))) == MAX_STEPS


def test_every_api_has_a_trail() -> None:
    for body in ({"prompt": "hello"}, {"prompt": [1, 2, 3]}, {"input": "hi"}, {"system": "be"}):
        assert trail(json.dumps(body).encode()), body


@given(TURNS, st.fixed_dictionaries({name: st.integers(0, 99) for name in NAMES}))
def test_everybody_is_ranked_once_and_the_idlest_leads(
    turns: list[str], loads: dict[str, int]
) -> None:
    ranked = PrefixMap().place(trail(chat(*turns)), loads)
    assert sorted(ranked) == NAMES and loads[ranked[0]] == min(loads.values())


@given(TURNS, TURNS, st.integers(0, 2 * SLACK))
def test_a_prefix_stays_where_it_is_unless_too_much_is_there(
    first: list[str], more: list[str], load: int
) -> None:
    prefixes = PrefixMap()
    begun, way = trail(chat(*first)), trail(chat(*first, *more))
    (home, *_) = prefixes.place(begun, dict.fromkeys(NAMES, 0))
    known = begun[-1][0] >= SHARE * way[-1][0]
    (place, *_) = prefixes.place(way, {name: load * (name == home) for name in NAMES})
    if load > SLACK:
        assert place != home
    elif known:
        assert place == home


def test_what_is_known_of_a_lost_replica_is_asked_elsewhere_and_then_stays_there() -> None:
    prefixes, way = PrefixMap(), trail(chat("hello"))
    (home, *_) = prefixes.place(way, dict.fromkeys(NAMES, 0))
    others = {name: SLACK - i for i, name in enumerate(NAMES) if name != home}
    (second, *_) = prefixes.place(way, others)
    assert second == min(others, key=lambda name: others[name])
    assert prefixes.place(way, dict.fromkeys(NAMES, 0))[0] == second


def test_different_conversations_are_spread() -> None:
    prefixes = PrefixMap()
    loads = dict.fromkeys(NAMES, 0)
    for i in range(90):
        (name, *_) = prefixes.place(trail(chat(f"question {i}")), loads)
        loads[name] += 1
    assert set(loads.values()) == {30}


def test_ties_are_broken_alike_by_every_front() -> None:
    ways = [trail(chat(f"question {i}")) for i in range(50)]
    idle = dict.fromkeys(NAMES, 0)
    chosen = [PrefixMap().place(way, idle)[0] for way in ways]
    assert chosen == [PrefixMap().place(way, idle)[0] for way in ways]
    assert set(chosen) == set(NAMES)

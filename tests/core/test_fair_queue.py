"""Clients share rows, blocks and tokens: one that floods the scheduler delays no other, and what a
client has used counts, however it comes and goes."""

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from s1engine import _core
from tests.core.paged_mock import PagedMock
from tests.core.scenarios import FORMATS, Spec

BLOCK, BLOCKS, ROWS, STEP_TOKENS = 4, 96, 4, 16
FLOODER, OTHER = 1, 2
NUM_STEPS = 120
LONGEST = BLOCK * BLOCKS // 4  # so that what one sequence of a client keeps leaves room


def never_ends(ids: list[int]) -> list[int]:
    return [9]


@dataclass
class Clients:
    """A scheduler, and what its clients have added."""

    mock: PagedMock
    num_added: int = 0

    def add(self, client: int, length: int, new_tokens: int, priority: int = 0) -> int:
        """Add a sequence with a prompt of its own; return its id."""
        number, self.num_added = self.num_added, self.num_added + 1
        prompt = [3 + (number >> 2 * i) % 4 for i in range(length)]
        spec = Spec(prompt, new_tokens, FORMATS[0], None, priority=priority)
        spec.extra["client"] = client
        spec.add_to(self.mock.scheduler, number)
        return number

    def step(self) -> list[int]:
        """One step; return the ids of sequences that ended in it."""
        self.mock.step(never_ends)
        self.mock.scheduler.check_integrity()
        return list(self.mock.scheduler.finished)

    def served(self, client: int) -> int:
        return self.mock.scheduler.tokens_served(client)


def clients(rows: int = ROWS, **engine: bool) -> Clients:
    return Clients(
        PagedMock(
            num_blocks=BLOCKS,
            block_size=BLOCK,
            max_num_seqs=rows,
            max_num_batched_tokens=STEP_TOKENS,
            **engine,
        )
    )


lengths = st.integers(1, LONGEST // 2)
floods = st.lists(st.lists(st.tuples(lengths, lengths), max_size=3), min_size=1, max_size=30)


@settings(max_examples=30)
@given(floods, st.integers(1, 60), lengths, lengths, st.integers(2, ROWS), st.booleans())
def test_a_flood_delays_no_other_client(
    flood: list[list[tuple[int, int]]],
    steps_before: int,
    length: int,
    new_tokens: int,
    rows: int,
    caching: bool,
) -> None:
    """The flooder holds all rows, blocks and the queue, and goes on adding. Another client has its
    first token after the steps that its prompt needs at half the speed."""
    own = clients(rows, enable_prefix_caching=caching)

    def add_flood(step: int) -> None:
        for prompt, answer in flood[step % len(flood)]:
            own.add(FLOODER, prompt, answer)

    for step in range(steps_before):
        add_flood(step)
        own.step()
    newcomer = own.add(OTHER, length, new_tokens)
    to_first_token = 3 + 2 * -(-length // (STEP_TOKENS - rows))
    num_steps, ended = 0, False
    while not ended:
        add_flood(steps_before + num_steps)
        ended = newcomer in own.step()
        num_steps += 1
        if num_steps >= to_first_token:
            assert len(own.mock.scheduler.tokens(newcomer)) > length
        # Once it runs, its own length decides when it ends.
        assert num_steps <= to_first_token + 2 * new_tokens


def serve_busy(shapes: dict[int, tuple[int, int]], rows: int, num_steps: int) -> list[int]:
    """Tokens that each client is served while it keeps its queue full with sequences of one shape,
    which is lengths of prompt and answer."""
    own = clients(rows, enable_prefix_caching=False)
    for _ in range(num_steps):
        for client, (length, new_tokens) in shapes.items():
            while own.mock.scheduler.num_waiting(client) < rows:
                own.add(client, length, new_tokens)
        own.step()
    return [own.served(client) for client in shapes]


@settings(max_examples=12)
@given(st.tuples(lengths, lengths), st.tuples(lengths, lengths), st.integers(2, ROWS))
def test_a_busy_client_gets_as_much_as_another_or_half_of_what_it_gets_alone(
    first: tuple[int, int], second: tuple[int, int], rows: int
) -> None:
    """Whatever the shapes: short prompts beside long ones, short answers beside long ones. What is
    missing at most is what the rows hold when it is measured."""
    shared = serve_busy({0: first, 1: second}, rows, NUM_STEPS)
    for shape, served in zip((first, second), shared, strict=True):
        (alone,) = serve_busy({0: shape}, rows, NUM_STEPS)
        assert served >= min(alone / 2, max(shared)) - rows * LONGEST / 2


@settings(max_examples=12)
@given(lengths, lengths, st.integers(3, ROWS))
def test_answers_are_charged_as_long_as_they_become(first: int, second: int, rows: int) -> None:
    """Clients whose answers differ in length get equal tokens, not equal numbers of answers."""
    served = serve_busy({0: (1, first), 1: (1, second)}, rows, NUM_STEPS)
    assert abs(served[0] - served[1]) <= rows * LONGEST / 2


@settings(max_examples=30)
@given(st.integers(1, 10), st.booleans())
def test_leaving_repays_no_debt(pause: int, aborts: bool) -> None:
    """A client has used more than another, ends or aborts all it has, and comes back."""
    own = clients(rows=2)
    used = own.add(FLOODER, 20, 30)
    own.add(OTHER, 4, 90)
    for _ in range(20):
        own.step()
    if aborts:
        own.mock.scheduler.finish(used, _core.FinishReason.ABORT)
    while not aborts and used not in own.step():
        pass
    before = own.served(FLOODER)
    for _ in range(pause):
        own.step()
    assert before > own.served(OTHER)
    own.add(FLOODER, 4, 4)
    assert own.served(FLOODER) == before


def test_idle_time_earns_no_credit() -> None:
    own = clients(rows=2)
    own.add(OTHER, 4, 2)
    while own.mock.scheduler.has_unfinished():
        own.step()
    own.add(FLOODER, 4, 80)
    for _ in range(40):
        own.step()
    own.add(OTHER, 4, 2)
    assert own.served(OTHER) == own.served(FLOODER) > 40


def test_an_idle_engine_forgives() -> None:
    own = clients()
    own.add(FLOODER, 40, 40)
    while own.mock.scheduler.has_unfinished():
        own.step()
    own.add(OTHER, 4, 2)
    own.add(FLOODER, 4, 2)
    assert own.served(OTHER) == own.served(FLOODER) == 79


@given(st.integers(2, ROWS), st.integers(1, 4))
def test_short_requests_displace_one_sequence_only(rows: int, num_short: int) -> None:
    """A client that comes and goes makes room for itself, not for its whole queue; the flooder's
    first sequence is never the one that yields."""
    own = clients(rows)
    first = [own.add(FLOODER, 4, 60) for _ in range(rows)]
    own.step()
    for _ in range(3):
        for _ in range(num_short):
            own.add(OTHER, 2, 2)
        own.step()
        running = [n for n in first if own.mock.scheduler.req_index(n) >= 0]
        assert running == first[: rows - 1]
    while own.mock.scheduler.has_unfinished():
        own.step()


def test_cached_and_repeated_tokens_are_free() -> None:
    """A second sample of the same prompt is charged for what the cache does not hold; tokens that a
    preemption loses are charged once."""
    mock = PagedMock(num_blocks=64, block_size=4, max_num_seqs=1, enable_prefix_caching=True)
    own = Clients(mock)
    for number in range(2):
        spec = Spec([5] * 17, 3, FORMATS[0], None, extra={"client": OTHER})
        spec.add_to(mock.scheduler, number)
        while mock.scheduler.has_unfinished():
            own.step()
        mock.scheduler.remove(number)
    assert own.served(OTHER) == 19 + 3
    again = clients(enable_prefix_caching=False)
    again.add(OTHER, 20, 10)
    for _ in range(6):
        again.step()
    again.mock.scheduler.cancel_step()
    while again.mock.scheduler.has_unfinished():
        again.step()
    assert again.served(OTHER) == 29


@given(st.integers(0, 3))
def test_a_client_cannot_displace_a_higher_priority(priority: int) -> None:
    own = clients(rows=2)
    urgent = [own.add(FLOODER, 4, 30, priority=-1) for _ in range(2)]
    own.step()
    other = own.add(OTHER, 4, 2, priority=priority)
    own.step()
    assert all(own.mock.scheduler.req_index(number) >= 0 for number in urgent)
    assert own.mock.scheduler.req_index(other) < 0

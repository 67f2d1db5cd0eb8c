"""Budget forcing as in s1's own script: stop, append, generate again.

Each ignored end costs a whole ``generate`` over the batch, with all previous tokens as a new
prompt, and a barrier at which finished sequences wait for the slowest. It uses only the engine's
public interface, so that native forcing can be compared with it in tokens and seconds.
"""

from dataclasses import dataclass, field

from s1engine.engine.llm import LLM
from s1engine.outputs import RequestOutput
from s1engine.sampling_params import SamplingParams

BAN = -100.0  # a bias that no logit of a trained model overcomes


@dataclass
class PassState:
    """State of one prompt between passes."""

    prompt: list[int]  # ends with the opened thinking
    thinking: list[int] = field(default_factory=list)
    waits_used: int = 0
    ended: bool = False  # the model wrote an end
    answer: list[int] = field(default_factory=list)

    @property
    def token_ids(self) -> list[int]:
        """Everything generated and appended."""
        return self.thinking + self.answer


def think_in_passes(
    llm: LLM, prompts: list[list[int]], *, budget: int, num_waits: int, max_tokens: int
) -> list[PassState]:
    """Greedy answers to prompts with an open thinking block, as in s1's evaluation harness, except
    that waits share the one budget."""
    reasoning = llm.engine.format
    assert reasoning is not None
    wait = llm.engine.tokenizer.encode("Wait")
    states = [PassState(prompt) for prompt in prompts]
    live = states
    for wait_round in range(num_waits + 1):
        _think(llm, live, budget)
        live = [s for s in live if s.ended and len(s.thinking) + len(wait) < budget]
        if wait_round == num_waits:
            break
        for state in live:
            state.thinking += wait
            state.waits_used += 1
    newlines = set(llm.engine.tokenizer.newline_ids)
    for state in states:
        if state.ended:
            end = list(reasoning.natural_end)
        else:
            last = (state.prompt + state.thinking)[-1]
            gap = [] if last in newlines else list(reasoning.newline)
            end = [*gap, *reasoning.forced_end(None)]
        state.answer = end
    params = [_greedy(max_tokens - len(s.token_ids)) for s in states]
    outputs = _generate(llm, [s.prompt + s.token_ids for s in states], params, stops=())
    for state, output in zip(states, outputs, strict=True):
        state.answer += output.outputs[0].token_ids
    return states


def _think(llm: LLM, states: list[PassState], budget: int) -> None:
    """One round for all: each generates until it writes an end or exhausts the budget."""
    before = [len(state.thinking) for state in states]
    _extend(llm, states, budget)
    stuck = [
        state
        for state, n in zip(states, before, strict=True)
        if state.waits_used and len(state.thinking) == n < budget  # an end directly after the wait
    ]
    if stuck:
        assert llm.engine.format is not None
        bias = dict.fromkeys(llm.engine.format.triggers, BAN)
        _extend(llm, stuck, budget, most=1, bias=bias)
        _extend(llm, stuck, budget)


def _extend(
    llm: LLM,
    states: list[PassState],
    budget: int,
    most: int | None = None,
    bias: dict[int, float] | None = None,
) -> None:
    """Continue thinking, within the budget and by at most ``most`` tokens."""
    assert llm.engine.format is not None
    triggers = llm.engine.format.triggers
    states = [state for state in states if len(state.thinking) < budget]
    remaining = [budget - len(state.thinking) for state in states]
    params = [_greedy(min(left, most or left), bias) for left in remaining]
    outputs = _generate(llm, [s.prompt + s.thinking for s in states], params, triggers)
    for state, output in zip(states, outputs, strict=True):
        ids = output.outputs[0].token_ids
        state.ended = ids[-1] in triggers
        state.thinking += ids[:-1] if state.ended else ids


def _greedy(max_tokens: int, logit_bias: dict[int, float] | None = None) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, logit_bias=logit_bias or {})


def _generate(
    llm: LLM, prompts: list[list[int]], params: list[SamplingParams], stops: tuple[int, ...]
) -> list[RequestOutput]:
    """Plain continuation, with thinking disabled, up to the end of text or one of ``stops``."""
    if not prompts:
        return []
    each = [_with_stops(p, stops) for p in params]
    return llm.generate(prompts, each, progress=False, enable_thinking=False)


def _with_stops(params: SamplingParams, stops: tuple[int, ...]) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=params.max_tokens,
        logit_bias=params.logit_bias,
        stop_token_ids=stops,
    )

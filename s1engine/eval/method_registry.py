"""The methods by name: the options each accepts, and the runs it makes of them.

Checks all options of a sweep before a model is loaded. Prompts are those of s1's evaluation.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from s1engine.checks import check_float, check_int
from s1engine.config import MAX_TOKENS, MAX_WAITS
from s1engine.errors import RequestError
from s1engine.eval.methods import (
    ONE_TRACE,
    TOKENS_PER_STEP,
    CheckpointSweep,
    Chooser,
    Method,
    RejectionSampling,
    RunSettings,
    SinglePass,
    first_sample,
    majority_vote,
    most_confident,
)
from s1engine.sampling_params import MAX_N, SamplingParams, ThinkingBudget

TOKEN_SUFFIX = "Think for up to {n} tokens."
STEP_SUFFIX = "Think for up to {n} steps."
CLASS_SUFFIXES = {
    "short": "Answer after a short amount of thinking. "
    "Do not spend excessive time double-checking your work.",
    "long": "Answer after a long amount of thinking. If you feel like you are finished early, "
    "spend the extra time trying to double-check your work until you are absolutely sure that "
    "you have the correct answer.",
}
MAX_STEPS = 10_000
MAX_TRIES = 1000
BASELINES = ("class-conditional", "class-conditional-forced")
"""Methods whose run without a length is the baseline of their other runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepOptions:
    """The values that a sweep runs over, and its sampling. None: the method's default."""

    budgets: tuple[int | None, ...] | None = None
    num_waits: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None
    samples: tuple[int, ...] | None = None
    max_tries: int | None = None
    wait_text: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for budget in self.budgets or ():
            if budget is not None:
                check_int("budgets", budget, 0, MAX_TOKENS)
        _check_all("num_waits", self.num_waits, 0, MAX_WAITS)
        _check_all("steps", self.steps, 1, MAX_STEPS)
        _check_all("samples", self.samples, 1, MAX_N)
        for name in ("budgets", "num_waits", "steps", "samples"):
            values = getattr(self, name) or ()
            if len(set(values)) < len(values):
                raise RequestError(f"{name} has a value twice", param=name)
        if self.max_tries is not None:
            check_int("max_tries", self.max_tries, 1, MAX_TRIES)
        if self.temperature is not None:
            check_float("temperature", self.temperature, 0.0, 100.0)
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS)

    def params(
        self, run: RunSettings, *, temperature: float, forced: bool = True
    ) -> SamplingParams:
        """Sampling parameters of a run; ``forced``: its limits are enforced, not only asked for."""
        sampled = temperature if self.temperature is None else self.temperature
        return SamplingParams(
            n=run.samples,
            temperature=sampled,
            max_tokens=self.max_tokens,
            seed=self.seed,
            thinking=self._thinking(run) if forced else None,
        )

    def _thinking(self, run: RunSettings) -> ThinkingBudget | None:
        if run.sample_limit is None and not run.num_waits:
            return None
        wait = ThinkingBudget().wait_text if self.wait_text is None else self.wait_text
        return ThinkingBudget(max_tokens=run.sample_limit, num_waits=run.num_waits, wait_text=wait)


def _check_all(param: str, values: Sequence[int] | None, low: int, high: int) -> None:
    for value in values or ():
        check_int(param, value, low, high)


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """A method in the registry."""

    options: frozenset[str]
    """Fields of SweepOptions that it accepts, besides sampling."""
    build: Callable[[str, SweepOptions], list[Method]]
    help: str


def build_methods(names: Sequence[str], options: SweepOptions) -> list[Method]:
    """The methods of a sweep, in the order of ``names``. Raises RequestError for an option that
    none of them accepts."""
    for name in names:
        if name not in METHODS:
            raise RequestError(
                f"method must be one of {', '.join(METHODS)}; got {name!r}", param="method"
            )
    if len(set(names)) < len(names):
        raise RequestError("method has a name twice", param="method")
    accepted = frozenset().union(*(METHODS[name].options for name in names))
    for field in ("budgets", "num_waits", "steps", "samples", "max_tries", "wait_text"):
        if getattr(options, field) is not None and field not in accepted:
            raise RequestError(f"{field} does not apply to {', '.join(names)}", param=field)
    methods = [method for name in names for method in METHODS[name].build(name, options)]
    return [method for method in methods if method.settings]


# --- the runs of each method ---


def _budget_forcing(name: str, options: SweepOptions) -> list[Method]:
    """A run for each number of waits and each budget."""
    runs = [
        RunSettings(name, budget, num_waits)
        for num_waits, budget in itertools.product(
            options.num_waits or (0,), options.budgets or (None,)
        )
    ]
    return [SinglePass(run, options.params(run, temperature=0), first_sample) for run in runs]


def _checkpoints(name: str, options: SweepOptions) -> list[Method]:
    """One trace for all budgets, for each number of waits."""
    budgets = options.budgets or (None,)
    largest = None if None in budgets else max(b for b in budgets if b is not None)
    smaller = tuple(sorted(b for b in budgets if b is not None and b != largest))
    methods: list[Method] = []
    for num_waits in options.num_waits or (0,):
        params = options.params(RunSettings(name, largest, num_waits), temperature=0)
        thinking = replace(params.thinking or ThinkingBudget(), checkpoints=smaller)
        runs = tuple(RunSettings(name, budget, num_waits) for budget in budgets)
        methods.append(CheckpointSweep(runs, replace(params, thinking=thinking), first_sample))
    return methods


def _token_conditional(name: str, options: SweepOptions) -> list[Method]:
    forced = name.endswith("-forced")
    return [
        SinglePass(
            (run := RunSettings(name, budget)),
            options.params(run, temperature=0, forced=forced),
            first_sample,
            suffix="" if budget is None else TOKEN_SUFFIX.format(n=budget),
        )
        for budget in options.budgets or (1024, 2048, 4096, 8192, 16384)
    ]


def _step_conditional(name: str, options: SweepOptions) -> list[Method]:
    """Forced, thinking is cut at the number of tokens with which s1 measures Control of steps. s1
    cuts at the marker of step 0, which only its model, trained to count steps down, writes; the
    engine ends thinking at single tokens only."""
    forced = name.endswith("-forced")
    return [
        SinglePass(
            (run := RunSettings(name, steps=steps)),
            options.params(run, temperature=0, forced=forced),
            first_sample,
            suffix=STEP_SUFFIX.format(n=steps),
        )
        for steps in options.steps or (16, 32, 64, 128, 256)
    ]


def _class_conditional(name: str, options: SweepOptions) -> list[Method]:
    """The baseline without a length first, then short and long."""
    budgets = (options.budgets or (None,)) if name.endswith("-forced") else (None,)
    return [
        SinglePass(
            (run := RunSettings(name, budget, length=length)),
            options.params(run, temperature=0),
            first_sample,
            suffix=CLASS_SUFFIXES[length] if length else "",
        )
        for budget in budgets
        for length in (None, "short", "long")
    ]


def _rejection_sampling(name: str, options: SweepOptions) -> list[Method]:
    tries = options.max_tries or 16
    runs = [RunSettings(name, budget, max_tries=tries) for budget in options.budgets or (None,)]
    if any(run.budget == 0 for run in runs):
        raise RequestError("budgets: no thinking is below a budget of 0", param="budgets")
    return [RejectionSampling(run, options.params(run, temperature=1)) for run in runs]


def _parallel(choose: Chooser, logprobs: int | None = None) -> Callable[..., list[Method]]:
    def build(name: str, options: SweepOptions) -> list[Method]:
        runs = [
            RunSettings(name, budget, samples=samples)
            for budget in options.budgets or (None,)
            for samples in options.samples or (1, 2, 4, 8)
        ]
        return [
            SinglePass(run, replace(options.params(run, temperature=1), logprobs=logprobs), choose)
            for run in runs
        ]

    return build


_BUDGETS = frozenset({"budgets"})
METHODS = {
    "budget-forcing": MethodEntry(
        _BUDGETS | {"num_waits", "wait_text"},
        _budget_forcing,
        "thinking cut at a maximum, prolonged by waits",
    ),
    ONE_TRACE: MethodEntry(
        _BUDGETS | {"num_waits", "wait_text"},
        _checkpoints,
        "the same answers, all budgets from one trace",
    ),
    "token-conditional": MethodEntry(
        _BUDGETS, _token_conditional, "the prompt asks for at most so many tokens"
    ),
    "token-conditional-forced": MethodEntry(
        _BUDGETS, _token_conditional, "the same, and thinking is cut there"
    ),
    "step-conditional": MethodEntry(
        frozenset({"steps"}), _step_conditional, "the prompt asks for at most so many steps"
    ),
    "step-conditional-forced": MethodEntry(
        frozenset({"steps"}),
        _step_conditional,
        f"the same, and thinking is cut at {TOKENS_PER_STEP} tokens a step",
    ),
    "class-conditional": MethodEntry(
        frozenset(), _class_conditional, "the prompt asks for short or long thinking"
    ),
    "class-conditional-forced": MethodEntry(
        _BUDGETS, _class_conditional, "the same, and thinking is cut at the budget"
    ),
    "rejection-sampling": MethodEntry(
        _BUDGETS | {"max_tries"},
        _rejection_sampling,
        "sampled until the thinking ends below the budget",
    ),
    "majority-voting": MethodEntry(
        _BUDGETS | {"samples"}, _parallel(majority_vote), "the answer of most samples"
    ),
    "best-of-n": MethodEntry(
        _BUDGETS | {"samples"},
        _parallel(most_confident, logprobs=0),
        "the sample whose tokens were likeliest on average",
    ),
}

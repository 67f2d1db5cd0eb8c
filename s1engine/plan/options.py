"""The flags of ``s1engine info --plan``, besides those of the engine."""

from dataclasses import dataclass, replace

from s1engine.checks import check_float, check_int
from s1engine.errors import RequestError
from s1engine.plan.hardware import CPU, MAX_GPUS, WEIGHTS, Gpu, find_gpu

ROUTINGS = ("least-loaded", "round-robin")
MAX_REQUESTS = 20_000
MAX_LENGTH = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """Options of a plan. Lists are comma-separated; a plan covers every combination of values."""

    gpu: str = "H100"
    """A100, H100, H200, H20, B200, L40S, L4, or cpu for this machine (see ``--calibrate``)."""
    gpus: str = "1,2,4,8"
    """List: total number of GPUs, up to 64; each engine uses ``--tensor-parallel-size`` of them."""
    link_gb_per_s: float | None = None
    """Between GPUs that share a model, one direction. None: from the GPU's data sheet."""
    link_us: float | None = None
    """Latency of an empty all-reduce between them. None: 8 over NVLink, 25 over PCIe."""
    acceptance: str = "traces"
    """Acceptance probability of a draft token after accepted ones, for
    ``--num-speculative-tokens``; traces: as measured on reasoning traces."""
    routing: str = "least-loaded"
    """How requests are routed to engines: least-loaded, round-robin."""
    weights: str = "auto"
    """Weight format: auto (as ``--quantization``, ``--dtype``), fp8, int8, int4; GPUs only."""
    trace: str | None = None
    """Trace file: CSV of Azure or vidur, JSON lines of Mooncake or LLMServingSim. None: random
    lengths."""
    requests: int = 200
    """Number of requests; of a trace, the first ones."""
    rate: str | None = None
    """List: requests a second, as a Poisson process or by scaling the trace's arrivals; ``inf``:
    all at once. None: as in the trace, else all at once."""
    input_len: int = 256
    """Mean tokens of a random prompt."""
    output_len: int = 2048
    """Mean output tokens of a random request without a budget."""
    spread: float = 0.5
    """Random lengths are within this share of their mean."""
    thinking_share: float = 0.0
    """Share of the output that is thinking. 0: no thinking."""
    thinking_budget: str | None = None
    """List: maximum of thinking tokens (``none``: no maximum)."""
    num_waits: int = 0
    """Number of ends of thinking that a wait replaces."""
    wait_thinking: int = 256
    """Thinking tokens after a wait."""
    calibrate: bool = False
    """Measure steps on this machine's CPU (under a minute), for ``--gpu cpu``."""
    page: str | None = None
    """Write figures to this HTML file."""

    def __post_init__(self) -> None:
        if self.gpu.lower() != CPU:
            find_gpu(self.gpu)
        elif not self.calibrate:
            raise RequestError("gpu: cpu has no data sheet; add --calibrate", param="gpu")
        elif self.weights != "auto":
            raise RequestError("gpu: calibration of a CPU does not cover weights", param="gpu")
        if self.calibrate and self.gpu.lower() != CPU:
            raise RequestError(f"calibrate measures this CPU, not {self.gpu}", param="calibrate")
        for name, value, known in (
            ("routing", self.routing, ROUTINGS),
            ("weights", self.weights, ("auto", *WEIGHTS)),
        ):
            if value not in known:
                raise RequestError(
                    f"{name} must be one of {', '.join(known)}; got {value!r}", param=name
                )
        for link, given in (("link_gb_per_s", self.link_gb_per_s), ("link_us", self.link_us)):
            if given is not None:
                check_float(link, given, 1e-3, 1e6)
        self.acceptance_probability()
        check_int("requests", self.requests, 1, MAX_REQUESTS)
        check_int("input_len", self.input_len, 1, MAX_LENGTH)
        check_int("output_len", self.output_len, 1, MAX_LENGTH)
        check_int("num_waits", self.num_waits, 0, 64)
        check_int("wait_thinking", self.wait_thinking, 1, MAX_LENGTH)
        check_float("spread", self.spread, 0.0, 1.0)
        check_float("thinking_share", self.thinking_share, 0.0, 1.0)
        if (self.thinking_budget is not None or self.num_waits) and not self.thinking_share:
            raise RequestError(
                "thinking_budget and num_waits need a thinking_share above 0",
                param="thinking_share",
            )

    @property
    def is_cpu(self) -> bool:
        return self.gpu.lower() == CPU

    def device(self) -> Gpu:
        """The GPU, with the links of the options."""
        gpu = find_gpu(self.gpu)
        if self.link_gb_per_s is not None:
            gpu = replace(gpu, link_gb_per_s=self.link_gb_per_s)
        return gpu if self.link_us is None else replace(gpu, link_us=self.link_us)

    def acceptance_probability(self) -> float | None:
        """The acceptance probability of a draft token; None: as on traces."""
        if self.acceptance == "traces":
            return None
        try:
            return check_float("acceptance", float(self.acceptance), 0.0, 1.0)
        except ValueError:
            raise RequestError(
                f"acceptance: {self.acceptance!r} is neither a share from 0 to 1 nor traces",
                param="acceptance",
            ) from None

    def numbers_of_gpus(self, ranks: int) -> list[int]:
        """The numbers of GPUs, ascending; ``ranks`` GPUs form an engine."""
        numbers = []
        for text in self.gpus.split(","):
            number = int(text) if text.strip().isdecimal() else 0
            if not 1 <= number <= MAX_GPUS or number % ranks:
                raise RequestError(
                    f"gpus: {text!r} is not a multiple of tensor_parallel_size ({ranks}) "
                    f"from 1 to {MAX_GPUS}",
                    param="gpus",
                )
            numbers.append(number)
        return sorted(set(numbers))

    def rates(self) -> list[float | None]:
        """Requests a second; None: as in the trace."""
        if self.rate is None:
            return [None if self.trace else float("inf")]
        rates: list[float | None] = []
        for text in self.rate.split(","):
            try:
                value = float(text)
            except ValueError:
                value = -1.0
            if not value > 0:
                raise RequestError(f"rate: {text!r} is not a positive number", param="rate")
            rates.append(value)
        return rates

    def budgets(self) -> list[int | None]:
        """Maxima of thinking tokens; None: no maximum."""
        if self.thinking_budget is None:
            return [None]
        budgets: list[int | None] = []
        for text in self.thinking_budget.split(","):
            word = text.strip()
            if word != "none" and (not word.isdecimal() or int(word) > MAX_LENGTH):
                raise RequestError(
                    f"thinking_budget: {text!r} is neither a number of tokens nor none",
                    param="thinking_budget",
                )
            budgets.append(None if word == "none" else int(word))
        return budgets

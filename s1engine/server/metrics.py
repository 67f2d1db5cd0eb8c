"""Metrics in Prometheus' text format, with vLLM's names where it has them, under our prefix.

Counters grow with each finished request; gauges are read from the scheduler when metrics are
rendered. Knows nothing of HTTP.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from s1engine.engine.core_output import EngineStats
from s1engine.logs import num_dropped_lines
from s1engine.outputs import CompletionOutput, RequestOutput

PREFIX = "s1engine"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKENS = tuple(2**i for i in range(17))
SHARES = tuple(i / 10 for i in range(1, 11))


class Metrics:
    """Metrics of one engine.

    Args:
        stats: returns the engine's current figures.
        in_flight: returns the sequences in flight of each API key, by its number.
        buffered: returns the bytes that the server holds for clients.
    """

    def __init__(
        self,
        model_name: str,
        stats: Callable[[], EngineStats],
        in_flight: Callable[[], Mapping[str, int]] = dict,
        buffered: Callable[[], float] = float,
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Clients(model_name, in_flight))
        self._registry.register(_Engine(model_name, stats))
        self._model_name = model_name
        held = "Bytes of bodies and log-probabilities held for clients."
        names = ("model_name",)
        gauge = Gauge(f"{PREFIX}:buffered_bytes", held, names, registry=self._registry)
        gauge.labels(model_name).set_function(buffered)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._generated = self._counter("generation_tokens", "Tokens generated, forced ones too.")
        self._success = self._counters("request_success", "Finished samples.", "finished_reason")
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival.", SECONDS)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival.", SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "Until scheduled.", SECONDS)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "After the first token.", SECONDS
        )
        self._prefill = self._histogram("request_prefill_time_seconds", "To a token.", SECONDS)
        self._decode = self._histogram("request_decode_time_seconds", "After it.", SECONDS)
        self._inference = self._histogram("request_inference_time_seconds", "Both.", SECONDS)
        self._prompt = self._histogram("request_prompt_tokens", "Of a request.", TOKENS)
        self._output = self._histogram("request_generation_tokens", "Of a sample.", TOKENS)
        self._n = self._histogram("request_params_n", "Samples asked for.", TOKENS)
        self._refused = self._counters(
            "requests_refused", "Requests not let in, or failed.", "code"
        )
        self._aborted = self._counters("requests_aborted", "Requests cut while they ran.", "reason")
        self._thinking = self._histogram("request_thinking_tokens", "Of a sample.", TOKENS)
        self._used = self._histogram(
            "thinking_budget_utilization", "Thinking tokens over the effective budget.", SHARES
        )
        self._ends = self._counters("thinking_end", "Samples by why thinking ended.", "end_reason")
        self._waits = self._counter("thinking_waits", "Ends that a wait text replaced.")
        self._forced = self._counter("forced_tokens", "Tokens injected, not sampled.")
        self._checkpoints = self._counter("checkpoint_answers", "Answers at checkpoints.")

    def observe(self, output: RequestOutput) -> None:
        """Count a finished request."""
        timing = output.timing
        self._prompt_tokens.inc(output.usage.prompt_tokens)
        self._generated.inc(output.usage.completion_tokens)
        self._ttft.observe(timing.ttft_s)
        self._e2e.observe(timing.total_s)
        self._queue.observe(timing.queue_s)
        self._prefill.observe(timing.ttft_s - timing.queue_s)
        self._decode.observe(timing.total_s - timing.ttft_s)
        self._inference.observe(timing.total_s - timing.queue_s)
        self._prompt.observe(output.usage.prompt_tokens)
        self._n.observe(len(output.outputs))
        longest = max(len(sample.token_ids) for sample in output.outputs)
        if longest > 1:
            per_token = (timing.total_s - timing.ttft_s) / (longest - 1)
            self._per_token.observe(per_token)
        self._checkpoints.inc(len(output.checkpoints))
        for sample in output.outputs:
            self._output.observe(len(sample.token_ids))
            self._success(sample.finish_reason).inc()
            self._observe_thinking(sample)

    def count_refused(self, code: str) -> None:
        """Count a request that was not admitted, or that failed in the engine."""
        self._refused(code).inc()

    def count_aborted(self, reason: str) -> None:
        """Count a request that ended before its output: ``disconnect``, ``timeout``, ``shutdown``
        or ``engine``."""
        self._aborted(reason).inc()

    def _observe_thinking(self, sample: CompletionOutput) -> None:
        used = sample.thinking
        if used is None:
            return
        self._thinking.observe(used.tokens)
        if used.budget > 0:
            self._used.observe(used.tokens / used.budget)
        self._ends(used.end_reason or "none").inc()
        self._waits.inc(used.waits_used)
        self._forced.inc(used.forced_tokens)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return self._counters(name, text)()

    def _counters(self, name: str, text: str, *labels: str) -> Callable[..., Counter]:
        """Counters by the values of ``labels``. Each is looked up once: ``labels`` is slow."""
        names = ("model_name", *labels)
        counter = Counter(f"{PREFIX}:{name}", text, names, registry=self._registry)
        return cache(partial(counter.labels, self._model_name))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        full = f"{PREFIX}:{name}"
        names = ("model_name",)
        histogram = Histogram(full, text, names, registry=self._registry, buckets=buckets)
        return histogram.labels(self._model_name)


class _Clients(Collector):
    """What each API key has in flight."""

    def __init__(self, model_name: str, in_flight: Callable[[], Mapping[str, int]]) -> None:
        self._model_name = model_name
        self._in_flight = in_flight

    def collect(self) -> list[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            f"{PREFIX}:key_sequences",
            "Sequences running or waiting of an API key, by its number in the order of the keys.",
            labels=["model_name", "key"],
        )
        for client, count in self._in_flight().items():
            family.add_metric([self._model_name, client], count)
        return [family]


class _Engine(Collector):
    """The engine's gauges and its own counters."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self._model_name = model_name
        self._stats = stats

    def collect(self) -> list[GaugeMetricFamily | CounterMetricFamily]:
        stats = self._stats()
        used = 1 - stats.num_free_blocks / stats.num_blocks
        gauges = {
            "num_requests_running": (stats.num_running, "Sequences that run."),
            "num_requests_waiting": (stats.num_waiting, "Sequences that wait."),
            "kv_cache_usage_perc": (used, "Share of KV blocks in use; 1 is all."),
            "kv_cache_pinned_perc": (
                stats.num_pinned_blocks / stats.num_blocks,
                "Share of KV blocks that pinned prefixes hold.",
            ),
        }
        counters = {
            "prefix_cache_queries": (stats.prefix_queries, "Prompt tokens looked up."),
            "prefix_cache_hits": (stats.prefix_hits, "Prompt tokens found in the cache."),
            "num_preemptions": (stats.num_preemptions, "Sequences that gave up their blocks."),
            "spec_decode_num_drafts": (stats.num_drafts, "Drafts, of one sequence in one step."),
            "spec_decode_num_draft_tokens": (stats.num_draft_tokens, "Tokens in drafts."),
            "spec_decode_num_accepted_tokens": (
                stats.num_accepted_tokens,
                "Drafted tokens that were sampled so.",
            ),
            "spec_decode_undrafted": (
                stats.num_undrafted,
                "Sequences that allow no drafts, or none of the answer.",
            ),
            "engine_restarts": (stats.num_restarts, "Engines that have replaced a dead one."),
            "log_lines_dropped": (num_dropped_lines(), "Of the server: stdout, stderr blocked."),
            "computed_tokens": (stats.num_computed_tokens, "Tokens that went through the model."),
        }
        families: list[GaugeMetricFamily | CounterMetricFamily] = []
        model = [self._model_name]
        for kind, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (value, text) in values.items():
                family = kind(f"{PREFIX}:{name}", text, labels=["model_name"])
                family.add_metric(model, value)
                families.append(family)
        return families

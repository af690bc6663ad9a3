"""What Prometheus reads at /metrics: vLLM's names, with labkit's prefix."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from labkit.engine.async_llm import AsyncLLM
from labkit.engine.requests import RequestOutput
from labkit.launch.local import RankError


class Metrics:
    """What Prometheus reads: vLLM's names behind another prefix. Gauges and totals are the engine's, taken when asked for."""

    def __init__(self, llm: AsyncLLM) -> None:
        self.llm, self.model = llm, llm.llm.model.name
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.ttft = self._histogram("time_to_first_token", "From a request's arrival to its first token.")
        self.gap = self._histogram("inter_token_latency", "Between a request's tokens.")
        self.tpot = self._histogram("request_time_per_output_token", "Mean of a request between its tokens.")
        self.whole = self._histogram("e2e_request_latency", "From a request's arrival to its end.")
        self.queued = self._histogram("request_queue_time", "From a request's arrival until it was first computed.")
        labels = ["model_name", "finished_reason"]
        self.ended = Counter("labkit:request_success", "Outputs that have ended.", labels, registry=self.registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        edges = [factor * 10**power for power in (-3, -2, -1, 0, 1) for factor in (1, 2.5, 5)]
        made = Histogram(f"labkit:{name}_seconds", what, ["model_name"], registry=self.registry, buckets=edges)
        return made.labels(self.model)

    def collect(self) -> Iterator[Metric]:
        stats = self.llm.stats()
        for kind, name, what, value in (
            (GaugeMetricFamily, "num_requests_running", "Requests in the batch.", stats["running"]),
            (GaugeMetricFamily, "num_requests_waiting", "Requests not admitted yet.", stats["waiting"]),
            (GaugeMetricFamily, "kv_cache_usage_perc", "Blocks of KV cache in use, 1 is all.",
             stats["kv_blocks_used"] / max(1, stats["kv_blocks"])),
            (CounterMetricFamily, "num_preemptions", "Times a request gave up its blocks.", stats["preemptions"]),
            (CounterMetricFamily, "restarts", "Times that ranks were replaced, because one had failed.", stats["restarts"]),
            (CounterMetricFamily, "engine_steps", "Passes of a replica that gave tokens.", stats["steps"]),
            (CounterMetricFamily, "prompt_tokens", "Of requests that are done.", stats["prompt_tokens"]),
            (CounterMetricFamily, "prefix_cache_hits", "Of these, tokens that the KV cache had.", stats["cached_tokens"]),
            (CounterMetricFamily, "generation_tokens", "Tokens generated.", stats["generation_tokens"]),
        ):  # fmt: skip
            family = kind(f"labkit:{name}", what, labels=["model_name"])
            family.add_metric([self.model], value)
            yield family

    async def watch(self, outputs: AsyncIterator[RequestOutput], n: int) -> AsyncGenerator[RequestOutput, None]:
        """The same outputs. Notes when they come and how they end."""
        began = before = time.perf_counter()
        reasons = ["abort"] * n
        try:
            async for output in outputs:
                now = time.perf_counter()
                if before == began:
                    self.ttft.observe(output.metrics.ttft_s)
                    self.queued.observe(output.metrics.queue_s)
                else:
                    self.gap.observe(now - before)
                before = now
                reasons = [each.finish_reason or "abort" for each in output.outputs]
                if output.finished:
                    self.whole.observe(now - began)
                    if output.metrics.tpot_s is not None:
                        self.tpot.observe(output.metrics.tpot_s)
                yield output
        except ValueError:  # refused
            reasons = []
            raise
        except RankError:
            reasons = ["error"] * n
            raise
        finally:
            for reason in reasons:
                self.ended.labels(self.model, reason).inc()

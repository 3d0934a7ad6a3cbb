"""Prometheus metrics: histograms of what clients saw, and the node's own counters.

What the engine counts is not counted again here: a collector reads its last picture at the
moment of the scrape. When the engine restarts, its counters begin at 0 again, which Prometheus'
``rate`` knows how to read.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mmrl.deploy.protocol import Engine, NodeState
from mmrl.deploy.server.records import MISSES, OUTCOMES, Record, Watcher

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TTFT_S = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120)
TPOT_S = (0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
E2E_S = (0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600)
DECISION_S = (
    *(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 5e-2),
    *(0.1, 0.5, 1),
)

# Name, help, attribute of ModelState or NodeState.
MODEL_GAUGES = (
    ("mmrl_queue_length", "Requests that wait.", "queued"),
    ("mmrl_running_sequences", "Sequences that prefill or decode.", "running"),
    ("mmrl_suspended_sequences", "Sequences whose KV cache is saved or moves.", "suspended"),
    ("mmrl_oldest_wait_seconds", "Age of the oldest waiting request.", "oldest_wait_s"),
    ("mmrl_weight_bytes", "Weights of the whole model.", "weight_bytes"),
    ("mmrl_resident_bytes", "Device memory taken for weights.", "resident_bytes"),
    ("mmrl_kv_bytes", "Device memory taken for the KV cache.", "kv_bytes"),
    ("mmrl_ttft_target_seconds", "Target of the first token.", "ttft_s"),
    ("mmrl_tpot_target_seconds", "Target per further token; 0 for none.", "tpot_s"),
    ("mmrl_paused", "Whether it is paused.", "paused"),
    ("mmrl_focus", "Whether it has the focus.", "focus"),
    ("mmrl_pinned", "Whether it is pinned.", "pinned"),
    ("mmrl_quarantined", "Whether it is quarantined.", "quarantined"),
)
MODEL_COUNTERS = (
    ("mmrl_loads", "Loads that ended.", "loads"),
    ("mmrl_outs", "Times it was put out.", "outs"),
    ("mmrl_idle_evictions", "Times it was evicted while idle.", "idle_evictions"),
    ("mmrl_preemptions", "Sequences preempted.", "preempted"),
    ("mmrl_kv_dropped", "Sequences whose KV cache was dropped.", "kv_dropped"),
    ("mmrl_computed_prefill_tokens", "Tokens prefilled.", "prefill_tokens"),
    ("mmrl_computed_decode_tokens", "Tokens decoded.", "decode_tokens"),
    ("mmrl_model_compute_seconds", "Time its iterations computed.", "compute_s"),
)
LINK_KINDS = {
    "load": "load_bytes",
    "stream": "stream_bytes",
    "kv_save": "kv_save_bytes",
    "kv_restore": "kv_restore_bytes",
}
NODE_GAUGES = (
    ("mmrl_reverted", "Whether the champion decides instead of the policy.", "reverted"),
    ("mmrl_draining", "Whether the server takes no more requests.", "draining"),
    ("mmrl_memory_budget_bytes", "Device memory the node may use.", "budget_bytes"),
    ("mmrl_memory_reserve_bytes", "Slots and workspace.", "reserve_bytes"),
    ("mmrl_memory_free_bytes", "Device memory free.", "free_bytes"),
    ("mmrl_host_kv_bytes", "KV cache saved on the host.", "host_kv_bytes"),
    ("mmrl_host_kv_limit_bytes", "Most KV cache on the host.", "host_kv_limit_bytes"),
    ("mmrl_engine_start_time_seconds", "Start of the engine, since the epoch.", "started_s"),
    ("mmrl_engine_state_time_seconds", "Time of the last picture of the node.", "time_s"),
)
NODE_COUNTERS = (
    ("mmrl_decisions", "Times the policy was asked.", "decisions_asked"),
    ("mmrl_illegal_actions", "Illegal actions of the policy.", "illegal_actions"),
    ("mmrl_compute_seconds", "Time the device computed.", "compute_s"),
    ("mmrl_scheduler_overhead_seconds", "Device idle and work waiting.", "overhead_s"),
)


class Metrics(Watcher):
    """All metrics of one server, in a registry of their own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        model = ("model",)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, model, buckets=buckets, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, model + labels, registry=self.registry)

        self._ttft = histogram("mmrl_ttft_seconds", "Time to the first token.", TTFT_S)
        self._tpot = histogram("mmrl_tpot_seconds", "Time per further token.", TPOT_S)
        self._e2e = histogram("mmrl_e2e_seconds", "Time to the last token.", E2E_S)
        self._requests = counter("mmrl_requests", "Requests that ended.", "outcome")
        self._misses = counter("mmrl_target_misses", "Requests that missed a target.", "target")
        self._prompt = counter("mmrl_prompt_tokens", "Tokens of prompts.")
        self._tokens = counter("mmrl_generated_tokens", "Tokens sent.")
        self._decisions = Histogram(
            "mmrl_decision_seconds",
            "Time a decision took.",
            buckets=DECISION_S,
            registry=self.registry,
        )
        self._known: set[str] = set()
        self.registry.register(NodeCollector(engine))

    def first_token(self, record: Record) -> None:
        """Take a request whose first token has come."""
        assert record.ttft_s is not None
        self._ttft.labels(record.info.name).observe(record.ttft_s)

    def ended(self, record: Record) -> None:
        """Count a request that has ended."""
        model = record.info.name
        self._requests.labels(model, record.outcome).inc()
        if record.miss is not None:
            self._misses.labels(model, record.miss).inc()
        if record.outcome in ("invalid", "refused"):
            return
        self._prompt.labels(model).inc(record.prompt_tokens)
        self._tokens.labels(model).inc(record.tokens)
        if record.tpot_s is not None:
            self._tpot.labels(model).observe(record.tpot_s)
        if record.finished:
            self._e2e.labels(model).observe(record.e2e_s)

    def picture(self, state: NodeState) -> None:
        """Take what a new picture of the node tells once."""
        for model in state.models:
            self._begin_at_zero(model.name)
        for latency_s in state.decision_latencies_s:
            self._decisions.observe(latency_s)

    def _begin_at_zero(self, model: str) -> None:
        """Have all series of a model: one that begins with its first event hides it from rates."""
        if model in self._known:
            return
        self._known.add(model)
        for each in (self._ttft, self._tpot, self._e2e, self._prompt, self._tokens):
            each.labels(model)
        for outcome in OUTCOMES:
            self._requests.labels(model, outcome)
        for miss in MISSES:
            self._misses.labels(model, miss)

    def page(self) -> bytes:
        """Return all metrics as text, in the format of `CONTENT_TYPE`."""
        return generate_latest(self.registry)


class NodeCollector(Collector):
    """Reads the engine's last picture when Prometheus scrapes."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        """Return nothing: registering must not need a picture."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the node and of each model."""
        yield GaugeMetricFamily(
            "mmrl_ready", "Whether the engine serves.", float(self._engine.ready)
        )
        state = self._engine.state
        if state is None:
            return
        for name, text, attribute in NODE_GAUGES:
            yield GaugeMetricFamily(name, text, float(getattr(state, attribute)))
        for name, text, attribute in NODE_COUNTERS:
            yield CounterMetricFamily(name, text, float(getattr(state, attribute)))
        yield from self._by_kind(state)
        yield from self._by_model(state)

    @staticmethod
    def _by_kind(state: NodeState) -> Iterator[Metric]:
        fallbacks = CounterMetricFamily(
            "mmrl_fallbacks", "Decisions of the champion, by the policy's failure.", labels=["kind"]
        )
        for kind, count in state.fallbacks.items():
            fallbacks.add_metric([kind], count)
        yield fallbacks
        busy = CounterMetricFamily(
            "mmrl_link_busy_seconds", "Time the link was in use.", labels=["direction"]
        )
        busy.add_metric(["h2d"], state.h2d_busy_s)
        busy.add_metric(["d2h"], state.d2h_busy_s)
        yield busy
        policy = GaugeMetricFamily("mmrl_policy_info", "Which policy decides.", labels=["policy"])
        policy.add_metric([state.policy], 1)
        yield policy

    @staticmethod
    def _by_model(state: NodeState) -> Iterator[Metric]:
        gauge: Metric
        for name, text, attribute in MODEL_GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["model"])
            for model in state.models:
                gauge.add_metric([model.name], float(getattr(model, attribute)))
            yield gauge
        residency = GaugeMetricFamily(
            "mmrl_residency_ratio",
            "Share of pieces on the device, or wanted.",
            labels=["model", "of"],
        )
        for model in state.models:
            residency.add_metric([model.name, "landed"], model.landed / model.pieces)
            residency.add_metric([model.name, "target"], model.target / model.pieces)
        yield residency
        for name, text, attribute in MODEL_COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["model"])
            for model in state.models:
                counter.add_metric([model.name], float(getattr(model, attribute)))
            yield counter
        link = CounterMetricFamily(
            "mmrl_link_bytes", "Bytes over the link.", labels=["model", "kind"]
        )
        for model in state.models:
            for kind, attribute in LINK_KINDS.items():
                link.add_metric([model.name, kind], float(getattr(model, attribute)))
        yield link

"""`sustainable_rate`: the requests per second that a node's champion can just serve, simulated.

Load 1, as everywhere: there the slack rule reaches a goodput of .90. Found before the live runs, so
that one of them can be near saturation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmrl.deploy.node import LiveNode, ModelCosts, NodeNumbers
from mmrl.node.state import NODE, Nodes, Record
from mmrl.profiles.costs import CostModel
from mmrl.scenarios.calibrate import find_crossing, rule_goodput
from mmrl.workloads.generators import WorkloadSpec, sample_trace
from mmrl.workloads.trace import Trace

NODE_FIELDS: tuple[str, ...] = NODE.names or ()
EPISODES = 8
FIRST_SEED = 1_000_000  # none that a run is given by default
LIMITS = 1e-3, 1e3  # requests per second
DRAIN_S = 15.0
TYPICAL_TOKENS = 500, 150  # of prompt and output, for the first guess


def sustainable_rate(
    models: Sequence[ModelCosts],
    numbers: NodeNumbers,
    spec: WorkloadSpec,
    duration_s: float,
    episodes: int = EPISODES,
) -> float:
    """Return the mean rate of requests, all models together, at load 1.

    Args:
        models: The fleet.
        numbers: Of its node.
        spec: What is asked for.
        duration_s: Length of an episode; requests have some seconds more after it.
        episodes: How many are played at each rate that is tried.

    Raises:
        InputError: There is no such rate.
    """
    source = _Episodes(models, numbers, duration_s)
    names = tuple(f"m{m}" for m in range(len(models)))

    def goodput(rate_per_s: float) -> float:
        traces = [
            sample_trace(spec, names, rate_per_s, duration_s, FIRST_SEED + i)
            for i in range(episodes)
        ]
        source.capacity = max(map(len, traces))
        return rule_goodput(source, [{"trace": trace} for trace in traces])

    alone = [CostModel(model.profile).isolated_latency_s(*TYPICAL_TOKENS) for model in models]
    start = min(max(1.0 / float(np.mean(alone)), LIMITS[0]), LIMITS[1])
    return find_crossing("this fleet", goodput, lambda load, reached: None, start, LIMITS)[0]


class _Episodes:
    """Traces to a node, in the form from which a `Simulator` takes its episodes."""

    capacity = 0

    def __init__(
        self, models: Sequence[ModelCosts], numbers: NodeNumbers, duration_s: float
    ) -> None:
        self._node = LiveNode.of(models, numbers)
        self._node.state.horizon_ns = round((duration_s + DRAIN_S) * 1e9)
        self.decode_tables = self._node.decode_tables
        self.prefill_tables = self._node.prefill_tables
        self.max_models, self.full_verbs = len(models), numbers.full_verbs

    def draw(
        self,
        rng: np.random.Generator,
        node: Record,
        requests: Nodes,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Fill a node and its requests; nothing is random here."""
        assert options is not None
        trace: Trace = options["trace"]
        template = self._node.state
        template.n_requests = 0
        for row in zip(
            trace.arrival_ns.tolist(),
            trace.model.tolist(),
            trace.prompt_tokens.tolist(),
            trace.output_tokens.tolist(),
            strict=True,
        ):
            self._node.submit(*row)
        for field in NODE_FIELDS:
            node[field] = template[field]
        requests[: len(trace)] = self._node.requests[: len(trace)]

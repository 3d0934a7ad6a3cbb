"""Play whole episodes: rules in compiled code, any other policy batch by batch.

Episodes are named by split and index; the same name means the same arrivals for every policy, so
that policies are compared in pairs.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.metrics import EpisodeMetrics, episode_metrics
from mmrl.node.jit import jit
from mmrl.node.state import DISPATCHES, CostTable, Nodes
from mmrl.rules.base import Rule
from mmrl.rules.dispatch import suggest
from mmrl.scenarios.seeds import Split, episode_rng
from mmrl.sim.batch import ALL, Sampler, Simulator
from mmrl.sim.kernel import step

BATCH = 32  # episodes that are played side by side

Episode = tuple[Split, int]
# observations float32[N, D] and legal actions bool[N, A] -> actions int64[N]
BatchPolicy = Callable[[npt.NDArray[np.float32], npt.NDArray[np.bool_]], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class EpisodeResult:
    """How a policy did in one episode.

    Attributes:
        split: Split of the episode.
        index: Its index within the split.
        info: What the sampler drew (``EpisodeInfo``).
        metrics: What came of it.
    """

    split: Split
    index: int
    info: Any
    metrics: EpisodeMetrics


@jit
def run_nodes(
    number: int,
    params: npt.NDArray[np.float64],
    nodes: Nodes,
    requests: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
) -> None:
    """Let rule ``number`` drive each node to the end of its episode."""
    for i in range(len(nodes)):
        s = nodes[i]
        r = requests[i]
        while not s.done:
            action = suggest(number, s, r, decode_tables, prefill_tables, params)
            step(s, r, decode_tables, prefill_tables, action)


@jit
def _suggest_all(
    number: int,
    params: npt.NDArray[np.float64],
    nodes: Nodes,
    requests: Nodes,
    decode_tables: CostTable,
    prefill_tables: CostTable,
    actions: npt.NDArray[np.int64],
) -> None:
    for i in range(len(nodes)):
        actions[i] = 0
        if not nodes[i].done:
            actions[i] = suggest(
                number, nodes[i], requests[i], decode_tables, prefill_tables, params
            )


def run_rule(simulator: Simulator, rule: Rule) -> None:
    """Let a rule drive all nodes of a simulator to the ends of their episodes, in compiled code.

    The nodes are reset before; the dispatch rule of the rule is set here.
    """
    rule.prepare(simulator.nodes)
    run_nodes(
        rule.number,
        rule.params,
        simulator.nodes,
        simulator.requests,
        simulator.decode_tables,
        simulator.prefill_tables,
    )


def suggestions(
    simulator: Simulator, rule: Rule, actions: npt.NDArray[np.int64], rows: slice = ALL
) -> None:
    """Write what a rule would do now at the nodes of a slice into ``actions``, int64[K].

    That is WAIT where the episode is done.
    """
    # numba takes a plain array much faster than a recarray
    nodes: Any = np.asarray(simulator.nodes)[rows]
    requests: Any = np.asarray(simulator.requests)[rows]
    tables = simulator.decode_tables, simulator.prefill_tables
    _suggest_all(rule.number, rule.params, nodes, requests, *tables, actions)


def mark_suggestions(
    simulator: Simulator,
    rule: Rule,
    observations: npt.NDArray[np.float32],
    first: int,
    rows: slice = ALL,
) -> None:
    """Mark what a rule would do now, one-hot over the actions, behind observations.

    Args:
        simulator: The nodes.
        rule: The rule.
        observations: float32[K, D], zero from ``first`` on.
        first: Where the block begins.
        rows: The nodes, K of them.
    """
    count = len(observations)
    actions = np.empty(count, np.int64)
    suggestions(simulator, rule, actions, rows)
    observations[np.arange(count), first + actions] = 1.0


def run_policy(simulator: Simulator, policy: BatchPolicy, champion: Rule | None = None) -> None:
    """Let a policy drive all nodes of a simulator to the ends of their episodes.

    Args:
        simulator: Its nodes are reset.
        policy: Gives actions int64[N] for observations and masks; what it gives for a finished
            node is ignored.
        champion: Where given, its suggestion follows the observation, one-hot over the actions.
    """
    n, size, count = simulator.num_envs, simulator.observation_size, simulator.num_actions
    observations = np.zeros((n, size + (count if champion else 0)), np.float32)
    masks = np.zeros((n, count), np.bool_)
    while not simulator.done.all():
        simulator.observe(observations)
        simulator.masks(masks)
        if champion is not None:
            mark_suggestions(simulator, champion, observations, size)
        simulator.step(np.asarray(policy(observations, masks), np.int64))


def rollout(
    policy: Rule | BatchPolicy,
    sampler: Sampler,
    episodes: Sequence[Episode],
    options: Mapping[str, Any] | None = None,
    *,
    dispatch: str | None = None,
    champion: Rule | None = None,
    report: Callable[[int], None] | None = None,
) -> list[EpisodeResult]:
    """Play episodes and measure them.

    Args:
        policy: A rule, or a function of observations float32[N, D] and masks bool[N, A].
        sampler: Where episodes come from.
        episodes: (split, index) of each.
        options: Handed to the sampler's ``draw``.
        dispatch: ``"rr"``, ``"edf"`` or ``"las"`` in place of the scenario's; a rule's own
            comes before it.
        champion: For a function only, see ``run_policy``.
        report: Told how many episodes have been played since it was last told.

    Returns:
        One result per episode, in their order; it does not depend on how they are batched.

    Warns:
        RuntimeWarning: The sampler's table had no room for some of the requests.
    """
    simulator = Simulator(sampler, min(BATCH, len(episodes))) if episodes else None
    results: list[EpisodeResult] = []
    for start in range(0, len(episodes), BATCH):
        batch = episodes[start : start + BATCH]
        assert simulator is not None
        simulator.nodes.done = 2  # the last batch may be smaller
        for i, (split, index) in enumerate(batch):
            simulator.reset(i, episode_rng(split, index), options)
        if dispatch is not None:
            simulator.nodes.dispatch = DISPATCHES.index(dispatch)
        if isinstance(policy, Rule):
            run_rule(simulator, policy)
        else:
            run_policy(simulator, policy, champion)
        for i, (split, index) in enumerate(batch):
            metrics = episode_metrics(simulator.nodes[i], simulator.requests[i])
            results.append(EpisodeResult(split, index, simulator.infos[i], metrics))
        if report is not None:
            report(len(batch))
    dropped = sum(getattr(result.info, "dropped", 0) for result in results)
    if dropped:  # not an error: hours of a training or an evaluation stand behind it
        warnings.warn(
            f"{dropped:,} requests were left out: episodes have more than the "
            f"{sampler.capacity:,} that the sampler expected",
            RuntimeWarning,
            stacklevel=2,
        )
    return results

"""Policies play the same episodes, spread over processes, and are measured.

The work is cut into pieces that do not depend on how many processes there are, so that the results
do not either. ``mmrl.agents.results`` makes tables of what was measured.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.agents.contenders import Contender
from mmrl.agents.export import ExportedPolicy, load_policy
from mmrl.agents.pool import side_by_side
from mmrl.agents.runner import PolicyRunner
from mmrl.agents.windows import Windows, cut, fit, label
from mmrl.bounds import Lookahead
from mmrl.errors import InputError
from mmrl.metrics import episode_metrics, request_latencies
from mmrl.node.actions import VERBS
from mmrl.node.state import UNARRIVED, Nodes, Record
from mmrl.rollout import run_rule
from mmrl.rules.dispatch import act
from mmrl.scenarios.mixture import ScenarioSampler
from mmrl.scenarios.registry import get_scenario
from mmrl.scenarios.seeds import Split, episode_rng
from mmrl.sim.batch import Simulator
from mmrl.workloads.readers import read_trace
from mmrl.workloads.trace import Trace

Floats = npt.NDArray[np.float32]
Decide = Callable[[Record, Nodes], int]
SIDE_BY_SIDE = 50  # episodes that a process plays at a time ...
PLANNED = 5  # ... where they take seconds each
LEAST_TIMED = 20  # decisions whose time tells something
LATENCIES = ("ttft_s", "tpot_s", "norm_latency")


@dataclass(frozen=True)
class Board:
    """One scenario, or one trace on a scenario: what policies are compared on.

    Attributes:
        name: How it is called in tables.
        scenario: Name or path of the scenario.
        trace: Name of the trace; empty where the scenario's own workload is played.
        windows: For each load, the episodes of the trace.
    """

    name: str
    scenario: str
    trace: str = ""
    windows: dict[float, Windows] = field(default_factory=dict)


@dataclass(frozen=True)
class Piece:
    """Some episodes of one policy at one load: what a process does at a time."""

    board: str
    scenario: str
    load: float
    split: Split
    episodes: tuple[int, ...]
    contender: Contender
    traces: tuple[Trace, ...] = ()


@dataclass(frozen=True)
class Played:
    """What came of a piece.

    Attributes:
        piece: The piece.
        episodes: A row per episode.
        models: A row per episode and model.
        latencies: Of all requests, float32[n] for each of `LATENCIES`.
    """

    piece: Piece
    episodes: list[dict[str, Any]]
    models: list[dict[str, Any]]
    latencies: dict[str, Floats]


def make_boards(
    scenarios: Sequence[str], loads: Sequence[float], episodes: int, traces: Sequence[Path] = ()
) -> list[Board]:
    """Read the scenarios, and fit the trace to each of them where there is one.

    Args:
        scenarios: Names or paths.
        loads: Loads at which they will be played.
        episodes: The most windows that are cut from a trace.
        traces: Files of one trace, each a service where their format has no column for it.

    Raises:
        InputError: A scenario or trace is wrong, or they do not suit each other.
    """
    _sampler.cache_clear()  # a file may have changed since the last evaluation
    _policy.cache_clear()
    raw = read_trace(list(traces)) if traces else None
    boards = []
    for path in scenarios:
        sampler = _sampler(path)
        name = sampler.scenario.name
        if raw is None:
            boards.append(Board(name, path))
            continue
        fitted = fit(raw, sampler)
        windows = {load: cut(fitted, sampler, load, episodes) for load in loads}
        boards.append(Board(f"{name}, {label(traces)}", path, label(traces), windows))
    names = [board.name for board in boards]
    if len(set(names)) < len(names):
        raise InputError(f"a scenario is named twice: {', '.join(names)}", "name each once")
    return boards


def check_verbs(boards: Sequence[Board], contenders: Sequence[Contender]) -> None:
    """Refuse a learned policy whose verbs are not those of a scenario.

    Raises:
        InputError: There is one.
    """
    for contender in contenders:
        if contender.path is not None:
            for board in boards:
                PolicyRunner(_policy(contender.path), Simulator(_sampler(board.scenario), 1))


def pieces(
    boards: Sequence[Board],
    contenders: Sequence[Contender],
    loads: Sequence[float],
    episodes: int,
    split: Split,
) -> list[Piece]:
    """Cut an evaluation into pieces of work, the slow ones first."""
    found = []
    for board in boards:
        scenario = _sampler(board.scenario).scenario.name
        for load in loads:
            traces = board.windows[load].traces if board.trace else ()
            count = len(traces) or episodes
            for contender in contenders:
                if not contender.plays(scenario):
                    continue
                size = PLANNED if contender.planner else SIDE_BY_SIDE
                for start in range(0, count, size):
                    indices = tuple(range(start, min(start + size, count)))
                    part = traces[start : start + size]
                    found.append(
                        Piece(board.name, board.scenario, load, split, indices, contender, part)
                    )
    return sorted(found, key=lambda piece: bool(piece.contender.rule))


def play_all(
    work: Sequence[Piece], workers: int, report: Callable[[int], None] | None = None
) -> list[Played]:
    """Play pieces, several at a time.

    Args:
        work: What to play.
        workers: How many processes; 1 plays in this one.
        report: Told how many episodes have been played since it was last told.

    Returns:
        What came of each, in the order of work.
    """
    played: dict[int, Played] = {}
    for k, part in side_by_side(play, work, workers):
        played[k] = part
        if report is not None:
            report(len(part.episodes))
    return [played[k] for k in range(len(work))]


def play(piece: Piece) -> Played:
    """Play the episodes of a piece side by side and measure them."""
    simulator = start(piece)
    drive(simulator, piece.contender, piece.scenario)
    key = {"board": piece.board, "load": piece.load, "policy": piece.contender.name}
    episodes, models = [], []
    latencies: dict[str, list[Floats]] = {name: [] for name in LATENCIES}
    for i, index in enumerate(piece.episodes):
        node, requests, info = simulator.nodes[i], simulator.requests[i], simulator.infos[i]
        metrics = episode_metrics(node, requests)
        waits = int(node.decisions) - int(node.actions.sum()) - int(node.illegal_actions)
        verbs = dict(zip(VERBS, node.actions.tolist(), strict=True))
        episodes.append(
            {
                **key,
                "episode": index,
                "platform": info.platform,
                "drawn_load": info.load,
                "rate_per_s": info.rate_per_s,
                **metrics.values,
                "verb_wait": waits,
                **{f"verb_{verb}": count for verb, count in verbs.items()},
            }
        )
        for m, model in enumerate(info.model_names):
            values = {name: float(column[m]) for name, column in metrics.models.items()}
            models.append({**key, "episode": index, "model": model, **values})
        arrived = requests[: int(node.n_requests)]
        arrived = arrived[arrived["state"] != UNARRIVED]
        ttft, tpot, e2e = request_latencies(node, arrived)
        norm = e2e * 1e9 / arrived["isolated_ns"]
        for name, values in zip(LATENCIES, (ttft, tpot, norm), strict=True):
            latencies[name].append(values.astype(np.float32))
    return Played(
        piece, episodes, models, {name: np.concatenate(part) for name, part in latencies.items()}
    )


def start(piece: Piece) -> Simulator:
    """Return a simulator with the episodes of a piece at their first decisions."""
    sampler = _sampler(piece.scenario)
    longest = max((len(trace) for trace in piece.traces), default=0)
    simulator = Simulator(sampler, len(piece.episodes), longest)
    for i, index in enumerate(piece.episodes):
        options = {"trace": piece.traces[i]} if piece.traces else {"load": piece.load}
        simulator.reset(i, episode_rng(piece.split, index), options)
    return simulator


def drive(simulator: Simulator, contender: Contender, scenario: str) -> None:
    """Let a contender drive all nodes to the ends of their episodes."""
    name = _sampler(scenario).scenario.name
    if contender.rule:
        run_rule(simulator, contender.rule_for(name))
        return
    if contender.planner:
        Lookahead(contender.planner_for(name), simulator).run()
        return
    runner = runner_for(simulator, contender)
    while not simulator.done.all():
        simulator.step(runner.act())


@cache
def _sampler(scenario: str) -> ScenarioSampler:
    return get_scenario(scenario).sampler()


@cache
def _policy(path: Path) -> ExportedPolicy:
    return load_policy(path)


def runner_for(simulator: Simulator, contender: Contender) -> PolicyRunner:
    """Return a learned policy at work on nodes that have been reset."""
    assert contender.path is not None
    policy = _policy(contender.path)
    if policy.rule is not None:
        policy.rule.prepare(simulator.nodes)
    return PolicyRunner(policy, simulator)


def decider(simulator: Simulator, contender: Contender, scenario: str) -> Decide:
    """Return how a contender decides for one node at a time, as it would when it serves.

    Args:
        simulator: Its one node has been reset; it is prepared for the contender here.
        contender: Who decides.
        scenario: Name or path of the scenario.
    """
    tables = simulator.decode_tables, simulator.prefill_tables
    name = _sampler(scenario).scenario.name
    if contender.rule:
        rule = contender.rule_for(name)
        rule.prepare(simulator.nodes)
        return lambda node, requests: act(rule, node, requests, *tables)
    if contender.planner:
        lookahead = Lookahead(contender.planner_for(name), simulator)
        return lambda node, requests: lookahead.act(0)
    runner = runner_for(simulator, contender)
    return lambda node, requests: int(runner.act()[0])


def decision_time_us(board: Board, load: float, contender: Contender, most: int = 300) -> float:
    """Return the median time of one decision for one node on this machine, in microseconds.

    NaN where an episode has too few decisions to tell.

    Args:
        board: Where.
        load: At which load.
        contender: Who decides.
        most: How many decisions are timed at most, a tenth of them to warm up.
    """
    traces = board.windows[load].traces[:1] if board.trace else ()
    simulator = start(Piece(board.name, board.scenario, load, "test", (0,), contender, traces))
    node, requests = simulator.nodes[0], simulator.requests[0]
    decide = decider(simulator, contender, board.scenario)
    times_s: list[float] = []
    while not node.done and len(times_s) < most:
        before = time.perf_counter()
        action = decide(node, requests)
        times_s.append(time.perf_counter() - before)
        simulator.step(np.array([action]))
    if len(times_s) < LEAST_TIMED:  # the first ones compile, and are most of them
        return float("nan")
    return float(np.median(times_s[len(times_s) // 10 :])) * 1e6

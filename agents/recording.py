"""Record episodes as policies play them, as small as a report needs them.

From the samples of ``mmrl.envs.timeline``: which models hold device memory, and who waits. Of a
learned policy also, at each decision, its probabilities and what the champion would have done.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mmrl.agents.contenders import CHAMPION, Contender, champion_for, resolve
from mmrl.agents.play import (
    Board,
    Decide,
    Piece,
    check_verbs,
    decider,
    make_boards,
    runner_for,
    start,
)
from mmrl.envs.timeline import EpisodeLog, Timeline, record_episode
from mmrl.node.actions import verb_names
from mmrl.rollout import suggestions
from mmrl.scenarios.registry import get_scenario
from mmrl.scenarios.seeds import Split
from mmrl.sim.batch import Simulator

if TYPE_CHECKING:
    from mmrl.agents.results import Results

RECORDED = 3  # episodes of a board
LEARNED = 4  # policies of a board that are recorded, beside the best rule and the champion
LIKELIEST = 5  # actions whose probabilities are kept
LEAST = 0.005  # and the least probability that is
OUT, LOADING, PARTIAL, RESIDENT = "out", "loading", "partial", "resident"


def record_all(
    results: "Results",
    boards: Sequence[Board],
    contenders: Sequence[Contender],
    load: float,
    split: Split,
    count: int = RECORDED,
) -> list[dict[str, Any]]:
    """Record some episodes of each board: learned policies, the best rule and the champion.

    Args:
        results: What came of the boards.
        boards: What was played on.
        contenders: Who played.
        load: At which load.
        split: Of the episodes.
        count: How many episodes of each board: the first; those where the first learned policy
            gains most over the best rule, and loses most; and the next ones.
    """
    by_name = {contender.name: contender for contender in contenders}
    found = []
    for board, about in zip(boards, results.summary["boards"], strict=True):
        rows = [row for row in about["rows"] if row["load"] == load]
        names = _recorded(rows)
        for index, why in _episodes(results, about, load, rows, count).items():
            for name in names:
                recorded = record(board, load, by_name[name], split, index)
                found.append(recorded | {"why": why})
    return found


def play_episode(
    scenario: str, policy: str, load: float = 1.0, split: Split = "test", index: int = 0
) -> EpisodeLog:
    """Play an episode of a scenario and record all of it.

    Args:
        scenario: Name or path.
        policy: As in ``mmrl.agents.contenders``; of a run the best one.
        load: At which load.
        split: Whose random streams.
        index: Which episode of the split.

    Raises:
        InputError: A name or number is wrong, or the policy has not the scenario's verbs.
    """
    (board,) = make_boards([scenario], [load], 1)
    contender = resolve([policy], [board.name])[0]
    check_verbs([board], [contender])
    simulator = start(Piece(board.name, scenario, load, split, (index,), contender))
    return record_episode(simulator, decider(simulator, contender, scenario))


def _recorded(rows: list[dict[str, Any]]) -> list[str]:
    """Name who is recorded; two at least where there are two."""
    rows = sorted(rows, key=lambda row: row["goodput"] or 0.0, reverse=True)
    learned = [row["policy"] for row in rows if row["kind"] == "learned"][:LEARNED]
    best = [row["policy"] for row in rows if row["is_best_rule"]]
    champion = [row["policy"] for row in rows if row["policy"] == CHAMPION]
    chosen = list(dict.fromkeys([*learned, *best, *champion]))
    others = [row["policy"] for row in rows if row["policy"] not in chosen]
    return [*chosen, *others[: max(0, 2 - len(chosen))]]


def _episodes(
    results: "Results",
    about: dict[str, Any],
    load: float,
    rows: list[dict[str, Any]],
    count: int,
) -> dict[int, str]:
    """Choose episodes of a board, and say why each was chosen."""
    table = results.episodes
    table = table[(table.board == about["name"]) & (table.load == load)]
    goodput = table.pivot(index="episode", columns="policy", values="goodput")
    learned = [row["policy"] for row in rows if row["kind"] == "learned"]
    best = [row["policy"] for row in rows if row["is_best_rule"]]
    first = int(goodput.index.min())
    chosen = {first: "the first, not chosen for its outcome"}
    if learned and best:
        gains = (goodput[learned[0]] - goodput[best[0]]).dropna().sort_values(kind="stable")
        if len(gains):
            ends = {int(gains.index[-1]): "gain", int(gains.index[0]): "loss"}
            for index, end in ends.items():
                if index != first and gains[index] * (1 if end == "gain" else -1) > 0:
                    chosen[index] = f"largest {end} of {learned[0]} over {best[0]}"
    chosen |= {int(k): "in order" for k in goodput.index if int(k) not in chosen}
    return dict(list(chosen.items())[:count])


def record(
    board: Board, load: float, contender: Contender, split: Split, index: int = 0
) -> dict[str, Any]:
    """Play an episode of a board and return its timeline.

    Returns:
        ``models``: names; ``spans``: [model, from_s, to_s, state] for each stretch of time in which
        a model is loading, partly or wholly on the device; ``times_s`` and ``waiting``: queued
        requests of all models; ``queues``: for each model [times_s, queued] where that changes;
        ``decisions``, see `Decisions.columns`; ``end_s``; and whose it is.
    """
    traces = board.windows[load].traces[index : index + 1] if board.trace else ()
    simulator = start(Piece(board.name, board.scenario, load, split, (index,), contender, traces))
    decisions = Decisions(simulator, contender, board.scenario)
    timeline = record_episode(simulator, decisions.decide).timeline
    times_s, waiting = _changes(timeline.time_s, timeline.queued.sum(axis=1))
    return {
        "board": board.name,
        "load": load,
        "policy": contender.name,
        "episode": f"{split} {index}",
        "models": list(timeline.model_names),
        "end_s": float(timeline.time_s[-1]),
        "spans": _all_spans(timeline),
        "times_s": times_s,
        "waiting": waiting,
        "queues": [list(_changes(timeline.time_s, queue)) for queue in timeline.queued.T],
        "decisions": decisions.columns(),
    }


class Decisions:
    """Decides for one node as a contender does, and notes each decision.

    Args:
        simulator: Its one node has been reset; it is prepared for the contender here.
        contender: Who decides.
        scenario: Name or path of the scenario.
    """

    def __init__(self, simulator: Simulator, contender: Contender, scenario: str) -> None:
        self._simulator = simulator
        self._verbs = verb_names(bool(simulator.sampler.full_verbs))
        self._time_s: list[float] = []
        self._actions: list[int] = []
        self._champion: list[int] = []
        self._likeliest: list[list[list[float]]] = []
        if contender.path is None:
            self._decide: Decide = decider(simulator, contender, scenario)
            return
        self._runner = runner_for(simulator, contender)
        self._rule = self._runner.policy.rule or champion_for(get_scenario(scenario).name)
        self._decide = self._learned

    def decide(self, node: Any, requests: Any) -> int:
        """Return what the contender does now."""
        self._time_s.append(round(float(node.now_ns) * 1e-9, 3))
        action = self._decide(node, requests)
        self._actions.append(action)
        return action

    def columns(self) -> dict[str, Any]:
        """Return all decisions.

        Returns:
            ``verbs``: action 0 is to wait, ``1 + m * len(verbs) + v`` is verb v on model m;
            ``time_s`` and ``action`` of each decision; of a learned policy ``champion``, the action
            of the rule it builds on (or else of the champion), and ``likeliest``: pairs of action
            and probability, the likeliest first.
        """
        found: dict[str, Any] = {
            "verbs": list(self._verbs),
            "time_s": self._time_s,
            "action": self._actions,
        }
        if self._champion:
            found |= {"champion": self._champion, "likeliest": self._likeliest}
        return found

    def _learned(self, node: Any, requests: Any) -> int:
        runner = self._runner
        action = int(runner.act()[0])  # reads the node
        chances = runner.policy.probabilities(runner.observations, runner.masks)[0]
        order = np.argsort(-chances, kind="stable")[:LIKELIEST].tolist()
        self._likeliest.append(
            [[k, round(float(chances[k]), 3)] for k in order if chances[k] >= LEAST]
        )
        suggested = np.empty(1, np.int64)
        suggestions(self._simulator, self._rule, suggested)
        self._champion.append(int(suggested[0]))
        return action


def _changes(
    time_s: npt.NDArray[np.float64], values: npt.NDArray[np.int64]
) -> tuple[list[float], list[int]]:
    """Return when a value changes and to what, and the last one once more at the end."""
    changed = np.flatnonzero(np.diff(values, prepend=-1, append=-1)[:-1])
    times_s = [*time_s[changed].round(3).tolist(), round(float(time_s[-1]), 3)]
    return times_s, [*values[changed].tolist(), int(values[-1])]


def _all_spans(timeline: Timeline) -> list[list[Any]]:
    columns = (timeline.landed, timeline.target, timeline.loaded_s)
    return [
        span
        for m in range(len(timeline.model_names))
        for span in spans(m, timeline.time_s, *(column[:, m] for column in columns))
    ]


def spans(
    m: int,
    time_s: npt.NDArray[np.float64],
    landed: npt.NDArray[np.float64],
    target: npt.NDArray[np.float64],
    loaded_s: npt.NDArray[np.float64],
) -> list[list[Any]]:
    """Join the samples at which model ``m`` is in the same state.

    Args:
        m: The model.
        time_s: float64[T], when the samples were taken.
        landed: float64[T], weights on the device, of the model.
        target: float64[T], weights wanted, of the model.
        loaded_s: float64[T], when the last load ended as of each sample; -1 before.

    Returns:
        [m, from_s, to_s, state] for each stretch of time in which the model is not out.
    """
    found: list[list[Any]] = []
    state, since = OUT, 0.0
    for new, now, loaded in zip(_states(landed, target), time_s, loaded_s, strict=True):
        if new == state:
            continue
        # A load may end between two samples: the node knows when it did.
        instant = float(loaded if state == LOADING and since < loaded < now else now)
        if state != OUT:
            found.append([m, round(since, 3), round(instant, 3), state])
        state, since = new, instant
    if state != OUT:
        found.append([m, round(since, 3), round(float(time_s[-1]), 3), state])
    return found


def _states(
    landed: npt.NDArray[np.float64], target: npt.NDArray[np.float64]
) -> npt.NDArray[np.str_]:
    """Name the state of a model at each sample."""
    there = np.where(landed < 1, PARTIAL, RESIDENT)
    return np.where(landed < target, LOADING, np.where(landed > 0, there, OUT))

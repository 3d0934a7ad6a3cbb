"""`evaluate`: compare policies on the same arrivals; ``mmrl evaluate`` prints what it finds.

>>> results = evaluate(["slack", "lru", "runs/mine"], ["demo"], episodes=100)
>>> results.write(Path("runs/mine/evaluation"))
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from mmrl.agents.contenders import resolve
from mmrl.agents.play import check_verbs, decision_time_us, make_boards, pieces, play_all
from mmrl.agents.provenance import provenance
from mmrl.agents.recording import RECORDED, record_all
from mmrl.agents.results import Results, collect
from mmrl.errors import InputError
from mmrl.files import files_hash
from mmrl.scenarios.registry import get_scenario
from mmrl.scenarios.seeds import Split

# Told: what is being done, how much of it is done, and how much there is.
Watch = Callable[[str, int, int], None]


def evaluate(
    policies: Sequence[str],
    scenarios: Sequence[str],
    *,
    traces: Sequence[Path] = (),
    loads: Sequence[float] = (1.0,),
    episodes: int = 100,
    split: Split = "test",
    workers: int = 1,
    seed: int = 0,
    record: int = RECORDED,
    watch: Watch | None = None,
) -> Results:
    """Let policies play the same episodes and compare them.

    Args:
        policies: Rules, run folders and exported policies, see ``mmrl.agents.contenders``.
        scenarios: Names or paths.
        traces: Files of one recorded trace to play in place of each scenario's workload.
        loads: Loads at which everything is played; 1.0, or else the highest, is the main one.
        episodes: How many per scenario and load; of a trace as many as it has, up to this.
        split: Whose random streams.
        workers: How many processes.
        seed: Of the bootstrap; the episodes are fixed by split and index.
        record: How many episodes of each board are kept as timelines, see `record_all`.
        watch: Told of progress.

    Raises:
        InputError: A policy, scenario, trace or number is wrong.
    """
    if not policies or not scenarios or not loads:
        raise InputError("nothing to evaluate", "name policies, scenarios and loads")
    if episodes < 1 or workers < 1:
        raise InputError(f"{episodes} episodes on {workers} processes", "ask for 1 at least")
    watch = watch or (lambda what, done, total: None)
    watch("reading", 0, 0)
    chosen = [get_scenario(name) for name in scenarios]
    contenders = resolve(policies, [scenario.name for scenario in chosen])
    wanted = tuple(dict.fromkeys(loads))
    boards = make_boards(scenarios, wanted, episodes, traces)
    check_verbs(boards, contenders)
    work = pieces(boards, contenders, wanted, episodes, split)
    total = sum(len(piece.episodes) for piece in work)
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        watch("playing", done, total)

    watch("playing", 0, total)
    played = play_all(work, workers, report)
    watch("timing decisions", 0, 0)
    main = 1.0 if 1.0 in wanted else max(wanted)
    decision_us = {
        (board.name, contender.name): decision_time_us(board, main, contender)
        for board, scenario in zip(boards, chosen, strict=True)
        for contender in contenders
        if contender.plays(scenario.name)
    }
    about = provenance(
        chosen,
        split=split,
        episodes=episodes,
        bootstrap_seed=seed,
        traces=[str(path) for path in traces],
        trace_sha256=files_hash(traces) if traces else None,
    )
    results = collect(boards, contenders, played, decision_us, [], about, seed)
    watch("recording timelines", 0, 0)
    results.timelines = record_all(results, boards, contenders, main, split, record)
    return results

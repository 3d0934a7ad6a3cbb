"""`demo`: train a policy for some minutes, evaluate it on unseen episodes and on a trace, report.

Everything stands in one folder: the run, its two evaluations and the report. A demo that was
stopped goes on where it stopped, and what is done already is not done again.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import mmrl
from mmrl.agents import runs
from mmrl.agents.config import UNLIMITED_STEPS, build_config
from mmrl.agents.contenders import CHAMPION
from mmrl.agents.evaluate import Watch, evaluate
from mmrl.agents.export import WEIGHTS
from mmrl.agents.report import write_report
from mmrl.agents.results import Results, check_place, is_results
from mmrl.errors import InputError
from mmrl.files import refuse_foreign, write_json
from mmrl.workloads.readers import read_trace

SCENARIO = "demo"
TRACE = Path(mmrl.__file__).parent / "data" / "demo_trace.csv"
RULES = (CHAMPION, "partial@tuned", "gdsf", "lru", "static", "full-swap")
LOADS = (0.7, 1.0, 1.3)
MARK = "demo.json"  # says that a folder is a demo's, and how long it has trained
ENVS = 128  # half as many as elsewhere: more updates in few minutes
EVAL_EVERY = 500_000
EVAL_EPISODES = 64


@dataclass(frozen=True)
class Show:
    """How the demo tells what it does.

    Attributes:
        say: Prints a line.
        evaluation: Shows an evaluation's progress.
    """

    say: Callable[[str], None]
    evaluation: Callable[[], AbstractContextManager[Watch]]


@dataclass(frozen=True)
class Demo:
    """What a demo has made.

    Attributes:
        run: The run folder.
        unseen: Evaluation on unseen episodes.
        traced: Evaluation on the trace.
        report: The page.
    """

    run: Path
    unseen: Results
    traced: Results
    report: Path


def demo(
    out: Path,
    minutes: float,
    traces: Sequence[Path],
    show: Show,
    *,
    episodes: int = 100,
    workers: int = 2,
) -> Demo:
    """Train, evaluate and report.

    Args:
        out: Folder for everything.
        minutes: How long to train.
        traces: Files of the trace; none for the one that mmrl ships.
        show: Told what is being done.
        episodes: How many an evaluation plays at each load.
        workers: Processes of an evaluation.

    Raises:
        InputError: The folder holds something else, or the trace cannot be read.
        KeyboardInterrupt: After Ctrl-C; the next call goes on.
    """
    traces = list(traces) or [TRACE]
    read_trace(traces)  # says now rather than after the training what is wrong with it
    _claim(out)
    run = out / "ppo"
    show.say(f"1/4 Training for {minutes:g} min on scenario '{SCENARIO}'")
    _train(out, run, minutes * 60, show)
    show.say(f"2/4 Evaluating on {episodes} unseen episodes at loads {', '.join(map(str, LOADS))}")
    unseen = _evaluated(out / "evaluation", run, [], LOADS, episodes, workers, show)
    show.say(f"3/4 Evaluating on {', '.join(path.name for path in traces)}")
    traced = _evaluated(out / "evaluation-trace", run, traces, (1.0,), episodes, workers, show)
    show.say("4/4 Writing the report")
    report = write_report([out / "evaluation", out / "evaluation-trace"], out / "report")
    return Demo(run, unseen, traced, report)


def _claim(out: Path) -> None:
    """Mark a new folder as a demo's; refuse one that holds something else."""
    if (out / MARK).is_file():
        return
    refuse_foreign(out, False, "demo")
    write_json(out / MARK, {"trained_s": 0.0})


def _train(out: Path, run: Path, wanted_s: float, show: Show) -> None:
    """Train for what is left of the wanted time."""
    from mmrl.agents.progress import ProgressBar
    from mmrl.agents.train import resume, train

    trained_s = float(json.loads((out / MARK).read_text("utf-8"))["trained_s"])
    left_s = wanted_s - trained_s
    if left_s < 1:
        show.say(f"    done before; to train anew, remove {run.parent}")
        return
    if not (run / runs.STATE).is_file():
        shutil.rmtree(run, ignore_errors=True)  # stopped before there was anything to go on from
    else:
        show.say(f"    going on after {trained_s:.0f} s")
    _warm_up()
    began_s = time.monotonic()
    with ProgressBar(UNLIMITED_STEPS, left_s) as bar:
        if run.exists():
            resume(run, UNLIMITED_STEPS, left_s, bar)
        else:
            config = build_config(
                scenarios=(SCENARIO,),
                steps=UNLIMITED_STEPS,
                time_s=left_s,
                envs=ENVS,
                eval_every=EVAL_EVERY,
                eval_episodes=EVAL_EPISODES,
                name=run.name,
                out=out,
            )
            train(config, bar)
    took_s = time.monotonic() - began_s
    write_json(out / MARK, {"trained_s": trained_s + min(left_s, took_s)})
    if took_s < left_s:  # a training that Ctrl-C stops saves and returns
        show.say("    stopped; mmrl demo goes on from here")
        raise KeyboardInterrupt


def _warm_up() -> None:
    """Compile what a training needs, so that the clock of the training measures training."""
    from mmrl.agents.train import train

    with tempfile.TemporaryDirectory() as folder:
        config = build_config(
            scenarios=(SCENARIO,),
            steps=64,
            envs=16,
            rollout_steps=4,
            eval_episodes=2,
            name="warm-up",
            out=folder,
        )
        train(config)


def _evaluated(
    folder: Path,
    run: Path,
    traces: Sequence[Path],
    loads: Sequence[float],
    episodes: int,
    workers: int,
    show: Show,
) -> Results:
    """Return an evaluation of the run, read where it has been done before."""
    kept = _kept(folder, run, traces, episodes)
    if kept is not None:
        show.say(f"    done before, in {folder}")
        return kept
    check_place(folder)
    with show.evaluation() as watch:
        results = evaluate(
            [str(run), *RULES],
            [SCENARIO],
            traces=traces,
            loads=loads,
            episodes=episodes,
            workers=workers,
            watch=watch,
        )
    results.write(folder)
    return results


def _kept(folder: Path, run: Path, traces: Sequence[Path], episodes: int) -> Results | None:
    """Return an evaluation that was made of the present policy in the same way, if there is one."""
    policy = run / runs.BEST / WEIGHTS
    if not is_results(folder):
        return None
    try:
        results = Results.read(folder)
    except InputError:
        return None
    about = results.summary["provenance"]
    wanted = {"episodes": episodes, "traces": [str(path) for path in traces]}
    fresh = (folder / "summary.json").stat().st_mtime >= max(
        path.stat().st_mtime for path in (policy, *traces)
    )
    same = all(about[key] == value for key, value in wanted.items())
    return results if fresh and same and about["versions"]["mmrl"] == mmrl.__version__ else None

"""`train`: one run of PPO from a configuration to a folder, interruptible at any time.

The loop is Stable-Baselines3's; `RunCallback` (in `mmrl.agents.callback`) evaluates, writes and
stops between two iterations. Everything random hangs on the seed, and a run that was stopped
continues to the same result, bit for bit, as one that was not (unless it ends by the clock).
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch as th
from stable_baselines3.common.logger import KVWriter, Logger, TensorBoardOutputFormat

from mmrl.agents import runs
from mmrl.agents.callback import Progress, RunCallback
from mmrl.agents.config import UNLIMITED_STEPS, TrainConfig
from mmrl.agents.export import ExportedPolicy, PriorRule, load_policy
from mmrl.agents.metrics_log import MetricsLog
from mmrl.agents.nodes import NodePlan, PlanNodes, TrainingNodes
from mmrl.agents.policy import BETA, EquivariantPolicy
from mmrl.agents.ppo import EventTimePPO
from mmrl.agents.processes import NodeProcesses
from mmrl.agents.state import go_on_from, read_state, restore
from mmrl.errors import InputError
from mmrl.files import write_json
from mmrl.rules import Rule, tuned_rule
from mmrl.rules.registry import ANY_FLEET
from mmrl.scenarios.registry import get_scenario
from mmrl.scenarios.schema import Scenario

CRITIC_FIRST = 8  # iterations until a fresh critic knows what the policy is worth
LEARNING_RATE = 4e-3
LEARNING_RATE_ON = 1e-3  # of a policy to go on from


def train(config: TrainConfig, progress: Progress | None = None) -> Path:
    """Train a policy.

    Args:
        config: What and how.
        progress: Told how it goes, for a progress bar.

    Returns:
        The folder of the run. After Ctrl-C it holds everything to continue.

    Raises:
        InputError: A scenario or rule is unknown, a setting is wrong, there is no such device, or
            the run exists.
    """
    check_device(config)
    scenarios = [get_scenario(name) for name in config.scenarios]
    start = load_policy(config.start) if config.start else None
    update: dict[str, Any]
    if start is not None:
        update = {
            "prior_rule": start.card.prior,
            "width": start.card.width,
            "all_verbs": start.card.verb_set == "both",
            "without": tuple(dict.fromkeys((*start.card.without, *config.without))),
        }
    else:
        rule = _prior_rule(config, scenarios)
        update = {"prior_rule": PriorRule.of(rule) if rule else None}
    if config.learning_rate is None:
        update["learning_rate"] = LEARNING_RATE if start is None else LEARNING_RATE_ON
    if not config.name:
        update["name"] = "-".join([*(s.name for s in scenarios), f"s{config.seed}"])
    config = config.model_copy(update=update)
    if start is not None:
        _check_start(config, start, scenarios)
    folder = runs.new_run(config.out, config.name)
    runs.clear(folder)
    for k, scenario in enumerate(scenarios):
        path = folder / runs.SCENARIOS / f"{k}-{scenario.name}.json"
        write_json(path, scenario.model_dump(mode="json"))
    write_json(folder / runs.CONFIG, config.model_dump(mode="json"))
    runs.write_provenance(folder)
    with runs.held(folder):
        return _run(config, scenarios, folder, None, start, progress)


def resume(
    folder: Path,
    steps: int | None = None,
    time_s: float | None = None,
    progress: Progress | None = None,
) -> Path:
    """Continue a run exactly where it was stopped.

    Args:
        folder: Of the run.
        steps: Total steps in place of those of its configuration ...
        time_s: Time to go on for; see `resumed` where one of them is given and the other used up.
        progress: Told how it goes.

    Raises:
        InputError: The folder holds no run of this version that can be continued, it is over, or
            its device is not here.
    """
    config = resumed(folder, steps, time_s)
    check_device(config)
    state = read_state(folder)
    return _run(config, read_scenarios(folder, config), folder, state, None, progress)


def resumed(folder: Path, steps: int | None, time_s: float | None) -> TrainConfig:
    """Return the configuration with which a run goes on.

    A limit that is given lifts the other one where that is used up: who gives more steps to a run
    whose time is over wants them, and the other way round.

    Args:
        folder: Of the run.
        steps: See `resume`.
        time_s: See `resume`.

    Raises:
        InputError: The folder holds no run of this version that can be continued, or it is over.
    """
    config = read_config(folder)
    if not (folder / runs.STATE).exists():
        raise InputError(f"run {folder} has not begun", "train it again under this name")
    state = read_state(folder)
    done, elapsed_s = int(state["steps"]), float(state["elapsed_s"])
    total, limit_s = config.steps, config.time_s
    if steps is not None:
        total = steps
        if limit_s is not None and elapsed_s >= limit_s:
            limit_s = None
    if time_s is not None:
        limit_s = elapsed_s + time_s
        if steps is None and done >= total:
            total = UNLIMITED_STEPS
    if done >= total:
        raise InputError(
            f"run {folder} is complete ({done} of {total} steps)",
            "give more with --steps or --time",
        )
    if limit_s is not None and elapsed_s >= limit_s:
        raise InputError(f"the time of run {folder} is over", "give more with --time or --steps")
    return config.model_copy(update={"steps": total, "time_s": limit_s})


def check_device(config: TrainConfig) -> None:
    """Refuse a device that is not here.

    Raises:
        InputError: It is not.
    """
    if config.device == "cuda" and not th.cuda.is_available():
        raise InputError("device is cuda, and torch finds no GPU", "leave the device out")


def _prior_rule(config: TrainConfig, scenarios: list[Scenario]) -> Rule | None:
    """Return the rule to build on, as tuned for the one scenario or else for any fleet."""
    if config.prior is None:
        return None
    place = scenarios[0].name if len(scenarios) == 1 else ANY_FLEET
    return tuned_rule(config.prior, place)


def _check_start(config: TrainConfig, start: ExportedPolicy, scenarios: list[Scenario]) -> None:
    """Refuse to go on from a policy that does not know a verb set of the training.

    But one with core verbs may learn the others beside them: ``verbs`` is both.

    Raises:
        InputError: It has others.
    """
    if start.card.verb_set == "core" and config.verbs == "both":
        return
    for scenario in config.played(scenarios):
        if not start.plays(scenario.verbs == "full"):
            raise InputError(
                f"policy {start.name} has the verbs '{start.card.verb_set}', "
                f"scenario '{scenario.name}' has '{scenario.verbs}'",
                f"train it with --verbs {start.card.verb_set}",
            )


def _run(
    config: TrainConfig,
    scenarios: list[Scenario],
    folder: Path,
    state: dict[str, Any] | None,
    start: ExportedPolicy | None,
    progress: Progress | None,
) -> Path:
    th.set_num_threads(1)  # threads of its own would wait for each other in spin locks
    rule = config.prior_rule.rule() if config.prior_rule else None
    plan = NodePlan(
        config.trained(scenarios),
        config.envs,
        rule,
        config.privileged,
        config.seed,
        config.all_verbs,
        config.without,
        config.paced,
    )
    nodes: PlanNodes = (
        NodeProcesses(plan, config.processes)
        if config.processes
        else TrainingNodes(plan, config.threads)
    )
    try:
        beta = BETA if config.beta is None else config.beta
        model = EventTimePPO(
            EquivariantPolicy,
            nodes,
            discount_s=config.discount_s,
            trace_s=config.trace_s,
            elapsed_time=config.elapsed_time,
            clip_apart=config.clip_apart,
            critic_first=CRITIC_FIRST if config.critic_first is None else config.critic_first,
            threads=config.threads,
            device=config.device,
            learning_rate=_linear(config.learning_rate or LEARNING_RATE),
            n_steps=config.rollout_steps,
            batch_size=config.batch_size,
            n_epochs=config.epochs,
            clip_range=config.clip,
            ent_coef=config.kl,
            max_grad_norm=config.max_grad_norm,
            stats_window_size=config.envs,
            seed=config.seed,
            policy_kwargs={"layout": nodes.layout, "width": config.width, "beta": beta},
        )
        step = int(state["steps"]) if state else 0
        outputs: list[KVWriter] = [
            MetricsLog(folder, step),
            TensorBoardOutputFormat(str(folder / runs.TENSORBOARD)),
        ]
        model.set_logger(Logger(str(folder), outputs))
        callback = RunCallback(config, config.played(scenarios), rule, folder, progress)
        if state is not None:
            restore(model, nodes, state)
            callback.set_state(state)
        elif start is not None and config.start is not None:
            its_critic = go_on_from(model, start, Path(config.start))
            if its_critic and config.critic_first is None:
                model.critic_first = 0
        with _stopping_on_interrupt(callback.stop):
            model.learn(config.steps - step, callback, reset_num_timesteps=state is None)
        for output in outputs:
            output.close()
    finally:
        nodes.close()
    return folder


def _linear(start: float) -> Callable[[float], float]:
    return lambda left: start * left


@contextmanager
def _stopping_on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """On the first Ctrl-C (or SIGTERM) stop after the iteration; a second one interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def handle(number: int, frame: object) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        stop()

    for number in signals:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_config(folder: Path) -> TrainConfig:
    """Return the configuration of a run.

    Raises:
        InputError: The folder holds no run of this version.
    """
    path = folder / runs.CONFIG
    try:
        return TrainConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot read {path}: {reason}", "name the folder of a run") from error
    except ValueError as error:
        raise InputError(f"{path}: not of this version", "train again") from error


def read_scenarios(folder: Path, config: TrainConfig) -> list[Scenario]:
    """Return the scenarios of a run, as they were when it began.

    Raises:
        InputError: A file is missing or not of this version.
    """
    return [_read_scenario(folder / runs.SCENARIOS, k) for k in range(len(config.scenarios))]


def _read_scenario(folder: Path, k: int) -> Scenario:
    path = next(folder.glob(f"{k}-*.json"), folder / f"{k}-*.json")
    try:
        return Scenario.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a scenario of this version", "train again") from error

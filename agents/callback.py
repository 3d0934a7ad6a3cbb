"""`RunCallback`: what happens between two iterations of a training run.

It logs what a scheduling engineer wants to see, plays development episodes with the policy and
compares them with the prior rule on the same arrivals, keeps the best policy, and writes the state
from which the run can continue.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback

from mmrl.agents import runs
from mmrl.agents.config import TrainConfig
from mmrl.agents.export import ExportedPolicy, Floats, PolicyCard, save_policy
from mmrl.agents.nodes import PlanNodes
from mmrl.agents.ppo import EventTimePPO
from mmrl.agents.provenance import git_commit, versions
from mmrl.agents.runner import play
from mmrl.agents.state import snapshot, write_state
from mmrl.envs.batch import shared_sampler
from mmrl.node.observe import GLOBAL_FEATURES, MODEL_FEATURES
from mmrl.rollout import Episode, EpisodeResult, rollout
from mmrl.rules import Rule
from mmrl.scenarios.mixture import ScenarioSampler
from mmrl.scenarios.schema import Scenario
from mmrl.tuning import LATENCY_WEIGHT

EPISODE_SCALARS = (
    "goodput",
    "goodput_worst_model",
    "longest_wait_s",
    "ttft_mean_s",
    "ttft_p99_s",
    "decisions_per_s",
    "loads_per_s",
    "preemptions_per_s",
)
SURE = 1.96  # standard errors by which the gain must exceed zero to count as a win
PIECE = 50  # episodes that a thread plays at a time
EVAL_SCALARS = (
    "goodput",
    "goodput_worst_model",
    "norm_latency",
    "ttft_p99_s",
    "longest_wait_s",
    "loads_per_s",
    "preemptions_per_s",
)


class Progress(Protocol):
    """Whoever shows how a training goes."""

    def update(self, step: int, scalars: dict[str, float]) -> None:
        """Show the step reached and the latest scalars."""


class RunCallback(BaseCallback):
    """Evaluates, writes and stops a run.

    Args:
        config: Of the run.
        scenarios: On which it is evaluated.
        rule: Its prior, or None; then the comparison is with nothing.
        folder: Of the run.
        progress: Told how it goes.
    """

    model: EventTimePPO

    def __init__(
        self,
        config: TrainConfig,
        scenarios: Sequence[Scenario],
        rule: Rule | None,
        folder: Path,
        progress: Progress | None,
    ) -> None:
        super().__init__()
        self._config, self._rule, self._folder, self._progress = config, rule, folder, progress
        self._scenarios = tuple(scenarios)
        self._episodes: list[Episode] = [("dev", i) for i in range(config.eval_episodes)]
        self._samplers: list[ScenarioSampler] = []
        self._verbs = {scenario.verbs for scenario in scenarios}
        self._groups: list[str] = []  # platform and verb set of each episode that is evaluated
        self._champion: dict[str, float] = {}
        self._champion_goodput: np.ndarray[Any, Any] | None = None
        self._best = -np.inf
        self._next_eval = 0
        self._saved_at = -1  # steps of what is on disk
        self._stop = False
        self._began_s = time.monotonic()
        self._elapsed_before_s = 0.0
        self._eval_s = 0.0
        self._beat: dict[str, float] = {}

    def stop(self) -> None:
        """Stop after the present iteration."""
        self._stop = True

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from the state of a run."""
        self._best = float(state["best"])
        self._next_eval = int(state["next_eval"])
        self._elapsed_before_s = float(state["elapsed_s"])
        self._beat = dict(state["beat"])

    def _elapsed_s(self) -> float:
        return self._elapsed_before_s + time.monotonic() - self._began_s

    # ------------------------------------------------------------------ SB3's events

    def _on_training_start(self) -> None:
        nodes = self.training_env
        assert isinstance(nodes, PlanNodes)
        self._nodes = nodes
        self._samplers = [shared_sampler(s.model_dump_json()) for s in self._scenarios]
        if self._config.time_s is not None:
            limit = self._config.time_s
            self.model.time_left = lambda: 1 - self._elapsed_s() / limit
        if self._rule is not None:
            self._evaluate_champion(self._rule)

    def _on_rollout_start(self) -> None:
        """Between two iterations: evaluate and write when it is time to."""
        time_left = self.model.time_left
        over = time_left is not None and time_left() <= 0
        if self._stop or over or self.num_timesteps >= self._next_eval:
            self._save(over)
            if over:
                self.logger.dump(self.num_timesteps)
        self.model.stopped = self._stop = self._stop or over

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        record = self.logger.record
        episodes = [e for e in self.model.ep_info_buffer or () if "goodput" in e]
        for name in EPISODE_SCALARS if episodes else ():
            record(f"serving/{name}", float(np.mean([e[name] for e in episodes])))
        self._record_decisions()
        decisions = self.model.n_steps * self.model.n_envs
        miss, latency = (-self.model.reward_terms / decisions).tolist()
        record("reward/miss_per_decision", miss)
        record("reward/latency_per_decision", latency)
        record("reward/latency_share", latency / max(1e-12, miss + latency))
        record("time/simulated_s_per_decision", float(self.model.rollout_buffer.dt_s.mean()))
        seconds = self.model.seconds | {"eval": self._eval_s}
        for name, spent in seconds.items():
            record(f"time/{name}_share", spent / max(1e-9, sum(seconds.values())))
        if self._progress is not None:
            scalars = {k: v for k, v in self.logger.name_to_value.items() if isinstance(v, float)}
            self._progress.update(self.num_timesteps, scalars)

    def _on_training_end(self) -> None:
        # Stopped before an iteration, it is written already; stopped in the last one, it is not.
        if self._saved_at != self.num_timesteps:
            self._save(over=True)
            self.logger.dump(self.num_timesteps)

    # ------------------------------------------------------------------ what is written

    def _record_decisions(self) -> None:
        counts = self.model.action_counts()
        layout = self._nodes.layout
        per_verb = counts[1:].reshape(layout.max_models, -1).sum(axis=0)
        shares = [counts[0], *per_verb.tolist()]
        for name, count in zip(("wait", *layout.verbs), shares, strict=True):
            self.logger.record(f"decisions/{name}", float(count / counts.sum()))
        if layout.suggestion:
            buffer = self.model.rollout_buffer
            suggested = buffer.observations[..., layout.public_size : layout.actor_size]
            followed = np.take_along_axis(suggested, buffer.actions[..., None], axis=-1)
            self.logger.record("decisions/as_suggested", float(followed.mean()))

    def export(self) -> ExportedPolicy:
        """Return the policy as it is now."""
        config = self._config
        weights: dict[str, Floats] = {
            name: tensor.detach().cpu().numpy().copy()
            for name, tensor in self.model.policy.actor.state_dict().items()
        }
        card = PolicyCard(
            global_features=GLOBAL_FEATURES,
            model_features=MODEL_FEATURES,
            verb_set="both" if config.all_verbs or len(self._verbs) > 1 else min(self._verbs),
            verbs=self._nodes.layout.verbs,
            without=config.without,
            width=config.width,
            prior=config.prior_rule,
            scenarios=tuple(scenario.name for scenario in self._scenarios),
            seed=config.seed,
            steps=self.num_timesteps,
            versions=versions(),
            git_commit=git_commit(),
        )
        return ExportedPolicy(card, weights)

    def _save(self, over: bool) -> None:
        """Evaluate if it is time to, write the policy, and the state to continue from.

        Args:
            over: Whether training ends here, though nobody stopped it.
        """
        policy = self.export()
        step = self.num_timesteps
        write = {runs.LAST}
        if over or (step >= self._next_eval and not self._stop):
            if step == 0:
                write.add(runs.STEP0)
            write.add(f"{runs.CHECKPOINTS}/step_{step:09d}")
            score = self._evaluate(policy)
            if score > self._best:
                self._best = score
                write.add(runs.BEST)
            while self._next_eval <= step:
                self._next_eval += self._config.eval_every
        for name in sorted(write):
            save_policy(self._folder / name, policy.card, policy.weights)
        state = snapshot(self.model, self._nodes)
        state |= {"best": self._best, "next_eval": self._next_eval, "elapsed_s": self._elapsed_s()}
        write_state(self._folder, state | {"beat": self._beat})
        self._saved_at = step

    def _evaluate(self, policy: ExportedPolicy) -> float:
        """Log how a policy does on the development episodes; return its score."""
        began_s = time.perf_counter()
        results = self._play_all(lambda sampler, episodes: play(policy, sampler, episodes))
        means = _means(results)
        for name, value in means.items():
            self.logger.record(f"eval/{name}", value)
        for name, value in self._champion.items():
            self.logger.record(f"eval/champion_{name}", value)
        if self._champion_goodput is not None:
            self._compare(_goodput(results) - self._champion_goodput)
        score = means["goodput"] - LATENCY_WEIGHT * means["norm_latency"]
        self.logger.record("eval/score", score)
        self.logger.record("eval/step", self.num_timesteps)  # the row is written one later
        self._eval_s += time.perf_counter() - began_s
        return score

    def _compare(self, difference: np.ndarray[Any, Any]) -> None:
        """Log the gain over the prior rule, in all and by platform, and when it was first sure."""
        gain, error = _mean_and_error(difference)
        self.logger.record("eval/goodput_gain", gain)
        self.logger.record("eval/goodput_gain_error", error)
        groups = np.array(self._groups)
        for group in sorted(set(self._groups)) if len(set(self._groups)) > 1 else ():
            self.logger.record(f"gain/{group}", _mean_and_error(difference[groups == group])[0])
        if not self._beat and gain > SURE * error:
            self._beat = {"s": self._elapsed_s(), "steps": float(self.num_timesteps)}
        for name, value in self._beat.items():
            self.logger.record(f"eval/beat_{name}", value)

    def _play_all(
        self, play_piece: Callable[[ScenarioSampler, list[Episode]], list[EpisodeResult]]
    ) -> list[EpisodeResult]:
        """Return the results of all development episodes, which threads play piece by piece."""
        pieces = [
            (sampler, self._episodes[first : first + PIECE])
            for sampler in self._samplers
            for first in range(0, len(self._episodes), PIECE)
        ]
        with ThreadPoolExecutor(self._config.threads) as pool:
            return [r for found in pool.map(lambda p: play_piece(*p), pieces) for r in found]

    def _evaluate_champion(self, rule: Rule) -> None:
        began_s = time.perf_counter()
        results = self._play_all(lambda sampler, episodes: rollout(rule, sampler, episodes))
        self._champion_goodput = _goodput(results)
        self._champion = _means(results)
        verbs = [scenario.verbs for scenario in self._scenarios for _ in self._episodes]
        self._groups = [f"{r.info.platform}_{v}" for r, v in zip(results, verbs, strict=True)]
        self._eval_s += time.perf_counter() - began_s


def _mean_and_error(values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return a mean and its standard error."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(values.mean()), float(error)


def _goodput(results: Sequence[EpisodeResult]) -> np.ndarray[Any, Any]:
    """Return the goodput of each episode; 1 for one without requests."""
    found: np.ndarray[Any, Any] = np.array([r.metrics["goodput"] for r in results])
    return np.where(np.isnan(found), 1.0, found)


def _means(results: Sequence[EpisodeResult]) -> dict[str, float]:
    return {
        name: float(np.nanmean([result.metrics[name] for result in results]))
        for name in EVAL_SCALARS
    }

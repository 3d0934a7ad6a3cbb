"""`TrainConfig`: everything that decides about a training run, and is written into its folder."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mmrl.agents.export import PriorRule
from mmrl.errors import InputError, first_error, nearest
from mmrl.scenarios.schema import Scenario

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
UNLIMITED_STEPS = 1_000_000_000  # the clock decides


def _as_names(value: Any) -> Any:
    return tuple(filter(None, value.split(","))) if isinstance(value, str) else value


class TrainConfig(BaseModel):
    """Settings of a training run; the defaults are those that worked.

    Attributes:
        scenarios: Names or paths; several are mixed over the environments.
        verbs: Verb set in place of the scenarios' own; ``both`` trains each of them with both.
        start: The policy to go on from: ``default``, the folder of a run or of a policy.
        steps: Decisions to learn from.
        time_s: Stop after so much time, if that comes first; the learning rate follows.
        seed: Of the network and all episodes.
        name: Of the run's folder; made from scenario and seed unless given.
        out: Folder of the runs.
        prior: Rule on which the policy builds, by name, as tuned for its scenario, or else for
            ``universal``. None: start from nothing. A policy to go on from brings its own.
        prior_rule: The same, found when the run starts.
        all_verbs: Whether the network has the full verbs though no scenario has them, as a policy
            to go on from may; found when the run starts.
        beta: Logit of the rule's suggestion at the start; `policy.BETA` unless given.
        privileged: Whether the critic sees the arrivals to come (in training only).
        width: Of the network's hidden layers; of a policy to go on from, its own.
        envs: Nodes simulated side by side.
        rollout_steps: Decisions of each node between two updates.
        batch_size: Decisions of a gradient step.
        epochs: Passes over a rollout.
        learning_rate: At the start; goes to 0 linearly. Unless given .004, and .001 for a policy
            to go on from: on little data it would unlearn more than it gains.
        kl: Weight of the divergence from the rule: what a deviation must gain to be learned; where
            loads take long, as much more. Without a prior it is that of an entropy bonus.
        clip: PPO's clip range.
        discount_s: Time constant of the discount.
        trace_s: Time constant of the trace decay.
        elapsed_time: Discount by elapsed time; else each decision counts as their mean time.
        paced: Stretch both time constants, and the price `kl`, where a fleet's loads take long.
        max_grad_norm: Of actor and critic each ...
        clip_apart: ... unless this is off: then of both together.
        critic_first: Iterations in which only the critic learns; unless given, `CRITIC_FIRST`,
            or none where the start's critic is taken over.
        jitter: In place of the scenarios' own, in training.
        miss_weight: Reward of a miss in place of the scenarios' own.
        latency_weight: Reward of the latency in place of the scenarios' own.
        randomise: Draw what the scenarios let vary; else train at the middle of each range.
        without: Verbs that the policy may not use.
        eval_every: Decisions between two evaluations on development seeds.
        eval_episodes: Episodes of each scenario that an evaluation plays.
        threads: Threads that simulate and learn; results do not depend on it.
        processes: Processes that play the nodes; 0: threads do. Results do not depend on it.
        device: Where the network learns: ``cpu`` or ``cuda``. Nodes are simulated on the processor.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenarios: Annotated[tuple[str, ...], Field(min_length=1)]
    verbs: Literal["core", "full", "both"] | None = None
    start: str | None = None
    steps: Count = 2_000_000
    time_s: Positive | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    name: str = ""
    out: Path = Path("runs")
    prior: str | None = "partial"
    prior_rule: PriorRule | None = None
    all_verbs: bool = False
    beta: float | None = None
    privileged: bool = True
    width: Count = 32
    envs: Count = 256
    rollout_steps: Count = 128
    batch_size: Count = 2048
    epochs: Count = 2
    learning_rate: Positive | None = None
    kl: NotNegative = 0.003
    clip: Positive = 0.2
    discount_s: Positive = 15.0
    trace_s: Positive = 15.0
    elapsed_time: bool = True
    paced: bool = True
    max_grad_norm: Positive = 0.5
    clip_apart: bool = True
    critic_first: Annotated[int, Field(ge=0)] | None = None
    jitter: Annotated[float, Field(ge=0, lt=1)] | None = None
    miss_weight: NotNegative | None = None
    latency_weight: NotNegative | None = None
    randomise: bool = True
    without: Annotated[tuple[str, ...], BeforeValidator(_as_names)] = ()
    eval_every: Count = 200_000
    eval_episodes: Count = 200
    threads: Count = 2
    processes: Annotated[int, Field(ge=0)] = 0
    device: Literal["cpu", "cuda"] = "cpu"

    def played(self, scenarios: list[Scenario]) -> list[Scenario]:
        """Return the scenarios with the verbs of this run, as they are evaluated."""
        if self.verbs is None:
            return scenarios
        sets: tuple[Literal["core", "full"], ...] = (
            ("core", "full") if self.verbs == "both" else (self.verbs,)
        )
        return [
            scenario.model_copy(
                update={
                    "verbs": verbs,
                    "name": scenario.name
                    if verbs == scenario.verbs
                    else f"{scenario.name}-{verbs}",
                }
            )
            for scenario in scenarios
            for verbs in sets
        ]

    def trained(self, scenarios: list[Scenario]) -> list[Scenario]:
        """Return the scenarios with the changes that hold in training alone."""
        found = []
        for scenario in self.played(scenarios):
            changes: dict[str, Any] = {}
            if self.jitter is not None:
                changes["jitter"] = self.jitter
            weights = {"miss": self.miss_weight, "latency": self.latency_weight}
            given = {name: value for name, value in weights.items() if value is not None}
            changes["reward"] = scenario.reward.model_copy(update=given)
            changed = scenario.model_copy(update=changes)
            found.append(changed if self.randomise else changed.pinned())
        return found


def build_config(**values: Any) -> TrainConfig:
    """Return a configuration.

    Raises:
        InputError: A field is unknown or wrong; the message names it.
    """
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "extra_forbidden":
            field = ".".join(map(str, first["loc"]))
            remedy = nearest(field, TrainConfig.model_fields)
            raise InputError(f"unknown setting '{field}'", remedy) from None
        raise InputError(first_error(error)) from None

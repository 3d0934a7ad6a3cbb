"""`TrainConfig`: everything that decides about a training run, and is written into its folder."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmrl.agents.export import PriorRule
from mmrl.errors import InputError, nearest

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class TrainConfig(BaseModel):
    """Settings of a training run; the defaults are those that worked.

    Attributes:
        scenarios: Names or paths; several are mixed over the environments.
        steps: Decisions to learn from.
        time_s: Stop after so much time, if that comes first; the learning rate follows.
        seed: Of the network and all episodes.
        name: Of the run's folder; made from scenario and seed unless given.
        out: Folder of the runs.
        prior: Rule on which the policy builds, by name; ``tuned_for`` its scenario where it was
            tuned. None: start from nothing.
        prior_rule: The same, found when the run starts.
        beta: Logit of the rule's suggestion at the start.
        privileged: Whether the critic sees the arrivals to come (in training only).
        width: Of the network's hidden layers.
        envs: Nodes simulated side by side.
        rollout_steps: Decisions of each node between two updates.
        batch_size: Decisions of a gradient step.
        epochs: Passes over a rollout.
        learning_rate: At the start; goes to 0 linearly.
        entropy: Weight of the entropy bonus.
        clip: PPO's clip range.
        discount_s: Time constant of the discount.
        trace_s: Time constant of the trace decay.
        max_grad_norm: Of actor and critic each.
        eval_every: Decisions between two evaluations on development seeds.
        eval_episodes: Episodes of each scenario that an evaluation plays.
        threads: Threads that simulate and learn; results do not depend on it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenarios: Annotated[tuple[str, ...], Field(min_length=1)]
    steps: Count = 2_000_000
    time_s: Positive | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    name: str = ""
    out: Path = Path("runs")
    prior: str | None = "slack"
    prior_rule: PriorRule | None = None
    beta: float = 3.0
    privileged: bool = True
    width: Count = 32
    envs: Count = 256
    rollout_steps: Count = 64
    batch_size: Count = 2048
    epochs: Count = 2
    learning_rate: Positive = 4e-3
    entropy: Annotated[float, Field(ge=0)] = 0.001
    clip: Positive = 0.2
    discount_s: Positive = 15.0
    trace_s: Positive = 6.0
    max_grad_norm: Positive = 0.5
    eval_every: Count = 200_000
    eval_episodes: Count = 200
    threads: Count = 2


def build_config(**values: Any) -> TrainConfig:
    """Return a configuration.

    Raises:
        InputError: A field is unknown or wrong; the message names it.
    """
    try:
        return TrainConfig(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            remedy = nearest(field, TrainConfig.model_fields)
            raise InputError(f"unknown setting '{field}'", remedy) from None
        raise InputError(f"{field}: {first['msg'].lower()}") from None

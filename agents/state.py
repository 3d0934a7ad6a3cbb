"""The state of a training run between two iterations: all on which the rest of it depends."""

from pathlib import Path
from typing import Any

import numpy as np
import torch as th

from mmrl.agents import runs
from mmrl.agents.export import FULL, ExportedPolicy, Floats
from mmrl.agents.nodes import PlanNodes
from mmrl.agents.policy import RARE
from mmrl.agents.ppo import EventTimePPO
from mmrl.errors import InputError
from mmrl.files import atomic_write
from mmrl.node.actions import CORE_VERBS, VERBS
from mmrl.node.observe import N_GLOBAL


def snapshot(model: EventTimePPO, nodes: PlanNodes) -> dict[str, Any]:
    """Return everything on which the rest of a training depends, between two iterations."""
    arrays = nodes.get_state()
    return {
        "steps": model.num_timesteps,
        "updates": model._n_updates,
        "critic_first": model.critic_first,
        "policy": model.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict(),
        "random": th.get_rng_state(),
        "generators": [generator.get_state() for generator in model.generators],
        "nodes": {
            key: value if isinstance(value, str) else th.from_numpy(value)
            for key, value in arrays.items()
        },
    }


def restore(model: EventTimePPO, nodes: PlanNodes, state: dict[str, Any]) -> None:
    """Bring model and nodes into a state that `snapshot` returned."""
    model.num_timesteps = int(state["steps"])
    model._n_updates = int(state["updates"])
    model.critic_first = int(state["critic_first"])
    model.policy.load_state_dict(state["policy"])
    model.policy.optimizer.load_state_dict(state["optimizer"])
    th.set_rng_state(state["random"])
    for generator, own in zip(model.generators, state["generators"], strict=True):
        generator.set_state(own)
    nodes.reset()
    arrays = {k: v if isinstance(v, str) else v.numpy() for k, v in state["nodes"].items()}
    model._last_obs = nodes.set_state(arrays)


def go_on_from(model: EventTimePPO, policy: ExportedPolicy, place: Path) -> bool:
    """Start a training with the weights of a policy, and with the critic of its run if it fits.

    Args:
        model: Whose networks they become; of the policy's width and prior, and of its verbs or
            all.
        policy: Where to go on from.
        place: Its folder; that of a run holds a critic too.

    Returns:
        Whether the critic was taken over.
    """
    weights = dict(policy.weights)
    if policy.card.verb_set == "core" and model.policy.actor.layout.full_verbs:
        weights = _with_all_verbs(weights)
    tensors = {name: th.from_numpy(array.copy()) for name, array in weights.items()}
    model.policy.actor.load_state_dict(tensors)
    if not (place / runs.STATE).is_file():
        return False
    prefix, weights = "critic.", read_state(place)["policy"]
    critic = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    own = model.policy.critic.state_dict()
    if {k: v.shape for k, v in critic.items()} != {k: v.shape for k, v in own.items()}:
        return False
    model.policy.critic.load_state_dict(critic)
    return True


def _with_all_verbs(weights: dict[str, Floats]) -> dict[str, Floats]:
    """Return the weights of a policy with core verbs for all verbs: to new ones it is blind.

    They are as rare as at the start of a training, what it has learned about the others holds on.
    """
    found = dict(weights)
    own = list(CORE_VERBS)
    for name, axis in (("verbs.weight", 0), ("verbs.bias", 0), ("encoder.extra.weight", 1)):
        if name in weights:
            few = np.moveaxis(weights[name], axis, 0)
            first = RARE if name == "verbs.bias" else 0.0
            all_verbs = np.full((len(VERBS), *few.shape[1:]), first, np.float32)
            all_verbs[own] = few
            found[name] = np.moveaxis(all_verbs, 0, axis)
    if "beta" in weights:
        found["beta"] = weights["beta"][[0, 0]]
    # It never saw this feature change; of the context the node's features are the last ones.
    for name, column in (
        ("encoder.node.weight", FULL),
        ("encoder.context.weight", FULL - N_GLOBAL),
    ):
        found[name] = weights[name].copy()
        found[name][:, column] = 0
    return found


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write the state of a run; tensors, numbers and text only."""
    with atomic_write(folder / runs.STATE, "wb") as file:
        th.save(state, file)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the state of a run.

    Raises:
        InputError: There is none, or it is damaged.
    """
    path = folder / runs.STATE
    try:
        state: dict[str, Any] = th.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot read {path}: {reason}", "name the folder of a run") from error
    except Exception as error:  # what torch raises for a damaged file is not one thing
        raise InputError(f"{path}: damaged", "train again") from error
    return state

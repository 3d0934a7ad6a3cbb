"""`Layout`: which number of an observation, and which action, means what.

An observation is the node's features, one block of features per model, then the blocks that
training may ask for: the suggestion of a rule (one-hot over the actions) and, last, the future for
the critic.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from gymnasium import spaces

from mmrl.envs.privileged import PRIVILEGED_FEATURES
from mmrl.errors import InputError, unknown
from mmrl.node import actions
from mmrl.node.observe import GLOBAL_FEATURES, MODEL_FEATURES, observation_size


@dataclass(frozen=True)
class Layout:
    """Names and places of observations and actions.

    Attributes:
        max_models: Blocks of models; smaller fleets are padded with zeros.
        full_verbs: Whether the verb set is ``full``.
        suggestion: Whether a rule's suggested action follows the features.
        privileged: Whether the future follows, for a critic in training.
    """

    max_models: int
    full_verbs: bool
    suggestion: bool = False
    privileged: bool = False

    @cached_property
    def public_size(self) -> int:
        """Features that describe the node, without the blocks of training."""
        return observation_size(self.max_models)

    @cached_property
    def actor_size(self) -> int:
        """Numbers that the actor may read: all but the privileged block."""
        return self.public_size + self.suggestion * self.num_actions

    @cached_property
    def observation_size(self) -> int:
        """Numbers of an observation."""
        return self.actor_size + self.privileged * self.max_models * len(PRIVILEGED_FEATURES)

    @cached_property
    def num_actions(self) -> int:
        """WAIT, and each verb on each model."""
        return 1 + self.max_models * len(self.verbs)

    @cached_property
    def verbs(self) -> tuple[str, ...]:
        """Names of the verbs, in the order of the actions."""
        return actions.verb_names(self.full_verbs)

    @cached_property
    def observation_space(self) -> spaces.Box:
        """Observations: all within [-1, 1]."""
        return spaces.Box(-1.0, 1.0, (self.observation_size,), np.float32)

    @cached_property
    def action_space(self) -> spaces.Discrete:
        """Actions: 0 is WAIT."""
        return spaces.Discrete(self.num_actions)

    @cached_property
    def action_names(self) -> tuple[str, ...]:
        """``"wait"``, then ``"model0.out"`` and so on."""
        pairs = (f"model{m}.{verb}" for m in range(self.max_models) for verb in self.verbs)
        return ("wait", *pairs)

    @cached_property
    def feature_names(self) -> tuple[str, ...]:
        """One name for each number of an observation."""
        models = range(self.max_models)
        names = [*GLOBAL_FEATURES, *(f"model{m}.{name}" for m in models for name in MODEL_FEATURES)]
        if self.suggestion:
            names += [f"suggestion.{action}" for action in self.action_names]
        if self.privileged:
            names += [f"future.model{m}.{name}" for m in models for name in PRIVILEGED_FEATURES]
        return tuple(names)

    def encode(self, model: int, verb: str) -> int:
        """Return the action that is a verb on a model.

        Raises:
            InputError: The verb set has no such verb, or there is no such model.
        """
        if verb not in self.verbs:
            raise unknown("verb", verb, self.verbs)
        if not 0 <= model < self.max_models:
            raise InputError(f"model is {model}", f"models are 0 to {self.max_models - 1}")
        return actions.encode(self.full_verbs, model, actions.VERBS.index(verb))

    def decode(self, action: int) -> tuple[int, str] | None:
        """Return (model, verb) of an action, None for WAIT.

        Raises:
            InputError: There is no such action.
        """
        if not 0 <= action < self.num_actions:
            raise InputError(f"action is {action}", f"actions are 0 to {self.num_actions - 1}")
        if action == actions.WAIT:
            return None
        model, place = divmod(int(action) - 1, len(self.verbs))
        return model, self.verbs[place]

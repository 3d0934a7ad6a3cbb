"""`EquivariantPolicy`: one small network for fleets of any size and order.

Every model passes through the same encoder, its embeddings are pooled (mean and maximum over the
models that are present) into a context, and the same head gives the logits of the verbs of each
model; WAIT has its logit from the context. With a prior the network is a residual: ``beta`` (one
number for each verb set) is added to the logit of the rule's suggestion and the last layers start
at zero, so that at step 0 the policy does what the rule does. The critic is a network of its own
and alone reads the privileged block.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from gymnasium import spaces
from sb3_contrib.common.maskable.distributions import MaskableDistribution
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn
from torch.nn import functional as F

from mmrl.agents.export import FULL, IMPOSSIBLE, PRESENT
from mmrl.envs.layout import Layout
from mmrl.envs.privileged import PRIVILEGED_FEATURES
from mmrl.node.actions import verb_names
from mmrl.node.observe import N_GLOBAL, N_MODEL

WIDTH = 32
BETA = 3.0  # the suggestion is then followed in about 9 of 10 decisions
RARE_VERBS = set(verb_names(True)) - set(verb_names(False))
RARE = -2.0  # their logit at the start: they are many, and a rule has less use for them

Mask = npt.NDArray[np.bool_] | th.Tensor


def of_actions(log_probs: th.Tensor, actions: th.Tensor) -> th.Tensor:
    """Return the log-probabilities [B] of the actions int64[B] among those of all, [B, A]."""
    return log_probs.gather(1, actions.unsqueeze(1)).squeeze(1)


class Encoder(nn.Module):
    """Embeddings of the models of a node, and the context they make together.

    Args:
        layout: Of the observations.
        extra: Features per model beside those of the layout (suggestion or privileged block).
        width: Of every hidden layer.
    """

    def __init__(self, layout: Layout, extra: int, width: int) -> None:
        super().__init__()
        self.layout = layout
        self.model = nn.Linear(N_MODEL, width)
        self.extra = nn.Linear(extra, width, bias=False) if extra else None
        self.node = nn.Linear(N_GLOBAL, width, bias=False)
        self.second = nn.Linear(width, width)
        self.context = nn.Linear(2 * width + N_GLOBAL, width)

    def forward(self, obs: th.Tensor, extra: th.Tensor | None) -> tuple[th.Tensor, th.Tensor]:
        """Return embeddings [B, M, width], zero for padding, and the context [B, width].

        Args:
            obs: [B, D].
            extra: [B, M, extra], where the encoder was made for it.
        """
        layout = self.layout
        node, blocks = obs[:, :N_GLOBAL], obs[:, N_GLOBAL : layout.public_size]
        models = blocks.reshape(-1, layout.max_models, N_MODEL)
        present = (models[:, :, PRESENT : PRESENT + 1] > 0).to(obs.dtype)
        hidden = self.model(models) + self.node(node).unsqueeze(1)
        if self.extra is not None:
            hidden = hidden + self.extra(extra)
        # Embeddings are not negative, so that zeros in the padding leave the maximum alone.
        embedding = F.relu(self.second(F.relu(hidden))) * present
        mean = embedding.sum(1) / present.sum(1).clamp(min=1.0)
        pooled = th.cat((mean, embedding.amax(1), node), dim=1)
        return embedding, F.relu(self.context(pooled))


class Actor(nn.Module):
    """Logits of all actions from an observation, not masked."""

    first: th.Tensor

    def __init__(self, layout: Layout, width: int, beta: float) -> None:
        super().__init__()
        self.layout = layout
        self.encoder = Encoder(layout, len(layout.verbs) if layout.suggestion else 0, width)
        self.head = nn.Linear(width, width)
        self.head_context = nn.Linear(width, width, bias=False)
        self.verbs = nn.Linear(width, len(layout.verbs))
        self.wait = nn.Linear(width, 1)
        self.beta = nn.Parameter(th.full((2,), beta)) if layout.suggestion else None
        self.first_beta = beta
        rare = [layout.suggestion and verb in RARE_VERBS for verb in layout.verbs]
        first = RARE * th.tensor([False, *rare * layout.max_models])
        self.register_buffer("first", first, persistent=False)  # logits beside the suggestion's

    def forward(self, obs: th.Tensor) -> th.Tensor:
        """Return logits [B, A]."""
        layout = self.layout
        suggestion = verbs = None
        if self.beta is not None:
            suggestion = obs[:, layout.public_size : layout.actor_size]
            verbs = suggestion[:, 1:].reshape(-1, layout.max_models, len(layout.verbs))
        embedding, context = self.encoder(obs, verbs)
        hidden = F.relu(self.head(embedding) + self.head_context(context).unsqueeze(1))
        logits = th.cat((self.wait(context), self.verbs(hidden).flatten(1)), dim=1)
        if self.beta is not None and suggestion is not None:
            logits = logits + self.beta[obs[:, FULL].long()].unsqueeze(1) * suggestion
        return logits

    def log_probs(self, obs: th.Tensor, masks: Mask | None = None) -> th.Tensor:
        """Return the log-probabilities of all actions [B, A]; illegal ones are next to -inf."""
        logits = self(obs)
        if masks is not None:
            legal = th.as_tensor(masks, dtype=th.bool).reshape(logits.shape)
            logits = logits.masked_fill(~legal, IMPOSSIBLE)
        return F.log_softmax(logits, dim=1)

    def divergence(self, obs: th.Tensor, log_probs: th.Tensor) -> th.Tensor:
        """Return how far decisions are from the rule, [B].

        It is KL(policy || rule), less a constant of the state: what the rule does is what the
        policy did at the start. Without a suggestion it is the negative entropy.

        Args:
            obs: [B, D].
            log_probs: [B, A], those of `log_probs` there.
        """
        probs = log_probs.exp()
        at_first = self.first
        if self.beta is not None:
            suggestion = obs[:, self.layout.public_size : self.layout.actor_size]
            at_first = at_first + self.first_beta * suggestion
        return (probs * (log_probs - at_first)).sum(1)

    def sample(
        self, obs: th.Tensor, masks: Mask | None = None, generator: th.Generator | None = None
    ) -> tuple[th.Tensor, th.Tensor]:
        """Return actions [B] drawn from the policy and their log-probabilities [B]."""
        log_probs = self.log_probs(obs, masks)
        # The largest of log-probabilities with Gumbel noise is a draw from the distribution.
        noise = th.empty_like(log_probs).exponential_(generator=generator).log_()
        actions = (log_probs - noise).argmax(dim=1)
        return actions, of_actions(log_probs, actions)


class Critic(nn.Module):
    """Value of an observation, the privileged block included."""

    def __init__(self, layout: Layout, width: int) -> None:
        super().__init__()
        self.layout = layout
        self.encoder = Encoder(layout, layout.privileged * len(PRIVILEGED_FEATURES), width)
        self.hidden = nn.Linear(width, width)
        self.value = nn.Linear(width, 1)

    def forward(self, obs: th.Tensor) -> th.Tensor:
        """Return values [B, 1]."""
        layout = self.layout
        extra = None
        if layout.privileged:
            block = obs[:, layout.actor_size :]
            extra = block.reshape(-1, layout.max_models, len(PRIVILEGED_FEATURES))
        _, context = self.encoder(obs, extra)
        return th.Tensor(self.value(F.relu(self.hidden(context))))


class EquivariantPolicy(MaskableActorCriticPolicy):
    """The network as a policy of sb3-contrib; `MaskablePPO` can train it as well.

    Args:
        observation_space: Box of the layout.
        action_space: Discrete of the layout.
        lr_schedule: Learning rate over the remaining progress.
        layout: Of the observations.
        width: Of every hidden layer.
        beta: Start value of the logit of the rule's suggestion, where the layout has one.
        **kwargs: Of `MaskableActorCriticPolicy`; its own networks are not built.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        layout: Layout,
        width: int = WIDTH,
        beta: float = BETA,
        **kwargs: Any,
    ) -> None:
        if observation_space.shape != (layout.observation_size,):
            raise ValueError(
                f"observations are {observation_space.shape}, not ({layout.observation_size},)"
            )
        self._settings: dict[str, Any] = {"layout": layout, "width": width, "beta": beta}
        # Adam's usual epsilon of SB3 (1e-5) is as large as these gradients: nothing would move.
        kwargs.setdefault("optimizer_kwargs", {"eps": 1e-8, "foreach": True})
        super().__init__(observation_space, action_space, lr_schedule, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        """Create actor and critic, and one optimiser with a group for each."""
        self.actor = Actor(**self._settings)
        self.critic = Critic(self._settings["layout"], self._settings["width"])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, gain=2**0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for last in (self.actor.verbs, self.actor.wait, self.critic.value):
            nn.init.zeros_(last.weight)
        with th.no_grad():
            self.actor.verbs.bias.copy_(self.actor.first[1 : 1 + len(self.actor.layout.verbs)])
        groups = [{"params": list(net.parameters())} for net in (self.actor, self.critic)]
        settings = {"lr": lr_schedule(1), **self.optimizer_kwargs}
        self.optimizer = self.optimizer_class(groups, **settings)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return super()._get_constructor_parameters() | self._settings

    def log_probs(self, obs: th.Tensor, masks: Mask | None = None) -> th.Tensor:
        """Return those of `Actor.log_probs`."""
        return self.actor.log_probs(obs, masks)

    def forward(
        self, obs: th.Tensor, deterministic: bool = False, action_masks: Mask | None = None
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Return actions [B], values [B, 1] and log-probabilities [B]."""
        if deterministic:
            log_probs, actions = self.log_probs(obs, action_masks).max(dim=1)
        else:
            actions, log_probs = self.actor.sample(obs, action_masks)
        return actions, self.critic(obs), log_probs

    def evaluate_actions(
        self, obs: th.Tensor, actions: th.Tensor, action_masks: Mask | None = None
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Return values [B, 1], log-probabilities of the actions [B] and entropies [B]."""
        log_probs = self.log_probs(obs, action_masks)
        chosen = of_actions(log_probs, actions.long().flatten())
        entropy = -(log_probs.exp() * log_probs).sum(dim=1)
        return self.critic(obs), chosen, entropy

    def get_distribution(
        self, obs: PyTorchObs, action_masks: Mask | None = None
    ) -> MaskableDistribution:
        """Return the distribution over actions as sb3-contrib represents it."""
        assert isinstance(obs, th.Tensor)
        distribution = self.action_dist.proba_distribution(action_logits=self.actor(obs))
        if action_masks is not None:
            distribution.apply_masking(action_masks)
        return distribution

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """Return values [B, 1]."""
        assert isinstance(obs, th.Tensor)
        return th.Tensor(self.critic(obs))

from typing import Any

import numpy as np
import torch as th

from mmrl.envs.layout import Layout
from mmrl.envs.privileged import PRIVILEGED_FEATURES
from mmrl.node.observe import N_GLOBAL, N_MODEL


def split(obs: th.Tensor, layout: Layout) -> tuple[th.Tensor, ...]:
    """Return node, models, suggestion of WAIT, suggested verbs and privileged block."""
    models = layout.max_models
    return (
        obs[:, :N_GLOBAL],
        obs[:, N_GLOBAL : layout.public_size].reshape(-1, models, N_MODEL),
        obs[:, layout.public_size : layout.public_size + 1],
        obs[:, layout.public_size + 1 : layout.actor_size].reshape(-1, models, len(layout.verbs)),
        obs[:, layout.actor_size :].reshape(-1, models, len(PRIVILEGED_FEATURES)),
    )


def join(*parts: th.Tensor) -> th.Tensor:
    return th.cat([part.flatten(1) for part in parts], dim=1)


def test_permuted_models_have_permuted_logits_and_the_same_value(
    recorded: Any, make_policy: Any
) -> None:
    layout = recorded.layout
    policy = make_policy(layout)
    obs = th.from_numpy(recorded.observations[:500])
    node, models, wait, verbs, future = split(obs, layout)
    order = th.tensor([3, 0, 5, 1, 4, 2])
    permuted = join(node, models[:, order], wait, verbs[:, order], future[:, order])
    logits, moved = policy.actor(obs), policy.actor(permuted)
    assert th.allclose(moved[:, 0], logits[:, 0], atol=1e-5)
    by_model = logits[:, 1:].reshape(-1, layout.max_models, len(layout.verbs))
    assert th.allclose(moved[:, 1:].reshape(by_model.shape), by_model[:, order], atol=1e-5)
    assert not th.allclose(moved, logits, atol=1e-2)
    assert th.allclose(policy.critic(permuted), policy.critic(obs), atol=1e-5)


def test_padding_changes_nothing(recorded: Any, make_policy: Any) -> None:
    layout = recorded.layout
    policy = make_policy(layout)
    wider = Layout(layout.max_models + 5, layout.full_verbs, True, True)
    padded_policy = make_policy(wider, seed=1)
    padded_policy.load_state_dict(policy.state_dict())  # the weights fit fleets of any size
    obs = th.from_numpy(recorded.observations[:500])
    node, models, wait, verbs, future = split(obs, layout)

    def pad(block: th.Tensor) -> th.Tensor:
        return th.nn.functional.pad(block, (0, 0, 0, 5))

    padded = join(node, pad(models), wait, pad(verbs), pad(future))
    logits = policy.actor(obs)
    assert th.allclose(padded_policy.actor(padded)[:, : logits.shape[1]], logits, atol=1e-5)
    assert th.allclose(padded_policy.critic(padded), policy.critic(obs), atol=1e-5)


def test_the_actor_ignores_the_privileged_block_and_the_critic_does_not(
    recorded: Any, make_policy: Any
) -> None:
    layout = recorded.layout
    policy = make_policy(layout)
    obs = th.from_numpy(recorded.observations[:200]).requires_grad_()
    (seen_by_actor,) = th.autograd.grad(policy.actor(obs).square().sum(), obs)
    assert (seen_by_actor[:, layout.actor_size :] == 0).all()
    (seen_by_critic,) = th.autograd.grad(policy.critic(obs).sum(), obs)
    assert (seen_by_critic[:, layout.actor_size :] != 0).any()
    other = obs.detach().clone()
    other[:, layout.actor_size :] = th.rand_like(other[:, layout.actor_size :])
    assert th.equal(policy.actor(other), policy.actor(obs))


def test_before_training_it_does_what_the_rule_suggests(recorded: Any, make_policy: Any) -> None:
    layout = recorded.layout
    policy = make_policy(layout, trained=False)
    obs = recorded.observations
    suggested = obs[:, layout.public_size : layout.actor_size].argmax(axis=1)
    actions, _ = policy.predict(obs, deterministic=True, action_masks=recorded.masks)
    assert np.array_equal(actions, suggested)
    assert len(set(actions.tolist())) > 5
    drawn, _ = policy.predict(obs, action_masks=recorded.masks)
    assert 0.6 < (drawn == suggested).mean() < 1


def test_without_a_prior_it_starts_uniform_over_what_is_legal(
    recorded: Any, make_policy: Any
) -> None:
    layout = Layout(recorded.layout.max_models, recorded.layout.full_verbs)
    policy = make_policy(layout, trained=False)
    assert policy.actor.beta is None
    obs = th.from_numpy(recorded.observations[:, : layout.observation_size])
    probabilities = policy.log_probs(obs, recorded.masks).exp().detach().numpy()
    expected = recorded.masks / recorded.masks.sum(axis=1, keepdims=True)
    assert np.allclose(probabilities, expected, atol=1e-6)


def test_draws_are_legal_and_follow_the_probabilities(recorded: Any, make_policy: Any) -> None:
    policy = make_policy(recorded.layout)
    row = int(recorded.masks.sum(axis=1).argmax())
    obs = th.from_numpy(recorded.observations[row]).expand(20_000, -1)
    mask = th.from_numpy(recorded.masks[row]).expand(20_000, -1)
    actions, log_prob = policy.actor.sample(obs, mask)
    expected = policy.log_probs(obs[:1], mask[:1])[0].exp()
    found = th.bincount(actions, minlength=len(expected)) / 20_000
    assert (found[~mask[0]] == 0).all()
    assert th.allclose(found, expected, atol=0.02)
    assert th.allclose(log_prob.exp(), expected[actions], atol=1e-6)
    values, again, entropy = policy.evaluate_actions(obs[:9], actions[:9], mask[:9])
    assert th.allclose(again, log_prob[:9]) and values.shape == (9, 1)
    reference = policy.get_distribution(obs[:9], mask[:9].numpy()).entropy()
    assert reference is not None and th.allclose(entropy, reference, atol=1e-4)


def test_divergence_is_that_from_the_softened_suggestion(recorded: Any, make_policy: Any) -> None:
    layout = recorded.layout
    obs = th.from_numpy(recorded.observations[:, : layout.observation_size])
    rule, policy = make_policy(layout, trained=False), make_policy(layout)
    ours, softened = (p.log_probs(obs, recorded.masks) for p in (policy, rule))
    divergence = (ours.exp() * (ours - softened)).sum(1)
    apart = policy.actor.divergence(obs, ours) - rule.actor.divergence(obs, softened)
    assert th.allclose(apart, divergence, atol=1e-4) and (divergence > 0.01).any()
    nearest = rule.actor.divergence(obs, softened).sum()
    pulls = th.autograd.grad(nearest, list(rule.actor.parameters()))
    assert all(th.allclose(pull, th.zeros(()), atol=1e-3) for pull in pulls)


def test_without_a_rule_divergence_is_negative_entropy(recorded: Any, make_policy: Any) -> None:
    policy = make_policy(Layout(recorded.layout.max_models, recorded.layout.full_verbs))
    obs = th.from_numpy(recorded.observations[:9, : recorded.layout.public_size])
    mask = recorded.masks[:9]
    entropy = policy.get_distribution(obs, mask).entropy()
    divergence = policy.actor.divergence(obs, policy.log_probs(obs, mask))
    assert th.allclose(divergence, -entropy, atol=1e-4)

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from safetensors.numpy import load_file, save_file

from mmrl.agents import export
from mmrl.agents.export import (
    DESCRIPTION,
    FULL,
    WEIGHTS,
    ExportedPolicy,
    PolicyCard,
    PriorRule,
    load_policy,
    save_policy,
)
from mmrl.agents.nodes import NodePlan, TrainingNodes
from mmrl.errors import InputError
from mmrl.node.actions import VERBS
from mmrl.node.observe import GLOBAL_FEATURES, MODEL_FEATURES
from mmrl.rules import get_rule


@pytest.fixture
def network(recorded: Any, make_policy: Any) -> Any:
    return make_policy(recorded.layout)


@pytest.fixture
def exported(network: Any, recorded: Any, tmp_path: Path) -> Path:
    card = PolicyCard(
        global_features=GLOBAL_FEATURES,
        model_features=MODEL_FEATURES,
        verb_set="core",
        verbs=recorded.layout.verbs,
        width=32,
        prior=PriorRule.of(get_rule("slack", margin=2.5)),
    )
    weights = {k: v.numpy() for k, v in network.actor.state_dict().items()}
    save_policy(tmp_path / "policy", card, weights)
    return tmp_path / "policy"


def test_it_decides_as_the_network_does(exported: Path, network: Any, recorded: Any) -> None:
    policy = load_policy(exported)
    assert policy.rule == get_rule("slack", margin=2.5)
    observations = recorded.observations[:, : recorded.layout.actor_size]
    theirs = network.log_probs(th.from_numpy(recorded.observations), recorded.masks).detach()
    actions = policy.act(observations, recorded.masks)
    assert np.array_equal(actions, theirs.argmax(dim=1).numpy())
    assert len(set(actions.tolist())) > 3
    probabilities = policy.probabilities(observations, recorded.masks)
    assert np.allclose(probabilities, theirs.exp().numpy(), atol=1e-5)
    assert (probabilities[~recorded.masks] == 0).all()


def test_one_observation_or_many(exported: Path, recorded: Any) -> None:
    policy = load_policy(exported)
    observations = recorded.observations[:6, : recorded.layout.actor_size]
    masks = recorded.masks[:6]
    many = policy.act(observations, masks)
    assert [
        int(policy.act(o, m)) for o, m in zip(observations, masks, strict=True)
    ] == many.tolist()
    with pytest.raises(ValueError, match="cannot have 17 numbers"):
        policy.act(np.zeros(17, np.float32), masks[0])


def test_neither_torch_nor_sb3_is_imported(exported: Path, recorded: Any) -> None:
    code = f"""
import sys
import numpy as np
from mmrl.agents.export import load_policy
policy = load_policy({str(exported)!r})
observation = np.zeros({recorded.layout.actor_size}, np.float32)
print(int(policy.act(observation, np.ones({recorded.layout.num_actions}, bool))))
print([m for m in ("torch", "stable_baselines3", "sb3_contrib") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "[]"


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reweigh(folder: Path, change: Any) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


def spoil(weights: dict[str, Any]) -> None:
    weights["head.bias"][3] = np.nan


BAD = {
    "holds NaN": lambda folder: reweigh(folder, spoil),
    "'beta' is missing": lambda folder: reweigh(folder, lambda w: w.pop("beta")),
    r"'head.bias' is float32\[7\]": lambda folder: reweigh(
        folder, lambda w: w.update({"head.bias": np.zeros(7, np.float32)})
    ),
    "damaged": lambda folder: (folder / WEIGHTS).write_bytes(b"not tensors"),
    "cannot read .*safetensors": lambda folder: (folder / WEIGHTS).unlink(),
    "cannot read .*json": lambda folder: (folder / DESCRIPTION).unlink(),
    "not valid JSON": lambda folder: (folder / DESCRIPTION).write_text("{"),
    "format is 99": lambda folder: rewrite(folder, format=99),
    "format is None": lambda folder: (folder / DESCRIPTION).write_text("[1]"),
    "model_features differ .*'x' is not known": lambda folder: rewrite(
        folder, model_features=["x", *MODEL_FEATURES[1:]]
    ),
    "global_features differ .*order": lambda folder: rewrite(
        folder, global_features=list(reversed(GLOBAL_FEATURES))
    ),
    "verbs differ": lambda folder: rewrite(folder, verb_set="full"),
    "colour": lambda folder: rewrite(folder, colour="red"),
    "unknown rule 'slak'": lambda folder: rewrite(folder, prior={"name": "slak", "params": {}}),
}


@pytest.mark.parametrize("message", BAD)
def test_wrong_files_are_refused(message: str, exported: Path) -> None:
    BAD[message](exported)
    with pytest.raises(InputError, match=message):
        load_policy(exported)


def test_a_policy_without_prior_needs_no_suggestion(recorded: Any, tmp_path: Path) -> None:
    card = PolicyCard(
        global_features=GLOBAL_FEATURES,
        model_features=MODEL_FEATURES,
        verb_set="core",
        verbs=recorded.layout.verbs,
        width=4,
        prior=None,
    )
    rng = np.random.default_rng(0)
    weights = {k: rng.normal(size=shape).astype(np.float32) for k, shape in card.shapes().items()}
    policy = ExportedPolicy(card, weights)
    observations = recorded.observations[:50, : recorded.layout.public_size]
    actions = policy.act(observations, recorded.masks[:50])
    assert recorded.masks[np.arange(50), actions].all()


def test_one_policy_under_both_verb_sets(busy: Any, make_policy: Any) -> None:
    rule = get_rule("slack")
    nodes = TrainingNodes(NodePlan([busy], 16, rule, privileged=False, seed=0, full_verbs=True))
    network = make_policy(nodes.layout)
    card = PolicyCard(
        global_features=GLOBAL_FEATURES,
        model_features=MODEL_FEATURES,
        verb_set="both",
        verbs=VERBS,
        without=("pause",),
        width=32,
        prior=PriorRule.of(rule),
    )
    weights = {k: v.numpy() for k, v in network.actor.state_dict().items()}
    policy = ExportedPolicy(card, weights)
    assert policy.plays(True) and policy.plays(False) and policy.full_verbs
    padded, own = nodes.reset(), nodes.parts[0].batch.layout
    places = [0] + [1 + m * 9 + VERBS.index(v) for m in range(own.max_models) for v in own.verbs]
    core = nodes.parts[0].batch.observe()
    assert core.shape[1] < padded.shape[1]
    expected = network.actor(th.from_numpy(padded)).detach().numpy()
    banned = np.array([name.endswith(".pause") for name in own.action_names])
    logits = policy.logits(core)
    assert np.allclose(logits[:, ~banned], expected[:, places][:, ~banned], atol=1e-4)
    assert (logits[:, banned] < -1e7).all()
    padded[:, FULL] = 1.0  # the same numbers as they would stand under the full verbs
    allowed = [not name.endswith(".pause") for name in nodes.layout.action_names]
    with_full = network.actor(th.from_numpy(padded)).detach().numpy()
    assert np.allclose(policy.logits(padded)[:, allowed], with_full[:, allowed], atol=1e-4)
    nodes.close()


def test_the_shipped_policy_by_name(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "DEFAULT_FOLDER", exported)
    assert load_policy("default").card == load_policy(exported).card
    monkeypatch.setattr(export, "DEFAULT_FOLDER", exported / "none")
    with pytest.raises(InputError, match=r"no default policy is shipped.*train one"):
        load_policy("default")

"""A small scenario and a run with made-up policies, for tests of what comes after training."""

from pathlib import Path

import numpy as np

from mmrl.agents.export import PolicyCard, PriorRule, save_policy
from mmrl.node.actions import verb_names
from mmrl.node.observe import GLOBAL_FEATURES, MODEL_FEATURES
from mmrl.rules import get_rule

TINY = """
description = "Three models on a budget for two: short episodes for tests."
platform = "h200"
budget_gb = 24
models = ["qwen2.5-7b", "llama3.2-3b", "qwen2.5-7b"]
targets = "relative"
utilisation_at_load_1 = 0.8
duration_s = 12
drain_s = 4

[workload.arrivals]
kind = "poisson"
"""

CARD = PolicyCard(
    global_features=GLOBAL_FEATURES,
    model_features=MODEL_FEATURES,
    verb_set="core",
    verbs=verb_names(False),
    width=4,
    prior=PriorRule.of(get_rule("slack")),
)

METRICS = """step,serving/goodput,eval/goodput,eval/champion_goodput,train/entropy_loss
100,0.5,0.52,0.6,-0.4
200,0.6,,,-0.3
300,0.7,0.65,0.6,-0.2
"""


def make_scenario(folder: Path) -> str:
    """Write the scenario and return its path."""
    path = folder / "tiny.toml"
    path.write_text(TINY)
    return str(path)


def make_policy(folder: Path, spread: float) -> Path:
    """Write a policy that follows the slack rule, but for weights of a spread."""
    rng = np.random.default_rng(0)
    weights = {
        name: np.asarray(rng.normal(0, spread, shape), np.float32)
        for name, shape in CARD.shapes().items()
    }
    weights["beta"] = np.full(2, 3.0, np.float32)
    save_policy(folder, CARD, weights)
    return folder


def make_run(folder: Path) -> Path:
    """Write a run folder whose best policy differs from that of step 0."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"scenarios": ["demo"]}')
    (folder / "metrics.csv").write_text(METRICS)
    make_policy(folder / "policy_step0", 0.0)
    make_policy(folder / "policy_best", 1.5)
    return folder

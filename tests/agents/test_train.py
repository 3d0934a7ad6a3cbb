import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch as th
from stable_baselines3.common.logger import Logger
from typer.testing import CliRunner

from mmrl.agents import runs
from mmrl.agents.callback import RunCallback
from mmrl.agents.config import TrainConfig, build_config
from mmrl.agents.export import FULL, load_policy
from mmrl.agents.nodes import NodePlan, TrainingNodes
from mmrl.agents.policy import RARE
from mmrl.agents.report import write_report
from mmrl.agents.runner import play
from mmrl.agents.state import read_state
from mmrl.agents.train import (
    CRITIC_FIRST,
    LEARNING_RATE,
    LEARNING_RATE_ON,
    read_config,
    read_scenarios,
    resume,
    train,
)
from mmrl.cli.app import app
from mmrl.envs.layout import Layout
from mmrl.errors import InputError
from mmrl.node.actions import CORE_VERBS, VERBS
from mmrl.node.state import NODE, REQUEST
from mmrl.rules import get_rule
from mmrl.rules.registry import tuned_params
from mmrl.scenarios.registry import DATA, get_scenario

SMALL: dict[str, Any] = {
    "envs": 32,
    "rollout_steps": 16,
    "batch_size": 256,
    "eval_every": 1024,
    "eval_episodes": 3,
    "threads": 1,
    "seed": 5,
}


@pytest.fixture
def scenario(tmp_path: Path) -> str:
    text = (DATA / "demo.toml").read_text()
    for key, value in (("utilisation_at_load_1", 2.5), ("duration_s", 10), ("drain_s", 4)):
        lines = [f"{key} = {value}" if li.startswith(key) else li for li in text.splitlines()]
        text = "\n".join(lines)
    path = tmp_path / "busy.toml"
    path.write_text(text)
    return str(path)


def small(scenario: str, tmp_path: Path, **changes: Any) -> TrainConfig:
    return build_config(**(SMALL | {"scenarios": (scenario,), "out": tmp_path} | changes))


def state(folder: Path) -> Any:
    """Return a run's state, with nodes and requests by field: their padding means nothing."""
    found = th.load(folder / runs.STATE, weights_only=True)
    for key, value in found["nodes"].items():
        for kind, dtype in ((".nodes", NODE), (".requests", REQUEST)):
            if key.endswith(kind):
                rows = value.numpy().view(dtype)
                found["nodes"][key] = {n: th.from_numpy(rows[n].copy()) for n in dtype.names or ()}
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(th.equal(one, other)) if isinstance(one, th.Tensor) else bool(one == other)


class Stop:
    """Presses Ctrl-C in the iteration that ends at a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def update(self, step: int, scalars: dict[str, float]) -> None:
        if step == self.at:
            signal.raise_signal(signal.SIGINT)


def test_a_run_stopped_in_its_last_iteration_is_complete(scenario: str, tmp_path: Path) -> None:
    ends = [
        train(small(scenario, tmp_path, name=name, steps=1024), progress)
        for name, progress in (("whole", None), ("stopped", Stop(1024)))
    ]
    whole, stopped = map(state, ends)
    assert stopped["steps"] == 1024 and same(whole["policy"], stopped["policy"])
    assert [load_policy(end / runs.LAST).card.steps for end in ends] == [1024, 1024]


def test_a_resumed_run_ends_as_one_that_was_not_stopped(scenario: str, tmp_path: Path) -> None:
    whole = train(small(scenario, tmp_path, name="whole", steps=3072, critic_first=1))

    small_run = small(scenario, tmp_path, name="stopped", steps=3072, critic_first=1)
    stopped = train(small_run, Stop(3 * 512))
    assert state(stopped)["steps"] == 3 * 512
    assert load_policy(stopped / runs.LAST).card.steps == 3 * 512
    assert not same(state(whole)["policy"], state(stopped)["policy"])
    resume(stopped)
    ends = state(whole), state(stopped)
    for end in ends:
        del end["elapsed_s"]
    assert same(*ends)
    with pytest.raises(InputError, match="3072 of 3072 steps"):
        resume(stopped)
    assert (whole / runs.LAST / "policy.safetensors").read_bytes() == (
        stopped / runs.LAST / "policy.safetensors"
    ).read_bytes()
    columns = ["step", "eval/step", "eval/goodput", "train/approx_kl", "decisions/as_suggested"]
    one, other = (runs.read_metrics(folder)[columns] for folder in (whole, stopped))
    assert one["step"].is_monotonic_increasing
    assert one.dropna().equals(other.dropna())


def test_what_a_run_leaves(scenario: str, tmp_path: Path) -> None:
    folder = train(small(scenario, tmp_path, steps=1536, name="it"))
    assert folder == tmp_path / "it"
    for name in (runs.STEP0, runs.BEST, runs.LAST, f"{runs.CHECKPOINTS}/step_000001024"):
        assert load_policy(folder / name).rule == get_rule(
            "partial", **tuned_params()["universal"]["partial"]
        )
    assert load_policy(folder).card == load_policy(folder / runs.BEST).card
    assert load_policy(folder / runs.LAST).card.steps == 1536
    metrics = runs.read_metrics(folder)
    assert metrics["eval/step"].dropna().tolist() == [0, 1024, 1536]
    first = metrics.loc[metrics["eval/step"] == 0].iloc[0]
    assert first["eval/goodput"] == first["eval/champion_goodput"]  # at step 0 it is the rule
    assert first["eval/goodput_gain"] == 0
    shares = metrics[[f"decisions/{v}" for v in ("wait", "out", "level100", "pause", "resume")]]
    assert np.allclose(shares.dropna().sum(axis=1), 1)
    provenance = json.loads((folder / runs.PROVENANCE).read_text())
    assert {"mmrl", "torch", "numba"} <= provenance["versions"].keys()
    assert list((folder / runs.TENSORBOARD).iterdir())
    with pytest.raises(InputError, match="exists already"):
        train(small(scenario, tmp_path, steps=1536, name="it"))


def test_a_run_that_ends_by_the_clock_is_evaluated_at_its_end(
    scenario: str, tmp_path: Path
) -> None:
    folder = train(small(scenario, tmp_path, name="clock", time_s=0.5, eval_every=10**6))
    metrics = runs.read_metrics(folder)
    assert metrics["eval/step"].max() == metrics["step"].max() == state(folder)["steps"] > 0
    assert load_policy(folder / runs.LAST).card.steps == metrics["step"].max()


def test_the_first_sure_gain_is_noted(scenario: str, tmp_path: Path) -> None:
    config = small(scenario, tmp_path, name="x")
    callback = RunCallback(config, [], None, tmp_path, None)
    callback.model = SimpleNamespace(logger=Logger(None, []))  # type: ignore[assignment]
    noted = callback.logger.name_to_value
    callback._groups = ["h200_core"] * 4
    callback._compare(np.array([0.1, -0.1, 0.1, 0.0]))  # within the noise
    assert "eval/beat_steps" not in noted
    callback.num_timesteps = 512
    callback._compare(np.array([0.1, 0.11, 0.09, 0.1]))
    callback.num_timesteps = 1024
    callback._compare(np.array([0.2, 0.21, 0.19, 0.2]))
    assert noted["eval/beat_steps"] == 512
    assert noted["eval/beat_s"] >= 0


def test_scenarios_are_mixed_and_padded_to_the_largest_fleet(scenario: str) -> None:
    busy, six = get_scenario(scenario), get_scenario("fast")
    nodes = TrainingNodes(NodePlan([busy, six], 40, get_rule("slack"), privileged=True, seed=0))
    assert nodes.layout.max_models == 8
    assert nodes.reset().shape == (40, nodes.layout.observation_size)
    names = [part.batch.scenario.name for part in nodes.parts for _ in range(part.num_envs)]
    assert names.count("busy") == names.count("fast") == 20
    for _ in range(5):
        masks = nodes.action_masks()
        observations, rewards, dones, infos = nodes.step(masks.argmax(axis=1))
        assert len(observations) == len(rewards) == len(dones) == len(infos) == 40
    nodes.close()


def test_core_and_full_verbs_share_one_layout(scenario: str) -> None:
    core = get_scenario(scenario)
    full = core.model_copy(update={"verbs": "full"})
    rule = get_rule("slack")
    mixed = TrainingNodes(NodePlan([core, full], 32, rule, privileged=True, seed=0))
    alone = TrainingNodes(NodePlan([core], 16, rule, privileged=True, seed=0))  # the same seeds
    layout, own = mixed.layout, alone.layout
    assert layout.full_verbs and not own.full_verbs
    places = [0] + [
        1 + m * 9 + VERBS.index(verb) for m in range(own.max_models) for verb in own.verbs
    ]
    seen, expected = mixed.reset()[:16], alone.reset()
    for step in range(60):
        masks, mine = mixed.action_masks(), alone.action_masks()
        assert np.array_equal(masks[:16, places], mine)
        assert masks[:16].sum() == mine.sum()  # no other verb is legal under the core verbs
        public = layout.public_size
        assert np.array_equal(seen[:, :public], expected[:, :public])
        suggested = seen[:, public : layout.actor_size]
        assert np.array_equal(suggested[:, places], expected[:, public : own.actor_size])
        assert np.array_equal(seen[:, layout.actor_size :], expected[:, own.actor_size :])
        chosen = [np.flatnonzero(row)[step % row.sum()] for row in mine]
        actions = masks.argmax(axis=1)
        actions[:16] = np.array(places)[chosen]
        seen, rewards = (array[:16] for array in mixed.step(actions)[:2])
        expected, expected_rewards = alone.step(np.array(chosen))[:2]
        assert np.array_equal(rewards, expected_rewards)
    mixed.close()
    alone.close()


def test_one_policy_for_both_verb_sets(scenario: str, tmp_path: Path) -> None:
    folder = train(small(scenario, tmp_path, steps=1024, name="both", verbs="both"))
    policy = load_policy(folder / runs.LAST)
    assert policy.card.verb_set == "both" and len(policy.card.verbs) == 9
    for verbs in ("core", "full"):
        sampler = get_scenario(scenario, verbs=verbs).sampler()
        assert len(play(policy, sampler, [("dev", 0)])) == 1
    metrics = runs.read_metrics(folder)
    assert {"gain/h200_core", "gain/h200_full"} <= set(metrics)
    assert metrics.loc[0, ["gain/h200_core", "gain/h200_full"]].tolist() == [0, 0]  # the rule


def test_training_goes_on_from_a_policy(scenario: str, tmp_path: Path) -> None:
    first = train(small(scenario, tmp_path, steps=1024, name="first", verbs="both"))
    trained = load_policy(first)
    for start in (first, first / runs.BEST):
        config = small(
            scenario, tmp_path, steps=1024, name=f"on-{start.name}", start=str(start), width=7
        )
        folder = train(config)
        begun = load_policy(folder / runs.STEP0)
        assert begun.card.verb_set == "both" and begun.rule == trained.rule
        for name, array in trained.weights.items():
            assert np.array_equal(begun.weights[name], array)
        kept = read_config(folder)
        assert kept.width == trained.card.width
        assert kept.learning_rate == LEARNING_RATE_ON < LEARNING_RATE
        critic_first = read_state(folder)["critic_first"]
        assert critic_first == (0 if start == first else CRITIC_FIRST)
        ended = load_policy(folder / runs.LAST)
        moved = any(not np.array_equal(ended.weights[n], w) for n, w in begun.weights.items())
        assert moved == (start == first)  # else only the critic learns at first
        resume(folder, steps=1536)
    blind = small(scenario, tmp_path, steps=512, name="blind", start=str(first), privileged=False)
    assert read_state(train(blind))["critic_first"] == CRITIC_FIRST  # the critic does not fit
    shipped = load_policy("default")
    folder = train(small(scenario, tmp_path, steps=512, name="d", start="default"))
    begun = load_policy(folder / runs.STEP0)
    assert all(np.array_equal(begun.weights[n], w) for n, w in shipped.weights.items())
    core = train(small(scenario, tmp_path, steps=512, name="core"))
    with pytest.raises(InputError, match=r"has the verbs 'core'.* has 'full'"):
        train(small(scenario, tmp_path, name="f", start=str(core), verbs="full"))


def test_a_policy_with_core_verbs_learns_the_others_and_forgets_nothing(
    scenario: str, tmp_path: Path
) -> None:
    first = train(small(scenario, tmp_path, steps=2048, name="core", critic_first=0))
    core = load_policy(first / runs.LAST)
    config = small(scenario, tmp_path, steps=512, name="both", start=str(first / runs.LAST))
    folder = train(config.model_copy(update={"verbs": "both"}))
    both = load_policy(folder / runs.STEP0)
    assert (core.card.verb_set, both.card.verb_set) == ("core", "both")
    models = get_scenario(scenario).largest_fleet
    layout = Layout(models, False, True)
    obs = np.random.default_rng(0).random((32, layout.actor_size), np.float32)
    obs[:, FULL] = 0
    assert np.ptp(core.logits(obs)) > 3.5  # more than the bonus of the suggestion
    np.testing.assert_allclose(both.logits(obs), core.logits(obs), atol=1e-5)
    assert (both.weights["beta"] == core.weights["beta"][0]).all()  # as sure under all verbs
    assert (np.delete(both.weights["verbs.bias"], CORE_VERBS) == RARE).all()
    sampler = get_scenario(scenario, verbs="full").sampler()
    assert len(play(both, sampler, [("dev", 0)])) == 1


def test_parts_can_be_switched_off(scenario: str, tmp_path: Path) -> None:
    off = {"elapsed_time": False, "clip_apart": False, "jitter": 0, "latency_weight": 0}
    config = small(scenario, tmp_path, steps=512, name="off", without="pause,resume", **off)
    (trained,) = config.trained([get_scenario(scenario, jitter=0.1)])
    assert trained.jitter == 0
    assert (trained.reward.miss, trained.reward.latency) == (1, 0)
    folder = train(config)
    policy = load_policy(folder / runs.LAST)
    assert policy.card.without == ("pause", "resume")
    assert not runs.read_metrics(folder)[["decisions/pause", "decisions/resume"]].any(axis=None)
    pinned = small(scenario, tmp_path, randomise=False).trained([get_scenario("universal")])[0]
    assert (
        len(pinned.models or ()) == 5 and not pinned.variants and pinned.load[0] == pinned.load[1]
    )
    assert pinned.sampler().max_models == 5


def test_without_prior_and_future(scenario: str, tmp_path: Path) -> None:
    config = small(scenario, tmp_path, steps=512, name="n", prior=None, privileged=False)
    policy = load_policy(train(config) / runs.LAST)
    assert policy.rule is None
    assert "beta" not in policy.weights


CALLS = {
    "no scenario given": [],
    "unknown scenario 'fsat'": ["fsat"],
    "steps is 'lots'": ["fast", "--steps", "lots"],
    "time is '10x'": ["fast", "--time", "10x"],
    "envs: input should be greater": ["fast", "--envs", "0"],
    "unknown setting 'entrpy'": ["fast", "--set", "entrpy=1"],
    "learning_rate: input should be": ["fast", "--set", "learning_rate=fast"],
    "no value": ["fast", "--set", "clip"],
    "cannot read .*config.json": ["--resume", "nowhere"],
}


@pytest.mark.parametrize("message", CALLS)
def test_wrong_calls_are_explained(message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["train", *CALLS[message], "--out", str(tmp_path)])
    assert isinstance(result.exception, InputError)
    with pytest.raises(InputError, match=message):
        raise result.exception
    assert not list(tmp_path.iterdir())


def test_a_run_finds_its_scenarios_again_whatever_their_names(
    scenario: str, tmp_path: Path
) -> None:
    dotted = tmp_path / "busy-1.5.toml"
    dotted.write_text(Path(scenario).read_text())
    config = small(scenario, tmp_path, scenarios=(str(dotted), scenario), steps=512, name="dots")
    folder = train(config)
    assert [each.name for each in read_scenarios(folder, config)] == ["busy-1.5", "busy"]
    resume(folder, steps=1024)
    assert state(folder)["steps"] == 1024


def test_a_limit_that_is_given_lifts_the_other_that_is_used_up(
    scenario: str, tmp_path: Path
) -> None:
    by_time = train(small(scenario, tmp_path, name="time", steps=10**6, time_s=1e-3))
    done = state(by_time)["steps"]
    with pytest.raises(InputError, match=r"time of run .* is over"):
        resume(by_time)
    resume(by_time, steps=done + 512)
    assert state(by_time)["steps"] == done + 512

    by_steps = train(small(scenario, tmp_path, name="steps", steps=512))
    with pytest.raises(InputError, match="512 of 512 steps"):
        resume(by_steps)
    with pytest.raises(InputError, match="512 of 512 steps"):
        resume(by_steps, steps=512, time_s=9)  # both are given: both hold
    resume(by_steps, time_s=0.5)
    assert state(by_steps)["steps"] > 512


def test_a_run_that_never_began_leaves_its_name_free(
    scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        with pytest.raises(InputError, match="exists already"):
            runs.new_run(tmp_path, "it")  # while it is being prepared
        raise KeyboardInterrupt

    config = small(scenario, tmp_path, name="it", steps=512)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mmrl.agents.train.TrainingNodes", interrupt)
        train(config)
    assert not (tmp_path / "it" / runs.STATE).exists()
    with pytest.raises(InputError, match="has not begun"):
        resume(tmp_path / "it")
    with pytest.raises(InputError, match="nothing was logged"):
        write_report([tmp_path / "it"], tmp_path / "report")
    other = Path(scenario).rename(tmp_path / "other.toml")
    train(config.model_copy(update={"scenarios": (str(other),)}))
    assert [path.name for path in (tmp_path / "it" / runs.SCENARIOS).iterdir()] == ["0-other.json"]
    assert state(tmp_path / "it")["steps"] == 512


def test_a_folder_with_anything_else_is_no_run_that_never_began(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / runs.SCENARIOS).mkdir(parents=True)
    (folder / runs.CONFIG).write_text("{}")
    assert runs.new_run(tmp_path, "model") == folder
    (folder / "model.safetensors").write_text("years of work")
    with pytest.raises(InputError, match="is no run to continue"):
        runs.new_run(tmp_path, "model")
    runs.clear(folder)
    assert len(list(folder.iterdir())) == 3


def test_a_device_that_is_not_here_is_told_before_anything_is_written(
    scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match="finds no GPU"):
        train(small(scenario, tmp_path, name="it", device="cuda"))
    assert not (tmp_path / "it").exists()


def test_a_damaged_state_is_explained(scenario: str, tmp_path: Path) -> None:
    folder = train(small(scenario, tmp_path, steps=512, name="d"))
    (folder / runs.STATE).write_bytes(b"half a fi")
    with pytest.raises(InputError, match="damaged"):
        resume(folder)

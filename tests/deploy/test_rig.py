"""The rig: a node driven by hand does what it is told, and records it."""

from collections.abc import Iterator

import pytest

from mmrl.deploy.clock import COMPUTE
from mmrl.deploy.config import build_config
from mmrl.deploy.known import unmeasured
from mmrl.deploy.profiler import serving
from mmrl.deploy.profiler.run import Request
from mmrl.deploy.protocol import Finish, Generate, Sampling
from mmrl.deploy.rig import Rig
from mmrl.errors import InputError, MmrlError
from mmrl.node.actions import LEVEL_0, LEVEL_50, LEVEL_100, OUT
from mmrl.node.state import DECODE_STEP


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    models = ["llama-tiny", "llama-tiny"]
    with Rig.of(models, device="cpu", memory=10**9, host_kv=10**6) as opened:
        yield opened


def test_models_go_to_the_levels_they_are_told_to_and_nowhere_else(rig: Rig) -> None:
    first, second = rig.names
    assert first != second
    state = rig.node.state
    for verb, pieces in ((LEVEL_50, 3), (LEVEL_100, 5), (LEVEL_0, 1), (OUT, 0)):
        rig.level(first, verb)
        assert (state.landed[0], state.granted[0], state.landed[1]) == (pieces, pieces, 0)


def test_instances_of_one_checkpoint_share_their_weights(rig: Rig) -> None:
    """And so they say the same, resident or streamed."""
    assert len(rig.fleet.arenas) == 1
    said = []
    for name, verb in zip(rig.names, (LEVEL_100, LEVEL_0), strict=True):
        rig.level(name, verb)
        request = Generate(name, tuple(range(20, 60)), 12, ignore_eos=True, sampling=Sampling(0.0))
        number = rig.send(request)
        rig.until(lambda n=number: rig.finished([n]))  # type: ignore[misc]
        assert rig.times[number][-1][1].finish is Finish.LENGTH
        assert len(rig.gaps(number, 0)) == 11
        said.append(rig.tokens(number))
        rig.level(name, OUT)
    assert said[0] == said[1] and len(said[0]) == 12
    rig.clear()
    assert rig.steps == [] and rig.transfers == []


def test_progress_is_another_after_whatever_ends_and_the_same_while_nothing_does(rig: Rig) -> None:
    first, seen = rig.names[0], [rig.node.progress]

    def gets_on() -> bool:
        if rig.node.progress != seen[-1]:
            seen.append(rig.node.progress)
        return rig.finished([number]) if number else False

    number = 0
    rig.level(first, LEVEL_100)
    assert not gets_on() and len(seen) == 2
    number = rig.submit(first, prompt=20, output=6)
    rig.until(gets_on)
    iterations = len(rig.steps)
    assert len(seen) == 2 + iterations
    for _ in range(3):
        rig.engine.run_instant()
    assert rig.node.progress == seen[-1]
    rig.level(first, OUT)
    rig.clear()


def test_what_ran_is_recorded(rig: Rig) -> None:
    first = rig.names[0]
    rig.level(first, LEVEL_100)
    numbers = [rig.submit(first, prompt=20, output=6) for _ in range(3)]
    rig.until(lambda: rig.finished(numbers))
    decoded = sum(step.batch for step in rig.steps if step.kind == DECODE_STEP)
    assert decoded == 3 * 5  # the first token of each comes of its prefill
    assert all(step.ended_s - step.begun_s == pytest.approx(step.took_s) for step in rig.steps)
    assert len(rig.transfers) == 5  # base weights and four layers
    rig.clear()
    rig.level(first, OUT)


def test_a_job_on_a_worker_ends_or_raises_beside_the_loop(rig: Rig) -> None:
    assert rig.on_worker(COMPUTE, lambda: 7).result == 7
    with pytest.raises(ZeroDivisionError):
        rig.on_worker(COMPUTE, lambda: 1 // 0)
    with pytest.raises(MmrlError, match="not legal"):
        rig.act(rig.names[0], OUT)
        rig.until(lambda: False, limit_s=5)


def test_only_unmeasured_models_are_measured_before_serving(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    asked: list[Request] = []
    monkeypatch.setattr(
        serving, "profile_models", lambda request, report: asked.append(request) or []
    )
    config = build_config(
        {
            "models": ["llama-tiny", "opt-tiny"],
            "node": {"device": "cpu", "profiles": str(tmp_path_factory.mktemp("none"))},
        },
        "test",
    )
    report: serving.Report = None  # type: ignore[assignment]
    assert serving.measure_missing(config, report) == ["llama-tiny", "opt-tiny"]
    assert [one.name for one in asked[0].models] == ["llama-tiny", "opt-tiny"]
    monkeypatch.setattr(serving, "unmeasured", lambda found: unmeasured(found)[1:])
    serving.measure_missing(config, report)
    assert [one.name for one in asked[1].models] == ["opt-tiny"]
    monkeypatch.setattr(serving, "unmeasured", lambda found: [])
    assert serving.measure_missing(config, report) == [] and len(asked) == 2


def test_a_model_that_is_nowhere_is_named() -> None:
    with pytest.raises(InputError, match="no-such-model"):
        Rig.of(["no-such-model"], device="cpu")

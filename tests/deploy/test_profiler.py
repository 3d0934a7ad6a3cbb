"""`mmrl profile run`: what it writes is true to what it measured, and nothing measured is lost."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmrl.deploy.config import ModelConfig, ServeConfig, build_config
from mmrl.deploy.hardware import device_name, gpu_users
from mmrl.deploy.known import find_profiles, notes_on
from mmrl.deploy.memory import OutOfDeviceMemory
from mmrl.deploy.profiler import machine, moving, run
from mmrl.deploy.profiler.fit import _overhead as overhead_of
from mmrl.deploy.profiler.fit import fit_stream, fit_transfer
from mmrl.deploy.profiler.raw import Raw, Section
from mmrl.deploy.profiler.run import Outcome, Request, profile_models
from mmrl.deploy.profiler.timing import Patience, repeated, spread
from mmrl.deploy.rig import open_checkpoints
from mmrl.errors import InputError
from mmrl.node.actions import LEVEL_0
from mmrl.profiles.costs import CostModel
from mmrl.profiles.registry import DATA, get_platform, get_profile
from mmrl.profiles.schema import load_profile
from mmrl.study.formulas import host_crossing_tokens

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}


class Silent:
    """A report that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def section(self, model: str, name: str, done: int, total: int) -> None:
        assert done < total

    def reading(self, model: str, done: int, total: int) -> None:
        assert done <= total


def model(folder: Path, name: str = "small", **changes: Any) -> ModelConfig:
    path = folder / name
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({**SHAPE, **changes}))
    (path / "random-weights.json").write_text('{"seed": 0}')
    return ModelConfig.model_validate(str(path))


def request(folder: Path, *models: ModelConfig, **changes: Any) -> Request:
    fields: dict[str, Any] = {
        "out": folder / "profiles",
        "device": "cpu",
        "memory": 200_000_000,
        "budget_s": 0.01,
        "platform": "tiny",
    }
    return Request(models, **{**fields, **changes})


@pytest.fixture(scope="module")
def small_machine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "CPU_BYTES", 1 << 20)
        patch.setattr(machine, "SMALL_DISK_BYTES", machine.CHUNK_BYTES)
        yield


@pytest.fixture(scope="module")
def measured(
    small_machine: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ModelConfig, Outcome]:
    """A folder with the profile of one small model, the model, and what came of it."""
    folder = tmp_path_factory.mktemp("profiler")
    one = model(folder)
    (outcome,) = profile_models(request(folder, one), Silent())
    assert not outcome.raw.errors()
    return folder, one, outcome


def test_a_run_writes_a_platform_and_profiles_that_the_registry_reads(
    measured: tuple[Path, ModelConfig, Outcome],
) -> None:
    folder, _, outcome = measured
    out = folder / "profiles"
    profile = get_profile(out, "small")
    assert profile == outcome.profile
    assert profile.kind == "measured"
    assert profile.provenance.gpu == device_name(CPU)
    assert profile.provenance.libraries["torch"] == torch.__version__
    assert profile.parameters == open_checkpoints([measured[1]])[0].parameters
    platform = get_platform(out)
    assert platform.name == "tiny" and platform.link_rates is not None
    assert platform.load == profile.load and platform.disk is not None
    assert {p.batch for p in profile.decode} >= {1, 32}
    assert [p.tokens for p in profile.prefill][-1] <= SHAPE["max_position_embeddings"]
    assert profile.host_layer_s and profile.host_model_s
    assert profile.slowdown is not None and profile.overhead is not None
    assert None not in (profile.overhead.settle_s, profile.overhead.piece_s)
    assert host_crossing_tokens(CostModel(profile)) is not None


def test_a_point_is_the_median_of_what_was_measured(
    measured: tuple[Path, ModelConfig, Outcome],
) -> None:
    folder, _, outcome = measured
    raw = json.loads((folder / "profiles" / "raw" / "small.json").read_text())
    point = min(raw["sections"]["prefill"]["points"], key=lambda point: point["tokens"])
    times = sorted(point["times_s"])
    assert len(times) == 3
    assert outcome.profile is not None
    assert outcome.profile.prefill[0].time_s == pytest.approx(times[1], rel=1e-5)
    assert outcome.profile.provenance.repeats["prefill"] == 3


def test_the_same_command_measures_nothing_twice(
    measured: tuple[Path, ModelConfig, Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, one, outcome = measured
    monkeypatch.setattr(run, "SECTIONS", dict.fromkeys(run.SECTIONS, _must_not_run))
    (again,) = profile_models(request(folder, one), Silent())
    assert again.profile == outcome.profile


def _must_not_run(*_: Any) -> None:
    raise AssertionError("this has been measured already")


def test_what_was_measured_otherwise_is_not_mixed_in(
    measured: tuple[Path, ModelConfig, Outcome],
) -> None:
    folder, one, _ = measured
    with pytest.raises(InputError, match=r"small\.json.*memory_bytes was 200000000, is 190000000"):
        profile_models(request(folder, one, memory=190_000_000), Silent())
    with pytest.raises(InputError, match="holds profiles of 'tiny'"):
        profile_models(request(folder, one, platform="other"), Silent())


def test_a_folder_of_something_else_is_refused_before_anything_is_measured(
    measured: tuple[Path, ModelConfig, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_measure_machine", _must_not_run)
    (tmp_path / "config.json").write_text("{}")
    asked = request(tmp_path, measured[1], out=tmp_path)
    with pytest.raises(InputError, match="holds no profiles"):
        profile_models(asked, Silent())
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_interruption_and_failure_lose_no_section(
    measured: tuple[Path, ModelConfig, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run goes on where it stopped; a failed section takes no other with it."""
    monkeypatch.setattr(run, "_measure_machine", lambda *_: _machine_of(measured[0]))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    one = model(tmp_path)
    sections = dict(run.SECTIONS)
    monkeypatch.setattr(run, "SECTIONS", {**sections, "load": interrupt})
    with pytest.raises(KeyboardInterrupt):
        profile_models(request(tmp_path, one), Silent())
    done = {"decode": _must_not_run, "prefill": _must_not_run}
    monkeypatch.setattr(run, "SECTIONS", {**sections, **done, "host": fail, "slowdown": fail})
    report = Silent()
    (outcome,) = profile_models(request(tmp_path, one), report)
    assert outcome.raw.errors() == dict.fromkeys(("host", "slowdown"), "RuntimeError: out of luck")
    assert outcome.profile is not None and outcome.profile.host_layer_s == ()
    assert "failed: host: RuntimeError: out of luck" in outcome.profile.provenance.notes
    assert any("host" in line and "FAILED" in line for line in report.lines)


def _machine_of(folder: Path) -> Raw:
    path = folder / "profiles" / "raw" / "machine.json"
    found = json.loads(path.read_text())
    return Raw(path, "machine", found["identity"], "test")


def test_without_a_section_that_costs_need_there_is_no_profile(
    measured: tuple[Path, ModelConfig, Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_measure_machine", lambda *_: _machine_of(measured[0]))
    monkeypatch.setattr(run, "SECTIONS", {"decode": lambda *_: None})
    (outcome,) = profile_models(request(tmp_path, model(tmp_path)), Silent())
    assert outcome.profile is None
    assert "prefill: not measured" in outcome.error
    assert not (tmp_path / "profiles" / "small.json").exists()


def test_impossible_wishes_are_refused_before_anything_is_measured(
    small_machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = model(tmp_path)
    monkeypatch.setattr(run, "_measure_model", _must_not_run)
    with pytest.raises(InputError, match="small does not fit even streamed"):
        profile_models(request(tmp_path, one, memory=1_000_000), Silent())
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="--device: 'cuda'"):
            profile_models(request(tmp_path, one, device="cuda"), Silent())
    monkeypatch.setattr(run, "gpu_users", lambda device: ["17, other, 900 MiB"])
    with pytest.raises(InputError, match="in use: 17, other"):
        profile_models(request(tmp_path, one, strict=True), Silent())
    report = Silent()
    with pytest.raises(AssertionError, match="measured already"):  # it goes on, to the models
        profile_models(request(tmp_path, one), report)
    assert "warning: the GPU is also used by 17, other, 900 MiB" in report.lines[0]


@pytest.mark.parametrize(
    ("apps", "used", "found"),
    [
        ("4711, python, 20480 MiB", "21000 MiB", ["4711, python, 20480 MiB"]),
        ("", "9000 MiB", ["processes that cannot be seen from here, 9000 MiB"]),
        ("", "3 MiB", []),
        ("", "[N/A]", []),
    ],
)
def test_who_else_uses_a_gpu_is_what_the_driver_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apps: str, used: str, found: list[str]
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        f'#!/bin/sh\ncase "$*" in *compute-apps*--id=1*) echo "{apps}";; '
        f'*memory.used*--id=1*) echo "{used}";; *) exit 1;; esac\n'
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu_users(torch.device("cuda:1")) == found
    assert gpu_users(CPU) == []
    smi.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))  # no driver at all
    assert gpu_users(torch.device("cuda:1")) == []


def test_a_server_takes_the_measured_profile_of_its_gpu_and_says_what_is_derived(
    measured: tuple[Path, ModelConfig, Outcome], tmp_path: Path
) -> None:
    folder, one, outcome = measured
    other = model(tmp_path, "other", num_hidden_layers=5)
    config = _serving([one, other], profiles=str(folder / "profiles"))
    found = find_profiles(config, open_checkpoints(config.models), CPU)
    assert found[0].profile == outcome.profile and found[0].changed == ()
    assert found[1].profile.kind == "derived"
    (note,) = notes_on(found)
    assert "costs of other are derived" in note and "measure" in note


def test_profiles_of_other_versions_and_of_another_gpu(
    measured: tuple[Path, ModelConfig, Outcome], tmp_path: Path
) -> None:
    folder, one, _ = measured
    data = json.loads((folder / "profiles" / "small.json").read_text())
    data["provenance"]["libraries"]["torch"] = "1.0"
    older = tmp_path / "older.json"
    older.write_text(json.dumps(data))
    config = _serving([one.model_copy(update={"profile": older})])
    opened = open_checkpoints(config.models)
    (found,) = find_profiles(config, opened, CPU)
    assert found.changed == (f"torch 1.0, now {torch.__version__}",)
    assert "torch 1.0" in notes_on([found])[0]
    data["provenance"]["gpu"] = "another GPU"
    older.write_text(json.dumps(data))
    with pytest.raises(InputError, match="measured on another GPU"):
        find_profiles(config, opened, CPU)
    assert find_profiles(config, opened, CPU, real_time=False)[0].profile == load_profile(older)
    wrong = _serving([one.model_copy(update={"profile": DATA / "h200" / "qwen2.5-7b.json"})])
    with pytest.raises(InputError, match="another architecture"):
        find_profiles(wrong, opened, CPU, real_time=False)


def _serving(models: list[ModelConfig], **node: Any) -> ServeConfig:
    listed = [one.model_dump(mode="json", exclude_none=True) for one in models]
    return build_config({"models": listed, "node": {"device": "cpu", **node}}, "test")


def test_a_point_that_does_not_fit_is_left_out_and_named() -> None:
    section = Section()

    def full() -> float:
        raise OutOfDeviceMemory("no room")

    assert section.measure(full, Patience(), batch=64) == []
    assert section.measure(lambda: 1.0, Patience(), batch=1) == [1.0] * 5
    assert [point["batch"] for point in section.points] == [1]
    assert section.skipped == ["batch 64: out of memory: no room"]


def test_streams_that_have_no_room_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "_highest", lambda subject, batch: LEVEL_0 - 1)
    section, subject = Section(), SimpleNamespace(rig=None, names=["small"])
    moving._stream(subject, section, 32, ())  # type: ignore[arg-type]
    assert section.skipped == ["batch 32: no memory for so many sequences"]


def test_measuring_goes_on_until_the_median_is_known() -> None:
    # Quartiles 1 and 3 around 2: 1.96 * 1.253 * 2 / 1.349 / sqrt(5) / 2.
    assert spread([1.0, 1.0, 2.0, 3.0, 3.0]) == pytest.approx(0.8142, abs=1e-4)
    assert spread([2.0] * 5) == 0
    assert len(repeated(lambda: 1.0, Patience(least=4, most=9))) == 4
    noisy = iter([0.0, *range(1, 100)])
    assert len(repeated(lambda: float(next(noisy)), Patience(least=4, most=9))) == 9


def test_fits_recover_what_made_the_times() -> None:
    moved = [(size, 0.002 + size / 50e9) for size in (10**7, 10**8, 10**9)]
    fitted = fit_transfer(moved)
    assert fitted.fixed_s == pytest.approx(0.002)
    assert fitted.bytes_per_s == pytest.approx(50e9)
    layer_s = {1: 0.008, 8: 0.009}
    points = [
        {"batch": batch, "missing_layers": missing, "times_s": [0.003 + missing * layer_s[batch]]}
        for batch in layer_s
        for missing in (7, 14, 28)
    ]
    fixed_s, layers = fit_stream(points, [0.008])
    assert fixed_s == pytest.approx(0.003)
    assert {layer.tokens: layer.time_s for layer in layers} == pytest.approx(layer_s)


def test_what_the_loop_adds_is_what_its_times_are_longer_than_the_prices(
    measured: tuple[Path, ModelConfig, Outcome],
) -> None:
    profile = measured[2].profile
    assert profile is not None
    costs = CostModel(profile.model_copy(update={"overhead": None}))
    step_s = costs.decode_s(8, 100)
    piece = {"what": "piece", "bytes": 10**6}
    layer_s = 10**6 / profile.load.bytes_per_s
    points = [
        {"what": "decode", "batch": 8, "context_tokens": 100, "times_s": [step_s + 0.001] * 3},
        {"what": "prefill", "tokens": 16, "times_s": [costs.prefill_s(16) + 0.002]},
        {"what": "save", "bytes": 10**6, "times_s": [costs.kv_save_s(1e6) + 0.002]},
        {"what": "restore", "bytes": 10**6, "times_s": [costs.kv_restore_s(1e6) + 0.004]},
    ]
    raw = SimpleNamespace(points=lambda section: points)
    added = {"decode_s": 0.001, "prefill_s": 0.002, "kv_s": 0.003}
    found = overhead_of(raw, costs)  # measured before these were known
    assert found is not None and (found.settle_s, found.piece_s) == (None, None)
    assert found.model_dump() == pytest.approx(added, rel=1e-4)
    points += [
        {"what": "settle", "times_s": [step_s + 0.001 + 0.005]},
        piece | {"times_s": [layer_s, layer_s, layer_s + 0.003]},  # few, but they count
    ]
    found = overhead_of(raw, costs)
    assert found is not None
    added |= {"settle_s": 0.005, "piece_s": 0.001}
    assert found.model_dump() == pytest.approx(added, rel=1e-4)

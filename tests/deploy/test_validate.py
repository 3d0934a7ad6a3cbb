"""A run under the simulator's own clock has no error at all; a real one is measured and kept."""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmrl.deploy.adapter import DeployAdapter, Verdict
from mmrl.deploy.fleet import Fleet
from mmrl.deploy.transitions import observe_node
from mmrl.deploy.validate import measure as measuring
from mmrl.deploy.validate.compare import REPORT, compare, compare_folder
from mmrl.deploy.validate.measure import Plan, measure, read_fleet, run_live
from mmrl.deploy.validate.record import Recording, numbers_of
from mmrl.deploy.validate.report import PAGE, lines, write_report
from mmrl.errors import InputError
from mmrl.node.observe import observation_size
from mmrl.node.state import DONE, NODE, REQUEST
from mmrl.profiles.derive import derive_profile
from mmrl.profiles.registry import get_platform
from mmrl.profiles.schema import Overhead, Slowdown, Transfer
from mmrl.rules import get_rule
from mmrl.workloads.generators import LengthSpec, WorkloadSpec
from mmrl.workloads.trace import Trace
from tests.deploy.test_engine import checkpoints, fleet_of

SLOW = Transfer(fixed_s=2e-3, bytes_per_s=25e6)  # loads take long against iterations
COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "fidelity"
POINTS = 0.002  # what other processors may round differently, of an error of 1
NOT_THE_SAME = {"now_ns", "h2d_busy_ns", "decisions", "illegal_actions"}


def arrivals(seed: int, count: int = 30, models: int = 3) -> Trace:
    rng = np.random.default_rng(seed)
    return Trace(
        np.cumsum(rng.exponential(12e6, count)).astype(np.int64),
        rng.integers(0, models, count).astype(np.int32),
        rng.integers(1, 120, count).astype(np.int32),
        rng.integers(1, 40, count).astype(np.int32),
        np.zeros(count, np.bool_),
        tuple(f"m{m}" for m in range(models)),
        60.0,
    )


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Three tiny models that do not fit together, with a link as slow as a real one's."""
    fleet = fleet_of(checkpoints(), 0.5, verbs="full")
    changes: dict[str, Any] = dict.fromkeys(("load", "stream", "kv_save", "kv_restore"), SLOW)
    changes["slowdown"] = Slowdown(beside_load=1.3, beside_save=1.2, beside_stream=1.1)
    changes["overhead"] = Overhead(
        decode_s=2e-4, prefill_s=5e-4, kv_s=3e-4, settle_s=7e-4, piece_s=4e-4
    )
    node = fleet.engine.node
    here = get_platform("consumer-pcie4")  # not this machine's, which is never quite the same
    node.models = tuple(
        replace(
            model,
            profile=derive_profile(
                model.profile.model, model.profile.architecture, here
            ).model_copy(update=changes),
        )
        for model in node.models
    )
    fleet.engine.close()
    yield fleet
    fleet.engine.close()
    fleet.close()


def record(fleet: Fleet, rule: str, seed: int) -> Recording:
    """A run under the clock of the costs."""
    numbers = replace(numbers_of(fleet.engine.node.state), gap_ns=3_000_000, latency_ns=1_000_000)
    policy = {"name": rule, "kind": "rule", "rule": rule, "params": {}}
    about: dict[str, Any] = {"load": 1.0, "policy": policy}
    return run_live(
        fleet, get_rule(rule), arrivals(seed), about=about, numbers=numbers, simulated=True
    )


@pytest.fixture(scope="module")
def runs(fleet: Fleet) -> dict[str, Recording]:
    """A run of each of two rules, by the name of its file."""
    return {f"{rule}-1.npz": record(fleet, rule, 2) for rule in ("slack", "lru")}


@pytest.fixture(scope="module")
def recorded(runs: dict[str, Recording], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs as the committed one is."""
    folder = tmp_path_factory.mktemp("runs")
    for name, run in runs.items():
        run.save(folder / name)
    return folder


def errors(value: Any) -> Iterator[float]:
    """Every number called error, bias or difference."""
    for name, part in value.items() if isinstance(value, dict) else enumerate(value):
        if name in ("error", "bias", "difference") and part is not None:
            yield part
        elif isinstance(part, dict | list):
            yield from errors(part)


def test_a_run_under_the_costs_clock_has_no_error(recorded: Path) -> None:
    compared, found = compare_folder(recorded)
    assert [run.recording.name for run in compared] == ["lru-1", "slack-1"]
    for run in compared:
        for side in (run.forced, run.closed):
            for name in set(REQUEST.names) - {"blocks"}:
                np.testing.assert_array_equal(side.r[name], run.live.r[name], name)
            for name in NODE.names[NODE.names.index("actions") :]:
                if name not in NOT_THE_SAME:
                    np.testing.assert_array_equal(side.s[name], run.live.s[name], name)
        s = run.live.s
        assert s["loads"].sum() > 3 and s["preempted"].sum() > 0
        assert (run.live.r["state"] == DONE).all()
    all_errors = list(errors(found))
    assert len(all_errors) > 150 and set(all_errors) == {0.0}
    assert all(one["same"] for one in found["ranking"])


class AtRandom(DeployAdapter):
    """Decides anything that is legal."""

    def decide(self, nodes: Any, table: Any) -> Verdict:
        rng = self.__dict__.setdefault("rng", np.random.default_rng(5))
        count = int(nodes["n_models"][0])
        seen = np.zeros(observation_size(count), np.float32)
        mask = np.zeros(1 + 9 * count, np.bool_)
        observe_node(nodes, table, self.decode_tables, self.prefill_tables, seen, mask)
        if rng.random() < 0.6:
            return super().decide(nodes, table)
        return Verdict(int(rng.choice(np.flatnonzero(mask))), "policy", 0.0)


def test_random_decisions_are_forced_without_error(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Levels, streaming, pauses, focus: what a log of any verbs does is done again."""
    monkeypatch.setattr(measuring, "DeployAdapter", AtRandom)
    found = compare(record(fleet, "slack", 6), tmp_path)
    assert found.report["log"]["verbs"] > 20
    assert found.report["log"]["done"] == found.report["log"]["verbs"]
    assert (found.live.s["actions"] > 0).all() and found.live.s["stream_bytes"].sum() > 0
    rows = [row for row in found.report["overall"] if row["error"] == row["error"]]
    assert {row["metric"] for row in rows} >= {"streamed_step", "decode_step", "load_mean_s"}
    forced = [found.report[part] for part in ("overall", "models", "transfers", "gaps")]
    assert {error for error in errors(forced) if error == error} == {0.0}
    assert all(part["count"] > 0 for part in found.report["transfers"].values())


def test_a_recording_comes_back_as_it_was(runs: dict[str, Recording], recorded: Path) -> None:
    for name, run in runs.items():
        kept = Recording.read(recorded / name)
        assert kept.header == json.loads(json.dumps(run.header))
        assert set(kept.arrays) == set(run.arrays)
        for array_name, array in run.arrays.items():
            assert kept.arrays[array_name].dtype == array.dtype, array_name
            np.testing.assert_array_equal(kept.arrays[array_name], array, array_name)


def test_a_damaged_recording_is_refused(recorded: Path, tmp_path: Path) -> None:
    whole = next(iter(sorted(recorded.glob("*.npz")))).read_bytes()
    flipped = bytearray(whole)
    with np.load(io.BytesIO(whole)) as file:  # in the middle of what is compressed
        largest = max(file.zip.infolist(), key=lambda one: one.compress_size)
    middle = largest.header_offset + 100 + largest.compress_size // 2
    flipped[middle : middle + 2] = bytes(255 - byte for byte in whole[middle : middle + 2])
    for content in (b"PK no archive", whole[: len(whole) // 2], whole[:-1], bytes(flipped), b""):
        (tmp_path / "damaged.npz").write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            Recording.read(tmp_path / "damaged.npz")


def test_the_page_needs_nothing_else(recorded: Path) -> None:
    found = write_report(recorded)
    page = (recorded / PAGE).read_text("utf-8")
    assert page.count('<div class="plot"') == page.count('type="application/json"') == 2 * 10
    assert "TTFT p99" in page and "lru at load 1" in page and "src=" not in page.split("<body>")[1]
    table = lines(found)
    assert {row[0] for row in table} == {"lru-1", "slack-1"} and "missed" not in table[0]


def test_a_live_node_is_measured_and_goes_on_where_it_was(tmp_path: Path) -> None:
    config = read_fleet(["llama-tiny", "qwen2.5-tiny"], "cpu", "300MB", str(tmp_path))
    (tmp_path / "lengths.csv").write_text("prompt_tokens,output_tokens\n40,6\n9,12\n70,1\n")
    lengths = LengthSpec(family="empirical", file=tmp_path / "lengths.csv")
    plan = Plan(config, ("slack",), (0.5, 1.0), 1.0, rate_per_s=12.0, drain_s=60.0)
    plan = replace(plan, workload=WorkloadSpec(lengths=lengths))
    out, words = tmp_path / "runs", []
    files = measure(plan, out, words.append)
    assert [file.name for file in files] == ["slack-0.5.npz", "slack-1.npz"]
    files[1].unlink()
    kept = files[0].read_bytes()
    assert measure(plan, out, words.append) == files and files[0].read_bytes() == kept
    for run in (Recording.read(file) for file in files):
        s, r = run.end()
        assert len(r) > 0 and (r["state"] == DONE).all() and run.header["rate_per_s"] in (6, 12)
        assert (r["generated"] == r["output"]).all() and s["loads"].sum() > 0
        steps = run.columns("iteration")
        assert (steps["ended_ns"] > steps["begun_ns"]).all()
        assert (steps["begun_ns"] >= 0).all() and len(steps["model"]) >= r["output"].max()
        moved = run.columns("transfer")
        assert moved["bytes"].sum() == s["load_bytes"].sum() + s["stream_bytes"].sum() + sum(
            s[f"kv_{way}_bytes"].sum() for way in ("save", "restore")
        )
    _, found = compare_folder(out)
    assert all(run["goodput"]["live"] > 0 for run in found["runs"])
    with pytest.raises(InputError, match="another seed"):
        measure(replace(plan, seed=1), out, words.append)


@pytest.mark.parametrize(
    ("policies", "words"),
    [(("nobody",), "neither a rule"), (("slack", "slack"), "the same name")],
)
def test_a_plan_that_cannot_be_is_refused_before_anything_opens(
    policies: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    plan = Plan(read_fleet(["llama-tiny"], "cpu", "160MB"), policies)
    with pytest.raises(InputError, match=words):
        measure(plan, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def published(value: Any, place: str = "") -> dict[str, float | None]:
    """Every number by its place."""
    found: dict[str, float | None] = {}
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for name, part in parts:
        here = f"{place}.{name}" if place else str(name)
        if isinstance(part, dict | list):
            found |= published(part, here)
        elif part is None or isinstance(part, int | float):
            found[here] = part
    return found


def test_the_published_errors_are_the_simulators() -> None:
    then = published(json.loads((COMMITTED / REPORT).read_text("utf-8")))
    now = published(compare_folder(COMMITTED)[1])
    assert set(then) == set(now) and len(now) > 300
    apart = {
        place: (then[place], now[place])
        for place in now
        if then[place] != now[place]
        and now[place] != pytest.approx(then[place], abs=POINTS, rel=POINTS)
    }
    assert not apart, "the simulator has changed: mmrl validate report, and see that it got better"


def test_a_committed_file_is_small_and_whole() -> None:
    files = list(COMMITTED.glob("*.npz"))
    assert files and all(file.stat().st_size < 2**20 for file in files)
    names = {run["run"] for run in json.loads((COMMITTED / REPORT).read_text("utf-8"))["runs"]}
    assert names == {file.stem for file in files}

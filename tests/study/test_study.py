"""The study: formulas worked by hand on a made-up model, and a page that needs nothing else."""

import json
import math
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from mmrl.cli.study import command
from mmrl.errors import InputError
from mmrl.profiles import registry
from mmrl.profiles.schema import (
    Architecture,
    DecodePoint,
    Limits,
    LinkRates,
    Platform,
    Profile,
    Provenance,
    Slowdown,
    TokenPoint,
    Transfer,
)
from mmrl.study import Study, compute, gather, write_study
from mmrl.study.formulas import Case, host_crossing_tokens, host_wins_below, preemption, with_link
from mmrl.study.node import simulated_preemption_s
from mmrl.study.sensitivity import elasticities, hidden_batches, preemption_pays
from mmrl.study.tables import against_published

SHAPE = Architecture(
    layers=10,
    hidden_size=1000,
    intermediate_size=3000,
    attention_heads=10,
    kv_heads=5,
    head_dim=100,
    vocabulary=1000,
    tied_embeddings=False,
)
LAYER, BASE, KV = 24_000_000, 4_000_000, 20_000  # bytes
PROVENANCE = Provenance(source="made up", command="none", gpu="none", link="none")
LIMITS = Limits(memory_bytes_per_s=1e15, compute_flop_per_s=1e18)
LINK = 1e9  # a streamed layer takes 24 ms, a whole load 1 ms + 244 ms
TRANSFERS = {
    "load": Transfer(fixed_s=0.001, bytes_per_s=LINK),
    "stream": Transfer(fixed_s=0.002, bytes_per_s=LINK),
    "kv_save": Transfer(fixed_s=0.003, bytes_per_s=LINK),
    "kv_restore": Transfer(fixed_s=0.004, bytes_per_s=LINK),
}


def platform_of(name: str = "made-up") -> Platform:
    return Platform(
        name=name,
        description="made up",
        kind="measured",
        memory_bytes=10**9,
        usable_bytes=10**9,
        host_kv_bytes=10**9,
        budgets_gb=(1.0,),
        link_bytes_per_s=LINK,
        limits=LIMITS,
        provenance=PROVENANCE,
        **TRANSFERS,
    )


def case_of(**changes: object) -> Case:
    """A decode step of 50 ms whatever the batch, 100 ms from a batch of 32 on."""
    fields = {
        "platform": "made-up",
        "model": "tiny",
        "kind": "measured",
        "architecture": SHAPE,
        "parameters": SHAPE.parameters,
        "layer_bytes": LAYER,
        "base_bytes": BASE,
        "kv_bytes_per_token": KV,
        "workspace_bytes": 10**6,
        "usable_bytes": 10**9,
        "limits": LIMITS,
        "decode": tuple(
            DecodePoint(batch=b, context_tokens=c, time_s=t)
            for b, t in ((1, 0.05), (16, 0.05), (32, 0.1), (64, 0.1))
            for c in (512, 16384)
        ),
        "prefill": (TokenPoint(tokens=128, time_s=0.1), TokenPoint(tokens=16384, time_s=0.2)),
        "streamed_layer_s": (TokenPoint(tokens=1, time_s=0.024),),
        "provenance": PROVENANCE,
    }
    return Case.of(platform_of(), Profile(**{**fields, **TRANSFERS, **changes}))


# ---------------------------------------------------------------------------- formulas


def test_a_step_is_the_longer_of_compute_and_stream() -> None:
    case = case_of()
    assert case.step_s(10, 1, 1024) == 0.05
    assert case.step_s(8, 1, 1024) == pytest.approx(0.05)  # 2 + 2 x 24 ms: the knee
    assert case.knee(1, 1024) == pytest.approx(0.8)
    assert case.step_s(6, 1, 1024) == pytest.approx(0.002 + 4 * 0.024)
    assert case.step_s(0, 1, 1024) == pytest.approx(0.242)
    assert case.step_s(6, 32, 1024) == pytest.approx(0.1)  # hidden behind more sequences
    assert case.residency_for(0.9, 1, 1024) == 0.8
    assert case.residency_for(0.5, 1, 1024) == 0.6  # 98 ms; 122 ms would be below
    assert case.knee(32, 1024) == pytest.approx(1 - 98 / 240)


def test_a_load_beside_it_takes_every_other_turn_on_the_link() -> None:
    case = case_of()
    assert case.step_beside_load_s(6, 1, 1024) == pytest.approx(0.002 + 4 * (0.024 + 0.024))
    assert case.step_beside_load_s(10, 1, 1024) == 0.05
    slowed = case_of(slowdown=Slowdown(beside_load=1.2, beside_save=1, beside_stream=1.1))
    assert slowed.step_beside_load_s(10, 1, 1024) == pytest.approx(0.06)
    assert case.step_s(10, 1, 1024) == 0.05


def test_a_streamed_neighbour_leaves_the_device_while_it_waits() -> None:
    case = case_of()
    assert case.neighbour_factor(10, 1, 1024) == 2  # two resident models alternate
    # of 242 ms it computes 50, in the other 192 the neighbour runs
    assert case.neighbour_factor(0, 1, 1024) == pytest.approx(242 / 192)
    slowed = case_of(slowdown=Slowdown(beside_load=1, beside_save=1, beside_stream=1.1))
    assert slowed.neighbour_factor(0, 1, 1024) == pytest.approx(1.1 * 242 / 192)


def test_missing_layers_on_the_host() -> None:
    case = case_of(host_layer_s=(TokenPoint(tokens=1, time_s=0.01),))
    assert case.host_step_s(6, 1, 1024) == pytest.approx(0.05 * 0.6 + 4 * 0.01)
    assert case.host_step_s(6, 2, 1024) is None  # not measured for so many
    # 50 + 5 m ms on the host, 2 + 24 m streamed: equal at m = 48 / 19 missing layers
    assert host_wins_below(case, 1, 1024) == pytest.approx(1 - 4.8 / 19)
    slow = case_of(host_layer_s=(TokenPoint(tokens=1, time_s=0.03),))
    assert host_wins_below(slow, 1, 1024) == 0  # 350 ms against 242 at no layer
    assert host_wins_below(case, 2, 1024) is None
    assert case_of().host_step_s(6, 1, 1024) is None


def host_points(*times_s: float) -> tuple[TokenPoint, ...]:
    return tuple(TokenPoint(tokens=n, time_s=t) for n, t in zip((1, 8, 32), times_s, strict=True))


def test_where_the_whole_model_on_the_host_meets_streaming() -> None:
    def crossing(*times_s: float) -> float | None:
        return host_crossing_tokens(case_of(host_model_s=host_points(*times_s)).costs)

    # streamed 242 ms: 42 ahead at 8 tokens, 158 behind at 32
    assert crossing(0.1, 0.2, 0.4) == pytest.approx(8 + 24 * 42 / 200)
    assert crossing(0.3, 0.35, 0.4) == 1  # behind from the first token on
    assert crossing(0.1, 0.11, 0.12) == math.inf
    assert host_crossing_tokens(case_of().costs) is None


def test_the_parts_of_a_preemption() -> None:
    parts = preemption(case_of(), 2, 1000, 10)
    kv_s = 1008 * KV / LINK  # whole blocks of 16
    assert parts.stop_s == 0.025
    assert parts.kv_save_s == pytest.approx(2 * (0.003 + kv_s))
    assert parts.reload_s == pytest.approx(0.001 + 0.244)
    assert parts.kv_restore_s == pytest.approx(2 * (0.004 + kv_s))
    assert parts.first_step_s == 0.05
    assert parts.overhead_s == pytest.approx(0.259 + 4 * kv_s)
    assert parts.total_s == pytest.approx(parts.overhead_s + 0.075)
    half = preemption(case_of(), 1, 1000, 5)
    assert half.reload_s == pytest.approx(0.001 + 0.124)
    assert half.first_step_s == pytest.approx(0.122)


def test_a_simulated_node_overlaps_one_step_with_the_reload() -> None:
    case = case_of()
    parts = preemption(case, 1, 1000 + 8, 10)
    assert simulated_preemption_s(case, 1000) == pytest.approx(
        parts.overhead_s - parts.first_step_s, abs=0.001
    )


def test_another_link_moves_what_the_link_paces() -> None:
    paced = case_of(load=Transfer(fixed_s=1.0, bytes_per_s=0.4 * LINK))
    doubled = with_link(paced, 2 * LINK)
    assert doubled.step_s(0, 1, 1024) == pytest.approx(0.002 + 10 * 0.012)
    assert doubled.profile.load == paced.profile.load  # something else paces it
    assert doubled.profile.kv_save.bytes_per_s == 2 * LINK
    assert with_link(paced, 0.1 * LINK).profile.load.bytes_per_s == 0.1 * LINK
    assert with_link(paced, LINK).profile == paced.profile


def test_an_output_is_priced_step_by_step() -> None:
    case = case_of(
        decode=(
            DecodePoint(batch=1, context_tokens=1, time_s=0.05),
            DecodePoint(batch=1, context_tokens=1001, time_s=0.15),
        )
    )
    assert case.mean_step_s(case.step_s, 10, 1, 1001) == pytest.approx(0.1, rel=1e-3)
    # with 4 layers missing 98 ms until the context makes the step longer than that, at 481
    wanted = (480 * 0.098 + 520 * (0.098 + 0.15) / 2) / 1000
    assert case.mean_step_s(case.step_s, 6, 1, 1001) == pytest.approx(wanted, rel=0.002)


# ---------------------------------------------------------------------------- sensitivities


def test_elasticities_of_a_link_bound_and_of_a_hidden_model() -> None:
    table = elasticities([case_of(stream=Transfer(fixed_s=0.0, bytes_per_s=LINK))])
    throughput = table[table.result == "decode throughput"].set_index("factor").elasticity
    # 75 % of 10 layers: 60 ms of stream against 50 ms; at 82.5 % the device paces
    assert throughput["residency"] == pytest.approx(math.log(78 / 50) / math.log(0.825 / 0.675))
    assert throughput["link rate"] == pytest.approx(math.log(75 / 50) / math.log(1.25 / 0.8))
    assert throughput["batch"] == pytest.approx(1)
    assert throughput["context"] == 0
    assert "model size" not in throughput.index  # one model has no range of sizes
    ranks = table[table.result == "decode throughput"].set_index("factor")["rank"]
    assert ranks["residency"] == 1 and ranks["context"] == 4


def test_steps_until_a_preemption_pays() -> None:
    case = case_of()
    (row,) = preemption_pays([case]).to_dict("records")
    cost_s = preemption(case, 8, 2048, 10).total_s + 0.245
    assert row["steps_vs_streaming"] == math.ceil(cost_s / (0.242 - 0.05))
    assert row["steps_10_percent"] == math.ceil(9 * cost_s / 0.05)
    fast = with_link(case, 100 * LINK)
    assert pd.isna(preemption_pays([fast]).steps_vs_streaming[0])  # streaming costs nothing


def test_batches_that_hide_the_stream() -> None:
    (row,) = hidden_batches([case_of()]).to_dict("records")
    # half of the layers stream in 122 ms, the longest step is 100: hidden by none
    assert pd.isna(row["batch_at_50"])
    # 2.5 layers in 62 ms: 55.8 ms is enough, on the way from 50 (16) to 100 ms (32)
    assert row["batch_at_75"] == 16 + math.ceil(16 * 5.8 / 50)


# ---------------------------------------------------------------------------- tables and page


@pytest.fixture(scope="module")
def study() -> Study:
    return compute(gather(["h200", "study-a6000"], ["qwen2.5-0.5b", "qwen2.5-14b"]))


def test_published_totals_stand_beside_ours(study: Study) -> None:
    table = study.tables["published"]
    ours = table[table.platform == "h200"]
    assert len(ours) == 6
    assert (ours.ratio > 4).all()
    assert (ours.published_s > ours.without_fixed_s).all()
    assert (ours.without_fixed_s > ours.page_locked_s).all()
    theirs = table[table.platform == "study-a6000"]
    assert theirs.host.unique().tolist() == ["study-a6000"]
    assert theirs.ratio.to_numpy() == pytest.approx(1, abs=0.05)
    assert ours.set_index("model").profile["qwen2.5-14b"].tolist() == ["measured"] * 2


MEASURED = ("host", "neighbours", "hooks", "cold", "rates")  # rows where that was measured


def test_tables_cover_all_cases(study: Study) -> None:
    for name, table in study.tables.items():
        if name not in ("published", "published_kv", *MEASURED):
            pairs = set(zip(table.platform, table.model, strict=True))
            assert pairs == {(c.platform.name, c.profile.model) for c in study.cases}, name
    residency = study.tables["residency"]
    assert (residency[residency.residency == 1].throughput == 1).all()
    assert residency.throughput.between(0, 1).all()


def test_a_case_of_ones_own_is_held_against_the_published_figures() -> None:
    table = against_published([case_of()])
    assert table.platform.unique().tolist() == ["made-up"]
    assert (table.profile == "derived").all()


def test_the_page_opens_offline_and_the_files_agree(study: Study, tmp_path: Path) -> None:
    page = write_study(study, tmp_path / "out").read_text(encoding="utf-8")
    own = page.replace(page[page.index("<script>") : page.index("</script>")], "")  # not plotly's
    assert "http://" not in own and "https://" not in own
    assert " src=" not in own and "<link" not in own
    assert "On h200 a preemption adds" in page
    written = json.loads((tmp_path / "out" / "study.json").read_text())
    assert written["tables"].keys() == study.tables.keys()
    for name, table in study.tables.items():
        assert len(written["tables"][name]) == len(table)
        assert len(table) > 0 or name in MEASURED
        assert len(pd.read_csv(tmp_path / "out" / f"{name}.csv")) == len(table)


def measured_case() -> Case:
    """A case whose machine was measured, too: disk, copies, host and neighbours."""
    rates = {f"{kind}_bytes_per_s": LINK for kind in ("h2d", "d2h", "both_h2d", "both_d2h")}
    rates |= {"pageable_h2d_bytes_per_s": LINK / 5, "pageable_d2h_bytes_per_s": LINK / 2}
    case = case_of(
        host_model_s=host_points(0.1, 0.2, 0.4),
        slowdown=Slowdown(beside_load=1.02, beside_save=1.01, beside_stream=1.05),
    )
    disk = Transfer(fixed_s=0.5, bytes_per_s=LINK / 10)
    changed = {"link_rates": LinkRates(**rates), "disk": disk}
    return Case.of(case.platform.model_copy(update=changed), case.profile)


def test_what_was_measured_of_the_machine_has_tables_and_findings(tmp_path: Path) -> None:
    study = compute([measured_case()])
    (cold,) = study.tables["cold"].to_dict("records")
    assert cold["page_locked_s"] == pytest.approx(0.001 + 0.244)
    assert cold["pageable_s"] == pytest.approx(0.244 * 5)
    assert cold["disk_s"] == pytest.approx(0.5 + 2.44 + 0.245)
    rates = study.tables["rates"].set_index(["memory", "way", "beside"])
    assert rates.share["pageable", "to the device", "alone"] == pytest.approx(0.2)
    host = study.tables["host"]
    assert host.streamed_s.tolist() == pytest.approx([0.242] * 3)
    assert study.tables["hooks"].empty  # of one GPU and model
    page = write_study(study, tmp_path).read_text(encoding="utf-8")
    for finding in (
        "The host computes tiny (up to 13 tokens) faster than the link brings it",
        "Page-locked memory fills the link at 1 GB/s, 5 times as fast as pageable",
        "From disk a model takes 13 times as long as from page-locked memory, from pageable 5",
        "beside the stream of a second instance: 1.05; beside its load: 1.02",
    ):
        assert finding in page


def test_a_page_about_derived_profiles_alone(tmp_path: Path) -> None:
    alone = compute(gather(["study-a6000"], ["qwen2.5-0.5b"]))
    assert "On study-a6000" in write_study(alone, tmp_path).read_text(encoding="utf-8")


def test_a_page_about_a_platform_where_streaming_costs_nothing(tmp_path: Path) -> None:
    study = compute([with_link(case_of(), 100 * LINK)])
    assert study.tables["pays"].steps_vs_streaming.isna().all()
    page = write_study(study, tmp_path).read_text(encoding="utf-8")
    assert "Streaming costs nothing here: swapping never beats it" in page


def test_a_study_replaces_a_study_and_nothing_else(study: Study, tmp_path: Path) -> None:
    write_study(study, tmp_path / "out")
    write_study(study, tmp_path / "out")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "index.html").write_text("a report")
    with pytest.raises(InputError, match="holds no study"):
        write_study(study, tmp_path / "report")
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["index.html"]


def test_unknown_names_and_places(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(command)

    def run(*arguments: str) -> None:
        CliRunner().invoke(app, [*arguments], catch_exceptions=False)

    with pytest.raises(InputError, match="did you mean 'h200'"):
        run("--platform", "h20")
    with pytest.raises(InputError, match="unknown model on platform h200"):
        run("--platform", "h200", "--model", "gpt")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="holds no study"):
        run(
            *("--platform", "study-a6000", "--model", registry.models("h200")[0]),
            *("--out", str(blocked)),
        )

"""The demo goes on where it stopped, does nothing twice, and leaves other folders alone."""

import json
from contextlib import nullcontext

import pytest

from mmrl.agents import demo as module
from mmrl.agents.demo import TRACE, Show, demo
from mmrl.errors import InputError
from mmrl.workloads.readers import read_trace
from tests.agents.made_up import make_run, make_scenario


@pytest.fixture
def said():
    return []


@pytest.fixture
def show(said):
    return Show(said.append, lambda: nullcontext(lambda what, done, total: None))


@pytest.fixture
def training(monkeypatch, tmp_path_factory):
    """Replace training by a made-up run; returns the times that were asked for."""
    asked = []

    def train(config, progress=None):
        asked.append(config.time_s)
        run = make_run(config.out / config.name)
        (run / "state.pt").touch()
        clock[0] += config.time_s / 4 if stop else config.time_s
        return run

    def resume(folder, steps=None, time_s=None, progress=None):
        asked.append(time_s)
        clock[0] += time_s
        return folder

    clock, stop = [0.0], []
    monkeypatch.setattr("mmrl.agents.train.train", train)
    monkeypatch.setattr("mmrl.agents.train.resume", resume)
    monkeypatch.setattr(module, "_warm_up", lambda: None)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(module, "SCENARIO", make_scenario(tmp_path_factory.mktemp("scenario")))
    monkeypatch.setattr(module, "RULES", ("slack", "lru"))
    monkeypatch.setattr(module, "LOADS", (1.0,))
    return asked, stop


def test_a_demo_and_the_same_again(tmp_path, show, said, training):
    asked, _ = training
    made = demo(tmp_path / "demo", 1, [], show, episodes=2, workers=1)
    assert made.report.is_file() and made.report.name == "index.html"
    boards = [r.summary["boards"][0] for r in (made.unseen, made.traced)]
    assert [board["name"] for board in boards] == ["tiny", "tiny, demo_trace.csv"]
    assert asked == [60]

    said.clear()
    demo(tmp_path / "demo", 1, [], show, episodes=2, workers=1)
    assert asked == [60]
    assert sum("done before" in line for line in said) == 3


def test_ctrl_c_in_training_keeps_it_and_the_next_call_goes_on(tmp_path, show, said, training):
    asked, stop = training
    stop.append("now")
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path / "demo", 1, [], show, episodes=2, workers=1)
    assert json.loads((tmp_path / "demo" / "demo.json").read_text()) == {"trained_s": 15}
    assert not (tmp_path / "demo" / "report").exists()
    demo(tmp_path / "demo", 1, [], show, episodes=2, workers=1)
    assert asked == [60, 45]
    assert any("going on after 15 s" in line for line in said)


def test_another_folder_is_left_alone(tmp_path, show, training):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no demo"):
        demo(tmp_path, 1, [], show)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_wrong_trace_is_told_before_the_training(tmp_path, show, training):
    asked, _ = training
    with pytest.raises(InputError, match="cannot read"):
        demo(tmp_path / "demo", 1, [tmp_path / "nothing.csv"], show)
    assert asked == []


def test_the_shipped_trace_is_what_its_page_says():
    trace = read_trace([TRACE])
    assert len(trace.model_names) == 6 and trace.duration_s == 2400
    assert "mmrl workload generate" in (TRACE.parent / "README.md").read_text()

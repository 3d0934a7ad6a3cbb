"""The report in a browser: opened from disk, filtered, drilled into, and served anew."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest

from mmrl.agents.evaluate import evaluate
from mmrl.agents.report import write_report
from mmrl.agents.report_server import ReportServer, stamp
from mmrl.agents.results import Results
from mmrl.errors import InputError
from tests.agents.made_up import METRICS, make_run, make_scenario
from tests.deploy import browser as browsers
from tests.deploy.browser import Browser

PATH = browsers.find()
in_browser = pytest.mark.skipif(PATH is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run evaluated at two loads, and the same results under the name of another place."""
    folder = tmp_path_factory.mktemp("sources")
    run = make_run(folder / "mine")
    results = evaluate(
        ["slack", "lru", str(run)], [make_scenario(folder)], episodes=3, loads=(0.5, 1.0)
    )
    results.write(run / "evaluation")
    summary = json.loads(json.dumps(results.summary))
    (board,) = summary["boards"]
    board |= {"name": "<i>other</i>", "platform": "elsewhere", "family": "code"}
    tables = (results.episodes, results.models, results.latencies)
    renamed = [table.assign(board=board["name"]) for table in tables]
    Results(summary, *renamed, []).write(folder / "other")
    return [run, folder / "other"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PATH is not None
    browser = Browser(PATH, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(sources, tmp_path_factory.mktemp("page") / "report")


def opened(browser: Browser, page: Path, height: int = 800) -> None:
    """Open the page anew; figures are drawn when they come into view."""
    browser.size(1300, height)
    browser.open("about:blank")
    browser.open(page.as_uri())


def choose(browser: Browser, name: str, value: str) -> None:
    browser.run(
        f"(() => {{ const s = document.querySelector('#{name}'); s.value = {value!r};"
        " s.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )


def texts(browser: Browser, selector: str) -> list[str]:
    return list(
        browser.run(f"[...document.querySelectorAll({selector!r})].map((n) => n.innerText)")
    )


def rows(browser: Browser, table: str) -> list[str]:
    return texts(browser, f"#{table} tbody tr")


def figure_is(browser: Browser, name: str, script: str) -> None:
    """Wait until a figure, ``plot``, is such that a script says so."""
    node = f"document.querySelector('[data-figure=\"{name}\"] .plot')"
    browser.until(f"Boolean({node})")
    browser.run(f"{node}?.scrollIntoView()")  # a page that refreshes may have none just now
    browser.until(f"((plot) => Boolean(plot?.data && ({script})))({node})")


@in_browser
def test_it_opens_from_disk_and_draws_everything(browser: Browser, page: Path) -> None:
    opened(browser, page, height=6000)
    browser.until("[...document.querySelectorAll('.plot')].length >= 19")
    browser.until(
        "[...document.querySelectorAll('.plot')].every((p) => p.data?.length || p.innerText)"
    )
    plots = "[...document.querySelectorAll('.plot')]"
    assert browser.run(f"{plots}.filter((p) => p.data?.length).length") >= 14
    for figure in texts(browser, "figure:not(:has(.empty)) figcaption"):
        title, _, about = figure.partition("\n")
        assert title and any(word in about for word in ("episode", "run")), figure
    assert all(address.startswith(("file:", "data:", "about:")) for address in browser.requested)
    assert browser.complaints == []
    assert len(rows(browser, "verdicts")) == 4 and "mine" in rows(browser, "verdicts")[0]
    assert "too few episodes" in rows(browser, "verdicts")[0]  # three, to say who wins
    assert browser.run("document.querySelectorAll('#verdicts i').length") == 8  # colours, no markup
    for width, dark in ((1500, True), (390, False)):
        browser.size(width, 900, dark)
        browser.until(f"document.documentElement.scrollWidth <= {width}")


@in_browser
def test_filters_leave_what_fits_and_the_choice_survives_a_reload(
    browser: Browser, page: Path
) -> None:
    opened(browser, page)
    figure_is(browser, "load", "plot.data.length === 4 && plot.data[0].x.length === 2")
    choose(browser, "platform", "elsewhere")
    assert all("<i>other</i>" in row for row in rows(browser, "verdicts"))
    assert "1 of 2 places" in browser.run("document.querySelector('#count').innerText")
    choose(browser, "load", "0.5")
    assert len(rows(browser, "verdicts")) == 1
    browser.until("document.querySelector('#trade').innerText.includes('Choose all loads')")
    figure_is(browser, "pareto-ttft", "plot.data.length === 5")
    choose(browser, "platform", "")
    button = "document.querySelector('#legend [data-name=lru]')"
    browser.run(f"{button}.focus()")  # by the keyboard
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=" ", code="Space", text=" ")
    browser.until(f"{button}.getAttribute('aria-pressed') === 'false'")
    figure_is(browser, "pareto-ttft", "!plot.data.some((trace) => trace.name === 'lru')")
    address = browser.run("location.href")
    browser.open("about:blank")
    browser.open(address)
    browser.until(f"{button}?.getAttribute('aria-pressed') === 'false'")
    assert browser.run("document.querySelector('#load').value") == "0.5"
    assert len(rows(browser, "verdicts")) == 2


@in_browser
def test_a_row_leads_to_its_place(browser: Browser, page: Path) -> None:
    opened(browser, page)
    hidden = "document.querySelector('#legend [data-name=mine]')"
    browser.run(f"{hidden}.click()")
    links = "[...document.querySelectorAll('#verdicts a')]"
    wanted = "a.innerText.includes('other') && a.closest('tr').cells[1].innerText === '0.5'"
    browser.run(f"{links}.find((a) => {wanted}).click()")
    assert browser.run(f"{hidden}.getAttribute('aria-pressed')") == "true"  # the row is about it
    below = "document.querySelector('#legend').getBoundingClientRect().bottom"
    top = "document.querySelector('#place-title').getBoundingClientRect().top"
    assert browser.run(f"{top} >= {below}")
    assert "<i>other</i>" in browser.run("document.querySelector('#place-about').innerText")
    assert browser.run("document.querySelector('#place-load').value") == "0.5"
    assert len(rows(browser, "policies")) == 4
    browser.until("document.querySelectorAll('#models tbody tr').length === 3")
    figure_is(browser, "ttft_s", "plot.data.length === 4")
    title = "document.querySelector('#models-title').innerText"
    assert "at load 0.5" in browser.run(title)
    models = rows(browser, "models")
    choose(browser, "place-load", "1")
    browser.until(f"{title}.includes('at load 1')")
    assert len(rows(browser, "models")) == 3 and rows(browser, "models") != models
    assert browser.run("document.querySelectorAll('#models thead th').length") == 6
    browser.run("document.querySelector('#legend [data-name=lru]').click()")
    browser.until("document.querySelectorAll('#models thead th').length === 5")


@in_browser
def test_an_empty_choice_is_said_to_be_empty(browser: Browser, page: Path) -> None:
    opened(browser, page)
    choose(browser, "platform", "elsewhere")
    families = browser.run("[...document.querySelector('#family').options].map((o) => o.value)")
    choose(browser, "family", next(name for name in families if name not in ("", "code")))
    assert "Nothing was played there" in browser.run("document.querySelector('#count').innerText")
    assert not browser.run("document.querySelector('#fitting').checkVisibility()")
    choose(browser, "platform", "")
    assert "1 of 2 places" in browser.run("document.querySelector('#count').innerText")
    assert browser.run("document.querySelector('#fitting').checkVisibility()")
    for name in ("mine", "mine step 0", "slack", "lru"):
        browser.run(f"document.querySelector('#legend [data-name={json.dumps(name)}]').click()")
    profile = "document.querySelector('[data-figure=profile]')"
    browser.run(f"{profile}.scrollIntoView()")
    browser.until(f"{profile}.innerText.includes('is hidden in the list')")
    assert browser.complaints == []


@in_browser
def test_an_episode_side_by_side(browser: Browser, page: Path) -> None:
    opened(browser, page)
    figure_is(browser, "timeline-left", "plot.data.some((trace) => trace.meta?.marks)")
    figure_is(browser, "timeline-right", "plot.data.some((trace) => trace.type === 'bar')")
    names = [browser.run(f"policies[state.{side}].name") for side in ("left", "right")]
    assert names[0] == "mine" and names[1] in ("slack", "lru")
    browser.run("goTo(0)")
    browser.run("document.querySelector('#departure').click()")
    panel = "document.querySelector('#decision-left')"
    browser.until(f"{panel}.innerText.includes('; the champion: ')")
    assert browser.run(f"{panel}.querySelectorAll('.chance').length") >= 1
    at = browser.run("state.time")
    figure_is(browser, "timeline-right", f"plot.layout.shapes[0].x0 === {at}")
    choose(browser, "episode", "1")
    browser.until("document.querySelector('#episode-about').innerText.includes('test ')")
    assert browser.complaints == []


@in_browser
def test_a_served_page_refreshes_when_a_run_goes_on(browser: Browser, tmp_path: Path) -> None:
    run = make_run(tmp_path / "young")
    with ReportServer([run], tmp_path / "report", 0, every_s=0.05) as server:
        browser.size(1300, 800)
        browser.open(server.url)
        figure_is(browser, "curve-5", "plot.data[0].x.length === 3")
        browser.until("!document.querySelector('#served').hidden")
        (run / "metrics.csv").write_text(METRICS + "400,0.8,,,-0.1\n")
        figure_is(browser, "curve-5", "plot.data[0].x.length === 4")
        assert browser.complaints == []


@in_browser
def test_the_choice_survives_results_that_come_later(
    browser: Browser, sources: list[Path], tmp_path: Path
) -> None:
    """With a policy more, and a place, the numbers of all others change; the address has names."""
    shown = "state.shown.map((k) => policies[k].name)"
    later = tmp_path / "later"
    later.mkdir()
    shutil.copytree(sources[1], later / "b")
    with ReportServer([later], tmp_path / "report", 0, every_s=0.05) as server:
        browser.size(1300, 800)
        browser.open(server.url)
        browser.until("typeof goToPlace !== 'undefined' && typeof recall !== 'undefined'")
        browser.run("goToPlace({ place: 0, load: 0.5, policy: 0, versus: null })")
        browser.run("state.shown = [names(policies).indexOf('lru')]; remember()")
        summary = json.loads((later / "b" / "summary.json").read_text())
        for policy in summary["policies"]:
            policy["name"] = {"mine": "an earlier one"}.get(policy["name"], policy["name"])
        for row in (row for board in summary["boards"] for row in board["rows"]):
            row["policy"] = {"mine": "an earlier one"}.get(row["policy"], row["policy"])
        summary["boards"][0]["name"] = "another"
        (later / "a.json").write_text(json.dumps(summary))
        server._sources = [later / "a.json", later]
        anew = "typeof policies !== 'undefined' && names(policies).includes('an earlier one')"
        browser.until(anew)
        assert browser.run(shown) == ["lru"]
        assert browser.run("places[state.place].name") == "<i>other</i>"
        assert browser.run("state.place") == 1


def test_a_server_goes_on_whatever_a_source_holds(sources: list[Path], tmp_path: Path) -> None:
    said: list[str] = []
    shutil.copytree(sources[1], tmp_path / "results")
    with ReportServer([tmp_path], tmp_path / "report", 0, said.append, every_s=0.02):
        (tmp_path / "foreign").mkdir()
        (tmp_path / "foreign" / "result.json").write_text('{"format": 1, "cells": 7}')
        wait_for(lambda: any("no benchmark result" in line for line in said))
        (tmp_path / "foreign" / "result.json").unlink()
        (tmp_path / "results" / "summary.json").touch()
        wait_for(lambda: "refreshed" in said)
    assert said[0].startswith("not refreshed") and said[-1] == "refreshed"


def test_a_server_goes_on_after_half_written_results(sources: list[Path], tmp_path: Path) -> None:
    said: list[str] = []
    results = tmp_path / "results"
    shutil.copytree(sources[1], results)
    with ReportServer([results], tmp_path / "report", 0, said.append, every_s=0.02) as server:
        before = urlopen(f"{server.url}build", timeout=10).read()
        assert len(before) == 12
        whole = (results / "summary.json").read_text()
        (results / "summary.json").write_text(whole[:1000])
        wait_for(lambda: any("not refreshed" in line for line in said))
        assert urlopen(f"{server.url}build", timeout=10).read() == before
        (results / "summary.json").write_text(whole.replace("elsewhere", "a new platform"))
        wait_for(lambda: "refreshed" in said)
        assert urlopen(f"{server.url}build", timeout=10).read() != before
        with pytest.raises(InputError, match=r"cannot serve on port \d+.*--port 0"):
            ReportServer([results], tmp_path / "report", int(server.url.split(":")[2].strip("/")))
    assert stamp([results]) != stamp([sources[1]])


def wait_for(condition) -> None:  # type: ignore[no-untyped-def]
    import time

    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)

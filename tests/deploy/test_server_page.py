"""The live page in a browser: what it shows, what its button does, and a server that restarts."""

import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from mmrl.deploy.protocol import Decision, NodeState
from mmrl.deploy.server import ServerSettings
from tests.deploy import browser as browsers
from tests.deploy.browser import Browser
from tests.deploy.made_up_engine import Moving, make_engine, make_tokenizer, serving, until

PATH = browsers.find()
pytestmark = pytest.mark.skipif(PATH is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PATH is not None
    browser = Browser(PATH, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def text_of(browser: Browser, selector: str) -> str:
    return str(browser.run(f"document.querySelector({selector!r}).innerText"))


def click(browser: Browser, selector: str) -> None:
    browser.until(f"!document.querySelector({selector!r}).disabled")
    browser.run(f"document.querySelector({selector!r}).click()")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def test_the_page_shows_the_node(browser: Browser, folder: Path) -> None:
    engine = make_engine(folder, ("alpha", "beta", "<i>gamma</i>"))
    Moving(engine, period_s=1.0)
    with serving(engine) as server:
        browser.open(server.url)
        browser.until("document.querySelectorAll('.model[data-model]').length === 3")
        assert browser.run("[...rows.keys()]") == ["alpha", "beta", "<i>gamma</i>"]
        browser.until("document.querySelectorAll('#decisions li').length >= 4")
        assert "s of 2 s" in text_of(browser, "#decisions")  # the reasons
        browser.until("document.querySelector('.model[data-model=beta] .area').getAttribute('d')")
        for _ in range(3):  # only now: on a busy machine what is above takes its minute
            body = {"model": "alpha", "prompt": "x", "max_tokens": 4}
            answer = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=30)
            assert answer.status_code == 200
        browser.until("document.querySelector('#missed').innerText === '0 of 3'")
        ttft = text_of(browser, ".model[data-model=alpha] .meter")
        assert "of 2.0 s" in ttft and not ttft.startswith("–")
        assert "ppo-h200-24 decides" in text_of(browser, "#about")
        assert "of 26 GB" in text_of(browser, "#memory")
        for width, dark in ((1500, False), (1500, True), (900, False), (390, True)):
            browser.size(width, 900, dark)
            assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.complaints == []
        hosts = {address.split("/")[2] for address in browser.requested if "://" in address}
        assert hosts == {server.url.removeprefix("http://")}


def test_decisions_for_nobody_are_one_line(browser: Browser, folder: Path) -> None:
    engine = make_engine(folder, ("alpha", "beta"))
    Moving(engine)
    picture = engine.picture
    said = [
        ("beta", "level100", "policy", "wants all its layers: 1 waits for 0.1 s, target 2 s"),
        ("alpha", "level0", "policy", "idle for 4.0 s"),
        ("alpha", "out", "policy", "idle for 4.1 s"),
        ("beta", "level0", "policy", "idle for 2.0 s"),
        ("beta", "out", "champion", "idle for 2.1 s"),
        ("beta", "pause", "policy", "pauses: 1 under way"),
        ("alpha", "out", "policy", "idle since the start"),
    ]

    def made_up() -> NodeState | None:
        state = picture()
        if state is None:
            return None
        decisions = tuple(
            Decision(k, state.started_s + k, model, verb, by, reason, 0.001)
            for k, (model, verb, by, reason) in enumerate(said)
        )
        fallbacks = {"deadline": 1, "not_finite": 0, "illegal": 3, "error": 0}
        return replace(state, decisions=decisions, decisions_asked=5182, fallbacks=fallbacks)

    engine.picture = made_up
    with serving(engine) as server:
        browser.open(server.url)
        browser.until("document.querySelectorAll('#decisions li').length === 5")
        lines = text_of(browser, "#decisions").splitlines()
        assert [line for line in lines if line and not re.fullmatch(r"\d\d:\d\d:\d\d", line)] == [
            "out alpha",
            "idle since the start",
            "pause beta",
            "pauses: 1 under way",
            "out beta by the champion",
            "idle for 2.1 s",
            "level 0, out alpha, beta",
            "3 times in 2 s, while idle",
            "load beta",
            "wants all its layers: 1 waits for 0.1 s, target 2 s",
        ]
        assert text_of(browser, "#asked") == (
            "asked 5,182 times · slack stood in: answer late once, not allowed 3 times"
        )


def test_the_button_reverts_and_restores(browser: Browser, folder: Path) -> None:
    engine = make_engine(folder)
    node = Moving(engine)
    with serving(engine) as server:
        browser.open(server.url)
        browser.until("document.querySelector('#link').innerText === 'live'")
        click(browser, "#revert")
        until(lambda: engine.commands == [("revert", None)])
        node.reverted = True
        browser.until("document.querySelector('#revert').innerText === 'Let the policy decide'")
        assert "champion (slack) decides" in text_of(browser, "#notice")
        assert "slack decides" in text_of(browser, "#about")
        click(browser, "#revert")
        until(lambda: engine.commands[1:] == [("restore", None)])


def test_nothing_is_to_be_reverted_where_the_champion_decides(
    browser: Browser, folder: Path
) -> None:
    engine = make_engine(folder)
    Moving(engine).policy = "slack"
    with serving(engine) as server:
        browser.open(server.url)
        browser.until("document.querySelector('#link').innerText === 'live'")
        assert browser.run("document.querySelector('#revert').disabled")
        assert "is the champion" in str(browser.run("document.querySelector('#revert').title"))


def test_the_page_goes_on_when_the_clock_is_set_back(browser: Browser, folder: Path) -> None:
    engine = make_engine(folder)
    Moving(engine, period_s=1.0)
    with serving(engine) as server:
        browser.open(server.url)
        browser.until("samples.length >= 2 && document.querySelector('#tokens').innerText > 0")
        picture, back_s = engine.picture, 3600.0
        engine.picture = lambda: (
            replace(state, time_s=state.time_s - back_s) if (state := picture()) else None
        )
        browser.until("samples.length >= 2 && samples.at(-1).time_s < Date.now() / 1000 - 1800")
        assert browser.run("samples.every((each, k) => !k || each.time_s > samples[k - 1].time_s)")
        browser.until("totals.length >= 2 && totals[0].time_s < Date.now() / 1000 - 1800")


def test_the_button_asks_for_the_key_once(browser: Browser, folder: Path) -> None:
    engine = make_engine(folder)
    node = Moving(engine)
    with serving(engine, ServerSettings(api_keys=("sk-right",))) as server:
        browser.open(server.url)
        browser.until("document.querySelector('#link').innerText === 'live'")
        click(browser, "#revert")
        for key in ("sk-wrong", "sk-right"):
            browser.until("document.querySelector('#ask').open")
            shown = browser.run("!document.querySelector('#wrong').hidden")
            assert shown == (key == "sk-right")
            assert engine.commands == []
            browser.run(f"document.querySelector('#secret').value = '{key}'")
            browser.run("document.querySelector('#go').click()")
        until(lambda: engine.commands == [("revert", None)])
        node.reverted = True
        browser.until("document.querySelector('#revert').innerText === 'Let the policy decide'")
        click(browser, "#revert")
        until(lambda: len(engine.commands) == 2)
        assert not browser.run("document.querySelector('#ask').open")
        assert browser.run("localStorage.length") == 0


def test_the_page_comes_back_after_a_restart(browser: Browser, folder: Path) -> None:
    port = free_port()
    engine = make_engine(folder)
    Moving(engine, period_s=1.0)
    with serving(engine, port=port) as server:
        browser.open(server.url)
        browser.until("samples.length >= 2")
        browser.run("window.before = samples[0].time_s")
    browser.until("document.querySelector('#link').innerText === 'reconnecting'")
    assert browser.run("document.querySelector('#revert').disabled")
    again = make_engine(folder)
    Moving(again, period_s=1.0)
    with serving(again, port=port):
        browser.until("document.querySelector('#link').innerText === 'live'")
        assert browser.run("samples[0].time_s === window.before")  # what was seen stays
        browser.until("samples.at(-1).time_s - window.before > 2")
        again.ready = False
        browser.until("document.querySelector('#link').className === 'off'")
        assert "does not serve" in text_of(browser, "#link")

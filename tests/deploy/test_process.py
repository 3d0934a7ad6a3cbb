"""The engine's process as the front sees it: answers, cancellation, deaths, the way down.

The engine here has no models: it answers by a script, in a real process of its own.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest

from mmrl.deploy import process
from mmrl.deploy.config import ServeConfig, build_config
from mmrl.deploy.process import EngineClient, Orders
from mmrl.deploy.protocol import (
    Draining,
    EngineDown,
    Finish,
    Generate,
    ModelInfo,
    Quarantined,
    QueueFull,
    Tokens,
)
from mmrl.errors import InputError, MmrlError
from tests.deploy.made_up_engine import made_up_state

INFO = ModelInfo("a", "a", 100, 50, 2.0, 0.1, 1000)
LAST, ENDLESS, DEADLY = 5, 6, 7  # prompts: one token is the answer; none ever comes; the end of it
FULL, QUARANTINED = 8, 9  # refused
Scene = Callable[[EngineClient], Awaitable[None]]


def scripted_engine(pipe: Connection, config: ServeConfig, orders: Orders | None = None) -> None:
    """Answers a prompt of `LAST` with its number; says on command what was cancelled.

    Started again, it notes its orders.
    """
    if config.models[0].path == "broken":
        pipe.send(("failed", True, "no such model", "name another"))
        return
    cancelled = []
    pipe.send(("ready", (INFO,), ("a note",) if orders is None else (repr(orders),), "core"))
    while True:
        while not pipe.poll(0.05):
            pipe.send(("state", made_up_state(0.0, (INFO,))))
        kind, *rest = pipe.recv()
        if kind == "stop":
            return
        if kind == "cancel":
            cancelled.append(rest[0])
        elif kind == "command" and rest[1] == "preload":
            pipe.send(("answer", rest[0], {}, (False, "it broke", "see the log")))
        elif kind == "command":
            pipe.send(("answer", rest[0], {"cancelled": cancelled}, None))
        elif rest[1].prompt[0] in (FULL, QUARANTINED):
            kinds = {FULL: "queue_full", QUARANTINED: "quarantined"}
            pipe.send(("refused", rest[0], kinds[rest[1].prompt[0]], "it is so"))
        elif rest[1].prompt[0] == DEADLY:
            os._exit(3)
        elif rest[1].prompt[0] == LAST:
            pipe.send(("tokens", [(rest[0], Tokens((rest[0],), Finish.LENGTH))]))


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[[Scene], None]:
    """Runs a scene with an engine that has started."""
    monkeypatch.setattr(process, "serve_engine", scripted_engine)
    monkeypatch.setattr(process, "RESTART_S", 0.01)

    def run(scene: Scene) -> None:
        async def with_engine() -> None:
            client = EngineClient(build_config({"models": ["a"]}, "test"))
            await client.start()
            try:
                await asyncio.wait_for(scene(client), 60)
            finally:
                await client.stop()

        asyncio.run(with_engine())

    return run


async def ask(client: EngineClient, prompt: int) -> list[Tokens]:
    return [tokens async for tokens in client.generate(Generate("a", (prompt,), 9))]


async def begin(client: EngineClient, prompt: int) -> "asyncio.Task[list[Tokens]]":
    """Start a request, and return when the engine has it."""
    task = asyncio.create_task(ask(client, prompt))
    await asyncio.sleep(0)
    assert not task.done()
    return task


def test_an_engine_that_dies_is_started_again(play: Callable[[Scene], None]) -> None:
    """What is in flight is answered with an error, new requests with 503, later ones are served."""

    async def scene(client: EngineClient) -> None:
        first = client.pid
        waiting = await begin(client, ENDLESS)
        (dying,) = await ask(client, DEADLY)
        (other,) = await waiting
        assert dying.finish is other.finish is Finish.ERROR and "died" in other.error
        with pytest.raises(EngineDown) as caught:
            await ask(client, LAST)
        assert caught.value.retry_after_s > 0
        while not client.ready:
            await asyncio.sleep(0.01)
        assert client.restarts == 1 and client.pid != first
        assert [tokens.finish for tokens in await ask(client, LAST)] == [Finish.LENGTH]

    play(scene)


def test_an_engine_that_is_started_again_has_the_orders_of_the_one_before(
    play: Callable[[Scene], None],
) -> None:
    async def scene(client: EngineClient) -> None:
        for command in (("policy", "lru"), ("revert",), ("pin", "a"), ("restore",), ("revert",)):
            await client.command(*command)
        with pytest.raises(MmrlError):
            await client.command("preload", "a")
        await ask(client, DEADLY)
        while not client.ready:
            await asyncio.sleep(0.01)
        assert client.notes == (repr(Orders("lru", "core", True, {"a": True})),)
        await client.command("policy", "fifo")  # which ends what reverted the one before
        await client.command("unpin", "a")
        await ask(client, DEADLY)
        while not client.ready:
            await asyncio.sleep(0.01)
        assert client.notes == (repr(Orders("fifo", "core", False, {"a": False})),)

    play(scene)


def test_an_engine_that_stands_still_gets_no_requests(
    play: Callable[[Scene], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it hold up the front, however much that has to tell it, nor its end."""
    monkeypatch.setattr(process, "WATCH_S", 0.05)
    monkeypatch.setattr(process, "STALLED_S", 1.0)

    async def scene(client: EngineClient) -> None:
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        flood = [asyncio.create_task(ask(client, ENDLESS)) for _ in range(5_000)]
        while client.ready:
            await asyncio.sleep(0.01)
        with pytest.raises(EngineDown, match="does not answer"):
            await ask(client, LAST)
        with pytest.raises(EngineDown, match="does not answer"):
            await client.command("revert")
        os.kill(client.pid, signal.SIGCONT)
        while not client.ready:
            await asyncio.sleep(0.01)
        assert [tokens.finish for tokens in await ask(client, LAST)] == [Finish.LENGTH]
        assert client.restarts == 0
        os.kill(client.pid, signal.SIGSTOP)
        while client.ready:
            await asyncio.sleep(0.01)
        await client.stop()
        assert all(tokens[-1].finish is Finish.ERROR for tokens in await asyncio.gather(*flood))

    play(scene)


def test_an_engine_that_hangs_is_started_again(
    play: Callable[[Scene], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "WATCH_S", 0.05)
    monkeypatch.setattr(process, "HUNG_S", 2.0)

    async def scene(client: EngineClient) -> None:
        first = client.pid
        assert first is not None
        waiting = await begin(client, ENDLESS)
        os.kill(first, signal.SIGSTOP)
        (lost,) = await waiting
        assert lost.finish is Finish.ERROR and "died" in lost.error
        while not client.ready:
            await asyncio.sleep(0.01)
        assert client.restarts >= 1 and client.pid != first

    play(scene)


def test_a_refusal_says_whether_to_come_again(play: Callable[[Scene], None]) -> None:
    async def scene(client: EngineClient) -> None:
        with pytest.raises(QueueFull, match="try again"):
            await ask(client, FULL)
        with pytest.raises(Quarantined, match="release") as caught:
            await ask(client, QUARANTINED)
        assert "again" not in str(caught.value)

    play(scene)


def test_a_closed_iterator_cancels_its_request(play: Callable[[Scene], None]) -> None:
    async def scene(client: EngineClient) -> None:
        task = await begin(client, ENDLESS)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await client.command("revert") == {"cancelled": [1]}

    play(scene)


def test_a_drain_waits_and_what_is_left_is_handed_back(play: Callable[[Scene], None]) -> None:
    async def scene(client: EngineClient) -> None:
        endless = await begin(client, ENDLESS)
        assert not await client.drain(0.05)
        assert not client.ready and not endless.done()
        while client.state is None or not client.state.draining:  # the next picture says so
            await asyncio.sleep(0.01)
        with pytest.raises(Draining):
            await ask(client, LAST)
        client.hand_back()
        with pytest.raises(Draining, match="goes down"):
            await endless
        assert await client.drain(0.0)

    play(scene)


def test_an_engine_that_cannot_start_says_why(play: Callable[[Scene], None]) -> None:
    async def start() -> None:
        client = EngineClient(build_config({"models": ["broken"]}, "test"))
        with pytest.raises(InputError, match="no such model"):
            await client.start()
        await client.stop()

    asyncio.run(start())


def test_what_does_not_fit_never_reaches_the_engine(play: Callable[[Scene], None]) -> None:
    async def scene(client: EngineClient) -> None:
        for request, words in (
            (Generate("b", (1,), 1), "unknown model 'b'"),
            (Generate("a", (), 1), "prompt is empty"),
            (Generate("a", (1,), 0), "max_tokens"),
            (Generate("a", (1,) * 60, 41), "context of 100"),
        ):
            with pytest.raises(MmrlError, match=words):
                await anext(client.generate(request))

    play(scene)


def test_what_an_operator_asks_is_answered(play: Callable[[Scene], None]) -> None:
    async def scene(client: EngineClient) -> None:
        assert client.notes == ("a note",) and client.models == {"a": INFO}
        assert await client.command("pin", "a") == {"cancelled": []}
        wrong: list[tuple[Any, ...]] = [("explode",), ("pin", "b")]
        for words in wrong:
            with pytest.raises(InputError, match="unknown"):
                await client.command(*words)
        with pytest.raises(MmrlError, match="it broke") as caught:
            await client.command("preload", "a")
        assert not isinstance(caught.value, InputError)  # nobody's input was wrong

    play(scene)

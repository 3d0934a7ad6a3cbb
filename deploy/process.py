"""The engine as a process of its own: `serve_engine` runs in it, `EngineClient` talks to it.

Launching kernels never waits for HTTP then, and an engine that dies takes no server with it: the
client answers what was in flight with an error, starts another, and goes on. An engine that serves
is never silent for long (it sends pictures of the node even while its loop waits for a worker), so
one that is takes no requests, and is ended in the end. Messages are tuples whose first item says
what they are; one pipe carries them both ways.
"""

import asyncio
import contextlib
import functools
import logging
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any, Literal

from mmrl.deploy.config import ServeConfig
from mmrl.deploy.logs import configure_logs
from mmrl.deploy.protocol import (
    Draining,
    EngineDown,
    Finish,
    Generate,
    ModelInfo,
    NodeState,
    Quarantined,
    QueueFull,
    Tokens,
    Unavailable,
)
from mmrl.deploy.watchdog import Watchdog
from mmrl.errors import InputError, MmrlError, unknown

PICTURE_S = 0.25  # time between two pictures of the node
RESTART_S = 1.0  # before an engine that died is started again; doubled each time
LONGEST_RESTART_S = 30.0
STOP_S = 10.0  # that an engine has to end
STILL_S = 2.0  # without the end of anything, until the log says where the engine's threads are
STILL_CPU_S = 60.0  # where one iteration may take long
WATCH_S = 0.5  # between two looks whether the engine says something
STALLED_S = 10.0  # of silence after which an engine that serves gets no requests
HUNG_S = 60.0  # of silence after which it is ended, and another started
COMMANDS = ("pin", "unpin", "preload", "release", "revert", "restore", "policy")
OF_THE_NODE = ("revert", "restore", "policy")  # and not of a model
REFUSALS: dict[str, tuple[type[Unavailable], str]] = {  # and what the client can do
    "queue_full": (QueueFull, "try again later"),
    "quarantined": (Quarantined, "an operator has to release it"),
}
Progress = Callable[[str, int, int], None]  # model, bytes read, bytes in all

log = logging.getLogger("mmrl.engine")


@dataclass
class Orders:
    """What operators have decided: an engine that is started again goes on with it.

    Quarantine is not among it: a new process may well be what the model needed.

    Attributes:
        policy: Name of the policy that decides.
        verbs: Those of the first engine; a policy that was chosen since does not change them.
        reverted: Whether the champion decides in its place.
        pinned: Models that were pinned (True) or let go (False).
    """

    policy: str
    verbs: Literal["core", "full"]
    reverted: bool = False
    pinned: dict[str, bool] = field(default_factory=dict)

    def note(self, command: str, subject: str | None) -> None:
        """Remember a command that was done."""
        if command in ("pin", "unpin"):
            self.pinned[str(subject)] = command == "pin"
        elif command in ("revert", "restore"):
            self.reverted = command == "revert"
        elif command == "policy":
            self.policy, self.reverted = str(subject), False


# --- in the engine's process ---------------------------------------------------------------


def serve_engine(pipe: Connection, config: ServeConfig, orders: Orders | None = None) -> None:
    """Load the fleet and serve until told to stop: the main function of the engine's process.

    Args:
        pipe: To the front.
        config: What to serve.
        orders: What the engine before this one did, if there was one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the front says when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logs()
    try:
        from mmrl.deploy.fleet import CHAMPION, open_fleet

        def progress(name: str, done: int, total: int) -> None:
            pipe.send(("loading", name, done, total))

        if orders is not None:  # its policy may be gone meanwhile: the node serves without it
            changes = {"policy": CHAMPION, "verbs": orders.verbs}
            node = config.node.model_copy(update=changes)
            config = config.model_copy(update={"node": node})
        fleet = open_fleet(config, progress)
    except MmrlError as error:
        pipe.send(("failed", type(error) is InputError, error.message, error.remedy))
        return
    engine = fleet.engine
    if orders is not None:
        follow(engine, orders)
    engine.emit = lambda items: pipe.send(("tokens", items))
    engine.refuse = lambda number, kind, words: pipe.send(("refused", number, kind, words))
    engine.accept = lambda number: pipe.send(("accepted", number))
    running = True

    def stop() -> None:
        nonlocal running
        running = False

    watchdog = Watchdog(STILL_CPU_S if fleet.device.type == "cpu" else STILL_S)
    pictured = 0.0

    def show() -> None:
        nonlocal pictured
        now = time.monotonic()
        if now - pictured >= PICTURE_S:
            pictured = now
            pipe.send(("state", fleet.picture()))
            watchdog.see(engine.node.progress, engine.open_requests > 0)

    engine.inbox.waiting = show  # an instant may wait for an iteration to end
    verbs = "full" if engine.node.state.full_verbs else "core"
    pipe.send(("ready", fleet.infos, fleet.notes, verbs))
    threading.Thread(target=_listen, args=(pipe, engine, stop), name="pipe", daemon=True).start()
    engine.begin()
    try:
        while running:
            engine.run_instant()
            show()
    except BrokenPipeError:
        return
    except Exception:  # the front starts another engine
        log.critical("the engine failed", exc_info=True)
        raise SystemExit(1) from None
    finally:
        with contextlib.suppress(OSError):
            pipe.send(("stopped",))
        watchdog.close()
        engine.close()


def _listen(pipe: Connection, engine: Any, stop: Callable[[], None]) -> None:
    """Hand what the front asks for to the loop, until it says stop or is gone.

    Args:
        pipe: To the front.
        engine: The engine.
        stop: Called by the loop then.
    """
    from mmrl.deploy.fleet import find_policy

    def answer(number: int, name: str, subject: str | None, policy: Any = None) -> None:
        result: dict[str, Any] = {}
        error = None
        try:
            result = _command(engine, name, subject, policy)
        except MmrlError as caught:
            error = type(caught) is InputError, caught.message, caught.remedy
        except Exception as caught:  # whatever an operator asks for, the engine goes on
            log.exception("%s failed", name)
            error = False, f"{name} failed: {caught}", "see the log"
        pipe.send(("answer", number, result, error))

    def change_policy(number: int, subject: str) -> None:
        policy: Any
        try:
            policy = find_policy(subject, "policy")
        except Exception as caught:
            policy = caught
        engine.call(functools.partial(answer, number, "policy", subject, policy))

    handlers: dict[str, Callable[..., None]] = {
        "generate": engine.submit,
        "cancel": engine.cancel,
        "command": answer,
        "stop": stop,
    }
    while True:
        try:
            kind, *rest = pipe.recv()
        except (EOFError, OSError):  # the front is gone
            engine.call(stop)
            return
        if kind == "command" and rest[1] == "policy":
            # A slow disk must hold up neither the loop nor what the front says next.
            words = rest[0], str(rest[2])
            threading.Thread(target=change_policy, args=words, daemon=True).start()
            continue
        engine.call(functools.partial(handlers[kind], *rest))
        if kind == "stop":
            return


def follow(engine: Any, orders: Orders) -> None:
    """Bring an engine to where operators had the one before it.

    Where the policy cannot be read any more, the champion goes on: it decides already.
    """
    from mmrl.deploy.fleet import find_policy

    try:
        engine.change_policy(find_policy(orders.policy))
    except Exception as error:
        log.error("the champion decides, as the policy cannot: %s", error)
    engine.revert(orders.reverted)
    for name, pinned in orders.pinned.items():
        engine.set_pinned(engine.names.index(name), pinned)


def _command(engine: Any, name: str, subject: str | None, policy: Any) -> dict[str, Any]:
    """Do what an operator asks for, of a model or with a policy.

    Args:
        engine: The engine.
        name: One of `COMMANDS`.
        subject: The model, where it is of one.
        policy: The one that is to decide, or what was raised when it was read.

    Raises:
        InputError: It is not possible.
    """
    if name in ("revert", "restore"):
        engine.revert(name == "revert")
        return {"policy": engine.adapter.name}
    if name == "policy":
        if isinstance(policy, Exception):
            raise policy
        engine.change_policy(policy)
        return {"policy": engine.adapter.name}
    m = engine.names.index(subject)
    if name in ("pin", "unpin"):
        engine.set_pinned(m, name == "pin")
    elif name == "release":
        engine.release(m)
    elif not engine.preload(m):
        raise InputError(
            f"{subject} does not fit beside what is in use", "try again later, or unpin a model"
        )
    return {"model": subject}


# --- in the front's process ----------------------------------------------------------------


class EngineClient:
    """An engine process, as the front sees it; implements ``mmrl.deploy.protocol.Engine``.

    Args:
        config: What the engine serves.
        progress: Told of weights read from disk.
    """

    def __init__(self, config: ServeConfig, progress: Progress | None = None) -> None:
        self._config, self._progress = config, progress
        self._models: dict[str, ModelInfo] = {}
        self._state: NodeState | None = None
        self._ready = self._draining = self._closing = False
        self._requests: dict[int, asyncio.Queue[Any]] = {}
        self._answers: dict[int, tuple[str, str | None, asyncio.Future[dict[str, Any]]]] = {}
        self._orders: Orders | None = None
        self._number = 0
        self._restart_s = RESTART_S
        self._outbox: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._process: Any = None
        self._started: asyncio.Future[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._silent_s = 0.0  # since the engine's last message, as far as the front itself ran
        self.notes: tuple[str, ...] = ()
        self.restarts = 0

    @property
    def models(self) -> dict[str, ModelInfo]:
        """Return the fleet by name; empty until the engine was ready once."""
        return self._models

    @property
    def ready(self) -> bool:
        """Return whether the engine serves."""
        return self._ready and not self._draining and not self._stalled

    @property
    def state(self) -> NodeState | None:
        """Return the last picture of the node."""
        return self._state

    @property
    def _stalled(self) -> bool:
        """Whether the engine has been silent for longer than one that runs ever is."""
        return self._silent_s >= STALLED_S

    @property
    def pid(self) -> int | None:
        """Return the number of the engine's process."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the engine and wait until it serves.

        Raises:
            MmrlError: It cannot; an `InputError` where the configuration is wrong.
        """
        self._loop = asyncio.get_running_loop()
        self._started = self._loop.create_future()
        self._launch()
        self._watching = asyncio.create_task(self._watch())
        await self._started

    async def generate(self, request: Generate) -> AsyncGenerator[Tokens, None]:
        """Run a request; the last item has ``finish``. Closing the iterator cancels it.

        Raises:
            InputError: The model is unknown or the request does not fit it.
            Unavailable: One of its kinds.
        """
        self._check(request)
        self._number += 1
        number = self._number
        items: asyncio.Queue[Any] = asyncio.Queue()
        self._requests[number] = items
        finished = False
        self._send(("generate", number, request))
        try:
            while not finished:
                item = await items.get()
                if isinstance(item, Unavailable):
                    finished = True
                    raise item
                if item is None:  # accepted
                    continue
                finished = item.finish is not None
                yield item
        finally:
            del self._requests[number]
            if not finished:
                self._send(("cancel", number))

    async def command(self, name: str, subject: str | None = None) -> dict[str, Any]:
        """Do what an operator asks, of a model or with a policy; see `COMMANDS`.

        Raises:
            InputError: It is unknown, or not possible.
            EngineDown: The engine does not run.
            MmrlError: It failed in a way that nobody foresaw.
        """
        if name not in COMMANDS:
            raise unknown("command", name, COMMANDS)
        if name not in OF_THE_NODE and subject not in self._models:
            raise unknown("model", str(subject), self._models)
        if not self._ready:
            raise EngineDown("the engine is starting", "try again", self._restart_s)
        self._refuse_if_stalled()
        self._number += 1
        answer: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._answers[self._number] = name, subject, answer
        self._send(("command", self._number, name, subject))
        return await answer

    async def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for those that run; return whether all ended."""
        self._draining = True
        until = self._loop.time() + timeout_s
        while self._requests and self._loop.time() < until:
            await asyncio.sleep(0.02)
        return not self._requests

    def hand_back(self) -> None:
        """Answer the requests that have not ended: they have to be sent to another server."""
        for items in self._requests.values():
            items.put_nowait(Draining("the server goes down", "send the request again"))

    async def stop(self) -> None:
        """End the engine's process; one that does not serve has nothing to end."""
        self._closing = True
        if self._watching is not None:
            self._watching.cancel()
        self._send(("stop",))
        if self._process is not None:
            if self._ready and not self._stalled:
                await asyncio.to_thread(self._process.join, STOP_S)
            if self._process.is_alive():
                self._process.kill()
                await asyncio.to_thread(self._process.join)

    def _check(self, request: Generate) -> None:
        info = self._models.get(request.model)
        if info is None:
            if not self._models:
                raise EngineDown("the engine is starting", "try again", self._restart_s)
            raise unknown("model", request.model, self._models)
        if not request.prompt:
            raise InputError("the prompt is empty", "send at least one token")
        if request.max_tokens < 1:
            raise InputError("max_tokens is below 1", "ask for at least one token")
        tokens = len(request.prompt) + request.max_tokens
        if tokens > info.max_context:
            raise InputError(
                f"{len(request.prompt)} prompt tokens and {request.max_tokens} to generate are "
                f"more than the context of {info.max_context}",
                "shorten the prompt or lower max_tokens",
            )
        if self._draining:
            raise Draining("the server is going down", "use another")
        if not self._ready:
            raise EngineDown("the engine is being restarted", "try again", self._restart_s)
        self._refuse_if_stalled()

    def _refuse_if_stalled(self) -> None:
        if self._stalled:
            raise EngineDown("the engine does not answer", "try again", STALLED_S)

    async def _watch(self) -> None:
        """Count for how long an engine that serves is silent; end one that hangs.

        One that starts may be silent for as long as it reads and compiles. What is counted are
        looks and not the clock: while the front itself stands still, it hears nobody.
        """
        while True:
            await asyncio.sleep(WATCH_S)
            if not self._ready:
                continue
            self._silent_s += WATCH_S
            if self._silent_s >= HUNG_S and self._process.is_alive():
                log.error("the engine has said nothing for %.0f s: it is ended", self._silent_s)
                self._process.kill()

    def _launch(self) -> None:
        if self._closing:
            return
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        arguments = theirs, self._config, self._orders
        self._process = context.Process(
            target=serve_engine, args=arguments, name="mmrl-engine", daemon=True
        )
        self._process.start()
        theirs.close()
        self._outbox = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(pipe,), daemon=True).start()
        threading.Thread(target=_write, args=(pipe, self._outbox), daemon=True).start()

    def _send(self, message: tuple[Any, ...]) -> None:
        self._outbox.put(message)

    def _read(self, pipe: Connection) -> None:
        """Hand the engine's messages to the event loop: a thread for each engine."""
        while True:
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                message = ("died",)
            try:
                self._loop.call_soon_threadsafe(self._handle, message)
            except RuntimeError:  # the loop is closed
                return
            if message[0] == "died":
                return

    def _handle(self, message: tuple[Any, ...]) -> None:
        kind, *rest = message
        self._silent_s = 0.0
        if kind == "tokens":
            for number, tokens in rest[0]:
                self._put(number, tokens)
        elif kind == "accepted":
            self._put(rest[0], None)
        elif kind == "refused":
            number, why, words = rest
            refusal, remedy = REFUSALS[why]
            self._put(number, refusal(words, remedy))
        elif kind == "state":
            self._state = replace(rest[0], draining=self._draining)  # the engine does not know
        elif kind == "answer":
            number, result, error = rest
            name, subject, answer = self._answers.pop(number)
            if error is None and self._orders is not None:
                self._orders.note(name, subject)  # though who asked may have gone
            if not answer.done():
                if error is None:
                    answer.set_result(result)
                else:
                    answer.set_exception(_error(*error))
        elif kind == "loading":
            if self._progress is not None:
                self._progress(*rest)
        elif kind == "ready":
            infos, self.notes, verbs = rest
            if self._orders is None:
                self._orders = Orders(self._config.node.policy, verbs)
            self._models = {info.name: info for info in infos}
            self._ready, self._restart_s = True, RESTART_S
            if self._started is not None and not self._started.done():
                self._started.set_result(None)
        elif kind == "failed":
            self._fail_start(_error(*rest))
        elif kind == "died":
            self._died()

    def _put(self, number: int, item: Any) -> None:
        items = self._requests.get(number)
        if items is not None:
            items.put_nowait(item)

    def _fail_start(self, error: MmrlError) -> None:
        if self._started is not None and not self._started.done():
            self._started.set_exception(error)
        else:
            log.error("the engine did not start again: %s", error)

    def _died(self) -> None:
        """Answer what was in flight, and start another engine unless the server ends."""
        self._ready, self._state = False, None
        self._outbox.put(None)
        for items in self._requests.values():
            items.put_nowait(Tokens((), Finish.ERROR, "the engine died"))
        for _, _, answer in self._answers.values():
            if not answer.done():
                answer.set_exception(EngineDown("the engine died", "try again", self._restart_s))
        self._answers.clear()
        if self._closing:
            return
        code = self._process.exitcode
        if self._started is not None and not self._started.done():
            self._fail_start(
                MmrlError(f"the engine died while it started (exit code {code})", "see its output")
            )
            return
        self.restarts += 1
        log.error("the engine died (exit code %s); starting it again", code)
        self._loop.call_later(self._restart_s, self._launch)
        self._restart_s = min(LONGEST_RESTART_S, 2 * self._restart_s)


def _write(pipe: Connection, outbox: "queue.SimpleQueue[tuple[Any, ...] | None]") -> None:
    """Send the engine what is put out for it, until None: a thread for each engine.

    An engine that does not read fills the pipe; this thread then waits, and not the event loop.
    """
    with contextlib.suppress(OSError):  # a dead engine is noticed where its messages are read
        while (message := outbox.get()) is not None:
            pipe.send(message)


def _error(input_error: bool, message: str, remedy: str) -> MmrlError:
    """Return the error that the engine tells of."""
    return (InputError if input_error else MmrlError)(message, remedy)

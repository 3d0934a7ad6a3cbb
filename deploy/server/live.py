"""What the live page shows: pictures of the node as they come, and the last minutes.

One task looks at the engine's picture some times a second, for everything that needs it: the
decision latencies of each picture are counted once, the history is kept for pages that open
later, and each open page is woken.
"""

import asyncio
import dataclasses
import math
import time
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from mmrl.deploy.protocol import Engine, NodeState
from mmrl.deploy.server.metrics import Metrics
from mmrl.deploy.server.recent import WINDOW_S, Recent
from mmrl.deploy.server.records import Record, Watcher
from mmrl.deploy.server.streams import event
from mmrl.files import finite

LOOK_S = 0.05  # well below the time between two pictures, so that none is passed over
TELL_S = 0.25  # between two events of a page
SAMPLE_S = 1.0
HISTORY_S = 300.0


class Live(Watcher):
    """Follows an engine for the page and the metrics.

    Args:
        engine: The engine.
        metrics: Told of each new picture.
    """

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics
        self._recent: dict[str, Recent] = {}
        self._history: deque[dict[str, Any]] = deque(maxlen=int(HISTORY_S / SAMPLE_S))
        self._latency: dict[str, Any] = {}
        self._told = 0.0
        self._tick = asyncio.Event()
        self._stopped = False

    def begun(self, record: Record) -> None:
        """Take a request that goes to the engine."""
        self._recent.setdefault(record.info.name, Recent()).begin(record)

    def ended(self, record: Record) -> None:
        """Take a request that has ended."""
        self._recent[record.info.name].end(record)

    async def follow(self) -> None:
        """Look at the engine until cancelled."""
        seen: NodeState | None = None
        sampled = -math.inf
        while True:
            state = self._engine.state
            if state is not None and state is not seen:
                seen = state
                self._metrics.picture(state)
                if state.time_s < sampled:  # the clock was set back
                    self._history.clear()
                    sampled = -math.inf
                if state.time_s - sampled >= SAMPLE_S:
                    sampled = state.time_s
                    self._history.append(_sample(state))
            if time.monotonic() - self._told >= TELL_S:
                self._tell()
            await asyncio.sleep(LOOK_S)

    def stop(self) -> None:
        """End the streams of all pages, so that the server can go down; they come back."""
        self._stopped = True
        self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        self._latency = {name: recent.summary() for name, recent in self._recent.items()}
        tick, self._tick = self._tick, asyncio.Event()
        tick.set()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yield what a page needs: first with the history, then some times a second.

        Of decisions, each event has those that the stream has not told yet.
        """
        told = -1
        started = None
        history: list[dict[str, Any]] | None = list(self._history)
        while not self._stopped:
            tick = self._tick
            state = self._engine.state
            message: dict[str, Any] = {
                "ready": self._engine.ready,
                "state": None,
                "latency": self._latency,
            }
            if history is not None:
                message |= {"history": history, "history_s": HISTORY_S, "window_s": WINDOW_S}
                history = None
            if state is not None:
                if state.started_s != started:  # a new engine counts from the start
                    started, told = state.started_s, -1
                fresh = tuple(each for each in state.decisions if each.number > told)
                told = max((each.number for each in fresh), default=told)
                message["state"] = as_json(dataclasses.replace(state, decisions=fresh))
            yield event(message)
            await tick.wait()


def as_json(state: NodeState) -> dict[str, Any]:
    """Return a picture as plain values; what is not finite becomes null."""
    plain: dict[str, Any] = finite(dataclasses.asdict(state))
    return plain


def _sample(state: NodeState) -> dict[str, Any]:
    """Return what the page draws over time."""
    return {
        "time_s": round(state.time_s, 3),
        "models": {
            model.name: [
                round(model.landed / model.pieces, 4),
                round(model.target / model.pieces, 4),
                model.queued,
                model.running,
            ]
            for model in state.models
        },
    }

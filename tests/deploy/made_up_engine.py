"""An engine without models, for tests of the front: it says what it is told to say.

Tests that use only the `Engine` protocol run against any engine; what a test needs beyond it
(holding a request at a stage, failing) is in the attributes of `MadeUpEngine`.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mmrl.deploy.protocol import (
    Decision,
    Finish,
    Generate,
    ModelInfo,
    ModelState,
    NodeState,
    Tokens,
)
from mmrl.deploy.server import create_app, stop_streams
from mmrl.deploy.server.settings import ServerSettings
from mmrl.errors import InputError

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] == 'refuse this' %}{{ raise_exception('refused') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["the quick brown fox jumps over the lazy dog", "héllo wörld", "one two three four"] * 9


def make_tokenizer(folder: Path, chat: bool = True) -> Path:
    """Write a byte-level BPE tokenizer: any text, 300 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = TEMPLATE if chat else None
    fast.save_pretrained(folder)
    return folder


class MadeUpEngine:
    """Says ``reply`` to everything, a token at a time.

    Attributes:
        reply: What each model says before its end of sequence.
        seen: All requests.
        closed: Requests whose iterator was closed before its end, and the stage they were in.
        hold: Stage at which requests stay until it changes: ``queue``, ``decode`` or nothing.
        fail: Raised by the next requests.
        fail_after: Tokens after which requests end with `Finish.ERROR`.
        batch: Tokens in an answer.
        commands: What operators asked.
    """

    def __init__(self, infos: dict[str, ModelInfo], encode: Callable[[str], list[int]]) -> None:
        self.infos = infos
        self.encode = encode
        self.reply = "The quick brown fox says héllo 🦊 to the lazy dog."
        self.seen: list[Generate] = []
        self.closed: list[tuple[str, str]] = []
        self.hold = ""
        self.fail: Exception | None = None
        self.fail_after: int | None = None
        self.batch = 1
        self.commands: list[tuple[str, str | None]] = []
        self.ready = True
        self.picture: Callable[[], NodeState | None] = self.still

    @property
    def models(self) -> dict[str, ModelInfo]:
        return self.infos if self.ready else {}

    @property
    def state(self) -> NodeState | None:
        return self.picture()

    def still(self) -> NodeState | None:
        return made_up_state(0.0, tuple(self.infos.values())) if self.ready else None

    async def generate(self, request: Generate) -> AsyncIterator[Tokens]:
        stage = "queue"
        self.seen.append(request)
        if self.fail is not None:
            raise self.fail
        try:
            while self.hold == "queue":
                await asyncio.sleep(0.002)
            reply = self.encode(self.reply)
            sent = 0
            while sent < request.max_tokens:
                await asyncio.sleep(0)
                stage = "decode"
                if self.fail_after is not None and sent >= self.fail_after:
                    yield Tokens((), Finish.ERROR, "out of luck")
                    return
                if sent >= len(reply) and not request.ignore_eos:
                    yield Tokens((), Finish.STOP)
                    return
                size = min(self.batch, request.max_tokens - sent)
                tokens = tuple(reply[(sent + i) % len(reply)] for i in range(size))
                if not request.ignore_eos:
                    tokens = tokens[: len(reply) - sent]
                sent += len(tokens)
                yield Tokens(tokens, Finish.LENGTH if sent == request.max_tokens else None)
                while self.hold == "decode":
                    await asyncio.sleep(0.002)
            stage = "done"
        except (asyncio.CancelledError, GeneratorExit):
            self.closed.append((request.model, stage))
            raise

    async def command(self, name: str, subject: str | None = None) -> dict[str, Any]:
        if name == "preload" and self.hold:
            raise InputError("no memory to preload", "put another model out first")
        self.commands.append((name, subject))
        return {"done": name}

    async def drain(self, timeout_s: float) -> bool:
        self.ready = False
        return True


def make_engine(folder: Path, names: tuple[str, ...] = ("alpha", "beta")) -> MadeUpEngine:
    """Return an engine with models that share the tokenizer in a folder."""
    sizes = (15.2e9, 6.2e9, 29.5e9, 1.3e9, 16.4e9, 3.1e9)
    infos = {
        name: ModelInfo(
            name=name,
            path=str(folder),
            max_context=128,
            vocabulary=300,
            ttft_s=(2.0, 1.0, 5.0, 0.5, 3.0, 1.0)[i % 6],
            tpot_s=(0.1, 0.05, 0.0, 0.05, 0.1, 0.08)[i % 6],
            weight_bytes=int(sizes[i % 6]),
        )
        for i, name in enumerate(names)
    }
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return MadeUpEngine(infos, lambda text: backend.encode(text, add_special_tokens=False).ids)


def made_up_state(time_s: float, infos: tuple[ModelInfo, ...]) -> NodeState:
    """Return a picture of a node at rest: the first model is resident, the others are out."""
    models = tuple(
        ModelState(
            name=info.name,
            pieces=29,
            landed=29 if i == 0 else 0,
            target=29 if i == 0 else 0,
            weight_bytes=info.weight_bytes,
            resident_bytes=info.weight_bytes if i == 0 else 0,
            kv_bytes=0,
            queued=i,
            running=1,
            suspended=0,
            oldest_wait_s=0.0,
            ttft_s=info.ttft_s,
            tpot_s=info.tpot_s,
            paused=False,
            focus=False,
            pinned=False,
            quarantined=False,
            loads=3,
            outs=2,
            idle_evictions=1,
            preempted=4,
            kv_dropped=0,
            load_bytes=1000,
            stream_bytes=200,
            kv_save_bytes=30,
            kv_restore_bytes=4,
            prefill_tokens=500,
            decode_tokens=600,
            compute_s=7.5,
        )
        for i, info in enumerate(infos)
    )
    decision = Decision(7, time_s, infos[0].name, "level100", "policy", "3 wait for it", 0.0004)
    return NodeState(
        time_s=time_s,
        started_s=0.0,
        device="CPU",
        policy="ppo-champion",
        champion="slack",
        reverted=False,
        draining=False,
        budget_bytes=24 << 30,
        reserve_bytes=1 << 30,
        free_bytes=(23 << 30) - sum(model.resident_bytes for model in models),
        host_kv_bytes=0,
        host_kv_limit_bytes=8 << 30,
        h2d_busy_s=1.5,
        d2h_busy_s=0.5,
        compute_s=9.0,
        decisions_asked=11,
        illegal_actions=1,
        fallbacks={"deadline": 2, "not_finite": 0},
        decision_latencies_s=(0.0004, 0.0006),
        overhead_s=0.25,
        models=models,
        decisions=(decision,),
    )


class Moving:
    """A made-up node that moves, for the page: models come and go, queues and counters grow."""

    def __init__(self, engine: MadeUpEngine, period_s: float = 7.0) -> None:
        self._engine = engine
        self._period_s = period_s
        self._start = time.time()
        self._last: NodeState | None = None
        self._decisions: list[Decision] = []
        self._number = 0
        self._resident: set[str] = set()
        self.policy, self.reverted = "ppo-h200-24", False
        engine.picture = self.picture

    def picture(self) -> NodeState | None:
        """Return the picture of now; a new one each 0.2 s."""
        if not self._engine.ready:
            return None
        now = time.time()
        if self._last is not None and now - self._last.time_s < 0.2:
            return self._last
        self._last = self._at(now)
        return self._last

    def _at(self, now: float) -> NodeState:
        infos = tuple(self._engine.infos.values())
        still = made_up_state(now, infos)
        since = now - self._start
        models = []
        for i, (info, model) in enumerate(zip(infos, still.models, strict=True)):
            phase = (since / self._period_s + i * 0.37) % 1.0
            share = max(0.0, min(1.0, phase * 8)) if phase < 0.45 else 0.0
            if i == 3:
                share = 1.0
            landed = round(share * model.pieces)
            queued = int(8 * (1 - phase)) if phase > 0.4 else int(2 * phase)
            if (share > 0) != (info.name in self._resident):
                self._resident ^= {info.name}
                self._decide(now, info.name, queued, share > 0)
            used = landed / model.pieces
            models.append(
                replace(
                    model,
                    landed=landed,
                    target=model.pieces if share > 0 else 0,
                    resident_bytes=int(used * info.weight_bytes * 0.45),
                    kv_bytes=int(used * 0.4e9 * (1 + i)),
                    queued=queued,
                    running=int(6 * used * (1.2 - phase)),
                    suspended=2 if share == 0 and i % 2 else 0,
                    oldest_wait_s=queued * 0.31,
                    pinned=i == 3,
                    paused=i == 2 and 0.3 < phase < 0.5,
                    focus=i == 0 and share == 1,
                    quarantined=i == 5,
                    load_bytes=int(since * 3e9),
                    stream_bytes=int(since * 1e9),
                    decode_tokens=int(since * 220),
                )
            )
        used_bytes = sum(model.resident_bytes + model.kv_bytes for model in models)
        return replace(
            still,
            started_s=self._start,
            device="NVIDIA H200",
            policy=still.champion if self.reverted else self.policy,
            reverted=self.reverted,
            free_bytes=max(0, (23 << 30) - used_bytes),
            host_kv_bytes=1 << 30,
            h2d_busy_s=since * 0.62,
            compute_s=since * 0.8,
            models=tuple(models),
            decisions=tuple(self._decisions[-100:]),
        )

    def _decide(self, now: float, model: str, queued: int, load: bool) -> None:
        self._number += 1
        reason = (
            f"{queued} wait for {model}, oldest {queued * 0.31:.1f} s of 2 s"
            if load
            else f"{model} was idle for 4 s; its memory goes to what waits"
        )
        verb = "level100" if load else "out"
        by = "champion" if self.reverted else "policy"
        self._decisions.append(Decision(self._number, now, model, verb, by, reason, 0.0007))


class Server:
    """A real uvicorn on loopback, in a thread of its own."""

    def __init__(self, app: FastAPI, port: int = 0) -> None:
        self.app = app
        config = uvicorn.Config(
            app, "127.0.0.1", port, log_config=None, access_log=False, ws="none"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError("the server did not start")
            time.sleep(0.002)
        self.port: int = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        stop_streams(self.app)
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()


@contextmanager
def serving(
    engine: MadeUpEngine, settings: ServerSettings | None = None, port: int = 0
) -> Iterator[Server]:
    """Serve an engine while the block runs."""
    server = Server(create_app(engine, settings or ServerSettings()), port)
    try:
        yield server
    finally:
        server.stop()


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for something that another thread does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)

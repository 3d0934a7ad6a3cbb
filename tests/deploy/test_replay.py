"""A replay sends what the simulator would play, records what comes, and measures it the same way.

The server here is scripted: what it does follows from the model that is asked and from how many
requests have come, never from a clock.
"""

import asyncio
import json
import threading
from array import array
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from mmrl.agents.contenders import Contender
from mmrl.agents.play import Piece, start
from mmrl.agents.report import gather, render
from mmrl.agents.results import Results
from mmrl.cli.app import app
from mmrl.deploy import streams
from mmrl.deploy.replay import (
    FIRST_TOKEN,
    LAST_TOKEN,
    Progress,
    Sent,
    Workload,
    episode_workload,
    request_body,
    send,
    served_names,
    stretched,
    trace_workload,
)
from mmrl.deploy.replay_results import (
    episode_arrays,
    make_results,
    measured,
    notes,
    request_table,
    simulated,
    write,
)
from mmrl.deploy.streams import Client, Outcome, Stream
from mmrl.errors import InputError
from mmrl.metrics import episode_metrics
from mmrl.node import state as node_state
from mmrl.node.state import new_requests
from mmrl.scenarios.targets import Targets
from tests.agents.made_up import make_scenario

S = 10**9
MODELS = ("steady", "bare", "late", "full", "busy", "broken", "torn", "wrong", "mute", "stuck")
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def sse(event: Any) -> bytes:
    return b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"


def piece(text: str = "x", count: int | None = None, reason: str | None = None) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
    usage = None if count is None else {"completion_tokens": count}
    return sse({"choices": [choice], "usage": usage})


def whole(status: str, body: Any, more: str = "") -> bytes:
    data = json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(data)}\r\n{more}\r\n".encode() + data


class ScriptedServer:
    """Speaks as much of the protocol as a replay uses; the model's name says how it behaves.

    Attributes:
        fixed: Its answer to everything, after which it closes; None for the script.
        bodies: What was asked for, in order.
        hold: Answers to ``steady`` begin when so many requests have come.
        gone: Set when a client of ``stuck`` or ``mute`` has gone.
    """

    def __init__(self, models: tuple[str, ...] = MODELS, fixed: bytes | None = None) -> None:
        self.models = models
        self.fixed = fixed
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[bytes] = []
        self.connections = 0
        self.open: set[asyncio.Task[None]] = set()
        self.hold = 0
        self.counters: list[str] = []
        self.gone = asyncio.Event()
        self.come = asyncio.Event()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self.open.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                await self.answer(head, reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open.discard(task)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def answer(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self.fixed is not None:
            writer.write(self.fixed)
            await writer.drain()
            raise ConnectionError
        if head.startswith(b"GET /v1/models "):
            writer.write(whole("200 OK", {"data": [{"id": name} for name in self.models]}))
            return
        if head.startswith(b"GET /metrics ") and self.counters:
            text = self.counters.pop(0).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
            return
        if not head.startswith(b"POST /v1/completions "):
            writer.write(whole("404 Not Found", {"error": {"message": "no such place"}}))
            return
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        body = json.loads(await reader.readexactly(length))
        self.bodies.append(body)
        if len(self.bodies) >= self.hold:
            self.come.set()
        await getattr(self, body["model"])(body["max_tokens"], reader, writer)

    async def steady(self, tokens: int, reader: Any, writer: Any) -> None:
        """Two tokens a chunk, counted; all wait until enough requests have come."""
        await self.come.wait()
        writer.write(HEAD)
        for count in range(2, tokens + 2, 2):
            writer.write(chunk(piece("xx", min(count, tokens))))
        self.done(writer, piece("", tokens, "length"))

    async def bare(self, tokens: int, reader: Any, writer: Any) -> None:
        """A token a chunk, nothing counted."""
        writer.write(HEAD + b"".join(chunk(piece()) for _ in range(tokens)))
        self.done(writer, piece("", None, "length"))

    async def late(self, tokens: int, reader: Any, writer: Any) -> None:
        """The count comes at the end."""
        writer.write(HEAD + chunk(piece()) + chunk(piece("", None, "length")))
        self.done(writer, sse({"choices": [], "usage": {"completion_tokens": tokens}}))

    async def full(self, tokens: int, reader: Any, writer: Any) -> None:
        error = {"error": {"message": "The queue is full.", "code": "queue_full"}}
        writer.write(whole("429 Too Many Requests", error, "Retry-After: 1\r\n"))

    async def busy(self, tokens: int, reader: Any, writer: Any) -> None:
        writer.write(whole("503 Service Unavailable", {"error": {"message": "draining"}}))

    async def broken(self, tokens: int, reader: Any, writer: Any) -> None:
        writer.write(HEAD + chunk(piece("x", 1)) + chunk(sse({"error": {"message": "it broke"}})))
        self.done(writer)

    async def torn(self, tokens: int, reader: Any, writer: Any) -> None:
        writer.write(HEAD + chunk(piece("x", 1)))
        await writer.drain()
        raise ConnectionError

    async def wrong(self, tokens: int, reader: Any, writer: Any) -> None:
        writer.write(whole("400 Bad Request", {"error": {"message": "too\nlong"}}))

    async def mute(self, tokens: int, reader: Any, writer: Any) -> None:
        await self.until_gone(reader)

    async def stuck(self, tokens: int, reader: Any, writer: Any) -> None:
        writer.write(HEAD + chunk(piece("xx", 2)))
        await self.until_gone(reader)

    async def until_gone(self, reader: asyncio.StreamReader) -> None:
        try:
            await reader.read()
        finally:
            self.gone.set()
        raise ConnectionError

    def done(self, writer: Any, *last: bytes) -> None:
        writer.write(b"".join(chunk(data) for data in (*last, sse(b"[DONE]"))) + b"0\r\n\r\n")


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[ScriptedServer]:
    server = ScriptedServer(**settings)
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    server.url = f"http://127.0.0.1:{port}"
    try:
        yield server
    finally:
        listening.close()
        tasks = list(server.open)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def in_background(**settings: Any) -> Iterator[ScriptedServer]:
    """A server on a loop of its own, for commands that have their own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    context = running(**settings)
    try:
        try:
            yield asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result(10)
        finally:
            asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def made_workload(asked: list[tuple[float, str, int]], drain_s: float = 30.0) -> Workload:
    """A workload of (arrival_s, model, output) with prompts of 7 tokens."""
    models = tuple(dict.fromkeys(model for _, model, _ in asked))
    table = new_requests(1, len(asked))[0]
    for row, (arrival_s, model, output) in zip(table, asked, strict=True):
        row["arrival_ns"], row["model"] = round(arrival_s * S), models.index(model)
        row["prompt"], row["output"] = 7, output
        row["ttft_ns"], row["tpot_ns"], row["isolated_ns"] = 100 * S, 100 * S, S
        row["first_ns"] = row["finish_ns"] = -1
    last_s = max(arrival_s for arrival_s, _, _ in asked)
    return Workload("made up, live", models, table, last_s + 0.01, drain_s)


def replayed(workload: Workload, prepare: Callable[[ScriptedServer], None] | None = None) -> Sent:
    async def main() -> Sent:
        async with running() as server:
            if prepare is not None:
                prepare(server)
            served = {name: name for name in workload.used}
            async with asyncio.timeout(30):
                return await send(workload, served, Client(server.url))

    return asyncio.run(main())


# --- sending --------------------------------------------------------------------------------------


def test_requests_leave_whatever_the_answers() -> None:
    """The server answers nobody before all have asked: a closed loop would wait for ever."""
    workload = made_workload([(0.0, "steady", 4)] * 300)

    def hold(server: ScriptedServer) -> None:
        server.hold = 300

    run = replayed(workload, hold)
    assert run.outcomes[Outcome.DONE] == 300
    assert {stream.tokens for stream in run.streams} == {4}
    assert len(run.lags_s) == 300 and (run.lags_s >= 0).all()
    assert run.end_ns >= max(stream.ended_ns for stream in run.streams)


def test_requests_leave_in_order_and_never_early() -> None:
    asked = [(0.00, "steady", 1), (0.02, "bare", 2), (0.04, "steady", 3), (0.04, "late", 4)]
    bodies: list[dict[str, Any]] = []
    run = replayed(made_workload(asked), lambda server: setattr(server, "bodies", bodies))
    assert [body["max_tokens"] for body in bodies] == [1, 2, 3, 4]
    assert [body["model"] for body in bodies] == [model for _, model, _ in asked]
    for (arrival_s, _, _), stream in zip(asked, run.streams, strict=True):
        assert stream.sent_ns >= stream.begun_ns >= run.start_ns + arrival_s * S


def test_every_chunk_has_its_time_and_its_tokens() -> None:
    run = replayed(made_workload([(0.0, "steady", 5), (0.0, "bare", 3), (0.0, "late", 9)]))
    steady, bare, late = run.streams
    assert list(steady.counts) == [2, 4, 5]
    assert list(bare.counts) == [1, 2, 3] and not bare.counted
    assert list(late.counts) == [9] and late.counted  # one chunk, and how many it was
    for stream in run.streams:
        assert len(stream.times_ns) == len(stream.counts)
        assert list(stream.times_ns) == sorted(stream.times_ns)
        assert run.start_ns <= stream.sent_ns <= stream.times_ns[0]
        assert stream.times_ns[-1] <= stream.ended_ns <= run.end_ns


def test_each_failure_is_known_by_its_kind() -> None:
    kinds = ("full", "busy", "broken", "torn", "wrong", "steady")
    run = replayed(made_workload([(0.0, kind, 2) for kind in kinds]))
    by_kind = dict(zip(kinds, run.streams, strict=True))
    assert {kind: (str(s.outcome), s.status, s.reason) for kind, s in by_kind.items()} == {
        "full": ("refused", 429, "429: The queue is full."),
        "busy": ("refused", 503, "503: draining"),
        "broken": ("failed", 200, "it broke"),
        "torn": ("failed", 200, "the server closed the connection"),
        "wrong": ("failed", 400, "400: too long"),
        "steady": ("done", 200, ""),
    }
    assert by_kind["torn"].tokens == 1  # what came counts


def test_the_end_of_the_time_closes_what_is_open() -> None:
    async def main() -> tuple[Sent, Workload]:
        async with running() as server:
            workload = made_workload([(0.0, "stuck", 5), (0.0, "mute", 5)], drain_s=0.3)
            served = {name: name for name in workload.used}
            run = await send(workload, served, Client(server.url))
            async with asyncio.timeout(10):
                await server.gone.wait()  # the server sees that nobody listens any more
            return run, workload

    run, workload = asyncio.run(main())
    assert [stream.outcome for stream in run.streams] == [Outcome.OPEN] * 2
    assert [stream.tokens for stream in run.streams] == [2, 0]
    assert run.end_ns - run.start_ns >= (workload.duration_s + workload.drain_s) * S
    assert not run.interrupted


def test_an_interrupt_keeps_what_there_is() -> None:
    async def main() -> Sent:
        async with running() as server:
            workload = made_workload([(0.0, "steady", 3), (0.0, "stuck", 3), (999.0, "bare", 3)])
            served = {name: name for name in workload.used}
            seen = asyncio.Event()

            def watch(progress: Progress) -> None:
                if progress.ended[Outcome.DONE] == 1 and progress.tokens == 5:
                    seen.set()

            task = asyncio.create_task(send(workload, served, Client(server.url), watch=watch))
            async with asyncio.timeout(20):
                await seen.wait()
                task.cancel()  # as Ctrl-C does
                return await task

    run = asyncio.run(main())
    assert run.interrupted
    assert [str(stream.outcome) for stream in run.streams] == ["done", "open", "unsent"]
    node, table = episode_arrays(run)
    assert episode_metrics(node, table)["requests"] == 2
    assert "interrupted after" in notes(run)[0]


def test_connections_are_used_again_and_a_closed_one_is_replaced() -> None:
    async def main() -> None:
        async with running() as server:
            client = Client(server.url)
            for _ in range(3):
                stream = Stream()
                await client.complete(request_body("steady", 3, 2, (0, 0)), stream)
                assert stream.outcome is Outcome.DONE
            assert server.connections == 1
            await client.complete(request_body("torn", 3, 2, (0, 0)), Stream())
            stream = Stream()
            await client.complete(request_body("steady", 3, 2, (0, 0)), stream)
            assert stream.outcome is Outcome.DONE and server.connections == 2
            client.close()

    asyncio.run(main())


def test_prompts_have_their_length_and_are_seeded() -> None:
    bodies = [json.loads(request_body("m", 5000, 17, seed)) for seed in ((0, 0), (0, 0), (0, 1))]
    assert bodies[0] == bodies[1] and bodies[0]["prompt"] != bodies[2]["prompt"]
    prompt = bodies[0].pop("prompt")
    assert len(prompt) == 5000
    assert min(prompt) == FIRST_TOKEN == 10 and max(prompt) == LAST_TOKEN == 250
    assert bodies[0] == {
        "model": "m",
        "max_tokens": 17,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    assert len(json.loads(request_body("m", 1, 1, (0, 0)))["prompt"]) == 1


# --- the protocol ---------------------------------------------------------------------------------


class NoTransport(asyncio.Transport):
    def write(self, data: Any) -> None:
        pass

    def abort(self) -> None:
        pass


ANSWER = (
    b"HTTP/1.1 100 Continue\r\n\r\n"
    + HEAD
    + b"".join(
        chunk(data)
        for data in (
            b": a comment\n\n",
            piece("a", 1),
            piece("b", 2)[:9],  # an event in two chunks
            piece("b", 2)[9:] + piece("\u00e9", 3).replace(b"\n\n", b"\r\n\r\n"),
            sse(b"[DONE]"),
        )
    )
    + b"0;extension\r\nTrailer: x\r\n\r\n"
)


@settings(max_examples=60)
@given(st.lists(st.integers(1, len(ANSWER) - 1), max_size=12, unique=True).map(sorted))
def test_an_answer_reads_the_same_however_it_is_cut(cuts: list[int]) -> None:
    async def main() -> None:
        connection, stream, statuses = streams._Connection(), Stream(outcome=Outcome.OPEN), []
        connection.connection_made(NoTransport())
        events = streams._Events(stream)
        ended = connection.exchange(b"", events.feed, statuses.append)
        for begin, end in zip([0, *cuts], [*cuts, len(ANSWER)], strict=True):
            assert not ended.done()
            connection.data_received(ANSWER[begin:end])
        assert await ended == 200 and statuses == [200]
        assert list(stream.counts) == [1, 2, 3] and stream.outcome is Outcome.DONE
        assert connection.reusable

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "what came is not HTTP"),
        (HEAD + b"zz\r\n", "what came is not HTTP"),
        (HEAD + chunk(sse(b"{]")) + b"0\r\n\r\n", "an event of the answer cannot be read"),
        (HEAD + chunk(sse(b"[DONE]")) + b"0\r\n\r\n", "the answer has no token"),
        (HEAD + chunk(piece("a", 1)) + b"0\r\n\r\n", "the answer broke off"),
    ],
)
def test_what_is_not_an_answer_fails_and_says_why(answer: bytes, outcome: str) -> None:
    async def main() -> Stream:
        async with running(fixed=answer) as server:
            client, stream = Client(server.url), Stream()
            async with asyncio.timeout(10):
                await client.complete(b"{}", stream)
            client.close()
            return stream

    stream = asyncio.run(main())
    assert (stream.outcome, stream.reason) == (Outcome.FAILED, outcome)


def test_the_key_goes_with_every_request() -> None:
    async def main() -> list[bytes]:
        async with running() as server:
            client = Client(server.url + "/v1/", "s3cret")
            assert [model["id"] for model in await client.models()] == list(MODELS)
            await client.complete(request_body("bare", 1, 1, (0, 0)), Stream())
            client.close()
            return server.heads

    heads = asyncio.run(main())
    assert len(heads) == 2
    assert all(b"\r\nAuthorization: Bearer s3cret\r\n" in head for head in heads)


# --- what came of it, by hand ---------------------------------------------------------------------


def stream_of(outcome: Outcome, sent_s: float, times_s: list[float], counts: list[int]) -> Stream:
    ends = {Outcome.DONE: times_s[-1:], Outcome.OPEN: [], Outcome.UNSENT: []}
    ended = ends.get(outcome, [times_s[-1] + 1 if times_s else sent_s + 1])
    return Stream(
        outcome,
        begun_ns=round((100 + sent_s) * S) if sent_s >= 0 else -1,
        sent_ns=round((100 + sent_s) * S) if sent_s >= 0 else -1,
        ended_ns=round((100 + ended[0]) * S) if ended else -1,
        status=200,
        reason="it broke" if outcome is Outcome.FAILED else "",
        times_ns=array("q", [round((100 + t) * S) for t in times_s]),
        counts=array("q", counts),
        counted=True,
    )


def hand_made(warmup_s: float = 0.0) -> Sent:
    """20 s of two models; instants count from 100 s of the clock. TTFT 2 s, TPOT 1 s, alone 2 s.

    | | model | arrives | chunks (tokens) | asked | |
    | 0 | 0 | 0 s | 1 s (1), 3 s (4), 5 s (5) | 5 | good |
    | 1 | 0 | 1 s | 6 s (1), 8 s (3) | 3 | TTFT missed |
    | 2 | 1 | 4 s | 5 s (1), 10 s (3) | 3 | TPOT missed: 5 s for 2 tokens |
    | 3 | 1 | 6 s | 8 s (1), 10 s (5) | 30 | open, and nothing missed for certain |
    | 4 | 0 | 12 s | none | 2 | open: TTFT missed |
    | 5 | 1 | 13 s | none | 2 | refused at 14 s |
    | 6 | 1 | 14 s | 15 s (1) | 3 | failed at 16 s |
    | 7 | 0 | 19 s | none | 3 | never sent |
    """
    models = ("a", "b")
    table = new_requests(1, 8)[0]
    table["arrival_ns"] = np.array([0, 1, 4, 6, 12, 13, 14, 19]) * S
    table["model"] = 0, 0, 1, 1, 0, 1, 1, 0
    table["prompt"], table["output"] = 7, (5, 3, 3, 30, 2, 2, 3, 3)
    table["ttft_ns"], table["tpot_ns"], table["isolated_ns"] = 2 * S, S, 2 * S
    table["first_ns"] = table["finish_ns"] = -1
    workload = Workload("by hand, live", models, table, 20.0, 5.0)
    return Sent(
        workload,
        {"a": "a", "b": "served-b"},
        [
            stream_of(Outcome.DONE, 0.0, [1, 3, 5], [1, 4, 5]),
            stream_of(Outcome.DONE, 1.5, [6, 8], [1, 3]),
            stream_of(Outcome.DONE, 4.0, [5, 10], [1, 3]),
            stream_of(Outcome.OPEN, 6.0, [8, 10], [1, 5]),
            stream_of(Outcome.OPEN, 12.0, [], []),
            stream_of(Outcome.REFUSED, 13.0, [], []),
            stream_of(Outcome.FAILED, 14.0, [15], [1]),
            stream_of(Outcome.UNSENT, -1, [], []),
        ],
        start_ns=100 * S,
        end_ns=120 * S,
        warmup_s=warmup_s,
    )


def test_shares_by_hand() -> None:
    m = episode_metrics(*episode_arrays(hand_made()))
    assert m["requests"] == 7 and m["elapsed_s"] == pytest.approx(20)
    assert m["goodput"] == pytest.approx(1 / 7)
    assert m["missed_ttft"] == pytest.approx(2 / 7)
    assert m["missed_tpot"] == pytest.approx(1 / 7)
    assert m["refused"] == pytest.approx(2 / 7)  # the one that failed too
    assert m["unfinished"] == pytest.approx(1 / 7)
    assert m.models["goodput"].tolist() == pytest.approx([1 / 3, 0])


def test_latencies_by_hand_are_censored_at_the_end() -> None:
    m = episode_metrics(*episode_arrays(hand_made()))
    # 1, 5, 1, 2; waits since 12 s; refused at 13 s: until the end; the failed one had a token
    assert m["ttft_mean_s"] == pytest.approx((1 + 5 + 1 + 2 + 8 + 7 + 1) / 7)
    assert m["longest_wait_s"] == pytest.approx(8)
    assert m["e2e_mean_s"] == pytest.approx((5 + 7 + 6 + 14 + 8 + 7 + 6) / 7)
    assert m["norm_latency"] == pytest.approx((5 + 7 + 6 + 14 + 8 + 7 + 6) / 14)
    # 4 s / 4; 2 s / 2; 5 s / 2; 12 s over 4 so far; 5 s over at least 1
    assert m["tpot_mean_s"] == pytest.approx((1 + 1 + 2.5 + 3 + 5) / 5)
    assert m["output_tokens_per_s"] == pytest.approx((5 + 3 + 3 + 5 + 1) / 20)
    assert m["requests_per_s"] == pytest.approx(3 / 20)


def test_a_warm_up_counts_nowhere() -> None:
    m = episode_metrics(*episode_arrays(hand_made(warmup_s=4.0)))  # 0 and 1 are out, 2 is in
    assert m["requests"] == 5 and m["elapsed_s"] == pytest.approx(16)
    assert m["goodput"] == 0 and m["missed_tpot"] == pytest.approx(1 / 5)
    assert m["ttft_mean_s"] == pytest.approx((1 + 2 + 8 + 7 + 1) / 5)
    assert m["e2e_mean_s"] == pytest.approx((6 + 14 + 8 + 7 + 6) / 5)
    assert m["output_tokens_per_s"] == pytest.approx((3 + 5 + 1) / 16)


def test_a_shorter_answer_is_judged_by_what_came() -> None:
    run = hand_made()
    run.workload.requests["output"][0] = 50
    _, table = episode_arrays(run)
    assert table["output"][0] == 5 and table["miss"][0] == node_state.MISS_NONE
    assert any("1 answers have fewer tokens" in note for note in notes(run))


def test_without_the_latency_alone_there_is_no_normalised_latency() -> None:
    run = hand_made()
    run.workload.requests["isolated_ns"] = 0
    played = measured(run, Contender("live", "live"))
    assert np.isnan(played.episodes[0]["norm_latency"])
    assert len(played.latencies["norm_latency"]) == 0 and len(played.latencies["ttft_s"]) == 7
    assert all(np.isnan(model["norm_latency"]) for model in played.models)
    assert played.episodes[0]["goodput"] == pytest.approx(1 / 7)


def test_the_table_of_requests_has_every_chunk(tmp_path: Path) -> None:
    run = hand_made(warmup_s=4.0)
    write(make_results(run), request_table(run), tmp_path / "live")
    table = pd.read_parquet(tmp_path / "live" / "requests.parquet")
    assert table.status.tolist() == [
        *("done", "done", "done", "open", "open", "refused", "failed", "unsent")
    ]
    assert table.chunk_s.map(list).tolist()[:2] == [[1, 3, 5], [6, 8]]
    assert table.chunk_tokens.map(list).tolist()[:2] == [[1, 3, 1], [1, 2]]
    assert table.scheduled_s.tolist()[:2] == [0, 1] and table.sent_s.tolist()[:2] == [0, 1.5]
    assert table.finish_s.tolist()[:3] == [5, 8, 10] and np.isnan(table.finish_s[3])
    assert table.served_as.tolist()[:3] == ["a", "a", "served-b"]
    assert table.warmup.tolist() == [True, True, *[False] * 6]
    assert not table.good.any()
    assert request_table(hand_made()).good.sum() == 1  # of seven: a goodput of 1 / 7
    assert table.reason[6] == "it broke"


def test_late_sending_is_told() -> None:
    run = hand_made()
    assert run.lags_s.tolist() == pytest.approx([0, 0.5, 0, 0, 0, 0, 0])
    assert any("fell behind" in note and "ms late" in note for note in notes(run))
    run.streams[1].begun_ns = 101 * S
    told = notes(run)
    assert not any("fell behind" in note for note in told)
    assert any("connecting was slow" in note and "ms late" in note for note in told)
    run.streams[1].sent_ns = 101 * S
    assert not any("ms late" in note for note in notes(run))


PAGE = """# HELP mmrl_loads_total Loads that ended.
mmrl_loads_total{{model="a"}} {loads}
mmrl_loads_total{{model="served-b"}} 1e1
mmrl_link_bytes_total{{kind="load",model="a"}} {bytes}
mmrl_link_bytes_total{{kind="stream",model="a"}} 7
mmrl_model_compute_seconds_total{{model="served-b"}} {busy}
mmrl_decisions_total {decisions}
mmrl_policy_info{{policy="slack"}} 1.0
python_info{{version="3"}} 1.0
"""


def test_counters_of_the_server_are_those_of_the_episode() -> None:
    run = hand_made()
    run.counters = (
        PAGE.format(loads=3.0, bytes=1e9, busy=1.5, decisions=10),
        PAGE.format(loads=7.0, bytes=5e9, busy=9.5, decisions=50),
    )
    node, table = episode_arrays(run)
    m = episode_metrics(node, table)
    assert node["loads"][:2].tolist() == [4, 0]
    assert m["loads_per_s"] == pytest.approx(4 / 20)
    assert m["load_bytes_per_s"] == pytest.approx(4e9 / 20) and m["stream_bytes_per_s"] == 0
    assert m["gpu_share"] == pytest.approx(8 / 20) and m["decisions_per_s"] == pytest.approx(2)
    assert "the server's policy: slack" in notes(run)
    assert not any("not known" in note for note in notes(run))


def test_counters_that_began_anew_are_not_known() -> None:
    run = hand_made()
    run.counters = (
        PAGE.format(loads=3, bytes=1e9, busy=1.5, decisions=10),
        PAGE.format(loads=1, bytes=5e9, busy=9.5, decisions=50),
    )
    assert episode_metrics(*episode_arrays(run))["load_bytes_per_s"] == 0
    assert any("not known" in note for note in notes(run))


def test_counters_are_read_at_both_ends() -> None:
    pages = ["mmrl_decisions_total 1.0", "mmrl_decisions_total 5.0"]

    def prepare(server: ScriptedServer) -> None:
        server.counters = list(pages)

    run = replayed(made_workload([(0.0, "steady", 2)]), prepare)
    assert run.counters == tuple(pages)
    assert episode_arrays(run)[0]["decisions"] == 4


# --- what is sent ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_scenario(tmp_path_factory.mktemp("replay"))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(
        "arrival_s,model,prompt_tokens,output_tokens,class\n"
        "0.0,x,7,3,interactive\n0.01,y,9,2,batch\n0.02,x,8,4,interactive\n"
    )
    return path


def test_an_episode_is_that_of_the_simulator(scenario: str) -> None:
    workload = episode_workload(scenario, "dev", 3, load=0.8)
    piece = Piece("", scenario, 0.8, "dev", (3,), Contender("slack", "rule", "slack"))
    simulator = start(piece)
    node, requests = simulator.nodes[0], simulator.requests[0]
    assert len(workload.requests) == node["n_requests"] > 3
    for field in ("arrival_ns", "model", "prompt", "output", "ttft_ns", "tpot_ns", "isolated_ns"):
        theirs = requests[: len(workload.requests)][field]
        assert workload.requests[field].tolist() == theirs.tolist(), field
    assert (workload.duration_s + workload.drain_s) * 1e9 == node["horizon_ns"]
    assert workload.models == ("qwen2.5-7b", "llama3.2-3b", "qwen2.5-7b#2")
    other = episode_workload(scenario, "dev", 4, load=0.8)
    assert other.requests["arrival_ns"].tolist() != workload.requests["arrival_ns"].tolist()


def test_time_is_stretched(scenario: str) -> None:
    workload = episode_workload(scenario, "dev", 0)
    slow = stretched(workload, 2.0)
    assert slow.duration_s == 2 * workload.duration_s and slow.drain_s == workload.drain_s
    assert slow.requests["arrival_ns"].tolist() == (2 * workload.requests["arrival_ns"]).tolist()
    assert slow.requests["ttft_ns"].tolist() == workload.requests["ttft_ns"].tolist()
    with pytest.raises(InputError, match="time scale is 0"):
        stretched(workload, 0.0)


def test_models_are_mapped_by_name(scenario: str) -> None:
    workload = episode_workload(scenario, "dev", 0)
    third = workload.models.index("llama3.2-3b")
    asked = workload.requests[workload.requests["model"] != third]
    workload = replace(workload, requests=asked)
    served = ["qwen2.5-7b", "llama3.2-3b", "second"]
    assert served_names(workload, served, {"qwen2.5-7b#2": "second"}) == {
        "qwen2.5-7b": "qwen2.5-7b",
        "qwen2.5-7b#2": "second",
    }  # of the third nothing is asked
    with pytest.raises(InputError, match=r"has no model 'qwen2.5-7b#2'.*--map"):
        served_names(workload, served)
    with pytest.raises(InputError, match=r"unknown model in --map 'qwen'.*did you mean"):
        served_names(workload, served, {"qwen": "second"})


def test_a_trace_is_sent_as_recorded(trace: Path) -> None:
    workload = trace_workload(
        [trace], ["other", "y", "second"], Targets.model_validate("chat"), 5.0, {"x": "second"}
    )
    requests = workload.requests
    assert [workload.models[m] for m in requests["model"]] == ["second", "y", "second"]
    assert requests["arrival_ns"].tolist() == [0, 10_000_000, 20_000_000]
    assert requests["prompt"].tolist() == [7, 9, 8] and requests["output"].tolist() == [3, 2, 4]
    assert requests["ttft_ns"].tolist() == [2 * S, 60 * S, 2 * S]  # batch work has time
    assert requests["tpot_ns"].tolist() == [S // 10, 0, S // 10]
    assert not requests["isolated_ns"].any()


def test_services_of_a_trace_become_models_of_the_server(trace: Path) -> None:
    chat = Targets.model_validate("chat")
    workload = trace_workload([trace], ["first", "second"], chat, 5.0)
    assert [workload.models[m] for m in workload.requests["model"]] == ["first", "second", "first"]
    assert any("by popularity" in note for note in workload.notes)
    with pytest.raises(InputError, match="no model 'x'"):
        trace_workload([trace], ["y"], chat, 5.0)
    with pytest.raises(InputError, match="depend on the latency of a request alone"):
        trace_workload([trace], ["x", "y"], Targets.model_validate("relative"), 5.0)


# --- results and report ---------------------------------------------------------------------------


def live_episode(scenario: str) -> Sent:
    """An episode that a server would have served in an instant."""
    workload = episode_workload(scenario, "dev", 0)
    done = []
    for request in workload.requests:
        first, output = S + int(request["arrival_ns"]), int(request["output"])
        times = array("q", [first + 1000] + [first + 2000] * (output > 1))
        counts = array("q", [1, output][: len(times)])
        done.append(Stream(Outcome.DONE, first, first, times[-1], 200, "", times, counts, True))
    return Sent(workload, {n: n for n in workload.models}, done, S, round(S * 17))


def test_the_report_shows_a_live_run_beside_simulated_ones(scenario: str, tmp_path: Path) -> None:
    run = live_episode(scenario)
    beside = simulated(run.workload, ["slack", "lru"])
    assert {int(part.episodes[0]["requests"]) for part in beside} == {len(run.streams)}
    results = make_results(run, "live", beside, url="http://somewhere:8000")
    write(results, request_table(run), tmp_path / "live")
    (board,) = Results.read(tmp_path / "live").summary["boards"]
    assert [row["policy"] for row in board["rows"]] == ["live", "slack", "lru"]
    live = board["rows"][0]
    assert live["goodput"] == 1.0 and live["requests"] == len(run.streams)
    assert live["vs_best_rule"]["policy"] in ("slack", "lru")
    assert "the arrivals of episode dev 0" in board["notes"]
    page = render(gather([tmp_path / "live"]))["index.html"]
    for policy, kind in {"live": "live", "slack": "rule", "lru": "rule"}.items():
        assert f'{{"name":"{policy}","kind":"{kind}"' in page
    assert "http://somewhere:8000" not in board["notes"]


def test_a_live_run_stands_in_a_report_alone(scenario: str, tmp_path: Path) -> None:
    run = live_episode(scenario)
    write(make_results(run), request_table(run), tmp_path / "live")
    page = render(gather([tmp_path / "live"]))["index.html"]
    assert "live alone on tiny, live at load 1" in page


def test_a_trace_alone_makes_a_report_without_normalised_latency(tmp_path: Path) -> None:
    run = hand_made()
    run.workload.requests["isolated_ns"] = 0
    write(make_results(run), request_table(run), tmp_path / "live")
    files = render(gather([tmp_path / "live"]))
    (place,) = (text for name, text in files.items() if name.startswith("data/place-"))
    assert '"ttft_s"' in place and '"norm_latency"' not in place


def test_names_and_empty_runs_are_refused(scenario: str) -> None:
    run = live_episode(scenario)
    with pytest.raises(InputError, match="named 'slack' too"):
        make_results(run, "slack", simulated(run.workload, ["slack"]))
    run.warmup_s = 1e3
    with pytest.raises(InputError, match="after the warm-up"):
        make_results(run)


# --- the command ----------------------------------------------------------------------------------


def replay(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["replay", *arguments])


def test_the_command_sends_a_trace_and_writes_results(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "live"
    with in_background() as server:
        result = replay(
            *(str(trace), "--url", server.url, "--out", str(out)),
            *("--map", "x=steady", "--map", "y=full", "--time-scale", "2"),
        )
    assert result.exit_code == 0, result.output
    assert [body["model"] for body in server.bodies] == ["steady", "full", "steady"]
    assert "2 done, 1 refused; 7 tokens" in result.output
    assert "1 of them: 429: " in result.output
    results = Results.read(out)
    assert results.episodes.policy.tolist() == ["live"]
    assert results.episodes.goodput.tolist() == pytest.approx([2 / 3])
    assert pd.read_parquet(out / "requests.parquet").scheduled_s.tolist() == [0, 0.02, 0.04]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to send"),
        (("--scenario", "nowhere"), "unknown scenario 'nowhere'"),
        (("none.csv",), "cannot read none.csv"),
        (("TRACE",), "the server has no model 'x'"),
        (("TRACE", "--map", "z=steady"), "unknown model in --map 'z'"),
        (("TRACE", "--map", "steady"), "--map is 'steady', not a pair"),
        (("TRACE", "--map", "x=steady", "--map", "y=gone"), "the server has no model 'gone'"),
        (("TRACE", "--map", "steady=gone"), "the server has no model 'gone'"),
        (("TRACE", "--targets", "chatty"), "unknown kind of targets 'chatty' (did you mean"),
        (("TRACE", "--targets", "none"), "targets 'none' (known: chat, market, sliding)"),
        (("TRACE", "--targets", "relative"), "depend on the latency of a request alone"),
        (("TRACE", "--mapping", "services"), "the trace has 3 services for 10 models"),
        (("TRACE", "--mapping", "segments", "--warmup", "60"), "nothing to measure"),
        (("TRACE", "--simulate", "slack"), "--simulate plays an episode of a --scenario"),
        (("--scenario", "demo", "--drain", "3"), "--drain is the scenario's"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(
    trace: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    trace.write_text(trace.read_text() + "0.03,steady,1,1,interactive\n")
    given_ = [str(trace) if text == "TRACE" else text for text in arguments]
    with in_background() as server:
        result = replay(*given_, "--url", server.url, "--out", str(tmp_path / "out"))
    assert isinstance(result.exception, InputError), result.output
    assert message in str(result.exception)
    assert result.exception.remedy and "\n" not in str(result.exception)
    assert not server.bodies and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("notes.txt", "mine", "is there and holds no results"),
        ("summary.json", '{"version": 1, "boards": []}', "holds the results of another run"),
        ("summary.json", '{"loss": 0.1}', "is there and holds no results"),
    ],
)
def test_a_folder_that_holds_anything_is_not_overwritten(
    trace: Path, tmp_path: Path, file: str, content: str, message: str
) -> None:
    out = tmp_path / "live"
    out.mkdir()
    (out / file).write_text(content)
    result = replay(str(trace), "--url", "http://127.0.0.1:9", "--out", str(out))
    assert isinstance(result.exception, InputError) and message in str(result.exception)
    assert (out / file).read_text() == content


def test_without_a_server_the_message_says_so(trace: Path, tmp_path: Path) -> None:
    async def free_port() -> int:
        async with await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0) as listening:
            return int(listening.sockets[0].getsockname()[1])

    for url, message in (
        (f"http://127.0.0.1:{asyncio.run(free_port())}", "connection refused (start one"),
        ("127.0.0.1:8000", "'127.0.0.1:8000' is not the URL of a server"),
        ("http://host:port", "'http://host:port' is not the URL of a server"),
    ):
        result = replay(str(trace), "--url", url, "--out", str(tmp_path / "out"))
        assert isinstance(result.exception, InputError) and message in str(result.exception)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (whole("401 Unauthorized", {"error": {"message": "no key"}}), "set MMRL_API_KEY"),
        (whole("200 OK", {"hello": "world"}), "answers 200 and no list of models"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n<html>", "answers 502 and no list of models"),
    ],
)
def test_another_kind_of_server_is_told_apart(answer: bytes, message: str) -> None:
    async def main() -> None:
        async with running(fixed=answer) as server:
            await Client(server.url).models()

    with pytest.raises(InputError) as caught:
        asyncio.run(main())
    assert message in str(caught.value)

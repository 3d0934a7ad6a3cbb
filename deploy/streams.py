"""Streamed completions of an OpenAI-compatible server, with the time of every chunk.

A small HTTP/1.1 client on asyncio: chunks get their time in the very call in which the event loop
hands over what the socket has read, before anything is queued or parsed, and a chunk costs some
microseconds, so that thousands of streams do not make the client the bottleneck.
"""

import asyncio
import json
import os
import re
import ssl
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from mmrl.errors import InputError, MmrlError

ANSWER_LIMIT_BYTES = 2**20  # of an answer that is read whole: a list of models, an error
HEAD_LIMIT_BYTES = 2**16
GET_TIMEOUT_S = 10.0
REFUSALS = (429, 503)
Receive = Callable[[bytes, int], None]


class Outcome(StrEnum):
    """What became of a request."""

    UNSENT = "unsent"  # the run ended before its time came
    OPEN = "open"  # its time has come; it has not ended
    DONE = "done"
    REFUSED = "refused"  # 429 or 503: the server takes no more
    FAILED = "failed"  # another error, or an answer that broke off


@dataclass(slots=True)
class Stream:
    """One request, and what came back; instants are of ``time.monotonic_ns``, -1 for never.

    Attributes:
        outcome: What became of it.
        begun_ns: When its time had come and this client turned to it.
        sent_ns: When it was handed to the socket, once there was a connection.
        ended_ns: When it ended, refused and failed ones too.
        status: HTTP status of the answer, 0 without one.
        reason: What went wrong.
        times_ns: When each chunk with new tokens came.
        counts: Tokens so far, with that chunk.
        counted: Whether the server counts; otherwise each chunk is taken for one token.
    """

    outcome: Outcome = Outcome.UNSENT
    begun_ns: int = -1
    sent_ns: int = -1
    ended_ns: int = -1
    status: int = 0
    reason: str = ""
    times_ns: "array[int]" = field(default_factory=lambda: array("q"))
    counts: "array[int]" = field(default_factory=lambda: array("q"))
    counted: bool = False

    @property
    def tokens(self) -> int:
        """Return how many tokens came."""
        return self.counts[-1] if self.counts else 0

    def end(self, outcome: Outcome, reason: str = "") -> None:
        """End it now; the first end counts."""
        if self.outcome is Outcome.OPEN:
            self.outcome, self.reason, self.ended_ns = outcome, reason, time.monotonic_ns()


class BrokenConnection(MmrlError):
    """The connection could not be made, or ended in the middle of an answer."""


class Client:
    """Sends requests to one server and keeps connections that have become free.

    Args:
        url: Such as ``http://127.0.0.1:8000``; ``/v1`` at its end may be there or not.
        key: API key, if the server wants one.

    Raises:
        InputError: That is not the URL of a server.
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if host is None or parts.scheme not in ("http", "https") or re.search(r"[\s?#]", url):
            raise InputError(f"'{url}' is not the URL of a server", "http://127.0.0.1:8000")
        secure = parts.scheme == "https"
        self.url = url
        self._host, self._port = host, port or (443 if secure else 80)
        self._ssl = ssl.create_default_context() if secure else None
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        if key is not None and not (key.isascii() and key.isprintable()):
            raise InputError("the API key holds characters that no key has", "set it again")
        bearer = f"Authorization: Bearer {key}\r\n" if key else ""
        self._headers = (
            f"Host: {parts.netloc.rpartition('@')[2]}\r\nAccept-Encoding: identity\r\n{bearer}"
        )
        self._idle: list[_Connection] = []

    async def models(self) -> list[dict[str, Any]]:
        """Return the models that the server lists, each with its ``id``.

        Raises:
            InputError: Nobody answers there, or nobody who speaks this protocol, or the key is
                wrong.
        """
        try:
            status, body = await self._get(f"{self._path}/models")
        except TimeoutError:
            raise InputError(
                f"{self.url} does not answer within {GET_TIMEOUT_S:g} s", "check that it is ready"
            ) from None
        except BrokenConnection as error:
            raise InputError(
                f"no server at {self.url}: {error.message}",
                "start one (mmrl serve) or correct --url",
            ) from None
        if status in (401, 403):
            raise InputError(f"{self.url} wants an API key ({status})", "set MMRL_API_KEY")
        try:
            if status != 200:
                raise ValueError
            models = json.loads(body)["data"]
            if not all(isinstance(model["id"], str) for model in models):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.url}{'' if '/v1' in self.url else '/v1'}/models answers {status} and no "
                "list of models",
                "name an OpenAI-compatible server",
            ) from None
        return list(models)

    async def metrics(self) -> str:
        """Return what the server counts, as Prometheus reads it; nothing where it does not tell."""
        try:
            status, body = await self._get(f"{self._path.removesuffix('/v1')}/metrics")
        except (TimeoutError, BrokenConnection):
            return ""
        return body.decode(errors="replace") if status == 200 else ""

    async def _get(self, path: str) -> tuple[int, bytearray]:
        """Return status and body; raises TimeoutError and `BrokenConnection`."""
        body = bytearray()
        head = f"GET {path} HTTP/1.1\r\n{self._headers}\r\n".encode()
        async with asyncio.timeout(GET_TIMEOUT_S):
            return await self._exchange(head, _gather(body), lambda status: None), body

    async def complete(self, body: bytes, stream: Stream) -> None:
        """Send a completion and follow its answer to the end; never raises but when cancelled.

        Args:
            body: JSON for ``/v1/completions``, with ``stream`` on.
            stream: Filled as the answer comes; stays open when this is cancelled.
        """
        head = (
            f"POST {self._path}/completions HTTP/1.1\r\n{self._headers}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()
        events, error = _Events(stream), bytearray()
        gather = _gather(error)

        def receive(data: bytes, now_ns: int) -> None:
            if stream.status == 200:
                events.feed(data, now_ns)
            else:
                gather(data, now_ns)

        def begun(status: int) -> None:
            stream.status = status

        def sent() -> None:
            stream.sent_ns = time.monotonic_ns()

        stream.outcome, stream.begun_ns = Outcome.OPEN, time.monotonic_ns()
        try:
            await self._exchange(head + body, receive, begun, sent)
        except BrokenConnection as broken:
            stream.end(Outcome.FAILED, broken.message)
            return
        if stream.status in REFUSALS:
            stream.end(Outcome.REFUSED, _error_text(bytes(error), stream.status))
        elif stream.status != 200:
            stream.end(Outcome.FAILED, _error_text(bytes(error), stream.status))
        else:
            stream.end(Outcome.FAILED, "the answer broke off")  # unless it has ended properly

    def close(self) -> None:
        """Close the connections that are free."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _exchange(
        self,
        request: bytes,
        receive: Receive,
        begun: Callable[[int], None],
        sent: Callable[[], None] = lambda: None,
    ) -> int:
        """Send a request, hand over its answer, return the status."""
        while True:
            while self._idle and self._idle[-1].lost:
                self._idle.pop()
            used = bool(self._idle)
            connection = self._idle.pop() if used else await self._connect()
            sent()
            try:
                status = await connection.exchange(request, receive, begun)
            except BrokenConnection:
                # A server closes a connection that nobody uses, at times as we begin to.
                if used and not connection.answered:
                    continue
                raise
            except BaseException:
                connection.close()
                raise
            if connection.reusable:
                self._idle.append(connection)
            else:
                connection.close()
            return status

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                _Connection, self._host, self._port, ssl=self._ssl
            )
        except OSError as error:
            raise BrokenConnection(_reason(error)) from None
        return connection


class _Connection(asyncio.Protocol):
    """An HTTP/1.1 connection, which carries one exchange at a time.

    Attributes:
        answered: Whether anything has come back in this exchange.
        reusable: Whether it may carry another one.
        lost: Whether it has been closed.
    """

    def __init__(self) -> None:
        self.answered = False
        self.reusable = False
        self.lost = False
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._ended: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.lost, self.reusable = True, False
        if self._ended is not None and not self._ended.done():
            if error is None and self._part == self._rest:
                self._ended.set_result(self._status)  # a body that ends with the connection
            else:
                self._fail("the server closed the connection")

    def close(self) -> None:
        """Close at once; the server sees that nobody listens any more."""
        self.lost, self.reusable = True, False
        if self._transport is not None:
            self._transport.abort()

    def exchange(
        self, request: bytes, receive: Receive, begun: Callable[[int], None]
    ) -> "asyncio.Future[int]":
        """Send a request.

        Args:
            request: Head and body.
            receive: Called with each part of the answer's body and the instant it came.
            begun: Called with the status before the first part.

        Returns:
            A future of the status; it fails with `BrokenConnection`.
        """
        assert self._transport is not None
        self.answered, self.reusable = False, False
        self._receive, self._begun = receive, begun
        self._status, self._left = 0, 0
        self._part: Callable[[int], bool] = self._head
        self._ended = asyncio.get_running_loop().create_future()
        if self.lost:
            self._fail("the server closed the connection")
        else:
            self._transport.write(request)
        return self._ended

    def data_received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        self._buffer += data
        if self._ended is None or self._ended.done():
            self.close()  # nobody asked
            return
        self.answered = True
        try:
            while not self._ended.done() and self._part(now_ns):
                pass
        except ValueError:
            self._fail("what came is not HTTP")
            self.close()

    # Each part of an answer: take it from the buffer and return True, or False to wait for more.

    def _head(self, now_ns: int) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_LIMIT_BYTES:
                raise ValueError
            return False
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        protocol, code, *_ = first.split(" ", 2)
        if not protocol.startswith("HTTP/1."):
            raise ValueError
        status = int(code)
        if status < 200:
            return True  # 100 Continue and the like: the answer follows
        pairs = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip().lower() for name, _, value in pairs}
        self._status = status
        self._begun(status)
        keep = headers.get("connection", "keep-alive" if protocol == "HTTP/1.1" else "close")
        self._keep = "close" not in keep
        if "chunked" in headers.get("transfer-encoding", ""):
            self._part = self._chunk
        elif "content-length" in headers or status in (204, 304):
            self._left = int(headers.get("content-length", "0"))
            self._part = self._counted
        else:
            self._keep = False
            self._part = self._rest
        return True

    def _chunk(self, now_ns: int) -> bool:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return False
        size = int(self._buffer[:end].partition(b";")[0], 16)
        if size == 0:
            del self._buffer[: end + 2]
            self._part = self._trailer
            return True
        if len(self._buffer) < end + 2 + size + 2:
            return False
        self._receive(bytes(self._buffer[end + 2 : end + 2 + size]), now_ns)
        del self._buffer[: end + 2 + size + 2]
        return True

    def _trailer(self, now_ns: int) -> bool:
        end = self._buffer.find(b"\r\n")
        if end < 0:
            return False
        del self._buffer[: end + 2]
        if end == 0:
            self._finish()
        return True

    def _counted(self, now_ns: int) -> bool:
        part = bytes(self._buffer[: self._left])
        del self._buffer[: len(part)]
        self._left -= len(part)
        if part:
            self._receive(part, now_ns)
        if self._left == 0:
            self._finish()
        return False

    def _rest(self, now_ns: int) -> bool:
        self._receive(bytes(self._buffer), now_ns)
        self._buffer.clear()
        return False

    def _finish(self) -> None:
        assert self._ended is not None
        self.reusable = self._keep and not self._buffer and not self.lost
        self._ended.set_result(self._status)

    def _fail(self, reason: str) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(BrokenConnection(reason))


class _Events:
    """Reads server-sent events of a completion into a `Stream`."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._partial = b""

    def feed(self, data: bytes, now_ns: int) -> None:
        """Take in a part of the body."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now_ns)

    def _event(self, data: bytes, now_ns: int) -> None:
        stream = self._stream
        if data == b"[DONE]":
            if stream.tokens:
                stream.end(Outcome.DONE)
            else:
                stream.end(Outcome.FAILED, "the answer has no token")
            return
        try:
            event = json.loads(data)
            if "error" in event:
                stream.end(Outcome.FAILED, _message(event))
                return
            choices = event.get("choices") or []
            usage = event.get("usage") or {}
            count = usage.get("completion_tokens")
            if count is not None:
                self._count(int(count), now_ns, late=not choices)
            elif choices and (choices[0].get("text") or not choices[0].get("finish_reason")):
                self._add(stream.tokens + 1, now_ns)
            if choices and choices[0].get("finish_reason") in ("error", "cancelled"):
                stream.end(Outcome.FAILED, f"ended by the server: {choices[0]['finish_reason']}")
        except (ValueError, TypeError, AttributeError, KeyError):
            stream.end(Outcome.FAILED, "an event of the answer cannot be read")

    def _count(self, count: int, now_ns: int, late: bool) -> None:
        """Take the server's count; one that comes alone at the end corrects the last chunk."""
        stream = self._stream
        stream.counted = True
        if late and stream.counts:
            stream.counts[-1] = count
        elif count > stream.tokens:
            self._add(count, now_ns)

    def _add(self, count: int, now_ns: int) -> None:
        self._stream.times_ns.append(now_ns)
        self._stream.counts.append(count)


def _gather(body: bytearray) -> Receive:
    """Return what collects a short answer; what is too much of it is dropped."""

    def receive(data: bytes, now_ns: int) -> None:
        if len(body) + len(data) <= ANSWER_LIMIT_BYTES:
            body.extend(data)

    return receive


def _reason(error: OSError) -> str:
    """Say why there is no connection; asyncio wraps the system's words in its own."""
    number = re.search(r"\[Errno (\d+)\]", str(error))
    return (os.strerror(int(number[1])) if number else error.strerror or str(error)).lower()


def _error_text(body: bytes, status: int) -> str:
    try:
        return f"{status}: {_message(json.loads(body))}"
    except (ValueError, TypeError):
        return str(status)


def _message(answer: Any) -> str:
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    text = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(text).split())[:200]


def allow_many_connections() -> None:
    """Raise this process's limit of open files, often 1,024, as far as it may."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

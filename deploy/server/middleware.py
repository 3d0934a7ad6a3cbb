"""The gate that every request passes: its id, host, keys, size, and its line in the log.

Plain ASGI: starlette's function middleware hides from a handler that its client has gone.
"""

import asyncio
import ipaddress
import logging
import re
import secrets
import time
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmrl.deploy.server.auth import Keys
from mmrl.deploy.server.errors import ApiError, internal
from mmrl.deploy.server.streams import ClientGone

log = logging.getLogger("mmrl.server")

# What may be read without a key: nothing here tells what anybody asked a model.
ADMIN = "/admin/"  # below it, operators' keys count
OPEN = frozenset(
    {"/", "/healthz", "/readyz", "/metrics", "/openapi.json", "/admin/state", "/admin/events"}
)
QUIET = frozenset({"/healthz", "/readyz", "/metrics", "/admin/state", "/admin/events"})
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
CLIENT_GONE = 499
DISCARD = 8  # times the limit: so much of a body that is too large is read, to be answered at all
DISCARD_S = 5.0


class Gate:
    """Lets requests in; see the module.

    Handlers add what the log shall tell to ``request.state.fields``.

    Args:
        app: What is behind.
        keys: API keys.
        admin_keys: Operators' keys.
        max_bytes: Largest body.
        host: Address that the server listens on.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, admin_keys: Keys, max_bytes: int, host: str
    ) -> None:
        self._app = app
        self._keys = keys
        self._admin_keys = admin_keys
        self._max_bytes = max_bytes
        # A page may let its own name point here (DNS rebinding): to a browser, this server is then
        # a part of that site. Keys keep such pages out; without any, only known names are let in.
        own = f"[{host}]" if ":" in host else host.lower()
        self._names = LOOPBACK | {own} if not keys and _is_loopback(host) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = Headers(scope=scope)
        fields: dict[str, Any] = {
            "id": _request_id(headers),
            "method": scope["method"],
            "path": scope["path"],
            "status": CLIENT_GONE,
        }
        scope.setdefault("state", {})["fields"] = fields
        answered = False

        async def answer(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                fields["status"] = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = fields["id"]
            await send(message)

        try:
            await self._admit(scope, headers, receive)
            await self._app(scope, self._limited(receive), answer)
        except ClientGone:
            pass  # nobody is left to be answered
        except ApiError as error:
            await error.response()(scope, receive, answer)
        except Exception:
            log.exception("a request failed", extra={"fields": fields})
            if answered:
                raise  # the server breaks the connection: the client sees that the answer is short
            await internal().response()(scope, receive, answer)
        finally:
            fields["seconds"] = round(time.perf_counter() - started, 6)
            level = logging.DEBUG if scope["path"] in QUIET else logging.INFO
            log.log(level, "request", extra={"fields": fields})

    async def _admit(self, scope: Scope, headers: Headers, receive: Receive) -> None:
        if self._names is not None and _host(headers) not in self._names:
            raise ApiError(
                403,
                "This server answers only as localhost, because it has no API keys: ask for it "
                "by that name, or let its operator set keys.",
                code="host",
            )
        reads = scope["method"] in ("GET", "HEAD")
        if not (reads and scope["path"] in OPEN):
            keys = self._admin_keys if scope["path"].startswith(ADMIN) else self._keys
            keys.check(headers.get("authorization"))
        if not reads and _from_another_site(headers):
            raise ApiError(403, "Requests of pages from other sites are refused.", code="origin")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_bytes:
            await self._discard(receive)
            raise ApiError(413, self._too_large, code="request_too_large")

    @property
    def _too_large(self) -> str:
        return f"The body is larger than {self._max_bytes} bytes."

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                if message.get("more_body", False):
                    await self._discard(receive)
                raise HTTPException(413, self._too_large)  # the one kind that reading lets through
            return message

        return limited

    async def _discard(self, receive: Receive) -> None:
        """Read on for a while: a client that is cut off while it sends may not see the answer."""
        left = DISCARD * self._max_bytes
        try:
            async with asyncio.timeout(DISCARD_S):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            return


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else secrets.token_hex(12)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _host(headers: Headers) -> str:
    """Return the name that a client calls this server by, without its port."""
    return re.sub(r":\d*$", "", headers.get("host", "")).lower()


def _from_another_site(headers: Headers) -> bool:
    """Return whether a browser sends this for a page of another site, which nobody meant."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in ("cross-site", "same-site")
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc != headers.get("host")

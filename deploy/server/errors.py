"""Every failure reaches a client in one shape: ``{"error": {message, type, param, code}}``.

Handlers raise `ApiError`; what the engine and the framework raise is turned into one here, so
that a client never meets another shape.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from mmrl.deploy.protocol import Draining, EngineDown, Quarantined, QueueFull, Unavailable
from mmrl.deploy.server.schemas import UNSUPPORTED
from mmrl.errors import InputError, MmrlError

INVALID = "invalid_request_error"
CODES = {400: "invalid_body", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


class ApiError(Exception):
    """A failure with its HTTP status.

    Args:
        status: HTTP status.
        message: What went wrong, in a sentence.
        param: The parameter that is wrong.
        code: A word for programs.
        type: Kind of error; by default, what the status says.
        headers: Further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.type = type or (INVALID if status < 500 else "server_error")
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """Return the body that clients read."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> Response:
        """Return the response."""
        # ASCII: a message may quote a lone surrogate from the request, which UTF-8 cannot hold.
        content = json.dumps(self.body, ensure_ascii=True)
        return Response(content, self.status, self.headers, "application/json")


def from_engine(error: Exception) -> ApiError:
    """Return what a client is told when the engine does not run a request."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Unavailable):
        return _unavailable(error)
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, MmrlError):
        return ApiError(500, str(error))
    return internal()


def internal() -> ApiError:
    """Return the answer to a failure that nobody foresaw; the log tells the operator more."""
    return ApiError(500, "The server failed; its log says why.", code="internal_error")


def _unavailable(error: Unavailable) -> ApiError:
    delay_s = max(0.0, error.retry_after_s)
    headers = {
        "Retry-After": str(math.ceil(delay_s)),
        "retry-after-ms": str(math.ceil(delay_s * 1000)),
    }
    if isinstance(error, QueueFull):
        return ApiError(
            429, str(error), type="rate_limit_error", code="queue_full", headers=headers
        )
    code = "unavailable"
    if isinstance(error, Draining):
        code = "draining"
    elif isinstance(error, EngineDown):
        code = "engine_down"
    elif isinstance(error, Quarantined):
        code = "model_quarantined"
        headers["x-should-retry"] = "false"  # until an operator releases it
    return ApiError(503, str(error), code=code, headers=headers)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """Return a 400 that names the first wrong parameter, from pydantic's list of errors."""
    first = errors[0]
    loc = tuple(first["loc"])
    if first["type"] == "json_invalid":
        where = f" at character {loc[-1]}" if isinstance(loc[-1], int) else ""
        return ApiError(400, f"The body is not valid JSON{where}.", code="invalid_json")
    if len(loc) < 2 and first["type"] == "value_error":  # of the body as a whole
        return ApiError(400, f"The body: {_plain(first['msg'])}.", code="invalid_value")
    if len(loc) < 2:
        return ApiError(
            400, "The body must be a JSON object, sent as application/json.", code="invalid_json"
        )
    if first["type"] == "extra_forbidden":
        path = _path(loc)
        return ApiError(
            400,
            f"The parameter '{path}' is not supported.",
            param=path,
            code="unsupported_parameter",
        )
    if first["type"] == "missing":
        path = _path(loc)
        return ApiError(400, f"'{path}' is missing.", param=path, code="missing_parameter")
    # A union reports each of its members; together they say what would have been right.
    same = [error for error in errors if tuple(error["loc"])[:2] == loc[:2]]
    param = _path(_common([tuple(error["loc"]) for error in same]))
    if loc[1] in UNSUPPORTED:
        param = str(loc[1])
        message = f"This value of the parameter '{param}' is not supported: leave it out."
        return ApiError(400, message, param=param, code="unsupported_parameter")
    message = "; or ".join(dict.fromkeys(_plain(str(error["msg"])) for error in same))
    return ApiError(400, f"'{param}': {message}.", param=param, code="invalid_value")


def _plain(message: str) -> str:
    """Return a message of pydantic's in the words of somebody who wrote JSON."""
    message = message.removeprefix("Value error, ").replace(" after validation", "")
    return message.replace("be None", "be null")


def _common(locs: Sequence[tuple[str | int, ...]]) -> tuple[str | int, ...]:
    """Return what all places begin with."""
    length = 0
    while all(len(loc) > length and loc[length] == locs[0][length] for loc in locs):
        length += 1
    return locs[0][:length]


def _path(loc: Sequence[str | int]) -> str:
    """Return ``messages[0].content`` for ("body", "messages", 0, "content")."""
    path = ""
    for part in loc[1:]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def install(app: FastAPI, invalid: Callable[[Request, object, str], None]) -> None:
    """Let the app answer every failure in the one shape.

    Args:
        app: The app.
        invalid: Told of a request whose body is refused, of the body and of the message.
    """

    async def api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        answer = from_validation(error.errors())
        invalid(request, error.body, answer.message)
        return answer.response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = {
            404: f"There is no {request.url.path}.",
            405: f"{request.method} is not possible on {request.url.path}.",
        }.get(error.status_code, error.detail)
        code = CODES.get(error.status_code)
        return ApiError(error.status_code, message, code=code, headers=error.headers).response()

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)

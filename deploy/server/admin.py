"""What operators do and see: commands to the node, its state, and the stream behind the page."""

from enum import StrEnum
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from mmrl.deploy.protocol import Engine, EngineDown
from mmrl.deploy.server.errors import ApiError, from_engine
from mmrl.deploy.server.live import Live, as_json
from mmrl.deploy.server.schemas import ErrorBody
from mmrl.deploy.server.streams import EventStream
from mmrl.errors import InputError, MmrlError

# Without a schema: before OpenAPI 3.2, some read it as that of the stream, some of each event.
STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}


class ModelCommand(StrEnum):
    """What is done to a model."""

    PIN = "pin"
    UNPIN = "unpin"
    PRELOAD = "preload"
    RELEASE = "release"


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of responses that say what went wrong."""
    return {status: {"model": ErrorBody} for status in statuses}


def routes(engine: Engine, live: Live) -> APIRouter:
    """Return the routes below ``/admin``."""
    router = APIRouter(prefix="/admin", tags=["admin"])

    async def command(name: str, subject: str | None = None) -> dict[str, Any]:
        try:
            return await engine.command(name, subject)
        except InputError as error:
            raise ApiError(409, str(error), code="not_possible") from error
        except MmrlError as error:
            raise from_engine(error) from error

    @router.post("/revert", responses=failures(401, 403, 409, 500, 503))
    async def revert() -> dict[str, Any]:
        """Let the champion decide instead of the policy."""
        return await command("revert")

    @router.post("/restore", responses=failures(401, 403, 409, 500, 503))
    async def restore() -> dict[str, Any]:
        """Let the policy decide again."""
        return await command("restore")

    @router.post("/policy/{policy:path}", responses=failures(401, 403, 409, 500, 503))
    async def change_policy(policy: str) -> dict[str, Any]:
        """Let another policy decide: default, a rule's name, or the folder of a trained one."""
        return await command("policy", policy)

    @router.post(
        "/{name}/{model:path}",
        responses=failures(400, 401, 403, 404, 409, 500, 503),
    )
    async def model_command(name: ModelCommand, model: str) -> dict[str, Any]:
        """Pin, unpin or preload a model, or release it from quarantine."""
        if model not in engine.models:
            raise ApiError(404, f"There is no model '{model}'.", code="model_not_found")
        return await command(name.value, model)

    @router.get("/state", responses=failures(503))
    async def state() -> dict[str, Any]:
        """Return the last picture of the node."""
        picture = engine.state
        if picture is None:
            raise from_engine(EngineDown("The engine is starting.", retry_after_s=2.0))
        return as_json(picture)

    @router.get("/events", response_class=Response, responses={200: STREAM})
    async def events() -> Response:
        """Stream pictures of the node, some times a second."""
        return EventStream(live.events())

    return router


def health_routes(engine: Engine) -> APIRouter:
    """Return ``/healthz`` (the front runs) and ``/readyz`` (requests are taken)."""
    router = APIRouter(tags=["health"])

    # Load balancers ask with HEAD, too.
    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Say that the server runs."""
        return {"status": "ok"}

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", responses={503: {}})
    async def readyz() -> Response:
        """Say whether requests are taken."""
        draining = engine.state is not None and engine.state.draining
        ready = engine.ready and not draining
        status = "ready" if ready else "draining" if draining else "starting"
        headers = {} if ready else {"Retry-After": "2"}
        return JSONResponse({"status": status}, 200 if ready else 503, headers)

    return router

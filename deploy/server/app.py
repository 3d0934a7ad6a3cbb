"""`create_app`: the endpoints of a live node, over any engine."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

import mmrl
from mmrl.deploy.protocol import Engine, ModelInfo
from mmrl.deploy.server import admin, errors, metrics, page, schemas
from mmrl.deploy.server.auth import Keys
from mmrl.deploy.server.completions import Completions
from mmrl.deploy.server.live import Live
from mmrl.deploy.server.middleware import ADMIN, OPEN, Gate
from mmrl.deploy.server.settings import ServerSettings
from mmrl.deploy.server.text import Texts

log = logging.getLogger("mmrl.server")

GENERATION_FAILURES = admin.failures(400, 401, 403, 404, 413, 429, 500, 503)
WARM_S = 0.5


def create_app(engine: Engine, settings: ServerSettings) -> FastAPI:
    """Return the HTTP front of an engine.

    The engine need not be ready: until it is, requests are answered with 503.

    Args:
        engine: Runs the requests; it lives on the same event loop.
        settings: What the operator decides.
    """
    counted = metrics.Metrics(engine)
    live = Live(engine, counted)
    texts = Texts()
    completions = Completions(engine, texts, (counted, live))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warm = asyncio.create_task(_warm(engine, texts))
        if engine.models:
            await warm  # not while the first request waits
        tasks = [asyncio.create_task(live.follow()), warm]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    keys = Keys(settings.api_keys)
    admin_keys = Keys(settings.admin_keys or settings.api_keys)
    # The pages that FastAPI makes for its document would load scripts from another host.
    app = FastAPI(
        title="mmrl live node",
        version=mmrl.__version__,
        description="Language models on one node, behind an OpenAI-compatible interface.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.live = live
    app.add_middleware(
        Gate,
        keys=keys,
        admin_keys=admin_keys,
        max_bytes=settings.max_request_bytes,
        host=settings.host,
    )
    errors.install(app, completions.invalid)
    _add_models(app, completions)
    _add_pages(app, counted, bool(admin_keys))
    app.include_router(admin.health_routes(engine))
    app.include_router(admin.routes(engine, live))
    app.openapi = lambda: _document(app, keys, admin_keys)  # type: ignore[method-assign]
    return app


def stop_streams(app: FastAPI) -> None:
    """End the streams of open live pages.

    To be called when the server is told to go down: uvicorn waits for open responses, and these
    have no end of their own. Pages come back by themselves.
    """
    app.state.live.stop()


async def _warm(engine: Engine, texts: Texts) -> None:
    """Load the tokenisers of the fleet as soon as it is known."""
    while not engine.models:
        await asyncio.sleep(WARM_S)
    for info in engine.models.values():
        with suppress(Exception):  # told to whoever asks for this model
            text = await texts.get(info.path)
            if text.vocabulary > info.vocabulary:
                log.warning(
                    "%s: its tokenizer writes tokens up to %d, the model has %d: prompts with "
                    "one that it lacks are refused",
                    info.name,
                    text.vocabulary - 1,
                    info.vocabulary,
                )


def _add_models(app: FastAPI, completions: Completions) -> None:
    created = int(time.time())

    def card(info: ModelInfo) -> schemas.ModelCard:
        return schemas.ModelCard(id=info.name, created=created, max_model_len=info.max_context)

    @app.post(
        "/v1/chat/completions",
        tags=["models"],
        response_model=schemas.ChatCompletion,
        responses={200: admin.STREAM, **GENERATION_FAILURES},
    )
    async def chat_completions(request: Request, body: schemas.ChatRequest) -> Response:
        """Answer a conversation; with ``stream``, as server-sent events."""
        return await completions.chat(request, body)

    @app.post(
        "/v1/completions",
        tags=["models"],
        response_model=schemas.Completion,
        responses={200: admin.STREAM, **GENERATION_FAILURES},
    )
    async def text_completions(request: Request, body: schemas.CompletionRequest) -> Response:
        """Continue a text; with ``stream``, as server-sent events."""
        return await completions.text(request, body)

    @app.get("/v1/models", tags=["models"], responses=admin.failures(401, 403, 503))
    async def models() -> schemas.ModelList:
        """List the fleet."""
        return schemas.ModelList(data=[card(info) for info in completions.models().values()])

    @app.get(
        "/v1/models/{model:path}", tags=["models"], responses=admin.failures(401, 403, 404, 503)
    )
    async def model(model: str) -> schemas.ModelCard:
        """Show one model."""
        return card(completions.model(model))


def _add_pages(app: FastAPI, counted: metrics.Metrics, keyed: bool) -> None:
    html = page.render(keyed)

    @app.get("/", response_class=HTMLResponse, tags=["pages"])
    async def live_page() -> HTMLResponse:
        """Show the node."""
        return HTMLResponse(html, headers=page.HEADERS)

    @app.get(
        "/metrics",
        tags=["pages"],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def prometheus() -> Response:
        """Return the metrics for Prometheus."""
        return Response(counted.page(), headers={"Content-Type": metrics.CONTENT_TYPE})


def _document(app: FastAPI, keys: Keys, admin_keys: Keys) -> dict[str, Any]:
    """Return the OpenAPI document: what FastAPI writes, as this server answers."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, description=app.description, routes=app.routes
        )
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # here it is a 400, in OpenAI's shape
                asked = admin_keys if path.startswith(ADMIN) else keys
                if asked and path not in OPEN:
                    operation["security"] = [{"key": []}]
        schemes = {"key": {"type": "http", "scheme": "bearer"}}
        if keys or admin_keys:
            document["components"]["securitySchemes"] = schemes
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        app.openapi_schema = document
    return app.openapi_schema

"""One request to a model, from its prompt to the answer, streamed or whole.

The engine is read as fast as it yields, and the client as fast as it takes; a client that goes
closes the engine's iterator, wherever the request is.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mmrl.deploy.protocol import (
    Engine,
    EngineDown,
    Finish,
    Generate,
    ModelInfo,
    Tokens,
    Unavailable,
)
from mmrl.deploy.server.errors import ApiError, from_engine, internal
from mmrl.deploy.server.forms import ChatForm, Form, TextForm
from mmrl.deploy.server.records import Record, Watcher
from mmrl.deploy.server.schemas import ChatRequest, CompletionRequest, GenerationRequest
from mmrl.deploy.server.streams import DONE, WAIT, EventStream, event, while_connected
from mmrl.deploy.server.text import (
    MESSAGE_CHARACTERS,
    ModelText,
    Texts,
    TextStream,
    off_loop,
)
from mmrl.errors import InputError, unknown

log = logging.getLogger("mmrl.server")

# The status of a stream is decided when its first token is there, or after this time: an error of
# the engine that comes sooner has its own status, a later one is told in the stream.
BEGIN_S = 0.5
# A stream with nothing to tell says so this often: proxies cut what is silent for a minute or so,
# and a request that waits for its model, or is suspended for another one, may be silent for longer.
SILENCE_S = 10.0
DEFAULT_TEXT_TOKENS = 16  # OpenAI's default of max_tokens for continued texts


class Completions:
    """Answers requests to the models.

    Args:
        engine: Runs them.
        texts: Tokenisers.
        watchers: Told of each request.
    """

    def __init__(self, engine: Engine, texts: Texts, watchers: Sequence[Watcher]) -> None:
        self._engine = engine
        self._texts = texts
        self._watchers = tuple(watchers)

    def models(self) -> dict[str, ModelInfo]:
        """Return the fleet.

        Raises:
            ApiError: The engine does not serve.
        """
        models = self._engine.models
        if not models:
            raise from_engine(EngineDown("The engine is starting.", retry_after_s=2.0))
        return models

    def model(self, name: str) -> ModelInfo:
        """Return a model of the fleet.

        Raises:
            ApiError: There is none of this name, or the engine does not serve.
        """
        models = self.models()
        if name not in models:
            message = str(unknown("model", name, models))
            raise ApiError(404, message, param="model", code="model_not_found")
        return models[name]

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        async with self._accepted(request, body) as (record, text):
            messages = [message.for_template for message in body.messages]
            size = sum(MESSAGE_CHARACTERS + len(message["content"]) for message in messages)
            try:
                prompt = await off_loop(size, text.chat, messages)
            except InputError as error:
                code = "invalid_messages"
                raise ApiError(400, str(error), param="messages", code=code) from error
            form = ChatForm(body.model, len(prompt), body.stream_options)
            limit = body.max_completion_tokens or body.max_tokens
            return await self._answer(request, body, limit, Job(record, text, prompt, form))

    async def text(self, request: Request, body: CompletionRequest) -> Response:
        """Continue a text."""
        async with self._accepted(request, body) as (record, text):
            given = body.given
            if isinstance(given, str):
                prompt = await off_loop(len(given), text.encode, given)
            else:
                prompt = given
            echo = ""
            if body.echo:
                echo = given if isinstance(given, str) else text.decode(prompt)
            form = TextForm(body.model, len(prompt), body.stream_options, echo)
            limit = body.max_tokens or DEFAULT_TEXT_TOKENS
            return await self._answer(request, body, limit, Job(record, text, prompt, form))

    def invalid(self, request: Request, body: object, why: str) -> None:
        """Count a request whose body is refused, if it names a model of the fleet.

        Args:
            request: The request.
            body: What it holds, as JSON.
            why: What the client is told.
        """
        model = body.get("model") if isinstance(body, dict) else None
        if isinstance(model, str) and model in self._engine.models:
            self._end_invalid(request, Record(self._engine.models[model]), why)

    @asynccontextmanager
    async def _accepted(
        self, request: Request, body: GenerationRequest
    ) -> AsyncGenerator[tuple[Record, ModelText], None]:
        """Start the clock, and yield the record and the model's tokeniser.

        What is found to be wrong with the request before it runs is counted.
        """
        info = self.model(body.model)
        record = Record(info)
        request.state.fields["model"] = info.name
        try:
            text = await self._texts.get(info.path)
        except InputError as error:
            raise ApiError(500, str(error), code="no_tokenizer") from error
        try:
            yield record, text
        except ApiError as error:
            if error.status == 400 and record.ended is None:  # else its run has counted it
                self._end_invalid(request, record, error.message)
            raise

    def _end_invalid(self, request: Request, record: Record, why: str) -> None:
        record.end("invalid", why)
        for watcher in self._told_of(request):
            watcher.begun(record)
            watcher.ended(record)

    def _told_of(self, request: Request) -> tuple[Watcher, ...]:
        return _LogLine(request.state.fields), *self._watchers

    async def _answer(
        self, request: Request, body: GenerationRequest, limit: int | None, job: "Job"
    ) -> Response:
        if body.stream_options is not None and not body.stream:
            raise ApiError(
                400,
                "'stream_options' needs 'stream'.",
                param="stream_options",
                code="invalid_value",
            )
        info = job.record.info
        job.record.prompt_tokens = len(job.prompt)
        most = _most_tokens(info, job, limit, body.min_tokens or 0)
        _check_vocabulary(info, job)
        generate = Generate(
            model=info.name,
            prompt=tuple(job.prompt),
            max_tokens=most,
            min_tokens=body.min_tokens or 0,
            ignore_eos=bool(body.ignore_eos),
            sampling=body.sampling,
        )
        stream = TextStream(job.text, job.prompt, body.stops, generate.min_tokens)
        run = Run(self._engine.generate(generate), stream, job, self._told_of(request))
        return await while_connected(request.receive, run.begin() if body.stream else run.whole())


@dataclass(frozen=True)
class Job:
    """What is known of a request before it runs.

    Attributes:
        record: Notes what happens.
        text: The model's tokeniser.
        prompt: Tokens.
        form: How the answer is written.
    """

    record: Record
    text: ModelText
    prompt: list[int]
    form: Form


def _most_tokens(info: ModelInfo, job: Job, limit: int | None, min_tokens: int) -> int:
    """Return the most tokens to generate: the limit, or as many as fit.

    Raises:
        ApiError: The prompt is empty, or prompt and answer do not fit the model's context.
    """
    prompt = job.form.prompt
    if not job.prompt:
        raise ApiError(400, "The prompt is empty.", param=prompt, code="empty_prompt")
    room = info.max_context - len(job.prompt)
    if room < (limit or 1):
        wanted = "" if limit is None else f" and asks for {limit} more"
        raise ApiError(
            400,
            f"{info.name} has a context of {info.max_context} tokens; this request has "
            f"{len(job.prompt)} in its {prompt}{wanted}.",
            param=prompt,
            code="context_length_exceeded",
        )
    most = room if limit is None else limit
    if min_tokens > most:
        raise ApiError(
            400,
            f"'min_tokens': at most {most} tokens are generated.",
            param="min_tokens",
            code="invalid_value",
        )
    return most


def _check_vocabulary(info: ModelInfo, job: Job) -> None:
    """Let no token reach the engine that the model has no embedding for.

    A GPU stops at one for good. Not only tokens that a client sends are in question: some
    tokenizers write tokens that their model lacks, as Gemma 3 1B's does for images.

    Raises:
        ApiError: There is one.
    """
    largest = max(job.prompt)
    if largest >= info.vocabulary:
        raise ApiError(
            400,
            f"'{job.form.prompt}': {info.name} has tokens 0 to {info.vocabulary - 1}, and no "
            f"token {largest}.",
            param=job.form.prompt,
            code="invalid_value",
        )


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of an answer of the engine, and how many tokens there are with it."""

    text: str
    tokens: int


class Run:
    """A request that runs.

    Args:
        answers: The engine's.
        stream: Makes text of them.
        job: The request.
        watchers: Told of its end before the client is.
    """

    def __init__(
        self,
        answers: AsyncGenerator[Tokens, None],
        stream: TextStream,
        job: Job,
        watchers: Sequence[Watcher],
    ) -> None:
        self._answers = answers
        self._stream = stream
        self._record = job.record
        self._form = job.form
        self._watchers = watchers
        self._queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        self._begun = asyncio.Event()
        self._producer: asyncio.Task[None] | None = None

    async def whole(self) -> Response:
        """Return the answer when it is complete."""
        text = "".join([piece.text async for piece in self._pieces()])
        return JSONResponse(self._form.whole(text, self._record.outcome, self._record.tokens))

    async def begin(self) -> Response:
        """Start a stream, and return the response that goes on with it.

        Raises:
            ApiError: It failed before anything was sent.
        """
        self._producer = asyncio.create_task(self._produce())
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._begun.wait(), BEGIN_S)
            if self._begun.is_set():
                first = self._queue.get_nowait()
                if isinstance(first, Exception):
                    raise first
                return EventStream(self._events(first), self._close)
            return EventStream(self._events(), self._close)
        except BaseException:
            await self._close()
            raise

    async def _produce(self) -> None:
        try:
            async for piece in self._pieces():
                self._queue.put_nowait(piece)
                self._begun.set()
            self._queue.put_nowait(None)
        except Exception as error:
            self._queue.put_nowait(error)
            self._begun.set()

    async def _close(self) -> None:
        if self._producer is not None:
            self._producer.cancel()
            await asyncio.gather(self._producer, return_exceptions=True)

    async def _events(self, first: Piece | None = None) -> AsyncGenerator[bytes, None]:
        """Yield a chunk for each answer of the engine, also where it has no text yet."""
        for chunk in self._form.opening():
            yield event(chunk)
        if first is not None:
            yield event(self._form.piece(first.text, first.tokens))
        while True:
            try:
                async with asyncio.timeout(SILENCE_S):
                    item = await self._queue.get()
            except TimeoutError:
                yield WAIT
                continue
            if item is None:
                break
            if isinstance(item, Exception):
                yield event(from_engine(item).body) + DONE
                return
            yield event(self._form.piece(item.text, item.tokens))
        for chunk in self._form.closing(self._record.outcome, self._record.tokens):
            yield event(chunk)
        yield DONE

    async def _pieces(self) -> AsyncGenerator[Piece, None]:
        """Yield the text of each answer of the engine; after the last, the record has ended.

        Raises:
            ApiError: The engine did not run it, or failed.
        """
        for watcher in self._watchers:
            watcher.begun(self._record)
        try:
            async with aclosing(self._answers):
                async for answer in self._answers:
                    text, finish = self._take(answer)
                    if finish is not None:
                        self._end(finish.value)
                    yield Piece(text, self._record.tokens)
                    if finish is not None:
                        return
            raise ApiError(500, "The engine left the request without an end.")
        except Exception as error:
            self._end(_outcome(error), str(error))
            if not isinstance(error, ApiError | Unavailable | InputError):
                log.exception("the engine failed")
            raise from_engine(error) from error
        finally:
            self._end("cancelled")  # the client has gone, unless it ended before

    def _take(self, answer: Tokens) -> tuple[str, Finish | None]:
        """Return the text of an answer, and why the request ends if it does."""
        before = self._stream.tokens
        text = self._stream.push(answer.tokens)
        if self._stream.tokens > before:
            self._record.take(self._stream.tokens - before)
            if before == 0:
                for watcher in self._watchers:
                    watcher.first_token(self._record)
        if self._stream.stopped:
            return text, Finish.STOP
        if answer.finish is Finish.CANCELLED:
            raise ApiError(503, answer.error or "The server ended the request.", code="cancelled")
        if answer.finish is Finish.ERROR:
            raise ApiError(500, answer.error or internal().message, code="engine_error")
        if answer.finish is not None:
            text += self._stream.finish()
        return text, answer.finish

    def _end(self, outcome: str, error: str = "") -> None:
        if self._record.ended is None:
            self._record.end(outcome, error)
            for watcher in self._watchers:
                watcher.ended(self._record)


class _LogLine(Watcher):
    """Adds what is known of a request to its line in the log."""

    def __init__(self, fields: dict[str, Any]) -> None:
        self._fields = fields

    def ended(self, record: Record) -> None:
        self._fields.update(record.fields)


def _outcome(error: Exception) -> str:
    if isinstance(error, Unavailable):
        return "refused"
    return "invalid" if isinstance(error, InputError) else "error"

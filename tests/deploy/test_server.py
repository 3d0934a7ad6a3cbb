"""The front over a made-up engine, on a real server: what clients send and what they get."""

import asyncio
import http.client
import io
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from pydantic import ValidationError

from mmrl.deploy.logs import JsonFormatter
from mmrl.deploy.protocol import (
    Draining,
    EngineDown,
    Generate,
    Quarantined,
    QueueFull,
    Sampling,
    Unavailable,
)
from mmrl.deploy.server import ServerSettings, create_app, read_keys
from mmrl.deploy.server.errors import from_validation
from mmrl.deploy.server.schemas import ChatRequest, CompletionRequest
from mmrl.deploy.streams import Client, Outcome, Stream
from mmrl.errors import InputError
from tests.deploy.made_up_engine import (
    MadeUpEngine,
    Server,
    made_up_state,
    make_engine,
    make_tokenizer,
    serving,
    until,
)

HELLO = [{"role": "user", "content": "hello"}]
LIMIT = 20_000
HTTP = httpx2.Client(verify=False, trust_env=False, timeout=30)


@pytest.fixture(scope="module", autouse=True)
def close_connections() -> Iterator[None]:
    yield
    HTTP.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[Server, MadeUpEngine]]:
    engine = make_engine(folder)
    with serving(engine, ServerSettings(max_request_bytes=LIMIT)) as server:
        yield server, engine


@pytest.fixture
def engine(server: tuple[Server, MadeUpEngine]) -> MadeUpEngine:
    """The engine behind `server`, as new."""
    engine = server[1]
    engine.__init__(engine.infos, engine.encode)  # type: ignore[misc]
    return engine


@pytest.fixture
def url(server: tuple[Server, MadeUpEngine]) -> str:
    return server[0].url


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def post(url: str, path: str, body: object, **headers: str) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **headers}
    return HTTP.post(url + path, content=content, headers=headers)


def error_of(response: httpx2.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    found: dict[str, Any] = body["error"]
    return found


def sample(url: str, line: str) -> float:
    """The value of a metric, 0 where it is not there yet."""
    lines = HTTP.get(f"{url}/metrics").text.splitlines()
    return next((float(each.split()[-1]) for each in lines if each.startswith(line + " ")), 0.0)


# What the official client gets.


def test_models(client: openai.OpenAI, engine: MadeUpEngine) -> None:
    models = client.models.list().data
    assert [(model.id, model.owned_by) for model in models] == [("alpha", "mmrl"), ("beta", "mmrl")]
    assert client.models.retrieve("beta").id == "beta"
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("bet")
    assert raised.value.code == "model_not_found"


def test_a_chat_answer(client: openai.OpenAI, engine: MadeUpEngine) -> None:
    answer = client.chat.completions.create(model="alpha", messages=HELLO)  # type: ignore[call-overload]
    assert answer.object == "chat.completion" and answer.model == "alpha"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == engine.reply
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(engine.encode(engine.reply))
    assert answer.usage.prompt_tokens == len(engine.seen[0].prompt)
    assert answer.usage.total_tokens == len(engine.seen[0].prompt) + answer.usage.completion_tokens


@pytest.mark.parametrize("batch", [1, 3])
def test_a_chat_stream(client: openai.OpenAI, engine: MadeUpEngine, batch: int) -> None:
    engine.batch = batch
    options = {"include_usage": True}
    stream = client.chat.completions.create(
        model="alpha", messages=HELLO, stream=True, stream_options=options
    )  # type: ignore[call-overload]
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == engine.reply
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == [] and last.usage.completion_tokens == len(engine.encode(engine.reply))
    assert len({chunk.id for chunk in (*chunks, last)}) == 1


def test_each_answer_of_the_engine_is_a_chunk(url: str, engine: MadeUpEngine) -> None:
    """Clients that measure see each token come, also those that end inside a character."""
    body = {
        "model": "alpha",
        "prompt": "x",
        "stream": True,
        "max_tokens": 20,
        "ignore_eos": True,
        "stream_options": {"continuous_usage_stats": True},
    }
    engine.reply = "🦊"
    lines = post(url, "/v1/completions", body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [*range(1, 21), 20]
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["", "", "", "🦊"] * 5 + [""]


def test_completions_take_text_a_list_and_tokens(
    client: openai.OpenAI, engine: MadeUpEngine
) -> None:
    tokens = engine.encode("one two")
    for prompt in ("one two", ["one two"], tokens, [tokens]):
        answer = client.completions.create(model="beta", prompt=prompt, max_tokens=3)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None and answer.usage.completion_tokens == 3
        assert engine.seen[-1].prompt == tuple(tokens)
    echoed = client.completions.create(model="beta", prompt=tokens, max_tokens=99, echo=True)
    assert echoed.choices[0].text == "one two" + engine.reply
    stream = client.completions.create(
        model="beta", prompt="one two", max_tokens=99, echo=True, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == "one two" + engine.reply


def test_everything_reaches_the_engine(url: str, engine: MadeUpEngine) -> None:
    body = {
        "model": "alpha",
        "messages": [
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "y"}],
            },
            {"role": "assistant", "content": "yes?", "refusal": None, "tool_calls": None},
            {"role": "assistant", "content": None},
            {"role": "user", "content": "go on", "name": "Ann"},
        ],
        "max_tokens": 50,
        "max_completion_tokens": 7,
        "min_tokens": 2,
        "ignore_eos": True,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 40,
        "seed": -1,
        "user": "me",
        "n": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "logprobs": False,
        "tools": [],
        "response_format": {"type": "text"},
        **dict.fromkeys(("metadata", "prompt_cache_key", "safety_identifier", "verbosity")),
    }
    assert post(url, "/v1/chat/completions", body).status_code == 200
    written = (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhey<|im_end|>\n"
        "<|im_start|>assistant\nyes?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>user\ngo on<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert engine.seen == [
        Generate("alpha", tuple(engine.encode(written)), 7, 2, True, Sampling(0.0, 0.5, 40, -1))
    ]


def test_without_a_limit_a_chat_may_fill_the_context(url: str, engine: MadeUpEngine) -> None:
    post(url, "/v1/chat/completions", {"model": "alpha", "messages": HELLO})
    post(url, "/v1/completions", {"model": "alpha", "prompt": "hello", "top_k": -1})
    chat, text = engine.seen
    assert len(chat.prompt) + chat.max_tokens == 128
    assert text.max_tokens == 16
    assert text.sampling == Sampling(1.0, 1.0, 0, None)


@pytest.mark.parametrize("stop", ["fox says", ["dog", "x says", "nothing"]])
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_the_request(
    client: openai.OpenAI, engine: MadeUpEngine, stop: Any, stream: bool
) -> None:
    first = stop if isinstance(stop, str) else stop[1]
    before = engine.reply.split(first)[0]
    answer: Any = client.chat.completions.create(
        model="alpha", messages=HELLO, stop=stop, stream=stream
    )  # type: ignore[call-overload]
    if stream:
        chunks = list(answer)
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == before
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        assert answer.choices[0].message.content == before
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage.completion_tokens < len(engine.encode(engine.reply))
    until(lambda: engine.closed == [("alpha", "decode")])


def test_the_asynchronous_client(url: str, engine: MadeUpEngine) -> None:
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client:

            async def one(model: str, stream: bool) -> str:
                answer: Any = await client.chat.completions.create(
                    model=model, messages=HELLO, stream=stream
                )  # type: ignore[call-overload]
                if not stream:
                    return str(answer.choices[0].message.content)
                return "".join([chunk.choices[0].delta.content async for chunk in answer])

            jobs = [one(model, stream) for model in ("alpha", "beta") for stream in (False, True)]
            return await asyncio.gather(*jobs)

    assert asyncio.run(talk()) == [engine.reply] * 4


@pytest.mark.parametrize("stage", ["queue", "decode"])
def test_a_stream_that_waits_says_so(
    client: openai.OpenAI,
    url: str,
    engine: MadeUpEngine,
    stage: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else proxies take it for dead. It is a comment, which clients skip."""
    monkeypatch.setattr("mmrl.deploy.server.completions.SILENCE_S", 0.05)
    engine.hold = stage
    waits = 0
    lines = []
    with HTTP.stream("POST", f"{url}/v1/completions", json={**TEXT, "stream": True}) as stream:
        for line in stream.iter_lines():
            lines.append(line)
            waits += line == ": wait"
            if waits == 3:
                engine.hold = ""
    assert waits >= 3 and lines[-2] == "data: [DONE]"

    engine.hold = stage
    chunks = client.chat.completions.create(model="alpha", messages=HELLO, stream=True)  # type: ignore[call-overload]
    threading.Timer(0.2, setattr, (engine, "hold", "")).start()
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == engine.reply

    async def replayed() -> Stream:
        followed = Stream()
        sender = Client(url)
        try:
            body = {**TEXT, "stream": True, "stream_options": {"continuous_usage_stats": True}}
            await sender.complete(json.dumps(body).encode(), followed)
        finally:
            sender.close()
        return followed

    engine.hold = stage
    threading.Timer(0.2, setattr, (engine, "hold", "")).start()
    followed = asyncio.run(replayed())
    assert (followed.outcome, followed.tokens, len(followed.times_ns)) == (Outcome.DONE, 16, 16)


# What is wrong is said, with the parameter.

CHAT = {"model": "alpha", "messages": HELLO}
TEXT = {"model": "alpha", "prompt": "x"}


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        *(
            ({**CHAT, name: value}, name, "unsupported_parameter")
            for name, value in {
                "logprobs": True,
                "top_logprobs": 3,
                "n": 2,
                "response_format": {"type": "json_object"},
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": "required",
                "functions": [{}],
                "frequency_penalty": 0.1,
                "presence_penalty": -1,
                "repetition_penalty": 1.1,
                "logit_bias": {"3": 1},
                "audio": {"voice": "x"},
                "modalities": ["text", "audio"],
                "store": True,
                "metadata": {"a": "b"},
                "verbosity": "high",
                "best_of": 1,
                "guided_json": {},
            }.items()
        ),
        ({**TEXT, "best_of": 2}, "best_of", "unsupported_parameter"),
        ({**TEXT, "suffix": "end"}, "suffix", "unsupported_parameter"),
        ({**TEXT, "logprobs": 0}, "logprobs", "unsupported_parameter"),
        ({**TEXT, "messages": HELLO}, "messages", "unsupported_parameter"),
        ({**CHAT, "max_tokens": 0}, "max_tokens", "invalid_value"),
        ({**CHAT, "max_tokens": "5"}, "max_tokens", "invalid_value"),
        ({**CHAT, "max_tokens": True}, "max_tokens", "invalid_value"),
        ({**CHAT, "temperature": -0.1}, "temperature", "invalid_value"),
        ({**CHAT, "temperature": float("nan")}, "temperature", "invalid_value"),
        ({**CHAT, "top_p": 0}, "top_p", "invalid_value"),
        ({**CHAT, "top_k": 0.5}, "top_k", "invalid_value"),
        ({**CHAT, "seed": 2**63}, "seed", "invalid_value"),
        ({**CHAT, "stop": ["a"] * 5}, "stop", "invalid_value"),
        ({**CHAT, "stop": ""}, "stop", "invalid_value"),
        ({**CHAT, "stream": "yes"}, "stream", "invalid_value"),
        ({**CHAT, "stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({**CHAT, "min_tokens": 9, "max_tokens": 8}, "min_tokens", "invalid_value"),
        ({**CHAT, "messages": []}, "messages", "invalid_value"),
        ({**CHAT, "messages": [{"content": "x"}]}, "messages[0].role", "missing_parameter"),
        ({**CHAT, "messages": [{**HELLO[0], "role": "tool"}]}, "messages[0].role", "invalid_value"),
        (
            {**CHAT, "messages": [{**HELLO[0], "content": None}]},
            "messages[0].content",
            "invalid_value",
        ),
        ({**CHAT, "messages": [{"role": "assistant"}]}, "messages[0].content", "missing_parameter"),
        ({**TEXT, "prompt": [[1], [2]]}, "prompt", "invalid_value"),
        ({**TEXT, "prompt": [[]]}, "prompt", "invalid_value"),
        ({**TEXT, "prompt": [[300]]}, "prompt", "invalid_value"),
        (
            {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "invalid_value",
        ),
        (
            {**CHAT, "messages": [{"role": "user", "content": "refuse this"}]},
            "messages",
            "invalid_messages",
        ),
        (
            {**CHAT, "messages": [{**HELLO[0], "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "invalid_value",
        ),
        (
            {**CHAT, "messages": [{**HELLO[0], "function_call": {}}]},
            "messages[0].function_call",
            "invalid_value",
        ),
        ({"messages": HELLO}, "model", "missing_parameter"),
        ({**TEXT, "prompt": ""}, "prompt", "invalid_value"),
        ({**TEXT, "prompt": []}, "prompt", "invalid_value"),
        ({**TEXT, "prompt": ["a", "b"]}, "prompt", "invalid_value"),
        ({**TEXT, "prompt": [1, -1]}, "prompt", "invalid_value"),
        ({**TEXT, "prompt": [300]}, "prompt", "invalid_value"),
        ({**TEXT, "prompt": 7}, "prompt", "invalid_value"),
        ({**TEXT, "max_tokens": 127}, None, None),
        ({**TEXT, "max_tokens": 128}, "prompt", "context_length_exceeded"),
        ({**TEXT, "prompt": [5] * 128}, "prompt", "context_length_exceeded"),
        (
            {**CHAT, "messages": [{"role": "user", "content": "x" * 200}]},
            "messages",
            "context_length_exceeded",
        ),
    ],
)
def test_wrong_parameters_are_named(
    url: str, engine: MadeUpEngine, body: dict[str, Any], param: str | None, code: str | None
) -> None:
    # CHAT["best_of"] and TEXT["messages"] belong to the other endpoint.
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    response = post(url, path, body)
    if code is None:
        assert response.status_code == 200
        return
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"
    assert str(param).split("[")[0] in error["message"] or code == "invalid_messages"
    assert "validation" not in error["message"] and "None" not in error["message"]
    assert engine.seen == []


@pytest.mark.parametrize(
    ("messages", "aside"), [(HELLO, False), ([{"role": "user", "content": ""}] * 300, True)]
)
def test_long_conversations_are_written_aside(
    url: str,
    engine: MadeUpEngine,
    messages: list[dict[str, str]],
    aside: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one of many messages that say nothing: others are answered meanwhile."""
    on_loop = []

    def chat(*given: object) -> list[int]:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            on_loop.append(False)
        else:
            on_loop.append(True)
        return [1]

    monkeypatch.setattr("mmrl.deploy.server.text.ModelText.chat", chat)
    response = post(url, "/v1/chat/completions", {"model": "alpha", "messages": messages})
    assert response.status_code == 200
    assert on_loop == [not aside]


MANY = {str(i): 1 for i in range(101)}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({**CHAT, "messages": [{}] * 3}, "messages[0].role"),
        ({**CHAT, "messages": [{**HELLO[0], "content": [{}] * 3}]}, "messages[0].content"),
        ({**TEXT, "prompt": [-1] * 3}, "prompt"),
        ({**TEXT, "prompt": [{}] * 3}, "prompt"),
        ({**TEXT, "prompt": [[-1] * 3]}, "prompt"),
        ({**CHAT, **MANY}, None),
        ({**CHAT, "messages": [{**HELLO[0], **MANY}]}, "messages[0]"),
        ({**CHAT, "messages": HELLO * 2049}, "messages"),
        ({**CHAT, "stream": True, "stream_options": MANY}, "stream_options"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else str(value),
)
def test_the_first_error_is_enough(body: dict[str, Any], param: str | None) -> None:
    """Else a large body that is wrong all over would hold up everybody while it is checked."""
    schema = CompletionRequest if "prompt" in body else ChatRequest
    with pytest.raises(ValidationError) as raised:
        schema.model_validate(body)
    errors = [{**error, "loc": ("body", *error["loc"])} for error in raised.value.errors()]
    assert len(errors) <= 4  # one for each member of a union, or for each field of an element
    answer = from_validation(errors)
    assert (answer.status, answer.param) == (400, param)
    assert param is not None or "more than 100 parameters" in answer.message


def test_a_conversation_has_2048_messages_at_most() -> None:
    assert len(ChatRequest.model_validate({**CHAT, "messages": HELLO * 2048}).messages) == 2048


@pytest.mark.parametrize("stream", [False, True])
def test_no_token_beyond_the_model_reaches_the_engine(folder: Path, stream: bool) -> None:
    """Not even one that its own tokenizer writes: a GPU stops at it."""
    engine = make_engine(folder)
    tokens = engine.encode("the fox")
    messages = [{"role": "user", "content": "the fox"}]
    with serving(engine) as server:
        for more, status in ((0, 400), (1, 200)):
            vocabulary = max(tokens) + more
            engine.infos = {"alpha": replace(engine.infos["alpha"], vocabulary=vocabulary)}
            for name, prompt in (
                ("prompt", "the fox"),
                ("prompt", ["the fox"]),
                ("prompt", tokens),
                ("messages", messages),
            ):
                path = "/v1/completions" if name == "prompt" else "/v1/chat/completions"
                body = {"model": "alpha", name: prompt, "stream": stream}
                response = post(server.url, path, body)
                assert response.status_code == status
                if status == 400:
                    error = error_of(response)
                    assert (error["param"], error["code"]) == (name, "invalid_value")
                    assert str(max(tokens)) in error["message"]
                    assert engine.seen == []


def test_a_tokenizer_with_more_tokens_than_its_model_is_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(folder)
    engine.infos["beta"] = replace(engine.infos["beta"], vocabulary=299)
    with serving(engine):
        until(lambda: "the model has 299" in caplog.text)
    assert "beta: its tokenizer writes tokens up to 299" in caplog.text
    assert "alpha" not in caplog.text


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)]
)
def test_a_prompt_of_no_tokens(
    url: str,
    engine: MadeUpEngine,
    path: str,
    body: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mmrl.deploy.server.text.ModelText.encode", lambda *text, **more: [])
    response = post(url, path, body)
    assert response.status_code == 400
    assert error_of(response)["code"] == "empty_prompt" and engine.seen == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b"[" * 10_000,
        b'{"model": "alpha", "prompt": "\\ud800"}',
        b'{"model": "alpha", "prompt": "x", "\\ud800": 1}',
        b'{"model": "alpha", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    ],
    ids=range(10),
)
def test_bodies_that_are_no_request(url: str, engine: MadeUpEngine, body: bytes) -> None:
    response = post(url, "/v1/completions", body)
    assert response.status_code == 400
    error_of(response)


def test_a_body_must_say_that_it_is_json(url: str, engine: MadeUpEngine) -> None:
    body = json.dumps(TEXT).encode()
    response = HTTP.post(f"{url}/v1/completions", content=body)
    assert response.status_code == 400
    assert "application/json" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("DELETE", "/", 405, "method_not_allowed"),
        ("POST", "/admin/pin/gamma", 404, "model_not_found"),
        ("POST", "/admin/delete/alpha", 400, "invalid_value"),
        ("GET", "/v1/models/gamma", 404, "model_not_found"),
    ],
)
def test_wrong_addresses(
    url: str, engine: MadeUpEngine, method: str, path: str, status: int, code: str
) -> None:
    response = HTTP.request(method, url + path)
    assert response.status_code == status
    assert error_of(response)["code"] == code
    if status == 405:
        assert response.headers["allow"]


def test_an_unknown_model_is_answered_with_the_nearest_name(
    client: openai.OpenAI, engine: MadeUpEngine
) -> None:
    with pytest.raises(openai.NotFoundError, match="did you mean 'alpha'") as raised:
        client.completions.create(model="alfa", prompt="x")
    assert (raised.value.param, raised.value.code) == ("model", "model_not_found")


def chunked(size: int) -> Iterator[bytes]:
    for _ in range(size // 1000):
        yield b" " * 1000


def test_a_body_that_is_too_large(url: str, engine: MadeUpEngine) -> None:
    headers = {"content-type": "application/json"}
    for content in (b" " * (LIMIT + 1), chunked(LIMIT + 5000)):
        response = HTTP.post(f"{url}/v1/completions", content=content, headers=headers)
        assert response.status_code == 413
        assert str(LIMIT) in error_of(response)["message"]
    exact = json.dumps({**TEXT, "user": ""}).encode()
    exact = exact.replace(b'""', b'"' + b"u" * (LIMIT - len(exact)) + b'"')
    assert len(exact) == LIMIT
    assert post(url, "/v1/completions", exact).status_code == 200


# What the engine cannot do now.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (QueueFull("256 wait", retry_after_s=0.3), 429, "queue_full"),
        (Draining("going down", retry_after_s=5), 503, "draining"),
        (EngineDown("restarting"), 503, "engine_down"),
        (Quarantined("alpha failed thrice", retry_after_s=30), 503, "model_quarantined"),
        (InputError("too long for alpha"), 400, None),
        (ValueError("a bug"), 500, "internal_error"),
    ],
)
def test_refusals_of_the_engine(
    url: str, engine: MadeUpEngine, failure: Exception, status: int, code: str, stream: bool
) -> None:
    engine.fail = failure
    response = post(url, "/v1/completions", {**TEXT, "stream": stream})
    assert response.status_code == status
    error = error_of(response)
    assert error["code"] == code
    if isinstance(failure, Unavailable):
        assert int(response.headers["retry-after"]) >= 1
        assert float(response.headers["retry-after-ms"]) == failure.retry_after_s * 1000
    retry = response.headers.get("x-should-retry")
    assert retry == ("false" if isinstance(failure, Quarantined) else None)
    assert "bug" not in error["message"]


def test_a_full_queue_is_tried_again_by_the_official_client(url: str, engine: MadeUpEngine) -> None:
    engine.fail = QueueFull("256 wait", retry_after_s=0.01)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=2)
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="alpha", prompt="x")
    assert len(engine.seen) == 3
    client.close()


def test_a_failure_in_the_middle(client: openai.OpenAI, engine: MadeUpEngine) -> None:
    engine.fail_after = 3
    with pytest.raises(openai.InternalServerError, match="out of luck"):
        client.completions.create(model="alpha", prompt="x")
    stream = client.completions.create(model="alpha", prompt="x", stream=True)
    received = []
    with pytest.raises(openai.APIError, match="out of luck"):
        for chunk in stream:
            received.append(chunk.choices[0].text)
    assert "".join(received) == "The"


def test_while_the_engine_is_not_ready(url: str, engine: MadeUpEngine) -> None:
    engine.ready = False
    for path in ("/v1/models", "/readyz", "/admin/state"):
        response = HTTP.get(url + path)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1
    assert error_of(post(url, "/v1/completions", TEXT))["code"] == "engine_down"
    assert HTTP.get(f"{url}/healthz").status_code == 200
    assert sample(url, "mmrl_ready") == 0
    engine.ready = True
    engine.picture = lambda: replace(engine.still(), draining=True)  # type: ignore[type-var]
    assert HTTP.get(f"{url}/readyz").json() == {"status": "draining"}
    assert sample(url, "mmrl_draining") == 1
    engine.picture = engine.still
    assert HTTP.get(f"{url}/readyz").json() == {"status": "ready"}
    for path in ("/healthz", "/readyz"):
        head = HTTP.head(url + path)
        assert (head.status_code, head.text) == (200, "")
    assert sample(url, "mmrl_ready") == 1


# Clients that go.


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["queue", "decode"])
def test_a_client_that_goes_cancels_its_request(
    url: str, engine: MadeUpEngine, stage: str, stream: bool
) -> None:
    cancelled = 'mmrl_requests_total{model="beta",outcome="cancelled"}'
    before = sample(url, cancelled)
    engine.hold = stage
    connection = http.client.HTTPConnection(url.removeprefix("http://"))
    body = json.dumps({"model": "beta", "prompt": "x", "stream": stream})
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", body, headers)
    if stream:
        # Also a stream whose first token takes long is answered: its client may want to know.
        answer = connection.getresponse()
        assert answer.status == 200
        if stage == "decode":
            assert b'"text":"T"' in answer.fp.readline() + answer.fp.readline()
    until(lambda: engine.seen)
    assert engine.closed == []
    if stream:
        answer.close()
    connection.close()
    until(lambda: engine.closed == [("beta", stage)])
    until(lambda: sample(url, cancelled) == before + 1)


# Keys.


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# for the team\nsk-one\n\n  sk-two \n")
    assert read_keys(file, "sk-three, sk-one") == ("sk-three", "sk-one", "sk-two")
    assert read_keys(None) == ()
    file.write_text("# none\n")
    with pytest.raises(InputError, match="no key"):
        read_keys(file)
    with pytest.raises(InputError, match="cannot read"):
        read_keys(tmp_path / "missing")
    file.write_text("two words\n")
    with pytest.raises(InputError, match="blank"):
        read_keys(file)


def test_keys_open_what_asks_and_changes(folder: Path) -> None:
    engine = make_engine(folder)
    with serving(engine, ServerSettings(api_keys=("sk-one", "sk-two"))) as server:
        asked = set()
        for path, methods in server.app.openapi()["paths"].items():
            address = server.url + path.format(model="alpha", name="pin", policy="lru")
            for method in methods:
                with HTTP.stream(method, address) as response:  # the events have no end
                    if response.status_code == 401:
                        asked.add((method.upper(), path))
        assert asked == {
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/completions"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/{model}"),
            ("POST", "/admin/revert"),
            ("POST", "/admin/restore"),
            ("POST", "/admin/policy/{policy}"),
            ("POST", "/admin/{name}/{model}"),
        }
        for wrong in ("Bearer sk-three", "Bearer", "sk-one", "Basic sk-one", "Bearer sk-one1"):
            # Before the body is looked at.
            response = post(server.url, "/v1/completions", b"{", authorization=wrong)
            assert response.status_code == 401
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert error_of(response)["code"] == "invalid_api_key"
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-two")
        assert len(client.models.list().data) == 2
        client.close()
        command = post(server.url, "/admin/revert", b"", authorization="bearer sk-one")
        assert command.status_code == 200
        assert engine.commands == [("revert", None)]


@pytest.mark.parametrize("api_keys", [("sk-client",), ()])
def test_operators_may_have_keys_of_their_own(folder: Path, api_keys: tuple[str, ...]) -> None:
    """Then a client's key commands nothing, and an operator's asks no model."""
    engine = make_engine(folder)
    settings = ServerSettings(api_keys=api_keys, admin_keys=("sk-operator",))
    with serving(engine, settings) as server:
        statuses = {
            (key, path): HTTP.request(
                method, server.url + path, headers={"authorization": f"Bearer {key}"}
            ).status_code
            for key in ("sk-client", "sk-operator", "sk-other")
            for method, path in (("GET", "/v1/models"), ("POST", "/admin/policy/lru"))
        }
        document = server.app.openapi()["paths"]
    assert {key for (key, path), status in statuses.items() if status == 200 and "v1" in path} == (
        {"sk-client"} if api_keys else {"sk-client", "sk-operator", "sk-other"}
    )
    commanded = [
        key for (key, path), status in statuses.items() if status == 200 and "v1" not in path
    ]
    assert commanded == ["sk-operator"]
    assert engine.commands == [("policy", "lru")]
    assert ("security" in document["/v1/models"]["get"]) == bool(api_keys)
    assert "security" in document["/admin/revert"]["post"]
    assert "security" not in document["/admin/state"]["get"]


# Operators.


def test_commands_reach_the_engine(url: str, engine: MadeUpEngine) -> None:
    for name in ("pin", "unpin", "preload", "release"):
        assert HTTP.post(f"{url}/admin/{name}/beta").json() == {"done": name}
    for name in ("revert", "restore"):
        assert HTTP.post(f"{url}/admin/{name}").json() == {"done": name}
    assert HTTP.post(f"{url}/admin/policy/runs/mine-s0").json() == {"done": "policy"}
    assert engine.commands == [
        *((name, "beta") for name in ("pin", "unpin", "preload", "release")),
        ("revert", None),
        ("restore", None),
        ("policy", "runs/mine-s0"),
    ]
    engine.hold = "queue"
    response = HTTP.post(f"{url}/admin/preload/beta")
    assert response.status_code == 409
    assert "another model" in error_of(response)["message"]


def test_pages_of_other_sites_command_nothing(url: str, engine: MadeUpEngine) -> None:
    for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
        assert HTTP.post(f"{url}/admin/revert", headers=headers).status_code == 403
    assert engine.commands == []
    for headers in ({"origin": url}, {"sec-fetch-site": "same-origin"}):
        assert HTTP.post(f"{url}/admin/revert", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("settings", "host", "status"),
    [
        *((ServerSettings(), host, 200) for host in ("localhost", "LOCALHOST:80", "127.0.0.1:1")),
        *((ServerSettings(), host, 200) for host in ("[::1]", "[::1]:8000")),
        *((ServerSettings(), host, 403) for host in ("evil.example", "evil.example:8000", "")),
        *((ServerSettings(), host, 403) for host in ("localhost.evil.example", "[localhost", "10")),
        (ServerSettings(host="127.0.0.2"), "127.0.0.2:8000", 200),
        (ServerSettings(host="localhost"), "evil.example", 403),
        (ServerSettings(host="0.0.0.0"), "gpu.lan:8000", 200),
        (ServerSettings(api_keys=("sk",)), "gpu.lan", 200),
    ],
    ids=str,
)
def test_names_of_other_sites_do_not_lead_to_an_open_node(
    folder: Path, settings: ServerSettings, host: str, status: int
) -> None:
    """A page whose name points here (DNS rebinding) is of the same origin to its browser."""
    engine = make_engine(folder)
    with serving(engine, settings) as server:
        headers = {
            "host": host,
            "origin": f"http://{host}",
            "sec-fetch-site": "same-origin",
            "authorization": "Bearer sk",
        }
        for method, path in (("POST", "/admin/revert"), ("GET", "/v1/models")):
            response = HTTP.request(method, server.url + path, headers=headers)
            assert response.status_code == status
            if status == 403:
                error = error_of(response)
                assert error["code"] == "host" and "localhost" in error["message"]
    assert bool(engine.commands) == (status == 200)


def test_the_state_and_its_stream(url: str, engine: MadeUpEngine) -> None:
    state = HTTP.get(f"{url}/admin/state").json()
    assert [model["name"] for model in state["models"]] == ["alpha", "beta"]
    assert state["decisions"][0]["reason"] == "3 wait for it"
    with HTTP.stream("GET", f"{url}/admin/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = (line for line in stream.iter_lines() if line)
        first, second = (json.loads(next(lines).removeprefix("data: ")) for _ in range(2))
    assert first["ready"] is True and isinstance(first["history"], list)
    assert len(first["state"]["decisions"]) == 1
    assert second["state"]["decisions"] == [] and "history" not in second


# What is measured and logged.


def test_metrics_count_what_happened(folder: Path) -> None:
    engine = make_engine(folder)
    with serving(engine) as server:
        url = server.url
        missed = 'mmrl_target_misses_total{model="beta",target="ttft"} 0.0'
        until(lambda: missed in HTTP.get(f"{url}/metrics").text)  # before there is one
        post(url, "/v1/completions", TEXT)
        engine.fail = QueueFull("full")
        post(url, "/v1/completions", TEXT)
        assert sample(url, 'mmrl_requests_total{model="alpha",outcome="length"}') == 1
        assert sample(url, 'mmrl_requests_total{model="alpha",outcome="refused"}') == 1
        assert sample(url, 'mmrl_target_misses_total{model="alpha",target="refused"}') == 1
        for name in ("ttft", "tpot", "e2e"):
            assert sample(url, f'mmrl_{name}_seconds_count{{model="alpha"}}') == 1
        assert sample(url, 'mmrl_generated_tokens_total{model="alpha"}') == 16
        assert sample(url, 'mmrl_residency_ratio{model="alpha",of="landed"}') == 1
        assert sample(url, 'mmrl_residency_ratio{model="beta",of="landed"}') == 0
        assert sample(url, 'mmrl_link_bytes_total{kind="kv_save",model="beta"}') == 30
        assert sample(url, 'mmrl_queue_length{model="beta"}') == 1
        assert sample(url, 'mmrl_loads_total{model="alpha"}') == 3
        assert sample(url, 'mmrl_outs_total{model="alpha"}') == 2
        assert sample(url, 'mmrl_preemptions_total{model="alpha"}') == 4
        assert sample(url, 'mmrl_fallbacks_total{kind="deadline"}') == 2


@pytest.mark.parametrize(
    "wrong",
    [{"n": 2}, {"prompt": [300]}, {"max_tokens": 128}, {"best_of": "x"}, {"wrong": 1}],
    ids=str,
)
def test_a_request_that_can_never_run_counts_once_as_invalid(
    url: str, engine: MadeUpEngine, wrong: dict[str, Any]
) -> None:
    counter = 'mmrl_requests_total{model="beta",outcome="invalid"}'
    before = sample(url, counter)
    for model in ("beta", "nobody"):
        assert post(url, "/v1/completions", {**TEXT, "model": model, **wrong}).status_code >= 400
    assert sample(url, counter) == before + 1


def test_what_the_engine_finds_invalid_counts_once(url: str, engine: MadeUpEngine) -> None:
    counter = 'mmrl_requests_total{model="beta",outcome="invalid"}'
    before, engine.fail = sample(url, counter), InputError("too long", "shorten it")
    assert post(url, "/v1/completions", {**TEXT, "model": "beta"}).status_code == 400
    assert sample(url, counter) == before + 1


def test_a_request_that_waits_beyond_its_target_counts_at_once(folder: Path) -> None:
    """Else a model that answers nobody would look like one that nobody asks."""
    engine = make_engine(folder)
    engine.infos = {"alpha": replace(engine.infos["alpha"], ttft_s=0.05)}
    engine.hold = "queue"
    with serving(engine) as server:

        def latency() -> Any:
            with HTTP.stream("GET", f"{server.url}/admin/events") as stream:
                line = next(line for line in stream.iter_lines() if line)
            return json.loads(line.removeprefix("data: "))["latency"].get("alpha")

        thread = threading.Thread(target=post, args=(server.url, "/v1/completions", TEXT))
        thread.start()
        until(lambda: (latency() or {}).get("missed"))
        found = latency()
        assert (found["requests"], found["missed"], found["tpot_s"]) == (1, 1, None)
        assert found["ttft_s"]["p50"] >= 0.05
        engine.hold = "decode"
        until(lambda: sample(server.url, 'mmrl_ttft_seconds_count{model="alpha"}') == 1)
        assert sample(server.url, 'mmrl_e2e_seconds_count{model="alpha"}') == 0
        engine.hold = ""
        thread.join(20)
        until(lambda: latency()["tpot_s"])
        assert (latency()["requests"], latency()["missed"]) == (1, 1)


def test_a_clock_that_is_set_back_begins_the_history_anew(folder: Path) -> None:
    engine = make_engine(folder)
    now = [1000.0]

    def picture() -> Any:
        now[0] += 2.0
        return made_up_state(now[0], tuple(engine.infos.values()))

    engine.picture = picture
    with serving(engine) as server:

        def times() -> list[float]:
            with HTTP.stream("GET", f"{server.url}/admin/events") as stream:
                line = next(line for line in stream.iter_lines() if line)
            return [each["time_s"] for each in json.loads(line.removeprefix("data: "))["history"]]

        until(lambda: len(times()) > 2)
        now[0] = 0.0
        until(lambda: max(times(), default=999) < 900)
        assert times() == sorted(times())


def test_the_latencies_of_a_picture_count_once(folder: Path) -> None:
    engine = make_engine(folder)
    picture = engine.still()
    engine.picture = lambda: picture
    with serving(engine) as server:
        until(lambda: sample(server.url, "mmrl_decision_seconds_count") == 2)
        with HTTP.stream("GET", f"{server.url}/admin/events") as stream:
            next(stream.iter_lines())
        assert sample(server.url, "mmrl_decision_seconds_count") == 2
        engine.picture = engine.still  # a new picture at each look
        until(lambda: sample(server.url, "mmrl_decision_seconds_count") > 2)


def test_the_grafana_dashboard_asks_for_metrics_that_exist(url: str, engine: MadeUpEngine) -> None:
    import re

    import mmrl.deploy

    post(url, "/v1/completions", TEXT)
    page = HTTP.get(f"{url}/metrics").text
    file = Path(mmrl.deploy.__path__[0]) / "grafana" / "mmrl.json"
    dashboard = json.loads(file.read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    names = {name for expression in asked for name in re.findall(r"mmrl_\w+", expression)}
    assert len(names) > 15
    assert {name for name in names if not re.search(rf"^(# TYPE )?{name}\b", page, re.M)} == set()


def test_each_request_has_an_id_and_a_line(url: str, engine: MadeUpEngine) -> None:
    lines = io.StringIO()
    handler = logging.StreamHandler(lines)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("mmrl.server")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        response = post(url, "/v1/completions", TEXT, **{"x-request-id": "mine-1"})
        assert response.headers["x-request-id"] == "mine-1"
        other = post(url, "/v1/completions", b"{", **{"x-request-id": "not ok"})
        assert len(other.headers["x-request-id"]) == 24
        HTTP.get(f"{url}/healthz")
        engine.fail_after = 3
        post(url, "/v1/completions", TEXT)
        until(lambda: lines.getvalue().count("\n") >= 3)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    first, second, third = (json.loads(line) for line in lines.getvalue().splitlines())
    assert first["id"] == "mine-1" and first["status"] == 200
    assert first["model"] == "alpha" and first["outcome"] == "length"
    assert (first["prompt_tokens"], first["tokens"]) == (1, 16)
    assert 0 <= first["ttft_s"] <= first["e2e_s"] <= first["seconds"]
    assert second["status"] == 400 and second["path"] == "/v1/completions"
    assert (third["outcome"], third["error"], third["tokens"]) == ("error", "out of luck", 3)


def test_open_pages_do_not_hold_a_server_that_goes_down(folder: Path) -> None:
    with serving(make_engine(folder)) as server:
        ended = threading.Event()

        def watch() -> None:
            with HTTP.stream("GET", f"{server.url}/admin/events") as stream:
                for line in stream.iter_lines():
                    if line:
                        opened.set()
            ended.set()

        opened = threading.Event()
        threading.Thread(target=watch, daemon=True).start()
        assert opened.wait(10)
        server.stop()
        assert ended.wait(10)


def test_the_document_says_what_is_refused(folder: Path) -> None:
    document = create_app(make_engine(folder), ServerSettings(api_keys=("k",))).openapi()
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert {"200", "400", "401", "404", "413", "429", "503"} <= set(chat["responses"])
    assert "422" not in chat["responses"]
    assert chat["security"] == [{"key": []}]
    assert "security" not in document["paths"]["/healthz"]["get"]
    assert "text/event-stream" in chat["responses"]["200"]["content"]
    request = document["components"]["schemas"]["ChatRequest"]
    assert request["additionalProperties"] is False

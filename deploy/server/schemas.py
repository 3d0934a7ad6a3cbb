"""Requests and responses of the OpenAI-compatible endpoints.

A request that asks for something this server does not do is refused with the name of the
parameter: unknown fields are forbidden, and a known one that is not supported takes only the
values that ask for nothing. The OpenAPI document says the same.

Bodies are checked on the event loop, and pydantic notes every error that it finds, of which a
client is told the first: what may be long stops at its first error, else a few megabytes of wrong
elements would hold up every other client for seconds.
"""

from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from mmrl.deploy.protocol import Sampling

SEED = 2**63
MOST_FIELDS = 100  # of an object; more than twice what is known
MOST_MESSAGES = 2048  # of a conversation at most, as with OpenAI


class Request(BaseModel):
    """A body: JSON types are meant as they are, and nothing is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MOST_FIELDS:
            raise ValueError(f"there are more than {MOST_FIELDS} parameters")
        return value


# What cannot be asked for, by the values that ask for nothing.
Nothing: TypeAlias = None
NoneOf = Annotated[list[Any], Field(max_length=0)]
EmptyObject = Annotated[dict[str, Any], Field(max_length=0)]
Zero = Annotated[float, Field(ge=0, le=0)]
OneFloat = Annotated[float, Field(ge=1, le=1)]
ZeroInteger = Annotated[int, Field(ge=0, le=0)]
OneInteger = Annotated[int, Field(ge=1, le=1)]


def _not_true(value: bool) -> bool:
    if value:
        raise ValueError("it can only be false")
    return value


def _not_false(value: bool) -> bool:
    if not value:
        raise ValueError("it can only be true")
    return value


Off = Annotated[
    bool, AfterValidator(_not_true), WithJsonSchema({"type": "boolean", "enum": [False]})
]
On = Annotated[
    bool, AfterValidator(_not_false), WithJsonSchema({"type": "boolean", "enum": [True]})
]

Stop = Annotated[str, Field(min_length=1)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]


class StreamOptions(Request):
    """What a stream tells beside text."""

    include_usage: bool | None = Field(
        None, description="One more chunk at the end, with the numbers of tokens and no choice."
    )
    continuous_usage_stats: bool | None = Field(
        None, description="The numbers of tokens so far in every chunk."
    )
    include_obfuscation: Off | None = None


class TextFormat(Request):
    """Plain text."""

    type: Literal["text"]


class NotSupported(Request):
    """What neither kind of completion supports, taken where it asks for nothing."""

    n: OneInteger | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    repetition_penalty: OneFloat | None = None
    length_penalty: OneFloat | None = None
    min_p: Zero | None = None
    use_beam_search: Off | None = None
    logit_bias: EmptyObject | None = None
    stop_token_ids: NoneOf | None = None
    skip_special_tokens: On | None = None


class GenerationRequest(NotSupported):
    """What both kinds of completion share."""

    model: str = Field(description="A name of /v1/models.")
    max_tokens: int | None = Field(None, ge=1, description="Most tokens to generate.")
    min_tokens: int | None = Field(
        None, ge=0, description="No end of sequence and no stop string before so many tokens."
    )
    ignore_eos: bool | None = Field(None, description="Generate max_tokens, whatever comes.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy; default 1.")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, description="0 and -1 cut nothing.")
    seed: int | None = Field(None, ge=-SEED, lt=SEED)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = Field(
        None, description="Up to 4 strings; the text ends before the first that comes."
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Accepted, not used.")

    @property
    def sampling(self) -> Sampling:
        """Return how tokens are chosen."""
        return Sampling(
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            top_k=max(0, self.top_k or 0),
            seed=self.seed,
        )

    @property
    def stops(self) -> list[str]:
        """Return the stop strings."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())


class TextPart(Request):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Request):
    """A message of a conversation; the fields that only come back from a server may be null."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)] | None = Field(
        description="Null for an assistant that said nothing."
    )
    name: str | None = Field(None, description="Accepted, not used.")
    refusal: Nothing = None
    audio: Nothing = None
    annotations: NoneOf | None = None
    function_call: Nothing = None
    tool_calls: NoneOf | None = None

    @field_validator("content")
    @classmethod
    def _said(
        cls, value: str | list[TextPart] | None, info: ValidationInfo
    ) -> str | list[TextPart] | None:
        if value is None and info.data.get("role", "assistant") != "assistant":
            raise ValueError("only an assistant's content may be null")
        return value

    @property
    def text(self) -> str:
        """Return the whole content."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())

    @property
    def for_template(self) -> dict[str, str]:
        """Return what chat templates read; they know no developer."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.text}


class NotSupportedInChat(NotSupported):
    """What chat completions do not support, taken where it asks for nothing."""

    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    response_format: TextFormat | None = None
    logprobs: Off | None = None
    top_logprobs: ZeroInteger | None = None
    tools: NoneOf | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: NoneOf | None = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: Nothing = None
    store: Off | None = None
    audio: Nothing = None
    prediction: Nothing = None
    reasoning_effort: Nothing = None
    web_search_options: Nothing = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: EmptyObject | None = None
    prompt_cache_key: Nothing = None
    safety_identifier: Nothing = None
    verbosity: Nothing = None


class ChatRequest(GenerationRequest, NotSupportedInChat):
    """Body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, description="Goes before max_tokens.")


class NotSupportedInText(NotSupported):
    """What continued texts do not support, taken where it asks for nothing."""

    best_of: OneInteger | None = None
    logprobs: Nothing = None
    suffix: Nothing = None


class CompletionRequest(GenerationRequest, NotSupportedInText):
    """Body of ``/v1/completions``."""

    prompt: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=1)]
    ) = Field(description="A text, tokens, or a list of one of these.")
    echo: bool | None = Field(None, description="Give the prompt back before the text.")

    @property
    def given(self) -> str | list[int]:
        """Return the prompt as one text or as tokens."""
        if isinstance(self.prompt, str):
            return self.prompt
        first = self.prompt[0]
        return cast("list[int]", self.prompt) if isinstance(first, int) else first


UNSUPPORTED = frozenset({*NotSupportedInChat.model_fields, *NotSupportedInText.model_fields})


class Usage(BaseModel):
    """Numbers of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


FinishReason = Literal["stop", "length"]


class ChatAnswer(BaseModel):
    """The message of the model."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: Nothing = None


class ChatChoice(BaseModel):
    """The one choice."""

    index: Literal[0] = 0
    message: ChatAnswer
    logprobs: Nothing = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Answer of ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(BaseModel):
    """The one choice."""

    index: Literal[0] = 0
    text: str
    logprobs: Nothing = None
    finish_reason: FinishReason


class Completion(BaseModel):
    """Answer of ``/v1/completions``."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mmrl"
    max_model_len: int = Field(description="Most tokens of prompt and output together.")


class ModelList(BaseModel):
    """The fleet."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Body of every failure."""

    error: ErrorDetail

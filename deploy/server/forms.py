"""How an answer is written: as a chat message or as a continued text, whole or in chunks."""

import secrets
import time
from collections.abc import Iterator
from typing import Any, ClassVar

from mmrl.deploy.server.schemas import StreamOptions


class Form:
    """What both forms share.

    Args:
        model: As the client called it.
        prompt_tokens: Length of the prompt.
        options: Of the stream.

    Attributes:
        prompt: Name of the parameter that holds the prompt.
    """

    prompt: ClassVar[str]
    _prefix: ClassVar[str]
    _whole: ClassVar[str]
    _chunk: ClassVar[str]

    def __init__(self, model: str, prompt_tokens: int, options: StreamOptions | None) -> None:
        self._head = {
            "id": f"{self._prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }
        self._prompt_tokens = prompt_tokens
        self._total = bool(options and options.include_usage)
        self._running = bool(options and options.continuous_usage_stats)

    def whole(self, text: str, reason: str, tokens: int) -> dict[str, Any]:
        """Return the complete answer, of so many tokens."""
        choice = {"index": 0, "logprobs": None, "finish_reason": reason, **self._answer(text)}
        return {
            **self._head,
            "object": self._whole,
            "choices": [choice],
            "usage": self._usage(tokens),
        }

    def opening(self) -> Iterator[dict[str, Any]]:
        """Yield the chunks before the first text."""
        yield from ()

    def piece(self, text: str, tokens: int) -> dict[str, Any]:
        """Return a chunk with text; ``tokens`` counts those up to here."""
        return self._choice(self._delta(text), None, tokens)

    def closing(self, reason: str, tokens: int) -> Iterator[dict[str, Any]]:
        """Yield the chunks after the last text."""
        yield self._choice(self._delta(""), reason, tokens)
        if self._total:
            yield {
                **self._head,
                "object": self._chunk,
                "choices": [],
                "usage": self._usage(tokens),
            }

    def _choice(self, delta: dict[str, Any], reason: str | None, tokens: int) -> dict[str, Any]:
        choice = {"index": 0, **delta, "logprobs": None, "finish_reason": reason}
        chunk = {**self._head, "object": self._chunk, "choices": [choice]}
        if self._running:
            chunk["usage"] = self._usage(tokens)
        elif self._total:
            chunk["usage"] = None
        return chunk

    def _usage(self, tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self._prompt_tokens + tokens,
        }

    def _answer(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, text: str) -> dict[str, Any]:
        raise NotImplementedError


class ChatForm(Form):
    """A chat completion."""

    prompt = "messages"
    _prefix = "chatcmpl"
    _whole = "chat.completion"
    _chunk = "chat.completion.chunk"

    def opening(self) -> Iterator[dict[str, Any]]:
        """Yield the chunk that says who speaks."""
        yield self._choice({"delta": {"role": "assistant", "content": ""}}, None, 0)

    def _answer(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}


class TextForm(Form):
    """A continued text, after the prompt itself if that is to be echoed."""

    prompt = "prompt"
    _prefix = "cmpl"
    _whole = _chunk = "text_completion"

    def __init__(
        self, model: str, prompt_tokens: int, options: StreamOptions | None, echo: str = ""
    ) -> None:
        super().__init__(model, prompt_tokens, options)
        self._echo = echo

    def opening(self) -> Iterator[dict[str, Any]]:
        """Yield the prompt, where it is echoed."""
        if self._echo:
            yield self.piece(self._echo, 0)

    def _answer(self, text: str) -> dict[str, Any]:
        return {"text": self._echo + text}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

"""Text to tokens and back: tokenisers, chat templates, streamed detokenisation, stop strings.

Text leaves a stream as early as it can and never has to be taken back: a token may end inside a
character, and text may turn out to be the beginning of a stop string, so both are held back until
more tokens decide.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jinja2.exceptions import TemplateError

from mmrl.errors import InputError

Result = TypeVar("Result")

INLINE_CHARACTERS = 4096  # longer texts are tokenised in a thread (a megabyte takes a second)
MESSAGE_CHARACTERS = 20  # a chat template takes as long for a message as this many of its text
CONTEXT_TOKENS = 5  # of the prompt: whether a first word gets a blank depends on what precedes it
SPAN_TOKENS = 3  # an incomplete UTF-8 character has at most three bytes, so as many tokens
REPLACEMENT = "\ufffd"  # decoders write it for bytes that are no character


class ModelText:
    """The tokeniser and the chat template of one model; safe to use from several threads.

    Args:
        tokenizer: A transformers tokeniser with a ``tokenizers`` backend.
        name: Named in errors.

    Attributes:
        vocabulary: All tokens are below it; the model may have fewer.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = name
        # Used directly: the wrapper sets truncation on every call, which threads must not share.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        added = self._backend.get_added_tokens_decoder()  # not always next to the others
        known = self._backend.get_vocab_size(with_added_tokens=True)
        self.vocabulary: int = max(known, 1 + max(added, default=-1))

    @classmethod
    def open(cls, path: str | Path) -> "ModelText":
        """Load the tokeniser in a model's folder.

        Raises:
            InputError: There is none, or none that ``tokenizers`` runs.
        """
        from transformers import AutoTokenizer  # takes a second

        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        except Exception as error:  # of a dozen kinds, whatever is wrong in the folder
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(
                f"cannot load a tokenizer from {path}: {reason[0]}",
                "put the model's tokenizer.json and tokenizer_config.json there",
            ) from error
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"the tokenizer in {path} has no tokenizer.json",
                "convert it: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            )
        return cls(tokenizer, Path(path).name)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the tokens of a text, with those that open a text if ``special``."""
        # Of a batch: encode() would keep the event loop waiting, also from another thread.
        [encoding] = self._backend.encode_batch_fast([text], add_special_tokens=special)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        text: str = self._backend.decode(list(tokens), skip_special_tokens=True)
        return text

    def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the tokens of a conversation up to where the model answers.

        Args:
            messages: ``role`` and ``content`` of each.

        Raises:
            InputError: The model has no chat template, or it refuses the conversation.
        """
        if not self._tokenizer.chat_template:
            raise InputError(f"{self._name} has no chat template", "use /v1/completions")
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise InputError(f"the chat template refuses these messages: {error}") from error
        return self.encode(text, special=False)  # the template wrote them


class Texts:
    """The texts of the fleet, each loaded once, when it is first asked for."""

    def __init__(self) -> None:
        self._loading: dict[str, asyncio.Task[ModelText]] = {}

    async def get(self, path: str) -> ModelText:
        """Return the text of the model in a folder.

        Raises:
            InputError: It cannot be loaded; the next call tries again.
        """
        task = self._loading.get(path)
        if task is None or (task.done() and task.exception() is not None):
            task = asyncio.create_task(asyncio.to_thread(ModelText.open, path))
            self._loading[path] = task
        return await asyncio.shield(task)  # who asked may go; others wait for the same


async def off_loop(size: int, function: Callable[..., Result], *args: object) -> Result:
    """Call a function of a text of ``size`` characters; in a thread, if that takes long.

    The loop goes on meanwhile as far as the function lets other threads run: `ModelText.encode`
    does all the time, Python code now and then.
    """
    if size <= INLINE_CHARACTERS:
        return function(*args)
    return await asyncio.to_thread(function, *args)


class Detokeniser:
    """Turns tokens into text as they come; what it returned adds up to the text of all of them.

    Args:
        decode: Text of a list of tokens.
        prompt: The tokens before; their text is not returned.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._tokens = list(prompt[-CONTEXT_TOKENS:])
        self._told = len(self._tokens)  # tokens whose text has been returned

    def push(self, token: int) -> str:
        """Take a token and return the text that is certain now; often that of this token."""
        self._tokens.append(token)
        before = self._decode(self._tokens[: self._told])
        text = self._decode(self._tokens)
        until = len(self._tokens)
        if text.endswith(REPLACEMENT):
            until = self._complete(text)
            if until == self._told:
                return ""
            text = self._decode(self._tokens[:until])
        return self._tell(before, text, until)

    def finish(self) -> str:
        """Return what was held back."""
        before = self._decode(self._tokens[: self._told])
        return self._tell(before, self._decode(self._tokens), len(self._tokens))

    def _complete(self, text: str) -> int:
        """Return how many tokens are certain, of those whose text may end inside a character.

        The last ones may be its beginning; those before them are certain where both parts make
        the text of the whole, which they do not if a character is cut.
        """
        for until in range(len(self._tokens) - SPAN_TOKENS, self._told, -1):
            parts = self._tokens[:until], self._tokens[until:]
            if "".join(map(self._decode, parts)) == text:
                return until
        return self._told

    def _tell(self, before: str, text: str, until: int) -> str:
        # What is told now is the context of what comes: it begins where a character does.
        del self._tokens[: self._told]
        self._told = until - self._told
        return text[len(before) :]


class StopStrings:
    """Holds back what may become a stop string, and cuts at the first that is complete.

    Args:
        stops: Not empty strings.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Take text and return what may be shown; nothing any more after a hit."""
        if self.hit:
            return ""
        text = self._held + text
        # The one that is complete first; of those that end together, the longest.
        ends = [
            (text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text
        ]
        if ends:
            self.hit, self._held = True, ""
            return text[: min(ends)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of text that begins stop."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class TextStream:
    """The text of a request as its tokens come.

    Args:
        text: Of the model.
        prompt: Tokens of the prompt.
        stops: Stop strings.
        min_tokens: No stop string is looked for in so many tokens.

    Attributes:
        tokens: How many tokens were taken; none any more after a stop string.
    """

    def __init__(
        self, text: ModelText, prompt: Sequence[int], stops: Sequence[str], min_tokens: int = 0
    ) -> None:
        self._detokeniser = Detokeniser(text.decode, prompt)
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self.tokens = 0

    @property
    def stopped(self) -> bool:
        """Return whether a stop string came."""
        return self._stops.hit

    def push(self, tokens: Sequence[int]) -> str:
        """Take tokens and return the text to show."""
        shown = ""
        for token in tokens:
            if self.stopped:
                break
            self.tokens += 1
            text = self._detokeniser.push(token)
            shown += text if self.tokens <= self._min_tokens else self._stops.push(text)
        return shown

    def finish(self) -> str:
        """Return the text that was held back, once no token comes any more."""
        if self.stopped:
            return ""
        last = self._stops.push(self._detokeniser.finish())
        return last + self._stops.finish()

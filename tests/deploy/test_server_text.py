import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mmrl.deploy.server.text import Detokeniser, ModelText, StopStrings, TextStream
from mmrl.errors import InputError
from tests.deploy.made_up_engine import make_tokenizer

TEXTS = st.text(st.sampled_from("ab theé🦊\u0301漢\ufffd\n"), max_size=30)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    return ModelText.open(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def fallback_text() -> ModelText:
    """A tokenizer of the sentencepiece kind: words with their blank, other bytes one by one."""
    words = {"<unk>": 0, "▁the": 1, "▁fox": 2, "s": 3, "▁": 4}
    vocabulary = words | {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return ModelText(PreTrainedTokenizerFast(tokenizer_object=tokenizer), "fallback")


def pieces(
    decode: Callable[[Sequence[int]], str], tokens: Sequence[int], prompt: Sequence[int] = ()
) -> list[str]:
    detokeniser = Detokeniser(decode, prompt)
    return [*(detokeniser.push(token) for token in tokens), detokeniser.finish()]


@given(TEXTS, TEXTS)
@example("漢🦊", "🦊🦊")
def test_streamed_text_is_the_whole_text(text: ModelText, prompt: str, answer: str) -> None:
    told = pieces(text.decode, text.encode(answer), text.encode(prompt))
    assert "".join(told) == answer
    if "\ufffd" not in answer:
        assert "\ufffd" not in "".join(told)  # no half character on the way either


@given(st.lists(st.integers(0, 299), max_size=30))
def test_any_tokens_stream_as_they_decode(text: ModelText, tokens: list[int]) -> None:
    told = pieces(text.decode, tokens)
    assert "".join(told) == text.decode(tokens)


def test_bytes_that_are_no_character_are_not_held_for_ever(text: ModelText) -> None:
    broken = text.encode("漢")[:1] * 20  # the first byte of three, again and again
    assert text.decode(broken) == "\ufffd" * 20
    shown = 0
    for k, piece in enumerate(pieces(text.decode, broken)):
        shown += len(piece)
        assert shown >= k - 3


@given(st.text(st.sampled_from("é🦊漢"), max_size=6), st.booleans())
def test_byte_fallback_streams_characters(answer: str, word: bool) -> None:
    fallback = fallback_text()
    tokens = [5 + byte for byte in answer.encode()] + [1, 3, 2] * word
    told = pieces(fallback.decode, tokens, [2])
    assert "".join(told) == answer + " thes fox" * word


def test_a_first_word_has_its_blank_after_a_prompt() -> None:
    fallback = fallback_text()
    assert "".join(pieces(fallback.decode, [1, 2], prompt=[2])) == " the fox"
    assert "".join(pieces(fallback.decode, [1, 2])) == "the fox"


def first_stop(whole: str, stops: Sequence[str]) -> str | None:
    """The text before the stop string that is complete first, character by character."""
    for end in range(1, len(whole) + 1):
        found = [stop for stop in stops if whole[:end].endswith(stop)]
        if found:
            return whole[: end - max(map(len, found))]
    return None


@given(
    st.text("abc", max_size=20),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    st.randoms(use_true_random=False),
)
@example("aab", ["ab"], random.Random(0))
@example("abcd", ["abcd", "bc"], random.Random(0))
def test_stop_strings_cut_and_never_show(
    whole: str, stops: list[str], chance: random.Random
) -> None:
    machine = StopStrings(stops)
    shown, at = "", 0
    while at < len(whole):
        size = chance.randint(1, 4)
        shown += machine.push(whole[at : at + size])
        at += size
        expected = first_stop(whole, stops)
        assert (whole if expected is None else expected).startswith(shown)
    expected = first_stop(whole, stops)
    assert machine.hit == (expected is not None)
    assert shown + machine.finish() == (whole if expected is None else expected)


def test_what_cannot_become_a_stop_string_is_shown_at_once() -> None:
    machine = StopStrings(["stop", "end"])
    assert [machine.push(text) for text in ("abc", "st", "x", "sto")] == ["abc", "", "stx", ""]
    assert machine.finish() == "sto"


def test_a_stop_string_ends_the_count_of_tokens(text: ModelText) -> None:
    tokens = text.encode("one two three four five")
    stream = TextStream(text, [], ["three"])
    assert stream.push(tokens) + stream.finish() == "one two "
    assert stream.stopped
    assert text.decode(tokens[: stream.tokens]).endswith("three")


def test_min_tokens_come_before_any_stop_string(text: ModelText) -> None:
    tokens = text.encode("a b a b a b")
    stream = TextStream(text, [], ["b"], min_tokens=len(text.encode("a b a")))
    assert stream.push(tokens) == "a b a "


def test_a_chat_is_written_by_the_template(text: ModelText) -> None:
    tokens = text.chat([{"role": "user", "content": "hi"}])
    written = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokens == text.encode(written, special=False)
    with pytest.raises(InputError, match="refused"):
        text.chat([{"role": "user", "content": "refuse this"}])


def test_a_model_without_a_template_cannot_chat(tmp_path: Path) -> None:
    text = ModelText.open(make_tokenizer(tmp_path, chat=False))
    with pytest.raises(InputError, match="no chat template"):
        text.chat([{"role": "user", "content": "hi"}])


def test_other_threads_run_while_a_long_text_is_tokenised(text: ModelText) -> None:
    thread = threading.Thread(target=text.encode, args=("the quick brown fox " * 50_000,))
    thread.start()
    looks = 0
    while thread.is_alive():
        thread.join(0.001)
        looks += 1
    assert looks > 10  # one or two where it keeps the interpreter to itself


def test_a_folder_without_a_tokenizer_is_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot load a tokenizer") as raised:
        ModelText.open(tmp_path)
    assert raised.value.remedy

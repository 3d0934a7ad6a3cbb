"""The trace formats that are read row by row: which columns, and what one row says.

Only counts per minute (Azure Functions) are no such format; readers.py expands them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

from mmrl.workloads.trace import BATCH, CSV_COLUMNS, INTERACTIVE

MAX_TOKENS = 2**24
YEAR_2000 = datetime(2000, 1, 1, tzinfo=UTC)


class Request(NamedTuple):
    """What one row says."""

    time_ns: int
    service: str
    prompt_tokens: int
    output_tokens: int
    batch_work: bool = False


class FailedRequest(Exception):
    """A well-formed row about a request that got no answer: not an error, but no request."""


@dataclass(frozen=True)
class Format:
    """How to read one kind of file.

    Attributes:
        columns: What a row must have: CSV columns, or JSON keys.
        parse: From the row (column -> text or JSON value) and the name of the file to the
            request; raises FailedRequest, or ValueError with the reason where the row is bad.
        tick_s: Times that are all multiples of this are spread over it. 0: times are exact.
            None: times that requests share are spread over the time to the next.
        own_clock: Times count from the trace's own zero, unless they begin far beyond it; else the
            first request is the zero.
    """

    columns: tuple[str, ...]
    parse: Callable[[dict[str, Any], str], Request]
    tick_s: float | None = 0.0
    own_clock: bool = False


def tokens(value: Any, least: int = 1) -> int:
    """Convert one field to a number of tokens, or raise ValueError."""
    number = float(value)
    if not least <= number <= MAX_TOKENS or number != int(number):
        raise ValueError(f"{value} is not a number of tokens")
    return int(number)


def _answer(value: Any) -> int:
    output = tokens(value, least=0)
    if output == 0:
        raise FailedRequest
    return output


def _time_ns(value: Any, unit_ns: int = 10**9) -> int:
    # Decimal: our own CSV must come back to the nanosecond after any number of seconds.
    time = Decimal(str(value)) * unit_ns
    if not (time.is_finite() and abs(time) < 2**62):
        raise ValueError(f"{value} is not a time")
    return int(time)


def _name(value: Any) -> str:
    if not isinstance(value, str):  # a JSON value may be anything
        raise ValueError(f"model {value!r} is not text")
    if not value:
        raise ValueError("model is empty")
    return value


def _parse_own(row: dict[str, Any], file: str) -> Request:
    time_ns = _time_ns(row["arrival_s"])
    if time_ns < 0:
        raise ValueError(f"arrival_s {row['arrival_s']} is negative")
    model = _name(row["model"])
    kind = row.get("class") or INTERACTIVE
    if kind not in (INTERACTIVE, BATCH):
        raise ValueError(f"class '{kind}' is neither {INTERACTIVE} nor {BATCH}")
    prompt, output = tokens(row["prompt_tokens"]), tokens(row["output_tokens"])
    return Request(time_ns, model, prompt, output, kind == BATCH)


def _parse_azure_llm(row: dict[str, Any], file: str) -> Request:
    when = datetime.fromisoformat(row["TIMESTAMP"])
    since = (when if when.tzinfo else when.replace(tzinfo=UTC)) - YEAR_2000
    time_ns = since // timedelta(microseconds=1) * 1000
    return Request(time_ns, file, tokens(row["ContextTokens"]), _answer(row["GeneratedTokens"]))


def _parse_burstgpt(row: dict[str, Any], file: str) -> Request:
    answer = _answer(row["Response tokens"])  # first: failed rows may have no prompt either
    model, prompt = _name(row["Model"]), tokens(row["Request tokens"])
    return Request(_time_ns(row["Timestamp"]), model, prompt, answer)


def _block_hashes(unit_ns: int) -> Callable[[dict[str, Any], str], Request]:
    """Parse what Mooncake and Bailian share; their times are in different units."""

    def parse(row: dict[str, Any], file: str) -> Request:
        time_ns = _time_ns(row["timestamp"], unit_ns)
        return Request(time_ns, file, tokens(row["input_length"]), _answer(row["output_length"]))

    return parse


def _lengths_only(prompt: str, output: str) -> Format:
    def parse(row: dict[str, Any], file: str) -> Request:
        return Request(0, file, tokens(row[prompt]), _answer(row[output]))

    return Format((prompt, output), parse)


# A file is of the first format whose columns it has.
FORMATS = {
    "mmrl": Format(CSV_COLUMNS[:4], _parse_own, own_clock=True),
    "azure-llm": Format(("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _parse_azure_llm),
    "burstgpt": Format(
        ("Timestamp", "Model", "Request tokens", "Response tokens"), _parse_burstgpt, tick_s=1.0
    ),
    "bailian": Format(
        ("chat_id", "timestamp", "input_length", "output_length"), _block_hashes(10**9)
    ),
    "mooncake": Format(
        ("timestamp", "input_length", "output_length"), _block_hashes(10**6), tick_s=None
    ),
}

# Files of lengths without times, good for empirical lengths alone. The second is vidur's.
LENGTH_FORMATS = {
    "lengths": _lengths_only("prompt_tokens", "output_tokens"),
    "vidur-lengths": _lengths_only("num_prefill_tokens", "num_decode_tokens"),
}

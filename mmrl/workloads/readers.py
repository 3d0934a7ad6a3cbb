"""Readers: recorded traces become a `Trace` over the services that they tell apart.

Files are read row by row, so that a bad row is named by its line. A service is a file (Azure
LLM, Bailian, Mooncake), a model (BurstGPT, our own CSV) or a function (Azure Functions);
fleet.py maps services to the models of a fleet. Everything that is done to the requests becomes
a note.
"""

import csv
import gzip
import json
import re
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from mmrl.errors import InputError, nearest, unknown
from mmrl.workloads.formats import FORMATS, LENGTH_FORMATS, FailedRequest, Format, Request
from mmrl.workloads.lengths import family_names, length_table, sample_many
from mmrl.workloads.trace import CSV_COLUMNS, Trace

FUNCTIONS = "azure-functions"
FORMAT_NAMES = (*FORMATS, FUNCTIONS)
MINUTE_COLUMN = re.compile(r"(?:min)?\d+")
MAX_INVOCATIONS = 20_000_000
FAR = 10  # times its span, or an hour: no trace that counts from its own zero begins so late
BAD_ROW_REMEDY = "correct it, or write a trace without bad rows: mmrl workload fit --skip-bad"


@dataclass
class _Table:
    """An open file: its columns, what its comments say, and its rows with line numbers.

    A row that cannot be split into the columns is the reason for that, a string.
    """

    path: Path
    header: list[str]
    first_line: str
    about: dict[str, Any]
    rows: Iterator[tuple[int, dict[str, Any] | str]]


@dataclass
class _Columns:
    """The requests so far, column by column: compact, since traces have millions of rows."""

    time_ns: "array[int]" = field(default_factory=lambda: array("q"))
    service: "array[int]" = field(default_factory=lambda: array("i"))
    prompt_tokens: "array[int]" = field(default_factory=lambda: array("i"))
    output_tokens: "array[int]" = field(default_factory=lambda: array("i"))
    batch_work: "array[int]" = field(default_factory=lambda: array("b"))
    services: dict[str, int] = field(default_factory=dict)
    durations_s: list[float] = field(default_factory=list)  # of each file; 0: it does not say
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.time_ns)

    def index_of(self, service: str) -> int:
        return self.services.setdefault(service, len(self.services))

    def append(self, request: Request) -> None:
        self.time_ns.append(request.time_ns)
        self.service.append(self.index_of(request.service))
        self.prompt_tokens.append(request.prompt_tokens)
        self.output_tokens.append(request.output_tokens)
        self.batch_work.append(request.batch_work)


def read_trace(
    paths: Sequence[str | Path],
    format: str | None = None,
    skip_bad: bool = False,
    seed: int = 0,
    lengths: str = "chat",
) -> Trace:
    """Read the files of one trace; gzip is seen through.

    Args:
        paths: The files; each is a service of its own where the format names none, called like
            the file, and with its folder where two have one name.
        format: One of `FORMAT_NAMES`; None to tell by the first line.
        skip_bad: Skip bad rows and count them in the notes, instead of raising.
        seed: For times that are spread and lengths that are drawn.
        lengths: The length family for counts per minute, which record no lengths.

    Returns:
        A trace whose models are the services, in order of first appearance.

    Raises:
        InputError: A file is missing, not text, of no known format or empty; a row is bad.
    """
    if format is not None and format not in FORMAT_NAMES:
        raise unknown("trace format", format, FORMAT_NAMES)
    if not paths:
        raise InputError("no trace file is given")
    files = [Path(path) for path in paths]
    names = [format or _detect(path, FORMATS) for path in files]
    for path, name in zip(files, names, strict=True):
        if name != names[0]:
            raise InputError(
                f"{files[0]} is {names[0]}, but {path} is {name}", "read them separately"
            )
        if files.count(path) > 1:
            raise InputError(f"{path} is given twice")
    rng = np.random.default_rng(seed)
    if names[0] == FUNCTIONS:
        return _read_functions(files, skip_bad, rng, lengths)
    format_ = FORMATS[names[0]]
    columns = _Columns()
    for path, service in zip(files, _services(files), strict=True):
        _read_rows(path, service, names[0], format_, skip_bad, columns)
    return _to_trace(columns, format_, rng)


def read_length_pairs(path: str | Path) -> NDArray[np.int32]:
    """Read recorded (prompt, output) lengths from a trace or from a CSV of lengths alone.

    Returns:
        int32[P, 2], P >= 1.

    Raises:
        InputError: The file is missing, of no known format or empty, or has a bad row.
    """
    formats = {**FORMATS, **LENGTH_FORMATS}
    name = _detect(Path(path), formats)
    if name == FUNCTIONS:
        raise InputError(f"{path} records no lengths", "name a trace that does")
    columns = _Columns()
    _read_rows(Path(path), "", name, formats[name], False, columns)
    return np.stack([columns.prompt_tokens, columns.output_tokens], axis=1).astype(np.int32)


def is_written_trace(path: Path) -> bool:
    """Whether a file is a trace that `Trace.to_csv` wrote: its first line tells the fleet."""
    try:
        with _open_text(path) as file:
            return "models" in _json_object(file.readline().removeprefix("#"))
    except InputError:
        return False


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    """Open a file, gzip or not; what cannot be read as text becomes an InputError."""
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        opener: Any = gzip.open if zipped else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is a broken gzip file: {error}", "fetch it again") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "check its name") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a text file: {error}") from error


@contextmanager
def _open_table(path: Path) -> Iterator[_Table]:
    """Open a CSV or JSONL file at its first row, past blank lines and comments."""
    with _open_text(path) as file:
        about: dict[str, Any] = {}
        number, line = 0, ""
        for line in file:
            number += 1
            if line.startswith("#"):
                about |= _json_object(line[1:])
            elif line.strip():
                break
        else:
            raise InputError(f"{path} is empty")
        if line.lstrip().startswith("{"):
            rows = _json_rows(line, number, file)
            yield _Table(path, list(_json_object(line)), line.strip(), about, rows)
        else:
            header = [name.strip() for name in next(csv.reader([line]))]
            rows = _csv_rows(header, number, file)
            yield _Table(path, header, line.strip(), about, rows)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _json_rows(first: str, number: int, file: TextIO) -> Iterator[tuple[int, dict[str, Any] | str]]:
    yield number, _json_object(first) or "not a JSON object"
    for later, line in enumerate(file, start=number + 1):
        if line.strip():
            yield later, _json_object(line) or "not a JSON object"


def _csv_rows(
    header: list[str], number: int, file: TextIO
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    reader = csv.reader(file)
    for row in reader:
        line = number + reader.line_num
        if len(row) == len(header):
            yield line, {name: value.strip() for name, value in zip(header, row, strict=True)}
        elif row:
            yield line, f"{len(row)} fields where the header has {len(header)}"


def _detect(path: Path, formats: Mapping[str, Format]) -> str:
    with _open_table(path) as table:
        for name, format in formats.items():
            if set(format.columns) <= set(table.header):
                return name
        if "HashFunction" in table.header:
            return FUNCTIONS
        _check_columns(path, table.header, formats)
        if any(set(format.columns) <= set(table.header) for format in LENGTH_FORMATS.values()):
            raise InputError(
                f"{path} records lengths and no arrival times",
                f"name its columns {','.join(CSV_COLUMNS[:4])}, or generate a workload with its "
                "lengths: --lengths empirical --lengths-file",
            )
        known = "; ".join(",".join(format.columns) for format in formats.values())
        raise InputError(
            f"{path} is of no known trace format: its first line is '{table.first_line[:60]}'",
            f"known columns: {known}; HashFunction,1,2,...",
        )


def _check_columns(path: Path, header: list[str], formats: Mapping[str, Format]) -> None:
    """Name the one column that a file lacks to be of a format, and what it may be called instead.

    Raises:
        InputError: It lacks one; where that is the time, only if another looks like it.
    """
    for name, format in formats.items():
        missing = [column for column in format.columns if column not in header]
        if len(missing) != 1 or len(format.columns) < 3:
            continue
        others = (column for column in header if column not in format.columns)
        like = next((column for column in others if nearest(column, missing)), None)
        if like is not None or missing[0] != CSV_COLUMNS[0]:
            raise InputError(
                f"{path} has no '{missing[0]}', which format {name} needs",
                f"rename '{like}', if that is it" if like else f"it has {', '.join(header)}",
            )


class _Problems:
    """Bad rows: raised at the first, or counted where they may be skipped."""

    def __init__(self, path: Path, skip: bool) -> None:
        self.path, self.skip = path, skip
        self.count, self.first = 0, ""

    def add(self, line: int, reason: object) -> None:
        text = str(reason)
        if not self.skip:
            raise InputError(f"{self.path}, line {line}: {text}", BAD_ROW_REMEDY)
        self.first = self.first or f"line {line}: {text}"
        self.count += 1

    @property
    def notes(self) -> list[str]:
        what = f"skipped {self.count:,} bad rows of {self.path.name} (first: {self.first})"
        return [what] if self.count else []


def _services(files: list[Path]) -> list[str]:
    """Name the service that each file is, all of them differently."""
    names = [
        path.name.removesuffix(".gz").removesuffix(".csv").removesuffix(".jsonl") for path in files
    ]
    for parts in (2, None):  # with the folder, and then the whole path
        names = [
            str(Path(*path.parts[-parts if parts else None :])) if names.count(name) > 1 else name
            for path, name in zip(files, names, strict=True)
        ]
    return names


def _read_rows(
    path: Path, service: str, name: str, format: Format, skip_bad: bool, columns: _Columns
) -> None:
    """Append one file's requests, and what is to be said about it."""
    problems = _Problems(path, skip_bad)
    before, failed, unsorted, last_ns = len(columns), 0, 0, -(2**62)
    with _open_table(path) as table:
        for column in format.columns:
            if column not in table.header:
                raise InputError(f"{path} has no '{column}', which format {name} needs")
        if format.own_clock:
            _take_header(path, table.about, columns)
        else:
            columns.durations_s.append(0.0)
        for line, row in table.rows:
            if isinstance(row, str):
                problems.add(line, row)
                continue
            try:
                request = format.parse(row, service)
            except FailedRequest:
                failed += 1
            except KeyError as error:
                problems.add(line, f"no {error}")
            except (ValueError, TypeError, ArithmeticError) as error:
                problems.add(line, error)
            else:
                unsorted += request.time_ns < last_ns
                last_ns = request.time_ns
                columns.append(request)
    read = len(columns) - before
    if read == 0:
        raise InputError(f"{path} holds no requests")
    if not (format.own_clock and "notes" in table.about):  # what we wrote comes back unchanged
        columns.notes.append(f"read {read:,} requests from {path.name} ({name})")
    columns.notes += problems.notes
    if failed:
        columns.notes.append(f"skipped {failed:,} failed requests of {path.name} (no output)")
    if unsorted:
        columns.notes.append(f"sorted {path.name}: {unsorted:,} rows were before the row ahead")


def _take_header(path: Path, about: dict[str, Any], columns: _Columns) -> None:
    """Take fleet, duration and notes from the comment that `Trace.to_csv` writes."""
    models, notes = about.get("models", []), about.get("notes", [])
    duration_s = about.get("duration_s", 0.0)
    texts = isinstance(models, list) and isinstance(notes, list)
    if not texts or not all(isinstance(text, str) for text in [*models, *notes]):
        raise InputError(f"{path}, line 1: models and notes must be lists of text")
    if not isinstance(duration_s, int | float):
        raise InputError(f"{path}, line 1: duration_s must be a number")
    for model in models:
        columns.index_of(model)
    columns.durations_s.append(duration_s)
    columns.notes += notes


def _to_trace(columns: _Columns, format: Format, rng: np.random.Generator) -> Trace:
    """Set the zero, spread rounded times, sort, and find the duration where none is recorded."""
    time_ns = np.array(columns.time_ns, np.int64)
    first_ns, span_ns = int(time_ns.min()), int(np.ptp(time_ns))
    moved: list[str] = []
    if not format.own_clock:
        time_ns -= first_ns
    elif not any(columns.durations_s) and first_ns > FAR * max(span_ns, 3600 * 10**9):
        time_ns -= first_ns  # Unix times, say: the trace would last since 1970
        moved = [f"took the first request, at {first_ns / 1e9:.0f} s, for the zero of time"]
    time_ns, spread = _spread(time_ns, format.tick_s, rng)
    order = np.argsort(time_ns, kind="stable")
    first_s, last_s = time_ns[order[0]] / 1e9, time_ns[order[-1]] / 1e9
    # One mean gap after the last request: to end with it would overestimate a short trace's rate.
    gap_s = (last_s - first_s) / (len(order) - 1) if last_s > first_s else 1.0
    duration_s = max(columns.durations_s)
    if not all(columns.durations_s):
        duration_s = max(duration_s, last_s + max(gap_s, 1e-6))
    return Trace(
        arrival_ns=time_ns[order],
        model=np.array(columns.service, np.int32)[order],
        prompt_tokens=np.array(columns.prompt_tokens, np.int32)[order],
        output_tokens=np.array(columns.output_tokens, np.int32)[order],
        batch_work=np.array(columns.batch_work, np.bool_)[order],
        model_names=tuple(columns.services),
        duration_s=float(duration_s),
        notes=(*columns.notes, *moved, *spread),
    )


def _spread(
    time_ns: NDArray[np.int64], tick_s: float | None, rng: np.random.Generator
) -> tuple[NDArray[np.int64], list[str]]:
    """Undo the rounding of times, which would make every tick a burst: (times, notes)."""
    if tick_s == 0:
        return time_ns, []
    ticks, tick_of = np.unique(time_ns, return_inverse=True)
    if tick_s is not None:
        width_ns = np.full(len(ticks), tick_s * 1e9)
        rounded = bool((time_ns % int(tick_s * 1e9) == 0).all())
    else:
        # Up to the next tick; where that is far, the service was idle: up to a median tick.
        gaps_ns = np.diff(ticks)
        typical_ns = float(np.median(gaps_ns)) if len(gaps_ns) else 3e9
        width_ns = np.minimum(np.append(gaps_ns, typical_ns), typical_ns)
        rounded = len(time_ns) >= 2 * len(ticks)
    if not rounded:
        return time_ns, []
    spread = (rng.random(len(time_ns)) * width_ns[tick_of]).astype(np.int64)
    note = f"spread times recorded in steps of {np.median(width_ns) / 1e9:g} s uniformly over them"
    return time_ns + spread, [note]


def _read_functions(
    files: list[Path], skip_bad: bool, rng: np.random.Generator, lengths: str
) -> Trace:
    """Expand counts per minute: the arrivals of a minute are uniform in it (Poisson, given n)."""
    if len(files) > 1:
        raise InputError("counts per minute are read from one file", "give one day at a time")
    path = files[0]
    counts_of, minutes, problems = _read_counts(path, skip_bad)
    total = sum(sum(counts) for counts in counts_of.values())
    if not 0 < total <= MAX_INVOCATIONS:
        raise InputError(
            f"{path} holds {total:,} invocations, not 1 to {MAX_INVOCATIONS:,}",
            "keep the rows of the functions that you want",
        )
    services = [name for name, counts in counts_of.items() if any(counts)]
    table = length_table(family_names(lengths))
    counts = np.array([counts_of[name] for name in services])  # [S, minutes]
    service, minute = (
        index.repeat(counts.ravel()) for index in np.indices(counts.shape).reshape(2, -1)
    )
    time_ns = ((minute + rng.random(total)) * 60e9).astype(np.int64)
    order = np.argsort(time_ns, kind="stable")
    model = service[order].astype(np.int32)
    pairs, batch_work = sample_many(rng, table, model % len(table.rows))
    return Trace(
        arrival_ns=time_ns[order],
        model=model,
        prompt_tokens=pairs[:, 0],
        output_tokens=pairs[:, 1],
        batch_work=batch_work,
        model_names=tuple(services),
        duration_s=60.0 * minutes,
        notes=(
            f"read {total:,} invocations of {len(services)} functions in {minutes} minutes "
            f"from {path.name} ({FUNCTIONS})",
            *problems.notes,
            "placed the invocations of a minute uniformly in it",
            f"drew lengths, which are not recorded, from family {lengths}",
        ),
    )


def _read_counts(path: Path, skip_bad: bool) -> tuple[dict[str, list[int]], int, _Problems]:
    """Read (function -> counts per minute, how many minutes, the bad rows)."""
    problems = _Problems(path, skip_bad)
    counts_of: dict[str, list[int]] = {}
    with _open_table(path) as table:
        minutes = [name for name in table.header if MINUTE_COLUMN.fullmatch(name)]
        if "HashFunction" not in table.header or not minutes:
            raise InputError(
                f"{path} has no 'HashFunction' and minute columns, which format {FUNCTIONS} needs"
            )
        for line, row in table.rows:
            if isinstance(row, str):
                problems.add(line, row)
                continue
            try:
                counts = [int(row[minute]) for minute in minutes]
                if min(counts) < 0:
                    raise ValueError(f"a count is negative: {min(counts)}")
            except ValueError as error:
                problems.add(line, error)
                continue
            # A function with several triggers has a row for each.
            seen = counts_of.get(row["HashFunction"], [0] * len(minutes))
            counts_of[row["HashFunction"]] = [a + b for a, b in zip(seen, counts, strict=True)]
    return counts_of, len(minutes), problems

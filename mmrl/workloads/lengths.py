"""Prompt and output lengths: named families of log-normal distributions, or recorded pairs.

A family becomes one row of numbers (`LengthTable.rows`), so that compiled code can give each
model of a fleet its own family and draw from it with `sample_lengths`.

The numbers of `code` and `summarize` come from ``mmrl workload describe`` on recorded data: the
median, and the least-squares slope of the log deciles (`fit_lognormal`). `chat` has the numbers
of the feasibility study, `batch` is a choice.
"""

from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mmrl.errors import InputError, unknown
from mmrl.node.jit import jit_arrays

DEFAULT_CONTEXT_LIMIT_TOKENS = 8192
EMPIRICAL = "empirical"
MIXED = "mixed"

NO_MAXIMUM = 2**31 - 1


@dataclass(frozen=True)
class LengthFamily:
    """Independent log-normal prompt and output lengths, in tokens.

    Attributes:
        prompt_median_tokens: Median prompt length.
        prompt_sigma: Standard deviation of the logarithm of the prompt length.
        output_median_tokens: Median output length.
        output_sigma: Standard deviation of the logarithm of the output length.
        prompt_max_tokens: Longer prompts are cut to this, as services do.
        batch_work: Batch work, which has no TPOT target.
    """

    prompt_median_tokens: float
    prompt_sigma: float
    output_median_tokens: float
    output_sigma: float
    prompt_max_tokens: int = NO_MAXIMUM
    batch_work: bool = False


FAMILIES = {
    "chat": LengthFamily(500, 0.9, 150, 0.8),
    # Azure LLM 2023, code service, first 15 minutes: 2,598 requests, prompts cut at 7,437.
    "code": LengthFamily(1379, 1.31, 13, 0.78, prompt_max_tokens=7437),
    # arXiv summarisation as shipped with vidur: 28,257 pairs, prompts of up to 4,054.
    "summarize": LengthFamily(2730, 0.41, 167, 0.59, prompt_max_tokens=4054),
    "batch": LengthFamily(800, 0.8, 600, 0.7, batch_work=True),
}

# The columns of LengthTable.rows.
PROMPT_LOG_MEDIAN, PROMPT_SIGMA, PROMPT_MAX, OUTPUT_LOG_MEDIAN, OUTPUT_SIGMA = range(5)
BATCH_WORK, FROM_PAIRS = range(5, 7)
COLUMNS = 7


class LengthTable(NamedTuple):
    """Families in the form that compiled code reads.

    Attributes:
        rows: float64[F, 7], one family each; an empirical one has FROM_PAIRS = 1.
        pairs: int32[P, 2], the recorded (prompt, output) pairs of the empirical family.
        context_limit_tokens: The most that prompt and output may have together.
    """

    rows: NDArray[np.float64]
    pairs: NDArray[np.int32]
    context_limit_tokens: int


def family_names(family: str | list[str]) -> list[str]:
    """Return the families that a name or a list of names stands for; `mixed` is all of them.

    Raises:
        InputError: There is no such family.
    """
    if family == MIXED:
        return list(FAMILIES)
    names: list[str] = []
    for name in [family] if isinstance(family, str) else family:
        if name not in (*FAMILIES, EMPIRICAL, MIXED):
            raise unknown("length family", name, [*FAMILIES, EMPIRICAL, MIXED])
        names += FAMILIES if name == MIXED else [name]
    return names


def length_table(
    names: list[str],
    context_limit_tokens: int = DEFAULT_CONTEXT_LIMIT_TOKENS,
    pairs: NDArray[np.int32] | None = None,
) -> LengthTable:
    """Tabulate families.

    Args:
        names: Keys of `FAMILIES`, or ``"empirical"``; one row each, in this order.
        context_limit_tokens: The most that prompt and output may have together.
        pairs: int32[P, 2] recorded (prompt, output) pairs, for ``"empirical"``.

    Raises:
        InputError: ``"empirical"`` is among the names and there are no pairs.
    """
    pool = np.zeros((0, 2), np.int32) if pairs is None else pairs
    rows = np.zeros((len(names), COLUMNS))
    for row, name in zip(rows, names, strict=True):
        if name == EMPIRICAL:
            if len(pool) == 0:
                raise InputError("empirical lengths need recorded pairs", "name a file of them")
            row[FROM_PAIRS] = 1
            continue
        family = FAMILIES[name]
        row[:FROM_PAIRS] = (
            np.log(family.prompt_median_tokens),
            family.prompt_sigma,
            family.prompt_max_tokens,
            np.log(family.output_median_tokens),
            family.output_sigma,
            family.batch_work,
        )
    return LengthTable(rows, pool, context_limit_tokens)


@jit_arrays
def sample_lengths(
    rng: np.random.Generator,
    row: NDArray[np.float64],
    pairs: NDArray[np.int32],
    context_limit_tokens: int,
) -> tuple[int, int]:
    """Draw one request's prompt and output length from one row of a `LengthTable`.

    A recorded pair is drawn whole, so that long prompts keep their own outputs. Both lengths
    are at least 1; the prompt is cut first, then the output, to the context limit.
    """
    if row[FROM_PAIRS] > 0:
        pair = int(rng.random() * len(pairs))
        prompt, output = float(pairs[pair, 0]), float(pairs[pair, 1])
    else:
        z_prompt, z_output = rng.standard_normal(), rng.standard_normal()
        prompt = np.exp(row[PROMPT_LOG_MEDIAN] + row[PROMPT_SIGMA] * z_prompt)
        prompt = min(prompt, row[PROMPT_MAX])
        output = np.exp(row[OUTPUT_LOG_MEDIAN] + row[OUTPUT_SIGMA] * z_output)
    prompt_tokens = int(min(max(np.rint(prompt), 1.0), context_limit_tokens - 1.0))
    output_tokens = int(min(max(np.rint(output), 1.0), float(context_limit_tokens - prompt_tokens)))
    return prompt_tokens, output_tokens


@jit_arrays
def sample_many(
    rng: np.random.Generator, table: LengthTable, row_of: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Draw the lengths of many requests, given each one's row in the table.

    Returns:
        (int32[R, 2] prompt and output lengths, bool[R] batch work).
    """
    pairs = np.empty((len(row_of), 2), np.int32)
    batch_work = np.empty(len(row_of), np.bool_)
    for i in range(len(row_of)):
        row = table.rows[row_of[i]]
        pairs[i, 0], pairs[i, 1] = sample_lengths(rng, row, table.pairs, table.context_limit_tokens)
        batch_work[i] = row[BATCH_WORK] > 0.0
    return pairs, batch_work


def fit_lognormal(tokens: NDArray[np.int32]) -> tuple[float, float]:
    """Fit a log-normal through the median and the nine deciles of a sample.

    The slope of the log deciles against the normal ones is robust against the atoms and cut
    tails of recorded lengths, which a maximum-likelihood fit is not.

    Args:
        tokens: int32[n >= 1] positive lengths.

    Returns:
        (median in tokens, sigma of the logarithm).
    """
    levels = np.arange(1, 10) / 10
    z = np.array([NormalDist().inv_cdf(level) for level in levels])
    logs = np.log(np.quantile(tokens, levels))
    return float(np.exp(logs[4])), float(z @ (logs - logs[4]) / (z @ z))

"""What is in a trace: how fast, how bursty, how long; as numbers, in the terminal, as a page.

`describe` computes; `print_description` and `write_plot` show.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmrl.files import atomic_write
from mmrl.workloads.lengths import fit_lognormal
from mmrl.workloads.trace import Trace, short_name

WINDOWS_S = (1, 10, 60)
QUANTILES = (0.10, 0.50, 0.90, 0.99)
# A variance over fewer windows than this says too little to be shown.
FEWEST_WINDOWS = 10
SHOWN_MODELS = 10  # as many as there are colours
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class LengthSummary:
    """Lengths of prompts or outputs, in tokens.

    Attributes:
        quantiles: At `QUANTILES`.
        lognormal: (median, sigma) of `fit_lognormal`.
    """

    quantiles: tuple[float, ...]
    lognormal: tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """The requests of one model, or of all.

    Attributes:
        name: The model; ``all`` for the whole trace.
        requests: How many.
        rate_per_s: Per second of the trace's duration.
        cv: Coefficient of variation of the inter-arrival times (1 for Poisson arrivals); NaN
            for fewer than 3 requests.
        dispersion: Index of dispersion, variance over mean of the counts in windows of
            `WINDOWS_S` (1 for Poisson arrivals); NaN for fewer than `FEWEST_WINDOWS` windows.
        batch_share: Share of batch work.
        prompt: Prompt lengths; None without requests.
        output: Output lengths; None without requests.
    """

    name: str
    requests: int
    rate_per_s: float
    cv: float
    dispersion: tuple[float, ...]
    batch_share: float
    prompt: LengthSummary | None
    output: LengthSummary | None


def describe(trace: Trace) -> list[Summary]:
    """Summarise a trace: all of it first, then each model, if there are several."""
    whole = _summary("all", trace, np.ones(len(trace), np.bool_))
    if len(trace.model_names) == 1:
        return [whole]
    each = (_summary(name, trace, trace.model == m) for m, name in enumerate(trace.model_names))
    return [whole, *each]


def _summary(name: str, trace: Trace, mask: NDArray[np.bool_]) -> Summary:
    arrival_ns, requests = trace.arrival_ns[mask], int(mask.sum())
    gaps_ns = np.diff(arrival_ns)
    bursty = requests > 2 and gaps_ns.mean() > 0
    return Summary(
        name=name,
        requests=requests,
        rate_per_s=requests / trace.duration_s,
        cv=float(gaps_ns.std() / gaps_ns.mean()) if bursty else np.nan,
        dispersion=tuple(_dispersion(arrival_ns, trace.duration_s, w) for w in WINDOWS_S),
        batch_share=float(trace.batch_work[mask].mean()) if requests else 0.0,
        prompt=_lengths(trace.prompt_tokens[mask]) if requests else None,
        output=_lengths(trace.output_tokens[mask]) if requests else None,
    )


def _dispersion(arrival_ns: NDArray[np.int64], duration_s: float, window_s: int) -> float:
    windows = int(duration_s // window_s)
    if windows < FEWEST_WINDOWS or len(arrival_ns) == 0:
        return np.nan
    index = arrival_ns // (window_s * 10**9)
    counts = np.bincount(index[index < windows], minlength=windows)
    return float(counts.var() / counts.mean()) if counts.any() else np.nan


def _lengths(tokens: NDArray[np.int32]) -> LengthSummary:
    quantiles = tuple(float(q) for q in np.quantile(tokens, QUANTILES))
    return LengthSummary(quantiles, fit_lognormal(tokens))


def print_description(trace: Trace, console: Console) -> None:
    """Print tables, the rate over time, histograms of the lengths, and the notes.

    The fit beside the length quantiles is `fit_lognormal`. Everything fits in 80 columns.
    """
    summaries = describe(trace)
    shown = [summaries[0], *sorted(summaries[1:], key=lambda s: -s.requests)[:SHOWN_MODELS]]
    several = "s" * (len(trace.model_names) > 1)
    console.print(
        f"{len(trace):,} requests to {len(trace.model_names)} model{several} "
        f"in {trace.duration_s:,.1f} s"
    )
    if len(summaries) > len(shown):
        console.print(f"(below: all, and the {SHOWN_MODELS} busiest)")
    _print_arrivals(shown, console)
    _print_lengths("Prompt tokens", [(s.name, s.prompt) for s in shown], console)
    _print_lengths("Output tokens", [(s.name, s.output) for s in shown], console)
    _print_charts(trace, shown, console)
    for note in trace.notes:
        console.print(f"- {note}", highlight=False, markup=False, soft_wrap=True)


def _table(title: str, *headings: str) -> Table:
    table = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    # The only column that shrinks in a narrow terminal.
    table.add_column("model", max_width=20, overflow="ellipsis")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _print_arrivals(summaries: list[Summary], console: Console) -> None:
    windows = [f"IDC {window_s} s" for window_s in WINDOWS_S]
    batch = ["batch"] * any(s.batch_share for s in summaries)
    table = _table("Arrivals", "requests", "per s", "CV", *windows, *batch)
    for s in summaries:
        numbers = ("-" if np.isnan(x) else f"{x:.2f}" for x in (s.cv, *s.dispersion))
        share = [f"{s.batch_share:.0%}"] * len(batch)
        table.add_row(escape(s.name), f"{s.requests:,}", f"{s.rate_per_s:.3g}", *numbers, *share)
    console.print(table)


def _print_lengths(
    title: str, rows: list[tuple[str, LengthSummary | None]], console: Console
) -> None:
    quantiles = [f"p{100 * q:.0f}" for q in QUANTILES]
    table = _table(title, *quantiles, "fit: median", "sigma")
    for name, lengths in rows:
        if lengths is not None:
            median, sigma = lengths.lognormal
            cells = [f"{q:,.0f}" for q in (*lengths.quantiles, median)]
            table.add_row(escape(name), *cells, f"{sigma:.2f}")
    console.print(table)


def _print_charts(trace: Trace, summaries: list[Summary], console: Console) -> None:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(max_width=20, no_wrap=True)
    console.print("[italic]Rate over time, and lengths")
    for s in summaries:
        arrival_ns = trace.arrival_ns
        if s is not summaries[0]:
            arrival_ns = arrival_ns[trace.model == trace.model_names.index(s.name)]
        counts = np.histogram(arrival_ns / 1e9, bins=48, range=(0, trace.duration_s))[0]
        grid.add_row(escape(s.name), f"|{_bars(counts)}|")
    if len(trace):
        grid.add_row()
        grid.add_row("Prompt tokens", _histogram(trace.prompt_tokens))
        grid.add_row("Output tokens", _histogram(trace.output_tokens))
    console.print(grid, "", highlight=False)


def _bars(counts: NDArray[np.int64]) -> str:
    # Rounded up: what is not empty shows.
    levels = np.ceil(counts / max(counts.max(), 1) * (len(BARS) - 1)).astype(int)
    return "".join(BARS[level] for level in levels)


def _histogram(tokens: NDArray[np.int32]) -> str:
    """Two bars per power of two."""
    halves = np.floor(2 * np.log2(tokens)).astype(int)
    low, high = int(halves.min()) // 2 * 2, int(halves.max()) // 2 * 2 + 2
    counts = np.bincount(halves - low, minlength=high - low)
    return f"{2 ** (low // 2):,} |{_bars(counts)}| {2 ** (high // 2):,} (logarithmic)"


def write_plot(trace: Trace, path: str | Path) -> None:
    """Write an HTML page with the rate over time and the length distributions; opens offline.

    Raises:
        InputError: Nothing can be written at path.
    """
    import plotly.graph_objects as go
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    figure: Any = make_subplots(
        rows=2,
        cols=2,
        specs=[[{"colspan": 2}, None], [{}, {}]],
        subplot_titles=("Requests per second", "Prompt tokens", "Output tokens"),
        vertical_spacing=0.16,
    )
    bins = int(np.clip(trace.duration_s / 5, 30, 120))
    edges_s = np.linspace(0, trace.duration_s, bins + 1)
    levels = np.linspace(0, 1, 201)
    busiest = np.argsort(-trace.counts, kind="stable")[:SHOWN_MODELS]
    for rank, m in enumerate(busiest):
        mask = trace.model == m
        if not mask.any():
            continue
        rate = np.histogram(trace.arrival_ns[mask] / 1e9, bins=edges_s)[0] / np.diff(edges_s)
        colour = qualitative.D3[rank]
        name = short_name(trace.model_names[m])
        look = {"name": name, "legendgroup": str(m), "line": {"color": colour, "width": 1.5}}
        middle_s = (edges_s[:-1] + edges_s[1:]) / 2
        figure.add_trace(go.Scatter(x=middle_s, y=rate, **look), row=1, col=1)
        for column, tokens in ((1, trace.prompt_tokens), (2, trace.output_tokens)):
            quantiles = np.quantile(tokens[mask], levels)
            line = go.Scatter(x=quantiles, y=levels, showlegend=False, **look)
            figure.add_trace(line, row=2, col=column)
    figure.update_xaxes(title_text="time (s)", row=1, col=1)
    figure.update_yaxes(rangemode="tozero", row=1, col=1)
    figure.update_xaxes(type="log", title_text="tokens", dtick=1, row=2)
    figure.update_yaxes(title_text="share of requests", row=2, col=1)
    figure.update_layout(
        title_text=f"{len(trace):,} requests in {trace.duration_s:,.0f} s",
        template="plotly_white",
        height=760,
        legend={"orientation": "h", "y": -0.12},
    )
    with atomic_write(path) as file:
        file.write(figure.to_html(include_plotlyjs=True, full_html=True))

"""The figures of a report, as Plotly JSON; colours belong to policies and are the same everywhere.

Figures are transparent and say nothing of text or grid colours: the page's style sheet does, for
light and dark. A trace's ``meta`` names its policy, so that the page's legend can hide it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmrl.node.actions import VERBS
from mmrl.pages import Plot, plot_json
from mmrl.stats import performance_profile

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

LEARNED = ("#2f7de1", "#7a5af8", "#0e9384")
STEP0 = "#7fb2ef"
RULES = {
    "slack": "#e8710a",
    "slack@tuned": "#f5a524",
    "gdsf": "#3a9d5d",
    "lru": "#8fbf4d",
    "full-swap": "#c2483d",
    "static": "#9b6b9e",
    "drain-first": "#d16ba5",
    "idle-cost": "#a08c5b",
    "setup-index": "#7d8794",
}
OTHER = ("#5aa9a3", "#b5838d", "#6d83c9", "#bf9b30")
VERB_COLOURS = {
    "level100": "#2f7de1",
    "level75": "#5b97e8",
    "level50": "#87b1ef",
    "level25": "#b3cbf5",
    "level0": "#d3e0f8",
    "out": "#e8710a",
    "pause": "#f5a524",
    "resume": "#3a9d5d",
    "focus": "#7a5af8",
}
VERB_NAMES = {
    "level100": "load",
    "level75": "level ¾",
    "level50": "level ½",
    "level25": "level ¼",
    "level0": "level 0",
}
BYTES = {
    "load_bytes_per_s": ("weights loaded", "#2f7de1"),
    "stream_bytes_per_s": ("layers streamed", "#7a5af8"),
    "kv_save_bytes_per_s": ("KV saved", "#f5a524"),
    "kv_restore_bytes_per_s": ("KV restored", "#3a9d5d"),
}
LATENCY_NAMES = {
    "ttft_s": ("Time to first token", "seconds"),
    "tpot_s": ("Time per output token", "seconds"),
    "norm_latency": ("Normalised latency", "E2E over the latency alone"),
}


@dataclass(frozen=True)
class Curve:
    """A scalar over the steps of a training; dashed for the rule that it started from."""

    steps: list[int]
    values: list[float]
    dashed: bool = False


def policy_colours(policies: Iterable[dict[str, Any]]) -> dict[str, str]:
    """Return a colour per policy: rules have theirs, learned ones are told apart in order."""
    colours: dict[str, str] = {}
    learned = other = 0
    for policy in policies:
        name, kind = policy["name"], policy["kind"]
        if name in colours:
            continue
        if kind == "rule" and name in RULES:
            colours[name] = RULES[name]
        elif kind in ("rule", "bound"):
            colours[name] = OTHER[other % len(OTHER)]
            other += 1
        elif kind == "step0":
            colours[name] = STEP0
        else:
            colours[name] = LEARNED[learned % len(LEARNED)]
            learned += 1
    return colours


def load_curves(board: dict[str, Any], colours: dict[str, str], shown: Sequence[str]) -> Plot:
    """Draw goodput against load with intervals."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for policy in _drawn(row["policy"] for row in board["rows"]):
        rows = [row for row in board["rows"] if row["policy"] == policy and row["goodput_interval"]]
        rows.sort(key=lambda row: float(row["load"]))
        goodput, low, high = ([100 * row["goodput_interval"][k] for row in rows] for k in range(3))
        figure.add_scatter(
            x=[row["load"] for row in rows],
            y=goodput,
            error_y={
                "array": [top - y for top, y in zip(high, goodput, strict=True)],
                "arrayminus": [y - bottom for bottom, y in zip(low, goodput, strict=True)],
                "thickness": 1,
                "width": 3,
            },
            mode="lines+markers",
            **_line(policy, colours, shown),
        )
    figure.update_xaxes(title="load")
    figure.update_yaxes(title="goodput, %", rangemode="normal")
    return Plot("Goodput against load", plot_json(figure), 340)


def latency_cdfs(
    latencies: "pd.DataFrame", board: dict[str, Any], colours: dict[str, str], shown: Sequence[str]
) -> list[Plot]:
    """Draw the share of requests at or below each latency, a figure per metric."""
    import plotly.graph_objects as go

    mine = latencies[(latencies.board == board["name"]) & (latencies.load == board["main_load"])]
    plots = []
    for metric, (title, unit) in LATENCY_NAMES.items():
        if not (mine.metric == metric).any():
            continue  # a live server's latencies over those alone, where nobody knows the latter
        figure = go.Figure()
        at_first = mine[(mine.metric == metric) & mine.policy.isin(shown)]
        for policy in _drawn(mine.policy):
            part = mine[(mine.metric == metric) & (mine.policy == policy)]
            figure.add_scatter(
                x=part.value.clip(lower=1e-4).round(5).tolist(),
                y=(part["quantile"] * 100).round(1).tolist(),
                mode="lines",
                **_line(policy, colours, shown),
            )
        figure.update_xaxes(type="log", title=unit, **_log_ticks(at_first.value))
        figure.update_yaxes(title="requests, %", range=[0, 101])
        plots.append(Plot(title, plot_json(figure), 300))
    return plots


def _log_ticks(values: "pd.Series[float]") -> dict[str, Any]:
    """Return ticks of a logarithmic axis in plain numbers: 1, 2, 5 in each decade, or 1 alone."""
    import numpy as np

    low, high = np.log10(values.clip(lower=1e-3).quantile([0.02, 1.0]).to_numpy())
    mantissas = (1, 2, 5) if high - low < 2.5 else (1,)
    ticks = [m * 10.0**k for k in range(int(low) - 2, int(high) + 2) for m in mantissas]
    return {
        "tickvals": ticks,
        "ticktext": [f"{tick:,.10g}" for tick in ticks],
        "range": [float(low) - 0.05, float(high) + 0.05],
    }


def profiles(
    episodes: "pd.DataFrame", board: dict[str, Any], colours: dict[str, str], shown: Sequence[str]
) -> Plot:
    """Draw the performance profile: the share of episodes with more than a goodput."""
    import numpy as np
    import plotly.graph_objects as go

    mine = episodes[(episodes.board == board["name"]) & (episodes.load == board["main_load"])]
    thresholds = np.linspace(0, 1, 201)
    figure = go.Figure()
    lowest = 1.0
    for policy in _drawn(mine.policy):
        values = mine[mine.policy == policy].goodput.dropna().to_numpy()
        if len(values) == 0:
            continue
        lowest = min(lowest, float(values.min())) if policy in shown else lowest
        share = 100 * performance_profile(values, thresholds)
        figure.add_scatter(
            x=(100 * thresholds).tolist(),
            y=share.round(2).tolist(),
            mode="lines",
            line_shape="hv",
            **_line(policy, colours, shown),
        )
    figure.update_xaxes(title="goodput, %", range=[100 * max(0.0, lowest - 0.02), 100.2])
    figure.update_yaxes(title="episodes above, %", range=[0, 101])
    return Plot("Performance profile", plot_json(figure), 340)


def decision_mix(board: dict[str, Any]) -> Plot:
    """Draw how often each verb is used, per minute; waiting is left out."""
    import plotly.graph_objects as go

    rows = _main_rows(board)[::-1]
    figure = go.Figure()
    for verb in reversed(VERBS):
        rates = [row["verbs_per_min"].get(verb, 0.0) for row in rows]
        if any(rates):
            figure.add_bar(
                y=[row["policy"] for row in rows],
                x=rates,
                orientation="h",
                name=VERB_NAMES.get(verb, verb),
                marker_color=VERB_COLOURS[verb],
                hovertemplate="%{y}: %{x:.1f} a minute<extra>%{fullData.name}</extra>",
            )
    return _bars("Decisions", "per minute", figure, len(rows))


def moved_bytes(board: dict[str, Any]) -> Plot:
    """Draw what goes over the link, per minute."""
    import plotly.graph_objects as go

    rows = _main_rows(board)[::-1]
    figure = go.Figure()
    for field, (name, colour) in BYTES.items():
        rates = [row[field] * 60 / 1e9 for row in rows]
        if any(rates):
            figure.add_bar(
                y=[row["policy"] for row in rows],
                x=rates,
                orientation="h",
                name=name,
                marker_color=colour,
                hovertemplate="%{y}: %{x:.1f} GB a minute<extra>%{fullData.name}</extra>",
            )
    return _bars("Bytes over the link", "GB per minute", figure, len(rows))


def _bars(title: str, unit: str, figure: "Figure", rows: int) -> Plot:
    figure.update_layout(
        barmode="stack",
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        bargap=0.35,
    )
    figure.update_xaxes(title=unit)
    figure.update_yaxes(showgrid=False, ticks="", ticksuffix="  ")
    return Plot(title, plot_json(figure, top=48), 120 + 26 * rows)


def timeline(
    recorded: dict[str, Any], colours: dict[str, str], most_waiting: int, end_s: float
) -> Plot:
    """Draw which models are on the device, and below how many requests wait for a first token."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[0.68, 0.32], vertical_spacing=0.05
    )
    colour = colours[recorded["policy"]]
    models = recorded["models"]
    styles = {
        "resident": {"color": colour},
        "partial": {"color": colour, "opacity": 0.55},
        "loading": {
            "color": "rgba(0,0,0,0)",
            "line": {"color": colour, "width": 1},
            "pattern": {"shape": "/", "fgcolor": colour, "size": 5, "solidity": 0.4},
        },
    }
    for state, marker in styles.items():
        spans = [span for span in recorded["spans"] if span[3] == state]
        if spans:
            figure.add_bar(
                y=[models[span[0]] for span in spans],
                x=[round(span[2] - span[1], 3) for span in spans],
                base=[round(span[1], 3) for span in spans],
                orientation="h",
                marker=marker,
                hovertemplate="%{y} " + state + ", from %{base:.1f} s<extra></extra>",
                row=1,
                col=1,
            )
    figure.add_scatter(
        x=recorded["times_s"],
        y=recorded["waiting"],
        mode="lines",
        line={"color": colour, "width": 1.5, "shape": "hv"},
        fill="tozeroy",
        hovertemplate="%{y} waiting at %{x:.1f} s<extra></extra>",
        row=2,
        col=1,
    )
    figure.update_layout(barmode="overlay", bargap=0.3, showlegend=False)
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=models[::-1],
        range=[-0.6, len(models) - 0.4],
        showgrid=False,
        ticks="",
        ticksuffix="  ",
        row=1,
    )
    figure.update_yaxes(title="waiting", range=[0, max(1, most_waiting) * 1.05], row=2)
    figure.update_xaxes(range=[0, end_s])
    figure.update_xaxes(title="seconds", row=2)
    return Plot(recorded["policy"], plot_json(figure), 190 + 30 * len(models))


def training_curves(runs: dict[str, dict[str, list[Curve]]]) -> list[Plot]:
    """Draw what runs logged, a figure per title; dashed where it is the rule they started from.

    Args:
        runs: For each run and title, its curves.
    """
    import plotly.graph_objects as go

    plots = []
    for title in dict.fromkeys(title for curves in runs.values() for title in curves):
        figure = go.Figure()
        several = len(runs) > 1 or any(
            c.dashed for curves in runs.values() for c in curves.get(title, [])
        )
        for k, (run, curves) in enumerate(runs.items()):
            for curve in curves.get(title, []):
                figure.add_scatter(
                    x=curve.steps,
                    y=curve.values,
                    name=f"{run}'s rule" if curve.dashed else run,
                    mode="lines+markers" if len(curve.steps) < 30 and not curve.dashed else "lines",
                    marker_size=4,
                    line={
                        "color": LEARNED[k % len(LEARNED)],
                        "width": 2,
                        "dash": "dot" if curve.dashed else "solid",
                    },
                    hovertemplate="%{y:.4g} at %{x:,} steps<extra>%{fullData.name}</extra>",
                )
        figure.update_layout(
            showlegend=several,
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        )
        figure.update_xaxes(title="steps", nticks=5)
        plots.append(Plot(title, plot_json(figure, top=32 if several else 10), 260))
    return plots


def _line(policy: str, colours: dict[str, str], shown: Sequence[str]) -> dict[str, Any]:
    return {
        "name": policy,
        "meta": {"policy": policy},
        "visible": policy in shown,
        "line": {
            "color": colours[policy],
            "width": 2,
            "dash": "dot" if colours[policy] == STEP0 else "solid",
        },
        "hovertemplate": "%{y:.1f} % at %{x:.3g}<extra>%{fullData.name}</extra>",
    }


def _main_rows(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for row in board["rows"] if row["load"] == board["main_load"]]


def _drawn(policies: Iterable[str]) -> list[str]:
    """Return each policy once in the order of drawing: the first one lies on top."""
    return list(dict.fromkeys(policies))[::-1]

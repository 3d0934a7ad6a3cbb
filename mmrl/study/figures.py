"""The figures of the study's page: small multiples, one for each platform, a colour per model."""

from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mmrl.pages import Plot, plot_json
from mmrl.study.findings import at
from mmrl.study.tables import BATCH, BATCHES, NAMED_LINKS, Study

COLOURS = ("#2f7de1", "#e8710a", "#3a9d5d", "#c2483d", "#7a5af8", "#a08c5b", "#d16ba5", "#5aa9a3")
PARTS = {
    "stop_s": ("stop", "#7d8794"),
    "kv_save_s": ("KV save", "#f5a524"),
    "reload_s": ("weights", "#2f7de1"),
    "kv_restore_s": ("KV restore", "#3a9d5d"),
    "first_step_s": ("first step", "#7a5af8"),
}
DOT: dict[str, Any] = {"dash": "dot", "width": 1.5}
DASH: dict[str, Any] = {"dash": "dash", "width": 1.5}
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"}
LINK_RANGE = [0.87, 2.72]  # logarithms of GB/s
PARTLY = "throughput_75"  # with three quarters of the layers


def model_colours(models: list[str]) -> dict[str, str]:
    """Return a colour per model."""
    return {model: COLOURS[k % len(COLOURS)] for k, model in enumerate(models)}


def residency(study: Study, platform: str, colours: dict[str, str]) -> Plot:
    """Draw throughput against residency, streamed: alone, one sequence and many."""
    mine = at(study, "residency", platform)
    figure = go.Figure()
    for batch, style in ((BATCHES[0], {}), (BATCHES[-1], DASH)):
        for model, rows in mine[mine.batch == batch].groupby("model", sort=False):
            about = f"batch {batch}"
            _line(figure, rows, "residency", "throughput", str(model), colours, about, style)
    bends = at(study, "bends", platform).query(f"batch == {BATCHES[0]}")
    for name, knee in zip(bends.model.tolist(), bends.knee.tolist(), strict=True):
        figure.add_scatter(
            x=[100 * knee],
            y=[100],
            mode="markers",
            name=name,
            meta={"model": name},
            marker={"color": colours[name], "size": 8},
            hovertemplate=f"bends at %{{x:.1f}} %<extra>{name}</extra>",
        )
    _percent_axes(figure)
    title = f"{platform}: batch 1 (solid, a dot where it bends) and {BATCHES[-1]} (dashed)"
    return Plot(title, plot_json(figure), 320)


def beside_others(study: Study, platform: str, colours: dict[str, str]) -> Plot:
    """Draw the same at the reference batch: alone, beside a load, computed on the host."""
    mine = at(study, "residency", platform)
    figure = go.Figure()
    for model, rows in mine[mine.batch == BATCH].groupby("model", sort=False):
        name = str(model)
        _line(figure, rows, "residency", "throughput", name, colours, "streamed, alone")
        _line(
            figure, rows, "residency", "throughput_beside_load", name, colours, "beside a load", DOT
        )
        if rows.throughput_on_host.notna().all():
            _line(
                figure, rows, "residency", "throughput_on_host", name, colours, "on the host", DASH
            )
    _percent_axes(figure)
    host = ", on the host (dashed)" if mine.throughput_on_host.notna().any() else ""
    title = f"{platform}: batch {BATCH}, alone (solid), beside a load (dotted){host}"
    return Plot(title, plot_json(figure), 320)


def preemption(study: Study, platform: str) -> Plot:
    """Draw the parts of a preemption as bars, a bar for each model."""
    mine = at(study, "preemption", platform)
    rows = mine[mine.batch == 1][::-1]
    figure = go.Figure()
    for column, (name, colour) in PARTS.items():
        figure.add_bar(
            y=rows.model.tolist(),
            x=rows[column].tolist(),
            orientation="h",
            name=name,
            marker_color=colour,
            hovertemplate="%{y}: %{x:.4f} s<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(barmode="stack", showlegend=True, legend=LEGEND, bargap=0.35)
    figure.update_xaxes(title="seconds")
    figure.update_yaxes(showgrid=False, ticks="", ticksuffix="  ")
    return Plot(f"{platform}: one sequence", plot_json(figure, top=48), 130 + 26 * len(rows))


def from_published(study: Study, platform: str) -> Plot:
    """Draw the way from the published totals to ours on a platform, step by step."""
    mine = study.tables["published"]
    mine = mine[mine.platform == platform][::-1]
    steps = {
        "published_s": ("published", "#c2483d"),
        "without_fixed_s": ("its fixed part gone", "#e8710a"),
        "page_locked_s": ("and page-locked on its link", "#f5a524"),
        "ours_s": (f"ours on {platform}", "#2f7de1"),
    }
    labels = (mine.model + "<br>" + mine.host.str.removeprefix("study-")).tolist()
    figure = go.Figure()
    for column, (name, colour) in list(steps.items())[::-1]:
        figure.add_bar(
            y=labels,
            x=mine[column].tolist(),
            orientation="h",
            name=name,
            marker_color=colour,
            hovertemplate="%{x:.3f} s<extra>%{fullData.name}</extra>",
        )
    legend = LEGEND | {"traceorder": "reversed"}
    figure.update_layout(barmode="group", showlegend=True, legend=legend, bargap=0.3)
    figure.update_xaxes(title="seconds", rangemode="tozero")
    figure.update_yaxes(showgrid=False, ticks="", ticksuffix="  ")
    title = f"From the published figures to {platform}"
    return Plot(title, plot_json(figure, top=48), 120 + 62 * len(labels), wide=True)


def by_context(study: Study, platform: str, colours: dict[str, str]) -> list[Plot]:
    """Draw the throughput of partly resident models, and the pause, against the context."""
    mine = at(study, "context", platform)
    rows = mine[mine.batch == BATCH]
    contexts = sorted(rows.context_tokens.unique().tolist())
    ticks = {"tickvals": contexts, "ticktext": [_count(c) for c in contexts]}
    return _pair(rows, "context_tokens", "tokens per sequence", platform, colours, ticks)


def by_link(study: Study, platform: str, colours: dict[str, str]) -> list[Plot]:
    """Draw the throughput of partly resident models, and the pause, against the link's rate."""
    mine = at(study, "link", platform)
    rows = mine[mine.batch == BATCH]
    names = [f"{name.removeprefix('NVLink-')}" for name in NAMED_LINKS]
    ticks = {"tickvals": list(NAMED_LINKS.values()), "ticktext": names, "range": LINK_RANGE}
    return _pair(rows, "link_gb_per_s", "link, 8 to 450 GB/s", platform, colours, ticks)


def importance(ranking: pd.DataFrame) -> list[Plot]:
    """Draw the median size of each factor's elasticity, a figure for each result."""
    plots = []
    for result, rows in ranking.groupby("result", sort=False):
        ordered = rows.sort_values("median")
        figure = go.Figure()
        figure.add_bar(
            y=ordered.factor.tolist(),
            x=ordered["median"].tolist(),
            orientation="h",
            marker_color="#2f7de1",
            error_x={
                "type": "data",
                "symmetric": False,
                "array": (ordered.high - ordered["median"]).tolist(),
                "arrayminus": (ordered["median"] - ordered.low).tolist(),
                "thickness": 1.5,
                "width": 3,
                "color": "#98a3b3",
            },
            hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        )
        figure.update_xaxes(title="size of the elasticity", rangemode="tozero")
        figure.update_yaxes(showgrid=False, ticks="", ticksuffix="  ")
        title = f"What {result} depends on: median and range over models and platforms"
        plots.append(Plot(title, plot_json(figure), 220))
    return plots


def _pair(
    rows: pd.DataFrame,
    x: str,
    unit: str,
    platform: str,
    colours: dict[str, str],
    ticks: dict[str, Any],
) -> list[Plot]:
    throughput, pause = go.Figure(), go.Figure()
    for model, mine in rows.groupby("model", sort=False):
        _line(throughput, mine, x, PARTLY, str(model), colours, "")
        _line(pause, mine, x, "total_s", str(model), colours, "", factor=1.0, unit=" s")
    for figure in (throughput, pause):
        figure.update_xaxes(type="log", title=unit, **ticks)
    throughput.update_yaxes(title="of resident, %", range=[-3, 104])
    seconds = [m * 10.0**k for k in range(-3, 3) for m in (1, 2, 3, 5)]
    pause.update_yaxes(
        type="log", title="seconds", tickvals=seconds, ticktext=[f"{s:g}" for s in seconds]
    )
    about = f"batch {BATCH}"
    return [
        Plot(f"{platform}: decode with 75 % of the layers, {about}", plot_json(throughput), 280),
        Plot(f"{platform}: pause of a preemption, {about}", plot_json(pause), 280),
    ]


def _line(
    figure: go.Figure,
    rows: pd.DataFrame,
    x: str,
    y: str,
    model: str,
    colours: dict[str, str],
    about: str,
    style: dict[str, Any] | None = None,
    factor: float = 100.0,
    unit: str = " %",
) -> None:
    share = x == "residency"
    figure.add_scatter(
        x=(rows[x] * (100 if share else 1)).round(3).tolist(),
        y=(rows[y] * factor).round(4).tolist(),
        mode="lines",
        name=model,
        meta={"model": model},
        line={"color": colours[model], "width": 2} | (style or {}),
        hovertemplate=f"%{{y:.3g}}{unit} at %{{x:.4g}}<extra>{model} {about}</extra>",
    )


def _percent_axes(figure: go.Figure) -> None:
    figure.update_xaxes(title="layers resident, %", dtick=25, range=[0, 101])
    figure.update_yaxes(title="of resident throughput, %", range=[-3, 104])


def _count(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 else str(tokens)

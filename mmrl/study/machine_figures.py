"""Figures of what was measured of the machine: host computation, link and disk."""

from typing import Any

import plotly.graph_objects as go

from mmrl.pages import Plot, plot_json
from mmrl.study.figures import DOT, LEGEND
from mmrl.study.findings import at
from mmrl.study.tables import Study

MEMORY = {"page-locked": "#2f7de1", "pageable": "#e8710a"}
PLACES = {
    "page_locked_s": ("page-locked memory", "#2f7de1"),
    "pageable_s": ("pageable memory", "#e8710a"),
    "disk_s": ("disk", "#c2483d"),
}
DECADES = [m * 10.0**k for k in range(-3, 4) for m in (1, 2, 5)]


def host(study: Study, platform: str, colours: dict[str, str]) -> Plot:
    """Draw whole iterations on the host and streamed, over tokens, and where they cross."""
    mine = at(study, "host", platform)
    figure = go.Figure()
    for model, rows in mine.groupby("model", sort=False):
        about: dict[str, Any] = {"name": str(model), "meta": {"model": str(model)}}
        line = {"color": colours[str(model)], "width": 2}
        for column, what, style in (("host_s", "on the host", {}), ("streamed_s", "streamed", DOT)):
            figure.add_scatter(
                x=rows.tokens.tolist(),
                y=(rows[column] * 1e3).tolist(),
                mode="lines",
                line=line | style,
                hovertemplate=f"%{{y:.3g}} ms, %{{x}} tokens<extra>{model} {what}</extra>",
                **about,
            )
        crossing = float(rows.crossing_tokens.iloc[0])
        if crossing > rows.tokens.iloc[0]:
            after = rows[rows.tokens >= crossing].iloc[0]
            figure.add_scatter(
                x=[crossing],
                y=[after.streamed_s * 1e3],
                mode="markers",
                marker={"color": colours[str(model)], "size": 10},
                hovertemplate=f"equal at {crossing:.0f} tokens<extra>{model}</extra>",
                **about,
            )
    tokens = sorted(mine.tokens.unique().tolist())
    figure.update_xaxes(type="log", title="tokens", tickvals=tokens)
    _log_seconds(figure.update_yaxes, "milliseconds", 1e3)
    title = f"{platform}: a whole model on the host (solid) and streamed (dotted)"
    return Plot(title, plot_json(figure), 320)


def link_rates(study: Study, platform: str) -> Plot:
    """Draw the rates of large copies by memory, way and what runs beside."""
    rows = at(study, "rates", platform)[::-1]
    labels = rows.way.where(rows.beside == "alone", rows.way + ", " + rows.beside)
    figure = go.Figure()
    figure.add_bar(
        y=(labels + ", " + rows.memory + "  ").tolist(),
        x=rows.gb_per_s.tolist(),
        text=[f"{rate:.1f}" for rate in rows.gb_per_s],
        textposition="outside",
        cliponaxis=False,
        orientation="h",
        marker_color=[MEMORY[memory] for memory in rows.memory],
        hovertemplate="%{y}: %{x:.1f} GB/s<extra></extra>",
    )
    figure.update_layout(bargap=0.3)
    figure.update_xaxes(title="GB/s", range=[0, 1.12 * rows.gb_per_s.max()])
    figure.update_yaxes(showgrid=False, ticks="")
    return Plot(f"{platform}: copies of 1 GiB", plot_json(figure), 300)


def cold_loads(study: Study, platform: str) -> Plot:
    """Draw how long each model takes from disk, pageable and page-locked memory."""
    rows = at(study, "cold", platform)[::-1]
    figure = go.Figure()
    for column, (name, colour) in PLACES.items():
        figure.add_scatter(
            y=rows.model.tolist(),
            x=rows[column].tolist(),
            mode="markers",
            name=name,
            marker={"color": colour, "size": 11},
            hovertemplate="%{y}: %{x:.3g} s<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(showlegend=True, legend=LEGEND)
    _log_seconds(figure.update_xaxes, "seconds", 1.0)
    figure.update_yaxes(ticks="", ticksuffix="  ")
    title = f"{platform}: a model's weights to the device, from"
    return Plot(title, plot_json(figure, top=48), 130 + 30 * len(rows))


def _log_seconds(axis: Any, title: str, per_second: float) -> None:
    ticks = [value * per_second for value in DECADES]
    axis(type="log", title=title, tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])

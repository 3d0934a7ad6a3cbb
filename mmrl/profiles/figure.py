"""One figure: how long a decode step takes when only part of a model is resident."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmrl.profiles.costs import CostModel
from mmrl.profiles.link import step_s
from mmrl.profiles.schema import Profile

if TYPE_CHECKING:
    import plotly.graph_objects as go

BATCHES = {32: ("#cc6677", 7), 8: ("#228833", 4), 1: ("#332288", 1.5)}  # batch: colour, width
CONTEXT_TOKENS = 1024
COLUMNS = 3
TICKS_MS = [m * 10**e for e in range(-1, 5) for m in (1, 2, 5)]


def residency_figure(profiles: Sequence[Profile]) -> "go.Figure":
    """Draw decode step time against residency, a panel for each profile, a line for each batch."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    columns = min(COLUMNS, len(profiles))
    rows = -(-len(profiles) // columns)
    titles = [f"{p.model}<br>{p.weight_bytes / 1e9:.1f} GB, {p.kind}" for p in profiles]
    spacing: dict[str, Any] = {"vertical_spacing": 0.16, "horizontal_spacing": 0.07}
    figure = make_subplots(rows, columns, subplot_titles=titles, shared_xaxes="all", **spacing)
    for i, profile in enumerate(profiles):
        costs = CostModel(profile)
        layers = range(profile.layers + 1)
        for batch, (colour, width) in BATCHES.items():
            figure.add_trace(
                go.Scatter(
                    x=[100 * n / profile.layers for n in layers],
                    y=[1e3 * step_s(costs, n, batch, CONTEXT_TOKENS) for n in layers],
                    customdata=list(layers),
                    name=f"batch {batch}",
                    legendgroup=str(batch),
                    showlegend=i == 0,
                    mode="lines",
                    line={"color": colour, "width": width},
                    hovertemplate="%{customdata} of "
                    f"{profile.layers} layers: %{{y:.1f}} ms<extra>batch {batch}</extra>",
                ),
                row=i // columns + 1,
                col=i % columns + 1,
            )
    figure.update_xaxes(title_text="layers resident (%)", showticklabels=True, dtick=25)
    ticks = [f"{ms:g}" for ms in TICKS_MS]
    figure.update_yaxes(type="log", tickvals=TICKS_MS, ticktext=ticks)
    figure.update_yaxes(title_text="decode step (ms)", col=1)
    figure.update_annotations(font_size=13)
    platform = ", ".join(sorted({f"{p.platform} ({p.kind})" for p in profiles}))
    figure.update_layout(
        title={
            "text": f"Decode step against residency on {platform}",
            "subtitle": {
                "text": f"{CONTEXT_TOKENS:,} tokens per sequence. Sloping: the link paces,<br>"
                "whatever the batch. Flat: the device paces."
            },
            "yref": "container",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 20},
        },
        template="plotly_white",
        height=200 + 340 * rows,
        legend={"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "x": 0},
        margin={"t": 150, "b": 100, "l": 60, "r": 20},
    )
    return figure

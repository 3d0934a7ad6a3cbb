"""The figures of a fidelity report: live and simulated side by side, for one run."""

from typing import Any

import numpy as np
import numpy.typing as npt

from mmrl.agents.figures import timeline as draw_timeline
from mmrl.deploy.validate.compare import Compared, Played
from mmrl.deploy.validate.steps import Steps, priced_steps
from mmrl.deploy.validate.trail import timeline
from mmrl.metrics import request_latencies
from mmrl.pages import Plot, plot_json

SIDES = {"live": "#e8710a", "forced": "#2f7de1", "closed loop": "#0e9384"}
DASHES = {"live": "solid", "forced": "solid", "closed loop": "dot"}
MODELS = ("#2f7de1", "#e8710a", "#3a9d5d", "#7a5af8", "#c2483d", "#9b6b9e", "#5aa9a3", "#bf9b30")
LATENCIES = ("Time to first token, s", "Time per output token, s", "End to end, s")
LEAST = 5  # iterations of a kind, or its figure is left out


def cdfs(run: Compared) -> list[Plot]:
    """Draw the share of requests at or below each latency: live, forced, closed loop."""
    import plotly.graph_objects as go

    sides = {name: _latencies(played) for name, played in _sides(run).items()}
    plots = []
    for i, title in enumerate(LATENCIES):
        figure = go.Figure()
        for side, latencies in sides.items():
            values = np.sort(latencies[i])
            share = 100 * np.arange(1, len(values) + 1) / max(1, len(values))
            figure.add_scatter(
                x=np.maximum(values, 1e-4).round(5).tolist(),
                y=share.round(2).tolist(),
                name=side,
                mode="lines",
                line={"color": SIDES[side], "width": 2, "dash": DASHES[side]},
                hovertemplate="%{y:.1f} % at %{x:.3g} s<extra>%{fullData.name}</extra>",
            )
        _legend(figure)
        figure.update_xaxes(type="log", title="seconds", nticks=6)
        figure.update_yaxes(title="requests, %", range=[0, 101])
        plots.append(Plot(title, plot_json(figure, top=32), 300))
    return plots


def scatters(run: Compared) -> list[Plot]:
    """Draw each request's latency in the simulator, forced, against that of the live node."""
    import plotly.graph_objects as go

    live, forced = run.live, run.forced
    both = (live.r["first_ns"] >= 0) & (forced.r["first_ns"] >= 0)
    done = both & (live.r["finish_ns"] >= 0) & (forced.r["finish_ns"] >= 0)
    plots = []
    for title, field, chosen in (
        ("Time to first token, s", "first_ns", both),
        ("End to end, s", "finish_ns", done),
    ):
        figure = go.Figure()
        x, y = ((side.r[field] - side.r["arrival_ns"]) * 1e-9 for side in (live, forced))
        ends = [float(values[chosen].min()) for values in (x, y) if chosen.any()]
        ends += [float(values[chosen].max()) for values in (x, y) if chosen.any()]
        if ends:
            line = [max(min(ends), 1e-4), max(ends)]
            figure.add_scatter(
                x=line, y=line, mode="lines", line={"color": "#888", "width": 1}, showlegend=False
            )
        for m, name in enumerate(run.recording.models):
            mine = chosen & (live.r["model"] == m)
            figure.add_scatter(
                x=x[mine].round(5).tolist(),
                y=y[mine].round(5).tolist(),
                name=name,
                mode="markers",
                marker={"color": _colour(m), "size": 4, "opacity": 0.6},
                hovertemplate="live %{x:.3g} s, simulated %{y:.3g} s"
                "<extra>%{fullData.name}</extra>",
            )
        _legend(figure)
        figure.update_xaxes(type="log", title="live", nticks=6)
        figure.update_yaxes(type="log", title="forced", nticks=6)
        plots.append(Plot(title, plot_json(figure, top=56), 360))
    return plots


def step_curves(run: Compared) -> list[Plot]:
    """Draw the median error of the price of an iteration by model, over batch or tokens."""
    steps = priced_steps(run.recording)
    names = run.recording.models
    over = {"decode": "batch", "prefill": "tokens", "streamed": "batch"}
    return [
        _curve(f"{kind.capitalize()}: error of the price, %", steps[kind], over[kind], names)
        for kind in steps
        if len(steps[kind]["model"]) >= LEAST
    ]


def timelines(run: Compared) -> list[Plot]:
    """Draw which models were on the device: live, forced, closed loop, one below the other."""
    node = run.recording.node()
    count = int(node.state.n_models)
    recorded = [
        timeline(
            side,
            played.trail,
            run.recording.models,
            node.state.pieces[:count],
            float(played.s.now_ns) * 1e-9,
        )
        for side, played in _sides(run).items()
    ]
    most = max(max(one["waiting"]) for one in recorded)
    end_s = max(one["end_s"] for one in recorded)
    plots = [draw_timeline(one, SIDES, most, end_s) for one in recorded]
    return [Plot(plot.title, plot.json, plot.height, wide=True) for plot in plots]


def _sides(run: Compared) -> dict[str, Played]:
    return dict(zip(SIDES, (run.live, run.forced, run.closed), strict=True))


def _latencies(played: Played) -> tuple[npt.NDArray[np.float64], ...]:
    return request_latencies(played.s, played.r)


def _curve(title: str, steps: Steps, over: str, names: list[str]) -> Plot:
    """Draw the median error of each model's iterations, in bins that double."""
    import plotly.graph_objects as go

    figure = go.Figure()
    errors = 100 * (steps["price_s"] / np.maximum(steps["took_s"], 1e-12) - 1)
    bins = np.floor(np.log2(np.maximum(1, steps[over]))).astype(int)
    for m, name in enumerate(names):
        mine = steps["model"] == m
        points: list[tuple[float, float, int]] = []
        for k in np.unique(bins[mine]).tolist():
            chosen = mine & (bins == k)
            if chosen.any():
                at = float(np.median(steps[over][chosen]))
                points.append((at, float(np.median(errors[chosen])), int(chosen.sum())))
        if points:
            x, y, count = zip(*points, strict=True)
            figure.add_scatter(
                x=x,
                y=[round(value, 2) for value in y],
                customdata=count,
                name=name,
                mode="lines+markers",
                line={"color": _colour(m), "width": 2},
                hovertemplate="%{y:+.1f} % at %{x:.0f}, %{customdata} iterations"
                "<extra>%{fullData.name}</extra>",
            )
    _legend(figure)
    figure.update_xaxes(type="log", title=over, nticks=8)
    figure.update_yaxes(title="simulated / live − 1, %")
    return Plot(title, plot_json(figure, top=56), 320)


def _colour(m: int) -> str:
    return MODELS[m % len(MODELS)]


def _legend(figure: Any) -> None:
    figure.update_layout(
        showlegend=True, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
    )

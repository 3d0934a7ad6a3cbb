"""How policies look in figures, and the one figure that is drawn here: an episode's timeline.

Colours belong to policies and are the same everywhere; the report draws its figures in the browser
(``templates/figures.js``) with the colours from here.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from mmrl.pages import Plot, plot_json

LEARNED = ("#2f7de1", "#7a5af8", "#0e9384", "#5560e0", "#06aed4", "#9e77ed")
LIVE = ("#d92d8a", "#b83280", "#ee6ab0")
STEP0 = "#7fb2ef"
RULES = {
    "slack": "#e8710a",
    "slack-goodput": "#f5a524",
    "partial": "#5aa9a3",
    "gdsf": "#3a9d5d",
    "lru": "#8fbf4d",
    "full-swap": "#c2483d",
    "static": "#9b6b9e",
    "drain-first": "#d16ba5",
    "idle-cost": "#a08c5b",
    "setup-index": "#7d8794",
}
TUNING = {"@tuned": "dash", " (once)": "dashdot", " (cell)": "longdash"}  # of a rule, by its name
OTHER = ("#b5838d", "#6d83c9", "#bf9b30")
DASHES = ("solid", "dash", "dashdot", "longdash")


class Style(NamedTuple):
    """How a policy is drawn: when colours run out, lines differ by their dashes."""

    colour: str
    dash: str


def policy_styles(policies: Iterable[tuple[str, str]]) -> dict[str, Style]:
    """Return a style per policy: rules have theirs, the others are told apart in order.

    Args:
        policies: Name and kind of each.
    """
    styles: dict[str, Style] = {}
    counts = dict.fromkeys(("learned", "live", "other"), 0)
    palettes = {"learned": LEARNED, "live": LIVE, "other": OTHER}
    for name, kind in policies:
        if name in styles:
            continue
        tuning = next((ending for ending in TUNING if name.endswith(ending)), "")
        rule = name.removesuffix(tuning)
        if kind == "rule" and rule in RULES:
            styles[name] = Style(RULES[rule], TUNING.get(tuning, "solid"))
        elif kind == "step0":
            styles[name] = Style(STEP0, "dot")
        else:
            group = kind if kind in palettes else "other"
            turn, place = divmod(counts[group], len(palettes[group]))
            styles[name] = Style(palettes[group][place], DASHES[turn % len(DASHES)])
            counts[group] += 1
    return styles


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

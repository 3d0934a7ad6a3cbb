"""`write_plan`: the answers of a plan as one page and as JSON; what both say is worked out here."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

import mmrl
from mmrl.files import atomic_write, write_json
from mmrl.pages import Plot, plot_json, render_page
from mmrl.plan.capacity import EPISODES, GOODPUT, Answer, Curve
from mmrl.plan.question import Question

TEMPLATE = Path(__file__).parent / "templates" / "plan.html"
PAGE, ANSWERS = "index.html", "plan.json"
COLOURS = ("#2f7de1", "#e8710a", "#3a9d5d", "#c2483d", "#7a5af8", "#a08c5b", "#d16ba5", "#5aa9a3")
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}


def write_plan(question: Question, answers: list[Answer], out: Path) -> Path:
    """Write ``index.html`` and ``plan.json`` into a folder and return the page.

    Args:
        question: What was asked.
        answers: One for each site, the site asked about first.
        out: The folder; made if need be.

    Raises:
        InputError: Nothing can be written there.
        MmrlError: The disk is full.
    """
    write_json(out / ANSWERS, as_json(question, answers))
    with atomic_write(out / PAGE) as file:
        file.write(render(question, answers))
    return out / PAGE


def as_json(question: Question, answers: list[Answer]) -> dict[str, Any]:
    """Return question and answers in plain values."""
    return {
        "version": mmrl.__version__,
        "goodput": GOODPUT,
        "episodes": EPISODES,
        "models": list(question.names),
        "rates_per_s": question.rates_per_s and list(question.rates_per_s),
        "targets": question.targets,
        "traffic": question.about,
        "answers": [
            {
                "site": asdict(answer.site),
                "label": answer.site.label,
                "fit": asdict(answer.fit) | {"verdict": answer.fit.verdict},
                "policies": [_policy(question, curve) for curve in answer.curves],
                "rules_at_capacity": answer.rules,
            }
            for answer in answers
        ],
    }


def _policy(question: Question, curve: Curve) -> dict[str, Any]:
    wanted = at_wanted(question, curve)
    return {
        "policy": curve.policy,
        "capacity_per_s": curve.capacity_per_s,
        "model_capacity_per_s": curve.model_capacity_per_s(question.shares),
        "goodput_at_wanted": None if wanted is None else wanted[0],
        "model_goodput_at_wanted": None if wanted is None else wanted[1],
        "curve": {
            "rates_per_s": curve.rates_per_s.tolist(),
            "goodput": curve.goodput.tolist(),
            "models": [[_told(x) for x in row] for row in curve.models.tolist()],
        },
    }


def _told(goodput: float) -> float | None:
    return None if math.isnan(goodput) else goodput


def at_wanted(question: Question, curve: Curve) -> tuple[float, list[float | None]] | None:
    """Return goodput of fleet and models at the wanted rates.

    None where no rates are wanted or none like these were played; a model's is None where it had
    too few requests.
    """
    if question.total_per_s is None:
        return None
    found = curve.at(question.total_per_s)
    return None if found is None else (found[0], [_told(x) for x in found[1].tolist()])


def headline(question: Question, answers: list[Answer]) -> list[str]:
    """Return the answer about the site asked about, and what changes it most, in sentences."""
    first = answers[0]
    where = first.site.label
    if first.fit.reason:
        return [f"The fleet does not fit on {where}", first.fit.reason]
    policy = first.curves[0]
    turns = first.fit.verdict == "takes turns"
    memory = (
        f"{sum(first.fit.weights_gb):.1f} GB of weights on {first.fit.budget_gb:g} GB: "
        f"{'the models take turns' if turns else 'all models stay resident'}."
    )
    capacity = policy.capacity_per_s
    if capacity is None:
        lead = f"On {where} {policy.policy} meets the targets of 90 % of requests at no rate"
        return [lead, memory]
    lead = f"On {where} {policy.policy} carries {capacity:.2g} requests/s"
    if question.total_per_s is not None:
        lead += f", {capacity / question.total_per_s:.1f} times what is wanted"
    return [lead, memory, *_served(question, policy), *_better(first), *_change(answers)]


def _served(question: Question, policy: Curve) -> list[str]:
    wanted = at_wanted(question, policy)
    if question.total_per_s is None:
        return []
    if wanted is None:
        return [f"The wanted {question.total_per_s:.3g} requests/s are beyond all that was played."]
    met = f"At the wanted rates {100 * wanted[0]:.1f} % of the requests meet their targets"
    pairs = zip(wanted[1], question.names, strict=True)
    short = sorted((x, name) for x, name in pairs if x is not None and x < GOODPUT)
    below = ", ".join(f"{name} ({100 * x:.1f} %)" for x, name in short)
    return [f"{met}; below 90 %: {below}." if short else f"{met}; no model is below 90 %."]


def _better(answer: Answer) -> list[str]:
    if len(answer.curves) == 1:
        return [f"No hand-written rule does better than {answer.curves[0].policy} there."]
    best = answer.curves[1]
    return [f"The best rule there, {best.policy}, carries {_rate(best.capacity_per_s)} requests/s."]


def _change(answers: list[Answer]) -> list[str]:
    """Say which alternative carries most."""
    found = [
        (answer.curves[0].capacity_per_s, answer)
        for answer in answers[1:]
        if answer.curves and answer.curves[0].capacity_per_s is not None
    ]
    now = answers[0].curves[0].capacity_per_s
    if not found or now is None:
        return []
    most, answer = max(found, key=lambda pair: pair[0] or 0.0)
    assert most is not None
    return [
        f"Of the alternatives {answer.site.label} carries most: {most:.2g} requests/s, "
        f"{most / now:.2f} times as much."
    ]


def _rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def render(question: Question, answers: list[Answer]) -> str:
    """Return the page."""
    sentences = headline(question, answers)
    first = answers[0]
    return render_page(
        TEMPLATE,
        {"rate": _rate, "percent": lambda x: "–" if x is None else f"{100 * x:.1f}"},
        title=f"mmrl plan: {sentences[0]}",
        lead=sentences[0],
        more=sentences[1:],
        names=question.names,
        wanted=question.rates_per_s,
        traffic=question.about,
        targets=question.targets,
        goodput=GOODPUT,
        episodes=EPISODES,
        sites=as_json(question, answers)["answers"],
        figures=[_curves(question, answers), _bars(question, first)] if first.curves else [],
        rules=sorted(first.rules.items(), key=lambda item: -item[1]),
    )


def _curves(question: Question, answers: list[Answer]) -> Plot:
    figure = go.Figure()
    for answer, colour in zip(answers, COLOURS * len(answers), strict=False):
        for k, curve in enumerate(answer.curves):
            figure.add_scatter(
                x=curve.rates_per_s.round(4).tolist(),
                y=(100 * curve.goodput).round(2).tolist(),
                mode="lines",
                name=f"{answer.site.label}: {curve.policy}",
                line={"color": colour, "width": 2, "dash": "dash" if k else "solid"},
                hovertemplate="%{y:.1f} % at %{x:.3g}/s<extra>%{fullData.name}</extra>",
            )
    figure.add_hline(y=100 * GOODPUT, line={"color": "#98a3b3", "width": 1, "dash": "dot"})
    if question.total_per_s is not None:
        figure.add_vline(x=question.total_per_s, line={"color": "#98a3b3", "width": 1})
    ticks = [m * 10.0**k for k in range(-3, 4) for m in (1, 2, 5)]
    figure.update_xaxes(
        type="log",
        title="requests/s, whole fleet",
        tickvals=ticks,
        ticktext=[f"{t:g}" for t in ticks],
    )
    figure.update_yaxes(title="goodput, %", range=[0, 102])
    figure.update_layout(showlegend=True, legend=LEGEND | {"orientation": "v"})
    rows = sum(len(answer.curves) for answer in answers)
    json = plot_json(figure, top=24 + 20 * rows)
    return Plot("Goodput against rate, same mix of models", json, 360 + 20 * rows, wide=True)


def _bars(question: Question, answer: Answer) -> Plot:
    """Draw the highest rate of each model that is served well, beside the one wanted."""
    names = list(question.names)[::-1]
    bars: list[tuple[str, Sequence[float | None], str]] = [
        (curve.policy, curve.model_capacity_per_s(question.shares), colour)
        for curve, colour in zip(answer.curves, COLOURS, strict=False)
    ]
    if question.rates_per_s is not None:
        bars.append(("wanted", question.rates_per_s, "#98a3b3"))
    figure = go.Figure()
    for name, values, colour in reversed(bars):
        figure.add_bar(
            y=names,
            x=[0.0 if value is None else value for value in values][::-1],
            orientation="h",
            name=name,
            marker_color=colour,
            hovertemplate="%{y}: %{x:.3g}/s<extra>%{fullData.name}</extra>",
        )
    legend = LEGEND | {"traceorder": "reversed"}
    figure.update_layout(barmode="group", showlegend=True, legend=legend, bargap=0.3)
    figure.update_xaxes(title="requests/s", rangemode="tozero")
    figure.update_yaxes(showgrid=False, ticks="", ticksuffix="  ")
    title = f"Highest rate at which a model meets its targets, {answer.site.label}"
    return Plot(title, plot_json(figure, top=48), 120 + 60 * len(names), wide=True)

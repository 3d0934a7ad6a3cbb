"""`write_plan`: the answers of a plan as one page and as JSON; what both say is worked out here."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

import mmrl
from mmrl.files import atomic_write, refuse_foreign, write_json
from mmrl.pages import Plot, plot_json, render_page
from mmrl.plan.capacity import EPISODES, GOODPUT, Answer, Capacity, Curve
from mmrl.plan.question import Question

TEMPLATE = Path(__file__).parent / "templates" / "plan.html"
PAGE, ANSWERS = "index.html", "plan.json"
# No colour stands for a site and a policy; coinciding curves show through each other's gaps.
SITES = ("#2f7de1", "#e8710a", "#3a9d5d", "#c2483d", "#a08c5b", "#5aa9a3")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
POLICIES = ("#7a5af8", "#d16ba5")
GREY = "#98a3b3"
FALLING = (1 + GOODPUT) / 2  # the curves are shown from a little below the first rate under this
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}


def check_place(out: Path) -> None:
    """Refuse a folder that holds something else than a plan.

    Raises:
        InputError: It does, or it is a file.
    """
    refuse_foreign(out, (out / ANSWERS).is_file(), "plan")


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
        "verbs": question.verbs,
        "traffic": question.about,
        "answers": [
            {
                "site": asdict(answer.site),
                "label": answer.site.label,
                "fit": asdict(answer.fit) | {"verdict": answer.fit.verdict},
                "policies": [_policy(question, curve) for curve in answer.curves],
                "rules": {name: _plain(capacity) for name, capacity in answer.rules.items()},
            }
            for answer in answers
        ],
    }


def _policy(question: Question, curve: Curve) -> dict[str, Any]:
    wanted = at_wanted(question, curve)
    return {
        "policy": curve.policy,
        "capacity": _plain(curve.capacity),
        "model_capacity": [_plain(x) for x in curve.model_capacity(question.shares)],
        "goodput_at_wanted": None if wanted is None else wanted[0],
        "model_goodput_at_wanted": None if wanted is None else wanted[1],
        "curve": {
            "rates_per_s": curve.rates_per_s.tolist(),
            "goodput": curve.goodput.tolist(),
            "models": [[_told(x) for x in row] for row in curve.models.tolist()],
        },
    }


def _plain(capacity: Capacity | None) -> dict[str, Any] | None:
    return None if capacity is None else asdict(capacity)


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
    how = {
        "all at once": "all models stay resident",
        "takes turns": "the models take turns",
        "streams layers": "a model that does not fit whole streams layers",
    }[first.fit.verdict]
    weights, budget = sum(first.fit.weights_gb), first.fit.budget_gb
    memory = f"{weights:.1f} GB of weights on {budget:g} GB: {how}."
    capacity = policy.capacity
    if capacity is None:
        lead = f"On {where} {policy.policy} meets the targets of 90 % of requests at no rate"
        return [lead, memory, *_better(first)]
    lead = f"On {where} {policy.policy} carries {_in_words(capacity)}"
    if question.total_per_s is not None:
        lead += f", {_times(capacity, question.total_per_s)} what is wanted"
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
    if best.capacity is None:
        return ["No hand-written rule meets the targets of 90 % of the requests there."]
    return [f"The best rule there, {best.policy}, carries {_in_words(best.capacity)}."]


def _change(answers: list[Answer]) -> list[str]:
    """Say which alternatives carry most."""
    found = [
        (answer.site.label, answer.curves[0].capacity)
        for answer in answers[1:]
        if answer.curves and answer.curves[0].capacity is not None
    ]
    now = answers[0].curves[0].capacity
    if not found or now is None:
        return []
    most = max(capacity for _, capacity in found)
    words = _in_words(most)
    first = [label for label, capacity in found if _in_words(capacity) == words]
    carry = "carries" if len(first) == 1 else "carry"
    sentence = f"Of the alternatives {' and '.join(first)} {carry} most: {words}"
    if words == _in_words(now):
        sentence += f", as much as {answers[0].site.label}"
    elif not now.at_least:
        sentence += f", {_times(most, now.per_s)} as much"
    more = [
        f"; {label} {_in_words(capacity)}"
        for label, capacity in found
        if capacity.at_least and label not in first
    ]
    return [f"{sentence}{''.join(more)}."]


def rate(value: float | None) -> str:
    """Return a rate for a table or sentence."""
    return "–" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def carried(capacity: Capacity | None) -> str:
    """Return a capacity for a table."""
    if capacity is None:
        return "–"
    return f"≥ {rate(capacity.per_s)}" if capacity.at_least else rate(capacity.per_s)


def _in_words(capacity: Capacity) -> str:
    return f"{'at least ' if capacity.at_least else ''}{rate(capacity.per_s)} requests/s"


def _times(capacity: Capacity, other_per_s: float) -> str:
    times = f"{rate(capacity.per_s / other_per_s)} times"
    return f"at least {times}" if capacity.at_least else times


def render(question: Question, answers: list[Answer]) -> str:
    """Return the page."""
    sentences = headline(question, answers)
    first = answers[0]
    rules = sorted(first.rules.items(), key=lambda item: item[1] or Capacity(0), reverse=True)
    return render_page(
        TEMPLATE,
        {
            "rate": rate,
            "carried": lambda x: carried(x and Capacity(**x)),
            "percent": lambda x: "–" if x is None else f"{100 * x:.1f}",
        },
        title=f"mmrl plan: {sentences[0]}",
        lead=sentences[0],
        more=sentences[1:],
        names=question.names,
        wanted=question.rates_per_s,
        traffic=question.about,
        targets=question.targets,
        verbs=question.verbs,
        goodput=GOODPUT,
        episodes=EPISODES,
        sites=as_json(question, answers)["answers"],
        figures=[*_curves(question, answers), _bars(question, first)] if first.curves else [],
        rules=[(name, _plain(capacity)) for name, capacity in rules],
    )


def _curves(question: Question, answers: list[Answer]) -> list[Plot]:
    """Draw goodput over rates: of the policy at all sites, and of the best rules if others."""
    curves = [curve for answer in answers for curve in answer.curves]
    wanted = question.total_per_s
    falls = [
        curve.rates_per_s[np.argmax([*(curve.goodput[:-1] < FALLING), True])]  # the last if never
        for curve in curves
    ]
    low = max(min(*falls, wanted or np.inf) / 2, min(curve.rates_per_s[0] for curve in curves))
    shown = float(low), max(wanted or 0.0, *(float(curve.rates_per_s[-1]) for curve in curves))
    policy = answers[0].curves[0].policy
    plots = []
    for k, name in enumerate((policy, "the best rule of each site")):
        drawn = [(n, answer) for n, answer in enumerate(answers) if len(answer.curves) > k]
        if not drawn:
            continue
        figure = go.Figure()
        for n, answer in drawn:
            curve, label = answer.curves[k], answer.site.label
            figure.add_scatter(
                x=curve.rates_per_s.round(4).tolist(),
                y=(100 * curve.goodput).round(2).tolist(),
                mode="lines",
                name=f"{label}: {curve.policy}" if k else label,
                line={
                    "color": SITES[n % len(SITES)],
                    "width": 2,
                    "dash": DASHES[n % len(DASHES)],
                },
                hovertemplate="%{y:.1f} % at %{x:.3g}/s<extra>%{fullData.name}</extra>",
            )
        _mark(figure, wanted, shown)
        json = plot_json(figure, top=24 + 20 * len(drawn))
        plots.append(Plot(f"Goodput against rate: {name}", json, 360 + 20 * len(drawn)))
    return plots


def _mark(figure: go.Figure, wanted_per_s: float | None, shown: tuple[float, float]) -> None:
    """Complete a figure of goodput over rates: axes, and what is enough and what is wanted."""
    enough = 100 * GOODPUT
    figure.add_hline(y=enough, line={"color": GREY, "width": 1, "dash": "dot"})
    words = {"showarrow": False, "xanchor": "left", "font": {"size": 11}}
    figure.add_annotation(
        x=0, xref="x domain", y=enough, yanchor="top", text=f"{enough:.0f} %: carried", **words
    )
    if wanted_per_s is not None:
        figure.add_vline(x=wanted_per_s, line={"color": GREY, "width": 1})
        x = math.log10(wanted_per_s)
        figure.add_annotation(x=x, y=0, yanchor="bottom", text=" wanted", **words)
    ticks = [m * 10.0**k for k in range(-3, 4) for m in (1, 2, 5)]
    figure.update_xaxes(
        type="log",
        title="requests/s, whole fleet",
        tickvals=ticks,
        ticktext=[f"{t:g}" for t in ticks],
        range=[math.log10(rate_per_s) for rate_per_s in shown],
    )
    figure.update_yaxes(title="goodput, %", range=[0, 102])
    figure.update_layout(showlegend=True, legend=LEGEND | {"orientation": "v"})


def _bars(question: Question, answer: Answer) -> Plot:
    """Draw the highest rate of each model that is served well, beside the one wanted."""
    names = list(question.names)[::-1]
    bars: list[tuple[str, list[Capacity | None], str]] = [
        (curve.policy, curve.model_capacity(question.shares), colour)
        for curve, colour in zip(answer.curves, POLICIES, strict=False)
    ]
    if question.rates_per_s is not None:
        bars.append(("wanted", [Capacity(r) for r in question.rates_per_s], GREY))
    figure = go.Figure()
    for name, values, colour in reversed(bars):
        figure.add_bar(
            y=names,
            x=[0.0 if value is None else value.per_s for value in values][::-1],
            text=[carried(value) for value in values][::-1],
            textposition="outside",
            cliponaxis=False,
            orientation="h",
            name=name,
            marker_color=colour,
            hovertemplate="%{y}: %{text}/s<extra>%{fullData.name}</extra>",
        )
    legend = LEGEND | {"traceorder": "reversed"}
    figure.update_layout(barmode="group", showlegend=True, legend=legend, bargap=0.3)
    figure.update_xaxes(title="requests/s", rangemode="tozero")
    figure.update_yaxes(showgrid=False, ticks="", ticksuffix="  ")
    title = f"Highest rate at which a model meets its targets, {answer.site.label}"
    return Plot(title, plot_json(figure, top=48), 120 + 60 * len(names), wide=True)

"""`write_study`: one folder with the page about a study and its tables as CSV and JSON.

The page only shows what is in the tables; what it says in words is put together from them.
"""

import math
from pathlib import Path
from typing import Any

import pandas as pd

import mmrl
from mmrl.files import atomic_write, refuse_foreign, write_json
from mmrl.pages import render_page
from mmrl.study import figures, machine_figures
from mmrl.study.findings import contradictions, lead, ours, ranking
from mmrl.study.headings import headings
from mmrl.study.tables import BATCH, CONTEXT, OUTPUTS, RESIDENCIES, Study

TEMPLATE = Path(__file__).parent / "templates" / "study.html"
PAGE, TABLES = "index.html", "study.json"


def check_place(out: Path) -> None:
    """Refuse a folder that holds something else than a study.

    Raises:
        InputError: It does, or it is a file.
    """
    refuse_foreign(out, (out / TABLES).is_file(), "study")


def write_study(study: Study, out: Path) -> Path:
    """Write ``index.html``, ``study.json`` and a CSV for each table into a folder.

    Args:
        study: All tables.
        out: The folder; it is made if need be, and an earlier study in it is replaced.

    Returns:
        The page.

    Raises:
        InputError: It holds something else, or nothing can be written there.
        MmrlError: The disk is full.
    """
    check_place(out)
    write_json(out / TABLES, as_json(study))  # first: by it the folder is known again
    for name, table in study.tables.items():
        with atomic_write(out / f"{name}.csv") as file:
            table.to_csv(file, index=False)
    with atomic_write(out / PAGE) as file:
        file.write(render(study))
    return out / PAGE


def as_json(study: Study) -> dict[str, Any]:
    """Return all tables as lists of rows, with what they were made from."""
    return {
        "version": mmrl.__version__,
        "reference": {"batch": BATCH, "context_tokens": CONTEXT},
        "sources": _sources(study),
        "tables": {name: _records(table) for name, table in study.tables.items()},
    }


def render(study: Study) -> str:
    """Return the page."""
    colours = figures.model_colours(study.models)
    sentences = lead(study)
    return render_page(
        TEMPLATE,
        {
            "percent": lambda x: "–" if pd.isna(x) else f"{100 * x:.0f}",
            "signed": lambda x: f"{x:+.2f}".replace("-", "−"),
            "seconds": _seconds,
            "whole": lambda x: "–" if pd.isna(x) else f"{int(x):,}",
            "tokens": _tokens,
            "heat": lambda x: f"{min(1.0, abs(x)):.3f}",
        },
        title=f"mmrl study: {sentences[0]}",
        lead=sentences[0],
        more=sentences[1:],
        headings=headings(study),
        batch=BATCH,
        context=CONTEXT,
        legend=[{"name": name, "colour": colour} for name, colour in colours.items()],
        residency=[figures.residency(study, p, colours) for p in study.platforms],
        beside=[figures.beside_others(study, p, colours) for p in study.platforms],
        bends=_records(study.tables["bends"]),
        host=[machine_figures.host(study, p, colours) for p in _with(study, "host")],
        hosts=_hosts(study),
        neighbours=_records(study.tables["neighbours"]),
        hooks=_records(study.tables["hooks"]),
        preemption=[figures.preemption(study, p) for p in study.platforms],
        preemptions=_records(study.tables["preemption"].query("batch == 1")),
        published=_records(study.tables["published"]),
        published_kv=_records(study.tables["published_kv"]),
        published_figure=figures.from_published(study, ours(study)),
        contradictions=contradictions(study),
        by_context=[
            plot for p in study.platforms for plot in figures.by_context(study, p, colours)
        ],
        outputs=_outputs(study),
        by_link=[plot for p in study.platforms for plot in figures.by_link(study, p, colours)],
        links=_links(study),
        rate_figures=[machine_figures.link_rates(study, p) for p in _with(study, "rates")],
        rates=_records(study.tables["rates"]),
        cold_figures=[machine_figures.cold_loads(study, p) for p in _with(study, "cold")],
        cold=_records(study.tables["cold"]),
        importance=figures.importance(ranking(study)),
        elasticity=_elasticity(study),
        pays=_pays(study),
        batches=_records(study.tables["batches"]),
        sources=_sources(study),
        tables=list(study.tables),
    )


def _with(study: Study, table: str) -> list[str]:
    """Return the platforms that a table has rows of."""
    return [name for name in study.platforms if name in set(study.tables[table].platform)]


def _hosts(study: Study) -> dict[str, Any]:
    """Return, for each model, seconds on the host by tokens, and seconds streamed."""
    table = study.tables["host"]
    tokens = sorted(set(table.tokens.tolist()))
    rows = []
    for (platform, model), points in table.groupby(["platform", "model"], sort=False):
        of = points.set_index("tokens")
        rows.append(
            {
                "platform": platform,
                "model": model,
                "host_s": [of.host_s.get(n) for n in tokens],
                "streamed_s": of.streamed_s.iloc[0],
                "crossing": of.crossing_tokens.iloc[0],
            }
        )
    return {"tokens": tokens, "rows": rows}


def _outputs(study: Study) -> dict[str, Any]:
    """Return, for each model, throughput at half of the layers by length of the output."""
    table = study.tables["outputs"]
    level = f"throughput_{RESIDENCIES[2] * 100:.0f}"
    return {
        "lengths": OUTPUTS,
        "rows": [
            {
                "platform": platform,
                "model": model,
                "throughput": rows[level].tolist(),
                "share": rows.preemption_share.tolist(),
            }
            for (platform, model), rows in table.groupby(["platform", "model"], sort=False)
        ],
    }


def _links(study: Study) -> dict[str, Any]:
    """Return, for each model, throughput with most of the layers and the pause, by named link."""
    table = study.tables["link"]
    named = table[table.link.notna() & (table.batch == BATCH)]
    return {
        "names": named.link.unique().tolist(),
        "rows": [
            {
                "platform": platform,
                "model": model,
                "kept": rows[figures.PARTLY].tolist(),
                "pause": rows.total_s.tolist(),
            }
            for (platform, model), rows in named.groupby(["platform", "model"], sort=False)
        ],
    }


def _elasticity(study: Study) -> list[dict[str, Any]]:
    """Return a block for each platform and result: a row for each model, a cell for each factor."""
    blocks = []
    for (platform, result), rows in study.tables["elasticity"].groupby(
        ["platform", "result"], sort=False
    ):
        factors = rows.factor.unique().tolist()
        cells = {(r.model, r.factor): r for r in rows.itertuples()}
        blocks.append(
            {
                "platform": platform,
                "result": result,
                "factors": factors,
                "rows": [
                    {
                        "model": model,
                        "cells": [
                            {
                                "value": cells[model, factor].elasticity,
                                "first": cells[model, factor].rank == 1,
                            }
                            for factor in factors
                        ],
                    }
                    for model in rows.model.unique()
                ],
            }
        )
    return blocks


def _pays(study: Study) -> list[dict[str, Any]]:
    """Return a matrix for each platform: rows are put out, columns run in their place."""
    blocks = []
    for platform, rows in study.tables["pays"].groupby("platform", sort=False):
        others = rows.other.unique().tolist()
        blocks.append(
            {
                "platform": platform,
                "others": others,
                "rows": [
                    {"model": model, "cells": _records(mine)}
                    for model, mine in rows.groupby("model", sort=False)
                ],
            }
        )
    return blocks


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return rows as dictionaries of plain Python values, None for an empty cell."""
    names = [str(name) for name in table.columns]
    columns = [[None if pd.isna(v) else v for v in table[name].tolist()] for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _sources(study: Study) -> list[dict[str, str]]:
    return [
        {
            "platform": case.platform.name,
            "model": case.profile.model,
            "kind": case.profile.kind,
            "date": case.profile.provenance.date or "–",
            "source": case.profile.provenance.source,
            "command": case.profile.provenance.command,
        }
        for case in study.cases
    ]


def _tokens(value: float) -> str:
    """Write a number of tokens, which may lie beyond all that was measured."""
    return "beyond" if math.isnan(value) else f"{value:.0f}"


def _seconds(value: float | None) -> str:
    """Write seconds with three significant digits."""
    if value is None or pd.isna(value):
        return "–"
    digits = 3 if value < 1 else 2
    return f"{value:.{digits}f}" if value >= 0.01 else f"{value:.4f}"

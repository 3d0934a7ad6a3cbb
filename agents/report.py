"""`write_report`: the dashboard of evaluations and training runs, one folder that opens offline.

``index.html`` holds the verdict and the table of all results; everything big (what one place is
about, a run's curves, an episode) is a script of its own in ``data/``, which the page loads when it
is wanted. Scripts, because a page that is opened from disk may not read other files.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmrl.agents.headline import Headline, overall
from mmrl.agents.report_data import Material, Report, curves, gather, trained_on
from mmrl.agents.report_suite import suite_headline
from mmrl.agents.results import Results
from mmrl.agents.runs import METRICS
from mmrl.errors import InputError
from mmrl.files import atomic_write, refuse_foreign
from mmrl.pages import PLOTLY, render_page

TEMPLATE = Path(__file__).parent / "templates" / "report.html"
SCRIPTS = ("report.js", "figures.js", "episode.js")
PAGE = "index.html"
GENERATOR = '<meta name="generator" content="mmrl report">'
DATA_NAME = re.compile(r"(place|run|episode)-[0-9a-f]{12}\.js")
ALSO = 3  # sentences below the headline


def write_report(sources: Sequence[Path], out: Path) -> Path:
    """Write the report about results and runs, and return its page.

    Args:
        sources: What `gather` takes.
        out: The folder; a report that is there already is replaced.

    Raises:
        InputError: A source is nothing or cannot be read, there is nothing to show yet, or the
            folder holds something else.
        MmrlError: The disk is full.
    """
    check_place(out)
    material = gather(sources)
    if not material.results and not any((run / METRICS).is_file() for run in material.runs):
        names = ", ".join(map(str, material.runs))
        raise InputError(f"{names}: nothing was logged or evaluated yet", "train first: mmrl train")
    return write_files(render(material), out)


def check_place(out: Path) -> None:
    """Refuse a folder that holds something else than a report.

    Raises:
        InputError: It does, or it is a file.
    """
    if out.suffix == ".html" or (out.exists() and not out.is_dir()):
        raise InputError(f"a report is a folder, {out} is a file", "for example --out report")
    page = out / PAGE
    ours = page.is_file() and GENERATOR in page.read_text("utf-8", "replace")[:1000]
    refuse_foreign(out, ours, "report")


def write_files(files: dict[str, str], out: Path) -> Path:
    """Write a report's files: the page last, so that it never misses what it names.

    Args:
        files: What `render` returned.
        out: The folder.
    """
    for name, text in files.items():
        path = out / name
        size = len(text.encode())
        if name == PAGE or not path.is_file() or path.stat().st_size != size:
            with atomic_write(path) as file:
                file.write(text)
    for path in (out / "data").glob("*.js"):
        if DATA_NAME.fullmatch(path.name) and f"data/{path.name}" not in files:
            path.unlink(missing_ok=True)
    return out / PAGE


def render(material: Material) -> dict[str, str]:
    """Return the files of a report by their names, the page last."""
    from markupsafe import Markup

    report = Report(material)
    folder = TEMPLATE.parent
    files = {PLOTLY.name: PLOTLY.read_text("utf-8")}
    index = report.index()
    for about, place in zip(index["places"], report.places, strict=True):
        about["file"] = _add(files, "place", report.detail(place))
    for about, run in zip(index["runs"], material.runs, strict=True):
        found = curves(run)
        about["file"] = _add(files, "run", found) if found else None
    index["episodes"] = [
        about | {"file": _add(files, "episode", recorded)} for about, recorded in report.episodes()
    ]
    lead, more = _lead(report)
    files[PAGE] = render_page(
        TEMPLATE,
        title=f"mmrl: {lead}",
        generator=Markup(GENERATOR),
        plotly_file=PLOTLY.name,
        date=_dates(list(material.results.values())),
        lead=lead,
        more=more,
        index=Markup(_json(index)),
        index_about=index,
        scripts=Markup("".join((folder / name).read_text("utf-8") for name in SCRIPTS)),
        missing=_missing(material),
        sources=_sources(material),
    )
    return files


def _add(files: dict[str, str], kind: str, data: dict[str, Any]) -> str:
    """Add a data file, named after its content, and return its name."""
    text = _json(data)
    name = f"data/{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.js"
    files[name] = f'mmrlData("{name}", {text});\n'
    return name


def _json(data: Any) -> str:
    """Write data so that it may stand in a script element."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _lead(report: Report) -> tuple[str, list[str]]:
    """Return the headline and the sentences below it."""
    found = overall(report.boards) if report.boards else []
    found = [Headline(*said) for suite in report.suites if (said := suite_headline(suite))] + found
    if not found:
        names = [run.name for run in report.material.runs]
        several = f"{len(names)} runs, not evaluated yet"
        return f"Training of {names[0] if len(names) == 1 else several}", []
    others = [f"{headline.title}. {headline.detail}" for headline in found[1:ALSO]]
    return found[0].title, [found[0].detail, *others]


def _missing(material: Material) -> list[str]:
    """Say what a reader may look for and does not find."""
    if material.results:
        return []
    return [
        f"{run} has not been evaluated: "
        f"mmrl evaluate --policies {run},slack --scenarios {','.join(trained_on(run))}"
        for run in material.runs
    ]


def _sources(material: Material) -> list[dict[str, Any]]:
    found = []
    for folder, results in material.results.items():
        about = results.summary["provenance"]
        facts = [
            ("when", about["time"]),
            ("command", about["command"]),
            ("commit", about["commit"] or "not in a git tree"),
            ("versions", _pairs(about["versions"])),
            ("machine", _pairs(about["machine"])),
            ("scenarios", _pairs(about["scenarios"])),
            ("episodes", _episodes(about)),
            ("bootstrap", f"10,000 resamples of episodes, seed {about['bootstrap_seed']}"),
        ]
        facts += [
            (policy["name"], policy["path"])
            for policy in results.summary["policies"]
            if policy["path"]
        ]
        found.append({"name": str(folder), "facts": facts})
    return found


def _episodes(about: dict[str, Any]) -> str:
    if "live" in about:  # one, or a trace that is no episode of anything
        return str(about["live"])
    return f"{about['split']} 0 to {about['episodes'] - 1}"


def _pairs(values: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _dates(every: list[Results]) -> str:
    days = sorted({results.summary["provenance"]["time"][:10] for results in every})
    return " to ".join(dict.fromkeys((days[0], days[-1]))) if days else ""

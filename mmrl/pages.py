"""Pages: one HTML file with everything in it, in one look, light and dark.

A page is a template beside a style sheet of the same name; what all pages share (the frame that a
template extends, style sheet, script, the macro that shows a figure) stands in ``mmrl/templates``.
Figures are Plotly JSON, are transparent and say nothing of text or grid colours: the style sheet
does. A trace's ``meta`` names its series, so that the page's legend can hide it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mmrl

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

SHARED = Path(__file__).parent / "templates"
# Plotly's lines and bars alone (npm: plotly.js-basic-dist-min): all of Plotly takes a browser four
# times as long to read.
PLOTLY = SHARED / "plotly-basic.min.js"


@dataclass(frozen=True)
class Plot:
    """A figure for a template.

    Attributes:
        title: Its heading.
        json: Plotly's JSON, ready for a script element.
        height: In pixels.
        wide: Whether it takes the whole row.
    """

    title: str
    json: str
    height: int = 320
    wide: bool = False


def plot_json(figure: "Figure", top: int = 10) -> str:
    """Return a figure for a script element, with the page's fonts and no colours of its own.

    Args:
        figure: The figure; its layout is completed.
        top: Margin above it in pixels.
    """
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12},
        margin={"l": 52, "r": 12, "t": top, "b": 42},
        hoverlabel={"font": {"family": "system-ui, sans-serif"}},
        dragmode=False,
    )
    if figure.layout.showlegend is None:
        figure.update_layout(showlegend=False)
    figure.update_xaxes(zeroline=False, automargin=True)
    figure.update_yaxes(zeroline=False, automargin=True)
    return str(figure.to_json()).replace("</", "<\\/")


def render_page(
    template: Path, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any
) -> str:
    """Return a page that needs no other file.

    Args:
        template: The template, which extends ``page.html``; ``style``, ``script``, ``plotly`` and
            ``version`` are given to it, ``title``, ``lead`` and ``more`` stand in the frame.
        filters: Filters of its own.
        **values: What it shows; every name that it uses must be there.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, SHARED]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters or {}
    sheets = (SHARED / "page.css", template.with_suffix(".css"))
    return environment.get_template(template.name).render(
        style=Markup("".join(sheet.read_text("utf-8") for sheet in sheets)),
        script=Markup((SHARED / "page.js").read_text("utf-8")),
        plotly=Markup(PLOTLY.read_text("utf-8")),
        version=mmrl.__version__,
        **values,
    )

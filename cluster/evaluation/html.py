"""Pages that open from disk: one file each, figures as SVG in it, and nobody is asked for anything."""

import io
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

LAYOUT = Path(__file__).parent
"""Where `page.html` is, which templates extend."""


def render(template: Path, **values: Any) -> str:
    """A template filled in; what is not marked as safe stays text, whatever it says.

    Raises:
        jinja2.UndefinedError: if a value is lacking.
    """
    loader = jinja2.FileSystemLoader([template.parent, LAYOUT])
    made = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return made.get_template(template.name).render(**values)


def svg(figure: Figure, name: str) -> str:
    """A figure as it stands in a page; the same one each time."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()[out.getvalue().index("<svg") :]

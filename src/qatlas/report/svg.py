"""A figure as SVG inside a page: its colours become the page's variables, so one drawing serves light, dark and print.

matplotlib writes colours as #rrggbb. Each colour of LIGHT stands for a role; in the SVG it is replaced by `var(--role)`, which the page sets for both
schemes. Text stays text (`svg.fonttype: none`): it can be selected and searched. Ids get the figure's prefix, since a page holds several drawings.
Equal figures give equal bytes: a salt in place of random ids, no date, no metadata.

The colours of the stages are Okabe and Ito's (jfly.uni-koeln.de/color), which people with colour-blindness tell apart; in dark they are lightened.
"""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from .numbers import FULL, UNTRAINED

LIGHT = {"ink": "#1c1e21", "muted": "#5d646c", "line": "#dfe3e8", "paper": "#ffffff",
         "full": "#737b84", "untrained": "#d55e00", "trained": "#0072b2", "export": "#009e73"}
DARK = {"ink": "#e8eaed", "muted": "#a2abb5", "line": "#343a42", "paper": "#16181c",
        "full": "#949da7", "untrained": "#f28e4c", "trained": "#5ab0f2", "export": "#3cc497"}
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "qatlas", "text.parse_math": False, "font.family": ["DejaVu Sans"], "font.size": 9.0,
         "axes.edgecolor": LIGHT["line"], "axes.labelcolor": LIGHT["muted"], "axes.linewidth": 0.8, "axes.spines.top": False,
         "axes.spines.right": False, "axes.titlesize": 10.0, "axes.titlelocation": "left", "axes.titlecolor": LIGHT["ink"], "axes.axisbelow": True,
         "axes.labelsize": 9.0, "grid.color": LIGHT["line"], "grid.linewidth": 0.7, "text.color": LIGHT["ink"], "xtick.color": LIGHT["muted"],
         "ytick.color": LIGHT["muted"], "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "xtick.major.size": 0.0, "ytick.major.size": 0.0,
         "xtick.minor.size": 0.0, "ytick.minor.size": 0.0, "legend.frameon": False, "legend.fontsize": 8.5, "figure.facecolor": LIGHT["paper"],
         "axes.facecolor": LIGHT["paper"], "savefig.facecolor": LIGHT["paper"], "path.simplify_threshold": 0.3}

WIDTH, HUGE = 8.0, 1e30                                           # inches; values beyond are drawn at the end of the axis


def color(stage: str) -> str:
    """The colour of a stage, by its kind.

    >>> color("trained") == LIGHT["trained"], color("gguf:q4_0") == LIGHT["export"]
    (True, True)
    """
    return LIGHT[{FULL: "full", UNTRAINED: "untrained", "trained": "trained"}.get(stage, "export")]


def svg(figure: Figure, alt: str, prefix: str) -> Markup:
    """The figure as an <svg> element for an HTML page, described by `alt`."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue().decode("utf-8")
    text = text[text.index("<svg"):]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="([^"]+)"', head)
    body = re.sub(r"<(?:[^<>]*)>", lambda tag: _tag(tag[0], prefix), body)
    shape = box[1] if box else "0 0 1 1"
    return Markup(f'<svg role="img" aria-label="{escape(alt)}" viewBox="{shape}">{body.strip()}')


def _tag(tag: str, prefix: str) -> str:
    """One tag of the drawing: its own ids, the page's colours and font. Text between tags is never touched."""
    tag = tag.replace("xlink:href", "href")
    tag = re.sub(r'\bid="', f'id="{prefix}-', tag)
    tag = re.sub(r'href="#', f'href="#{prefix}-', tag)
    tag = tag.replace("url(#", f"url(#{prefix}-")
    tag = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "var(--sans)", tag)
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: _ROLE.get(colour[0], colour[0]), tag)


_ROLE = {colour: f"var(--{role})" for role, colour in LIGHT.items()}

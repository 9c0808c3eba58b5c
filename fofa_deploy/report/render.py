"""The templates and what keeps a class or model name from becoming markup in them."""

from __future__ import annotations

import json
import re

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from fofa_deploy.progress import one_line
from fofa_deploy.report import choice, limits, plots, summary, words
from fofa_deploy.results import RunReport

# Tables, emphasis, code, links, images, headings and GitHub's formulas; bare links; and, where a value starts a line,
# list markers, underlines of headings and the four spaces of a code block.
MARKDOWN = re.compile(r"([\\`*_\[\]|~#!$])")
LEADING = re.compile(r"^\s*(?:([-+=])|(\d+)([.)])(?=\s|$))")
INDENT = re.compile(r"^\s{2,}")
AUTOLINK = re.compile(r"(:)(?=//)|(?<=www)(\.)", re.IGNORECASE)


def html(report: RunReport) -> str:
    """One self-contained page: no script, no remote asset, light and dark, printable."""
    charts = {"scatter": plots.scatter(report), "curves": plots.curves(report)}
    charts |= {"rooflines": limits.rooflines(report), "fleet": limits.fleet_plot(report)}
    charts |= {"choice": choice.choice_plot(report)}
    return _environment(html_value).get_template("report.html.j2").render(**_context(report), **charts)


def markdown(report: RunReport) -> str:
    """The same facts for a job summary."""
    return _environment(markdown_value).get_template("report.md.j2").render(**_context(report))


def model_card(report: RunReport) -> str:
    """A Hugging Face style card: YAML front matter, then prose."""
    return _environment(markdown_value).get_template("model_card.md.j2").render(**_context(report))


def html_value(value: object) -> Markup:
    """Every expression of an HTML template passes through here."""
    return value if isinstance(value, Markup) else escape(one_line(value))


def markdown_value(value: object) -> Markup:
    """Every expression of a Markdown template: Markdown may contain HTML, so both are escaped."""
    if isinstance(value, Markup):
        return value
    text = MARKDOWN.sub(r"\\\1", one_line(value))
    text = LEADING.sub(lambda m: f"\\{m[1]}" if m[1] else f"{m[2]}\\{m[3]}", INDENT.sub(" ", text))
    text = AUTOLINK.sub(lambda match: f"\\{match.group()}", text)
    return Markup(text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def quoted(text: object) -> Markup:
    """A JSON string, which is also a YAML one: it can neither end nor open anything in the front matter."""
    line = one_line(text)
    return Markup(json.dumps(line, ensure_ascii=not line.isprintable()))


def _environment(finalize: object) -> Environment:
    environment = Environment(
        loader=PackageLoader("fofa_deploy.report", "templates"),
        autoescape=True,
        finalize=finalize,  # type: ignore[arg-type]
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    shown = (words.percent, words.points, words.milliseconds, words.percentile, words.size, words.factor)
    more = (words.count, words.duration, words.tally, words.pairs, words.clipped, words.moment, words.pixels, quoted, html_value)
    environment.filters.update({function.__name__: function for function in (*shown, *more)})
    return environment


def _context(report: RunReport) -> dict[str, object]:
    return {
        "report": report,
        "summary": summary,
        "targets": summary.targets_of(report),
        "reference": report.reference,
        "environments": summary.environments(report),
    }

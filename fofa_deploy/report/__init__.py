"""Results -> report.json, report.md, report.html and model_card.md. Rendering changes no number and drops no target."""

from __future__ import annotations

from pathlib import Path

from fofa_deploy.errors import UserError
from fofa_deploy.report.record import read_report, to_json
from fofa_deploy.results import RunReport
from fofa_deploy.store import write_atomic

__all__ = ["read_report", "write_report"]


def write_report(report: RunReport, out: Path) -> None:
    """Write all four reports into the folder ``out``, each in one step: a reader sees the old file or the new one.

    Raises:
        UserError: the folder cannot be written.
    """
    from fofa_deploy.report import render  # matplotlib and jinja2 are not free, and reading a report needs neither

    texts = {
        "report.json": to_json(report),
        "report.md": render.markdown(report),
        "report.html": render.html(report),
        "model_card.md": render.model_card(report),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(out / name, text.encode())
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}", "free space or choose another folder") from error

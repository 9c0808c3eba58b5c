"""``fofa-deploy explain``"""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
def command(run: Path) -> None:
    """Why each stage of RUN was last run, how long it took, and when."""
    from rich.markup import escape

    from fofa_deploy.cli.show import table
    from fofa_deploy.recorded import recorded_plan
    from fofa_deploy.store import manifests

    rows = [[escape(m.stage), escape(m.finished_at), f"{m.seconds:.1f}", escape(m.why)] for m in manifests(run)]
    if not rows:
        recorded_plan(run)  # of another folder it says what that is not
    table("", ("stage", "finished", "seconds", "why it ran"), rows)

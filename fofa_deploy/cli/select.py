"""``fofa-deploy select``"""

from __future__ import annotations

from pathlib import Path

import click

from fofa_deploy.cli import options


@click.command()
@click.argument("plan")
@options.out
@options.overrides
@options.force
@options.quiet
def command(plan: str, out: Path, overrides: tuple[str, ...], force: bool, quiet: bool) -> None:
    """Choose the student of PLAN, whose student.model is 'auto', by what candidates take on its targets.

    The choice is left in OUT/selection; compress-and-export goes on from there.
    """
    from fofa_deploy.config import AUTO, load_plan
    from fofa_deploy.errors import PlanError

    resolved = load_plan(plan, overrides)
    if resolved.student.model != AUTO:
        raise PlanError(f"the plan names its student, {resolved.student.model}", f"set student.model = {AUTO!r} to have one chosen")
    from fofa_deploy.cli.show import notices, progress
    from fofa_deploy.pipeline import opened
    from fofa_deploy.select.apart import commands

    with opened(resolved, out, progress(quiet), force, settled=False) as run:
        selection = run.choose()
        assert selection
        click.echo(selection.page())
        click.echo(out / "selection")
        if lines := commands(selection, run.plan, out):
            click.echo("\n".join(["", "targets have students of their own; run", *lines]))
        notices(run.notices, run.store.notices)

"""``fofa-deploy distill``"""

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
    """Train the student of PLAN, and its teacher if need be; weights and curve are left in OUT/student."""
    from fofa_deploy.config import load_plan

    resolved = load_plan(plan, overrides)
    from fofa_deploy.cli.show import notices, progress
    from fofa_deploy.distill.job import read_summary
    from fofa_deploy.pipeline import follow, opened

    if follow(resolved):
        return
    with opened(resolved, out, progress(quiet), force) as run:
        summary = read_summary(run.student)
        accuracy = "" if summary.top1 is None else f", test top-1 {summary.top1:.2%}"
        click.echo(f"{summary.model}: {summary.params:,} parameters{accuracy}\n{run.student / 'weights.safetensors'}")
        notices(run.notices, run.store.notices)

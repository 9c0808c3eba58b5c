"""``fofa-deploy compress-and-export``"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fofa_deploy.cli import options, tell


@click.command(name="compress-and-export")
@click.argument("plan")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Run directory; run again to resume.")
@options.overrides
@click.option("--dry-run", is_flag=True, help="Look up all that the plan names, print it resolved, and stop.")
@options.force
@options.quiet
def command(plan: str, out: Path | None, overrides: tuple[str, ...], dry_run: bool, force: bool, quiet: bool) -> None:
    """Distill, export, quantize, verify, profile and report PLAN (a TOML file, or the name of an embedded plan: demo)."""
    from fofa_deploy.config import load_plan

    resolved = load_plan(plan, overrides)
    if dry_run:
        from fofa_deploy.lookup import look_up

        look_up(resolved)
        click.echo(resolved.model_dump_json(indent=2))
        return
    if out is None:
        raise click.UsageError("name the run directory with --out")
    from fofa_deploy.cli.show import outcome, progress
    from fofa_deploy.judge import failures
    from fofa_deploy.pipeline import compress_and_export, follow

    if follow(resolved):
        return
    report = compress_and_export(resolved, out, progress(quiet), force)
    outcome(report, out)
    problems = failures(resolved, report)
    for problem in problems:
        tell(problem)
    sys.exit(problems[0].exit_code if problems else 0)

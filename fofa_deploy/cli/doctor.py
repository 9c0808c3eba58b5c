"""``fofa-deploy doctor``"""

from __future__ import annotations

import click

from fofa_deploy.cli import options


@click.command()
@options.as_json
def command(as_json: bool) -> None:
    """What this machine can build and run for every installed profile, and why not."""
    import json

    from rich.markup import escape

    from fofa_deploy import environment
    from fofa_deploy.cli.show import table
    from fofa_deploy.diagnosis import diagnose

    machine, found = environment.describe(), diagnose()
    if as_json:
        click.echo(json.dumps({"machine": machine.model_dump(mode="json"), "profiles": [d.model_dump(mode="json") for d in found]}))
        return
    click.echo(
        f"{machine.cpu}, {machine.cores} cores, {machine.memory_bytes / 2**30:.0f} GiB, {machine.os}, Python {machine.python}"
    )
    click.echo(f"features: {', '.join(machine.features) or 'none that decide a kernel'}")
    click.echo(", ".join(f"{name} {version}" for name, version in machine.versions.items()))
    rows = [[d.profile, d.runtime, _yes(d.probe.can_build), _yes(d.probe.can_run), escape(d.probe.reason)] for d in found]
    table("", ("profile", "runtime", "builds", "runs", "why not"), rows)


def _yes(value: bool) -> str:
    return "[green]yes[/]" if value else "[red]no[/]"

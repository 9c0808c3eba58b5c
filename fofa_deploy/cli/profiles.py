"""``fofa-deploy profiles``"""

from __future__ import annotations

import click


@click.command()
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List the installed hardware profiles, or show every field of NAME (a name or a path)."""
    from rich.markup import escape

    from fofa_deploy.cli.show import table
    from fofa_deploy.profile import find_profile, installed_profiles

    if name:
        click.echo(find_profile(name).model_dump_json(indent=2))
        return
    rows = [[p.name, p.runtime, ", ".join(p.precisions), escape(p.description)] for p in installed_profiles()]
    table("", ("profile", "runtime", "precisions", "description"), rows)

"""``fofa-deploy backends``"""

from __future__ import annotations

import click


@click.command()
def command() -> None:
    """List the registered back ends and the precisions they build."""
    from rich.markup import escape

    from fofa_deploy.backend import backend_names, get_backend
    from fofa_deploy.cli.show import table
    from fofa_deploy.errors import BackendError

    rows = []
    for name in backend_names():
        try:
            rows.append([name, ", ".join(sorted(get_backend(name).precisions))])
        except BackendError as error:
            rows.append([name, escape(error.message)])
    table("", ("back end", "precisions"), rows)

"""Options that several verbs share."""

from __future__ import annotations

from pathlib import Path

import click

FOLDER = click.Path(path_type=Path, file_okay=False)
EXISTING_FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
FILE = click.Path(path_type=Path, exists=True, dir_okay=False)

out = click.option("--out", type=FOLDER, required=True, help="Run directory; run again to resume.")
overrides = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the plan, such as distill.epochs=20."
)
force = click.option("--force", is_flag=True, help="Go on in a run directory that was made from another plan.")
quiet = click.option("--quiet", is_flag=True, help="No progress on standard error.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")
hardware = click.option("--profile", "profile_name", help="Hardware profile, by name or path (see fofa-deploy profiles).")
trust_engine = click.option(
    "--trust-engine", is_flag=True, help="Open engine files: they are machine code, and can do what you can."
)
images = click.option("--images", type=EXISTING_FOLDER, help="Folder of real images, for calibration and comparison.")

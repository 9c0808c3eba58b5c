"""``python -m fofa_deploy.data.write_shards PLAN FOLDER``: a plan's images, of whatever source, as tar shards.

Files are copied as they are; images from other sources are written as PNG at the plan's size. Then set data.name = "shards"
and data.root = FOLDER.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from fofa_deploy.config import DataPlan, load_plan
from fofa_deploy.data.layouts import open_sources
from fofa_deploy.data.shards import CLASSES, write_shards
from fofa_deploy.data.sources import Source
from fofa_deploy.errors import FofaError


def reshard(plan: DataPlan, folder: Path, per_shard: int = 10_000) -> list[Path]:
    """Write both splits and the names of their classes; returns the shards.

    Raises:
        DataError: as `open_sources`; or an image cannot be read.
    """
    written = []
    for source, split in zip(open_sources(plan), (plan.train_split, plan.test_split), strict=True):
        written += write_shards(_encoded(source), folder, split, per_shard)
        (folder / CLASSES).write_text("".join(f"{name}\n" for name in source.class_names), encoding="utf-8")
    return written


def _encoded(source: Source) -> Iterator[tuple[bytes, str, int]]:
    for index, label in enumerate(source.labels):
        content, suffix = source.encoded(index)
        yield content, suffix, int(label)


@click.command(help=__doc__)
@click.argument("plan")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--per-shard", default=10_000, show_default=True, type=click.IntRange(1), help="Images per shard.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the plan.")
def command(plan: str, folder: Path, per_shard: int, overrides: tuple[str, ...]) -> None:
    try:
        written = reshard(load_plan(plan, overrides).data, folder, per_shard)
    except FofaError as error:
        raise click.ClickException(f"{error.message}\n  -> {error.action}") from error
    except OSError as error:
        raise click.ClickException(f"{folder} cannot be written: {error.strerror or error}\n  -> choose another folder") from error
    for path in written:
        click.echo(path)


if __name__ == "__main__":
    command()

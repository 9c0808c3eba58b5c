"""``fofa-deploy export``"""

from __future__ import annotations

from pathlib import Path

import click

from fofa_deploy.cli import options


@click.command()
@click.argument("source")
@options.out
@click.option("--model", help="Of a checkpoint: 'timm:NAME' or 'package.module:function'.")
@click.option("--classes", type=int, help="Of a checkpoint's model.")
@options.images
@options.overrides
@options.force
@options.quiet
def command(
    source: str,
    out: Path,
    model: str | None,
    classes: int | None,
    images: Path | None,
    overrides: tuple[str, ...],
    force: bool,
    quiet: bool,
) -> None:
    """Capture the student of SOURCE as OUT/graph/model.onnx, verified, with sidecar and golden inputs.

    SOURCE is a plan, or a checkpoint (.safetensors, .pt) together with --model, --classes and --images; further facts about
    its input are given as --set data.image_size=224 --set data.mean=[0.485,0.456,0.406].
    """
    from fofa_deploy.config import load_plan, ready_made

    if model is None and (classes is not None or images is not None):
        raise click.UsageError("--classes and --images go with a checkpoint and --model; a plan has its own")
    if model is None:
        plan = load_plan(source, overrides)
    elif classes is None or images is None:
        raise click.UsageError("a checkpoint needs --model, --classes and --images")
    else:
        plan = ready_made(Path(source), model, classes, images, overrides)
    from fofa_deploy.cli.show import notices, progress
    from fofa_deploy.pipeline import follow, opened

    if follow(plan):
        return
    with opened(plan, out, progress(quiet), force) as run:
        click.echo(run.graph / "model.onnx")
        notices(run.notices, run.store.notices)

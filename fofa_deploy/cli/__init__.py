"""The command line: one thin file per verb, imported only when its verb is named."""

from __future__ import annotations

import importlib
import sys

import click

from fofa_deploy.errors import FofaError

VERBS = {
    "compress-and-export": "The whole job: distill, export, quantize, verify, profile and report, for every target.",
    "distill": "Train the student of a plan, and its teacher if need be.",
    "export": "Capture a plan's student, or a ready-made checkpoint, as a verified ONNX graph.",
    "quantize": "Build and verify a hardware profile's recipes from a run or an ONNX file.",
    "verify": "Hold the artifacts of a run, or an ONNX file, to the model they came from.",
    "profile": "Measure the latency of a run's artifacts, or of an ONNX file.",
    "report": "Write the reports of a finished run again.",
    "check": "Judge a candidate against a baseline and its budgets: the gate of a CI job.",
    "select": "Choose a plan's student by what candidates take on its targets.",
    "bundle": "Pack a run's artifact for a device that cannot be reached.",
    "doctor": "What this machine can build and run, and why not.",
    "backends": "List the registered back ends.",
    "profiles": "List the hardware profiles, or show one.",
    "explain": "Why each stage of a run was run.",
}


class LazyGroup(click.Group):
    """Knows its verbs by name and imports a verb's module when it is called: ``--help`` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"fofa_deploy.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        command.name = cmd_name
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        from difflib import get_close_matches

        near = get_close_matches(args[0], VERBS, n=1)
        if args[0] not in VERBS and near:
            ctx.fail(f"no command {args[0]!r}; did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from fofa_deploy import __version__

        click.echo(f"fofa-deploy {__version__}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit.")
def cli() -> None:
    """Turn a large image classifier into the best small one for your hardware, and prove it.

    Exit codes: 0 success, 1 a stage or the gate failed, 2 usage or plan, 3 environment or target unavailable,
    4 inconclusive measurement, 130 interrupted (run the same command again to go on).
    """


def tell(error: FofaError) -> None:
    """What is wrong and what to do next, on standard error."""
    from fofa_deploy.progress import lines

    click.secho(f"error: {lines(error.message)}", fg="red", err=True)
    click.echo(f"  -> {lines(error.action)}", err=True)


def _of_the_system(error: OSError) -> FofaError:
    """What the operating system refuses where nobody expected it to."""
    import errno

    first = {
        errno.ENOSPC: "free space",
        errno.EDQUOT: "free space",
        errno.EACCES: "mend permissions",
        errno.EPERM: "mend permissions",
        errno.EROFS: "choose a folder that can be written",
    }.get(error.errno or 0, "mend that")
    return FofaError(str(error), f"{first}, then run the same command again to go on")


def main() -> None:
    """Entry point: every error ends in a message and an exit code."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: run the same command again", err=True)
        sys.exit(130)
    except FofaError as error:
        tell(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        tell(_of_the_system(error))
        sys.exit(3)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)

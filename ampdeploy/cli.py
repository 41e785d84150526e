"""The `ampdeploy` command: verbs loaded when used, and the one place errors become exit codes."""

from __future__ import annotations

import importlib
import sys
import traceback

import click

from ampdeploy import __version__
from ampdeploy.errors import (
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    EXIT_OK,
    EXIT_USER_ERROR,
    AmpDeployError,
)

# verb -> one line of help. The module commands/<verb>.py is imported only when the verb is used
# or asked for its own --help, which keeps `ampdeploy --help` in the milliseconds.
VERBS = {
    "build": "From model name to a smaller, verified model with a report.",
    "prune": "Score, search and slim only.",
    "distill": "Train a run's slim model against the original.",
    "export": "Write a run's models as ONNX and check them.",
    "engine": "Build a run's engines, or a bundle's on its device.",
    "eval": "Accuracy and fidelity of a run or an artifact on any image folder.",
    "bench": "Latency and memory of an artifact against a baseline, interleaved.",
    "report": "Render a run's report.json as Markdown or as a table.",
    "gate": "Hold a report against limits, and exit 3 if it breaks one.",
    "explain": "Why a pruned model is, or is not, as much faster as its FLOPs say.",
    "bundle": "Pack a run for the device that builds its own engine.",
    "inspect": "Parameters, FLOPs and widths of a model or checkpoint, per block.",
    "models": "List the registered models.",
    "doctor": "What this machine can do, and what is missing.",
}


class LazyGroup(click.Group):
    """A group whose commands live in `ampdeploy.commands.<verb>` until they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"ampdeploy.commands.{cmd_name}")
        command = module.command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            from ampdeploy.models.registry import close_matches

            raise click.UsageError(
                f"no verb {args[0]!r}.{close_matches(args[0], VERBS)} Verbs: {', '.join(VERBS)}.",
                ctx,
            )
        return super().resolve_command(ctx, args)


@click.command(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 user error, 2 usage, 3 a check said no, 4 missing dependency "
    "or hardware, 70 internal error, 130 interrupted.",
)
@click.version_option(__version__, prog_name="ampdeploy")
def cli() -> None:
    """Make a large vision transformer smaller, prove it is still right, and deploy it."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code (also the console script)."""
    try:
        cli.main(args=arguments, prog_name="ampdeploy", standalone_mode=False)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except AmpDeployError as error:
        click.echo(f"Error: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo(
            "\nInterrupted. Finished stages are kept; run the same command again to go on.",
            err=True,
        )
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # `ampdeploy ... | head`: whoever read has had enough, which is no error of ours.
        sys.stdout = None
        return EXIT_OK
    except MemoryError:
        click.echo(
            "Error: out of memory. Lower --calib-images or --micro-batch, or use a smaller model.",
            err=True,
        )
        return EXIT_USER_ERROR
    except Exception:
        traceback.print_exc()
        click.echo(
            f"\nThis is a bug in ampdeploy {__version__}, not something you did. Please report it "
            "with the lines above and the output of `ampdeploy doctor --json`.",
            err=True,
        )
        return EXIT_INTERNAL
    return EXIT_OK


def entry() -> None:
    """Console script."""
    sys.exit(main())


if __name__ == "__main__":
    entry()

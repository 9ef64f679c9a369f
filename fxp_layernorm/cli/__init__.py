"""The command line, `fxp-layernorm`: one file a subcommand, each imported when it is used."""

from __future__ import annotations

import errno
import importlib

import click

from .._version import __version__
from ..errors import FxpError

COMMANDS = ("inspect", "calibrate", "export", "verify", "report", "sweep", "demo", "bench")


class _Failure(click.ClickException):
    """An error of the package, as a message and exit code 2."""

    exit_code = 2


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f".{name}", __name__), name)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except FxpError as error:
            raise _Failure(str(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader has seen enough
                raise
            raise _Failure(str(error)) from error
        except MemoryError as error:
            raise _Failure(f"there is not enough memory: {error}") from error
        except KeyboardInterrupt:
            click.echo("Interrupted", err=True)
            raise SystemExit(130) from None  # as shells have it; 1 is for comparisons that fail


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="fxp-layernorm")
def main() -> None:
    """Integer LayerNorm for ONNX models, exact to the last bit.

    \b
    The way from a float model to integers:
      fxp-layernorm inspect model.onnx
      fxp-layernorm calibrate model.onnx --data feeds/ -o params.json
      fxp-layernorm export model.onnx params.json -o integer.onnx
      fxp-layernorm verify model.onnx integer.onnx params.json --data feeds/

    Results go to standard output, progress and the closing line (PASSED | ... or FAILED | ...) to standard error.
    Exit codes: 0 done and passed, 1 a comparison failed, 2 a usage, file or model error.
    """

"""What the subcommands share: arguments, JSON, tables, progress and the closing line."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console, Group
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..errors import InputError

if TYPE_CHECKING:
    from ..calibration import QuantizedNorms
    from ..params import ModelParams

PATH = click.Path(path_type=Path)
model_argument = click.argument("model", type=PATH)
params_argument = click.argument("params", type=PATH)
optional_params_argument = click.argument("params", type=PATH, required=False)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")


def _data_option(required: bool, more: str = "") -> Callable[[Any], Any]:
    return click.option(
        "--data",
        required=required,
        metavar="DATA",
        help="A .npz with one array an input name, a folder of such files (a feed each), or package.module:function "
        f"that yields feeds.{more}",
    )


data_option = _data_option(required=True)
optional_data_option = _data_option(
    required=False, more=" Only norms that stand between quantizers can do without: their parameters are in MODEL."
)


@dataclass
class Output:
    """Where a subcommand's results and messages go."""

    as_json: bool
    started: float = field(default_factory=time.perf_counter)
    messages: Console = field(default_factory=lambda: Console(stderr=True))

    def result(self, document: dict[str, Any], *tables: Group) -> None:
        """Print the result: the document as JSON, or the tables."""
        if self.as_json:
            click.echo(json.dumps(document, indent=1, allow_nan=False))
            return
        console = Console()
        if not console.is_terminal:  # a pipe or a file has no width to fit into
            console = Console(width=180)
        for table in tables:
            console.print(table)

    def close(self, text: str, *, passed: bool = True) -> None:
        """Print the closing line, and exit with 1 if a comparison failed."""
        word = "PASSED" if passed else "FAILED"
        click.echo(f"{word} | {text} | {time.perf_counter() - self.started:.1f} s", err=True)
        if not passed:
            raise SystemExit(1)

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[..., None]]:
        """Show progress on a terminal; yields a function to call after each step, or with the number of steps."""
        if not self.messages.is_terminal:
            yield lambda count=1: None
            return
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), _Rate(),
        )  # fmt: skip
        with Progress(*columns, console=self.messages, transient=True) as progress:
            task = progress.add_task(description, total=total or None)
            yield lambda count=1: progress.advance(task, count)


class _Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        """Return the rate, nothing before there is one."""
        return Text(f"{task.speed:.3g}/s" if task.speed else "")


def check_apart(written: Iterable[Path], read: Iterable[str | Path | None]) -> None:
    """Raise InputError if a file that is to be written is one that is read, or one of a folder of feeds."""
    for source, target in itertools.product(read, written):
        path = Path(source or "")
        if source is None or not (path.exists() and target.exists()):
            continue
        if target.samefile(path) or (target.suffix == ".npz" and target.parent.samefile(path)):
            raise InputError(f"{target} is read, and would be overwritten; name another file to write")


def parameters(model: Path, params: Path | None, word: str) -> ModelParams:
    """Return the parameters in a file, or without one those that a quantized model holds itself, planned for a word."""
    return quantized(model, word).params if params is None else saved_parameters(model, params)[0]


def saved_parameters(model: Path, path: Path) -> tuple[ModelParams, list[str]]:
    """Return the parameters in a file, and warn where they are those of another model than this one."""
    from ..calibration.record import model_sha256
    from ..export import load_model
    from ..params import ModelParams

    params = ModelParams.load(path)
    if model_sha256(model, load_model(model)) == params.model_sha256:
        return params, []
    warning = (
        f"{path} was made with another model than {model}, as its model_sha256 tells. Where all norms have the same "
        "weights here, its scales still are those of the other model's activations: calibrate again, unless what comes "
        "before the norms computes the same"
    )
    click.echo(f"Warning: {warning}", err=True)
    return params, [warning]


def quantized(model: Path, word: str) -> QuantizedNorms:
    """Return the parameters that a quantized model holds itself, planned for a word."""
    from ..calibration import quantized_norms

    return quantized_norms(model, hardware=None if word == "int64" else "carried24")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Group:
    """Return a titled table; numbers are set to the right. Names are text, whatever brackets they hold."""
    built = Table()
    for index, column in enumerate(columns):
        numeric = bool(rows) and isinstance(rows[0][index], int | float)
        built.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        built.add_row(*(Text(_cell(value)) for value in row))
    return Group(Text(title, style="bold"), built)


def count(number: int, noun: str) -> str:
    """Return a number with its noun in the right form."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 0.01 else f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)

"""Reports and sweeps, each as one HTML page: no network, no file beside it that it needs."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..errors import MissingDependencyError
from .report import ModelAnalysis

if TYPE_CHECKING:
    from .report import NormAnalysis
    from .sweeps import Sweep


def require() -> None:
    """Raise MissingDependencyError, with the command that helps, unless a page can be made."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"the report needs matplotlib and Jinja2 ({error.name} is missing): pip install 'fxp-layernorm[report]'"
        ) from error


def page(analysis: Any, *, worst_rows: str | None) -> str:
    """Return the page for a NormAnalysis or a ModelAnalysis.

    Parameters
    ----------
    analysis : NormAnalysis or ModelAnalysis
    worst_rows : str or None
        Name of the .npz with the worst rows, beside the page; None where there is none.

    Raises
    ------
    MissingDependencyError
        Without matplotlib and Jinja2.
    """
    model = analysis if isinstance(analysis, ModelAnalysis) else None
    norms: tuple[NormAnalysis, ...] = model.norms if model else (analysis,)
    return _render(
        "report.html.j2",
        model=model,
        norms=norms,
        ids={norm.name: f"norm{index}" for index, norm in enumerate(norms)},
        by_name={norm.name: norm for norm in norms},
        worst_rows=worst_rows,
    )


def sweep_page(sweep: Sweep) -> str:
    """Return the page for a Sweep; raises MissingDependencyError without matplotlib and Jinja2."""
    return _render("sweep.html.j2", sweep=sweep)


def framed(page: Callable[[], str]) -> str | None:
    """Return a page as a notebook shows it; None, for plain text, without matplotlib and Jinja2."""
    try:
        text = page()
    except MissingDependencyError:
        return None
    return f'<iframe srcdoc="{escape(text)}" style="width: 100%; height: 45em; border: 0"></iframe>'


def _render(template: str, **values: object) -> str:
    require()
    import jinja2

    from . import plots

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(figure=_figure, decibel=_decibel, percent=_percent, magnitude=_magnitude)
    return environment.get_template(template).render(
        plots=plots, norm_plots=plots.NormPlots(), version=__version__, **values
    )


def _source(template: str) -> str:
    return importlib.resources.files(__package__).joinpath(template).read_text(encoding="utf-8")


def _figure(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def _decibel(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(share: float) -> str:
    value = 100 * share
    return f"{value:.2f} %" if abs(value) >= 0.005 or not value else f"{value:.1g} %"


def _magnitude(value: float) -> str:
    return f"{value:,.0f}" if value < 1e6 else f"{value:.3g}"

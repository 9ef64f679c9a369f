"""The report as one HTML page: no network, no file beside it that it needs."""

from __future__ import annotations

import importlib.resources
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..errors import MissingDependencyError
from .report import ModelAnalysis

if TYPE_CHECKING:
    from .report import NormAnalysis


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
    require()
    import jinja2

    from . import plots

    model = analysis if isinstance(analysis, ModelAnalysis) else None
    norms: tuple[NormAnalysis, ...] = model.norms if model else (analysis,)
    ids = {norm.name: f"norm{index}" for index, norm in enumerate(norms)}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(figure=_figure, decibel=_decibel, percent=_percent, magnitude=_magnitude)
    source = importlib.resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        model=model,
        norms=norms,
        ids=ids,
        by_name={norm.name: norm for norm in norms},
        plots=plots,
        worst_rows=worst_rows,
        version=__version__,
    )


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

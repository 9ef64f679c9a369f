"""Error analysis: where each fraction of an LSB goes, which norm hurts a model, and what to change.

`analyze` takes a spec and real rows, `analyze_model` a model, its parameters and feeds; what they return is written
with `to_html` and `to_json`. `sweep` tries formats, and says which of them no other one beats.
"""

from __future__ import annotations

from .attribution import Attribution
from .models import analyze_model
from .norms import analyze
from .report import SCHEMA_VERSION, ModelAnalysis, NormAnalysis
from .stages import Stage
from .sweeps import Format, Sweep, formats, sweep

__all__ = [
    "SCHEMA_VERSION",
    "Attribution",
    "Format",
    "ModelAnalysis",
    "NormAnalysis",
    "Stage",
    "Sweep",
    "analyze",
    "analyze_model",
    "formats",
    "sweep",
]

"""Export: the same function as an ONNX graph, by itself or in place of a model's float norms.

`to_onnx` writes one norm from codes to codes; `find_norms` lists a model's norms; `quantize_model` replaces them; and
`verify` holds the result against the kernel, bit by bit.
"""

from __future__ import annotations

from .checks import NormCheck, OutputCheck, Verification
from .diagnosis import BorderDifference, CodeDifference, StageDifference
from .loading import load_model
from .model import Replacement, exported_norms, quantize_model, replace_norms
from .norms import Norm, find_norms
from .probing import export_probe, probe
from .qdq import Border, find_border, fitting_border
from .replacing import ExportedNorm
from .standalone import to_onnx
from .subgraph import Form, Word
from .verify import Verifier, verify
from .writing import export_model

__all__ = [
    "Border",
    "BorderDifference",
    "CodeDifference",
    "ExportedNorm",
    "Form",
    "Norm",
    "NormCheck",
    "OutputCheck",
    "Replacement",
    "StageDifference",
    "Verification",
    "Verifier",
    "Word",
    "export_model",
    "export_probe",
    "exported_norms",
    "find_border",
    "find_norms",
    "fitting_border",
    "load_model",
    "probe",
    "quantize_model",
    "replace_norms",
    "to_onnx",
    "verify",
]

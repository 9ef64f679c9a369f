"""The words int24 and float24: no value reaches 2**24, so that integers stay exact where float32 carries them.

int24 holds them in int32, float24 in float32. Both are one body: the row stage is `narrow_rows`, the element stage
`narrow_elements`, and `bounded` follows the bounds of every value, from those of the spec.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from ..errors import ModelError
from ..spec import LayerNormSpec
from .bounded import INT32, Bounded
from .graph import Operand, Writer
from .narrow_elements import elements
from .narrow_normalized import low_bits
from .narrow_root import ROOT_BITS
from .narrow_rows import Rows


class Body:
    """Writes the subgraph's nodes.

    Parameters
    ----------
    spec : LayerNormSpec
    dtype : onnx_ir.DataType
        INT32 or FLOAT: the word.
    writer : Writer
        What the attributes need is added to its own.
    output : onnx_ir.DataType
        Of the result.

    Raises
    ------
    ModelError
        If the word doesn't hold the spec.
    """

    def __init__(self, spec: LayerNormSpec, dtype: ir.DataType, writer: Writer, output: ir.DataType) -> None:
        self.spec, self.writer, self.output, self._dtype = spec, writer, output, dtype
        arithmetic = Bounded(spec, dtype, writer)
        low = low_bits(arithmetic)
        self.rows = Rows(arithmetic, columns=not arithmetic.floats and output != INT32, low=low)
        self._elements = elements(arithmetic, low)
        #: The values of docs/arithmetic.md's letters, by these (see `int64.Body.stages`).
        self.stages = self.rows.stages

    @property
    def opset(self) -> int:
        """The lowest opset that has the operators: ReduceSum with its axes as an input."""
        return 13

    def channels(self) -> dict[str, npt.NDArray[Any]]:
        """Return the channel inputs of the subgraph."""
        values = {**self.rows.channels, **self._elements.channels}
        return {name: value.astype(self._dtype.numpy()) for name, value in values.items()}

    def write(self, q: Operand, channels: Mapping[str, Operand]) -> Operand:
        """Append the nodes from the rows' input codes to their output codes, and return the latter."""
        t, y = self._elements.write(self.rows.write(q, channels), channels)
        self.stages["t"] = t
        return y if self.output == self._dtype else self.writer.cast(y, self.output)


def check(spec: LayerNormSpec, word: str) -> None:
    """Raise ModelError where a spec is not of the kind that the words of 24 bits hold."""
    bits = max(params.dtype.bits for params in spec.operands)
    reasons = {
        f"its lane has {spec.lane} bits, not 24 or 32": spec.lane > 32,
        f"its root has {spec.m} bits, not {ROOT_BITS}": spec.m != ROOT_BITS,
        f"its input has {bits} bits, not up to 24": bits > 24,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise ModelError(
            f"the word {word} doesn't hold this spec: {'; '.join(found)}. The word int64 does; for {word}, plan or "
            "calibrate with the hardware carried24"
        )

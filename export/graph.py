"""Writing a norm's nodes once for both forms: as they are, or as the body of a function.

In the inline form every integer of the spec is known, and what follows from them is computed here, so that only
operators on data are written. In a function they are attributes, and the same expressions become nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

Array: TypeAlias = npt.NDArray[Any]
#: A tensor of the graph, or a constant that is not written yet.
Operand: TypeAlias = ir.Value | Array

#: What is computed at once where all operands are constants. Unsigned integers wrap, as ONNX's do;
#: quotients are of positive numbers.
_FOLDED: dict[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.floor_divide,
    "Min": np.minimum,
    "Max": np.maximum,
    "Gather": np.take,
    "Reshape": lambda values, shape: values.reshape(shape),
    "Concat": lambda *parts, axis: np.concatenate(parts, axis),
}


def constant(tape: Tape, value: npt.ArrayLike) -> ir.Value:
    """Append a Constant node."""
    return tape.op("Constant", [], {"value": ir.tensor(np.asarray(value))})


class Writer:
    """Appends nodes to a tape.

    Parameters
    ----------
    tape : onnx_ir.tape.Tape
    attributes : mapping
        The integers and floats that follow from the spec, by their names as attributes of the function.
    inline : bool
        Whether they are written out; else nodes refer to the function's attributes.
    rank : int
        Of a number as a constant: ONNX Runtime broadcasts shapes of lower rank more slowly, but what comes before rows
        are made of tensors takes tensors of any rank.
    """

    def __init__(self, tape: Tape, attributes: Mapping[str, int | float], *, inline: bool, rank: int = 2) -> None:
        self.tape = tape
        self._ones = (1,) * rank
        self.inline = inline
        self.attributes = dict(attributes)
        self._written: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._references: dict[tuple[str, ir.DataType], ir.Value] = {}

    def op(self, name: str, *operands: Operand, **attributes: Any) -> Operand:
        """Append a node and return its output; an operation on constants gives a constant."""
        constants = [operand for operand in operands if not isinstance(operand, ir.Value)]
        if name in _FOLDED and len(constants) == len(operands):
            return _FOLDED[name](*constants, **attributes)
        return self.tape.op(name, [self.value(operand) for operand in operands], attributes)

    def cast(self, operand: Operand, dtype: ir.DataType) -> Operand:
        """Append a Cast; integers wrap."""
        if isinstance(operand, ir.Value):
            return self.tape.op("Cast", [operand], {"to": dtype})
        return operand.astype(dtype.numpy())

    def value(self, operand: Operand) -> ir.Value:
        """Return an operand as a tensor of the graph; equal constants are written once."""
        if isinstance(operand, ir.Value):
            return operand
        array = np.ascontiguousarray(operand).reshape(operand.shape)
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._written:
            self._written[key] = self.tape.op("Constant", [], {"value": ir.tensor(array)})
        return self._written[key]

    def constant(self, value: float, dtype: ir.DataType = ir.DataType.INT64) -> Array:
        """Return a number."""
        return np.full(self._ones, value, dtype=dtype.numpy())

    def attribute(self, name: str, dtype: ir.DataType = ir.DataType.INT64) -> Operand:
        """Return an attribute of the function as a tensor; integers wrap."""
        known = self.attributes[name]
        if self.inline:
            return np.full(self._ones, known).astype(dtype.numpy())
        key = name, dtype
        if key not in self._references:
            kind = ir.AttributeType.FLOAT if isinstance(known, float) else ir.AttributeType.INT
            field = f"value_{kind.name.lower()}"
            number = self.tape.op("Constant", [], {field: ir.RefAttr(field, name, kind)})
            value = self.op("Reshape", number, np.ones(2, dtype=np.int64))
            same = dtype == (ir.DataType.FLOAT if isinstance(known, float) else ir.DataType.INT64)
            self._references[key] = self.value(value if same else self.cast(value, dtype))
        return self._references[key]

    def scalar(self, operand: Operand) -> Operand:
        """Return a tensor of one element with the shape ()."""
        return self.op("Reshape", operand, np.zeros(0, dtype=np.int64))

    def shape(self, sizes: Sequence[int | str]) -> Operand:
        """Return a shape; a string in it is an attribute."""
        if self.inline:
            return np.array([self.attributes[s] if isinstance(s, str) else s for s in sizes], dtype=np.int64)
        vector = np.ones(1, dtype=np.int64)
        parts = [self.op("Reshape", self.attribute(s), vector) if isinstance(s, str) else s * vector for s in sizes]
        return self.op("Concat", *parts, axis=0)

    def ones(self, dtype: ir.DataType) -> Operand:
        """Return the column of n ones that sums a row by MatMul."""
        if self.inline:
            return np.ones((int(self.attributes["n"]), 1), dtype=dtype.numpy())
        one = ir.tensor(np.ones(1, dtype=dtype.numpy()))
        return self.op("ConstantOfShape", self.shape(["n", 1]), value=one)

    def power(self, exponent: Operand, dtype: ir.DataType = ir.DataType.INT64) -> Operand:
        """Return 2**exponent, 0 where the type doesn't hold it, for exponents from -128 to 127."""
        bits = np.iinfo(dtype.numpy()).bits - dtype.is_signed()
        table = np.array([1 << k if k < bits else 0 for k in range(128)], dtype=dtype.numpy())
        return self.op("Gather", table, exponent)

"""The integer subgraph: the equations of docs/arithmetic.md in standard ONNX operators, in the word int64.

The row stage is int64; the element stage is int32 for lanes of 24 and 32 bits and int64 for the lane of 64. Only
operators that ONNX Runtime and ONNX's reference compute exactly are used: Div truncates, so that every floor is
either a division of a non-negative number or put right by its remainder; integer Max, Min and Clip of more than 31
bits are avoided (microsoft/onnxruntime#25280), and so is a ReduceSum of int64 that exceeds 2**53.

One body serves all specs of a form: what differs between them are the attributes of the function's node and its
inputs G, B and, with channel exponents, their powers of two. The inline form is the same body with the attributes
written out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

from .. import proof
from ..errors import ModelError
from ..proof import NormKind
from ..spec import LayerNormSpec

#: The domain of the function form, and its version.
DOMAIN, DOMAIN_VERSION = "fxp_layernorm", 1
INT32, INT64 = ir.DataType.INT32, ir.DataType.INT64

#: 2**k for k in [0, 128), 0 where int64 doesn't hold it: rows of V0 = 0 reach these, and their R is set to 0.
_POWERS = np.array([1 << k if k < 63 else 0 for k in range(128)], dtype=np.int64)
#: Factor and divisor of a shift by k - _NO_SHIFT bits, to the left where that is positive.
_NO_SHIFT = 64
_LEFT = np.concatenate([np.ones(64, dtype=np.int64), _POWERS[:64]])
_RIGHT = np.maximum(np.concatenate([_POWERS[64:0:-1], np.ones(64, dtype=np.int64)]), 1)
#: Upper bounds of a square root by its argument's top 10 bits, with 11 fraction bits.
_ROOT_SEEDS = np.array([int(np.ceil(np.sqrt(k + 1) * 2**11)) for k in range(1024)], dtype=np.int64)
#: Added to a mean before its division by n, to keep the dividend positive; beyond any code.
_MEAN_BIAS = 1 << 32


@dataclass(frozen=True)
class Layout:
    """What decides the nodes of the subgraph, beyond its attributes.

    Attributes
    ----------
    kind : NormKind
    lane : onnx_ir.DataType
        Type of the element stage.
    sums : str
        How the sums are taken: "32" in int32, "64" in int64, "split" in int64 with the squares in two halves.
    exponents : bool
        Whether the input has channel exponents.
    """

    kind: NormKind
    lane: ir.DataType
    sums: str
    exponents: bool

    @classmethod
    def of(cls, spec: LayerNormSpec) -> Layout:
        """Return the layout of a spec.

        Raises
        ------
        ModelError
            If the word int64 doesn't hold the spec.
        """
        if spec.m < 16:
            raise ModelError(f"the word int64 needs a root of at least 16 bits; the spec has m = {spec.m}")
        largest = spec.row_stage.codes.largest
        squares = spec.n * largest * largest
        sums = "32" if squares < 1 << 31 else "64" if squares < 1 << 53 else "split"
        return cls(spec.kind, INT64 if spec.lane == 64 else INT32, sums, spec.input.exponents is not None)

    @property
    def name(self) -> str:
        """The name of the function."""
        kind = "LayerNorm" if self.kind is NormKind.LAYERNORM else "RMSNorm"
        return f"{kind}_{self.lane.name.lower()}_sum{self.sums}" + ("_exponents" if self.exponents else "")


def attributes(spec: LayerNormSpec, axes: Sequence[int]) -> dict[str, int | tuple[int, ...]]:
    """Return the attributes of a function node: every integer of the spec that is not one a channel."""
    values: dict[str, int | tuple[int, ...]] = {
        "axes": tuple(axes),
        "n": spec.n,
        "n_twice": 2 * spec.n,
        "eps_factor": 1 << 2 * spec.h,
        "eps_code": spec.E,
        "root_bits": spec.m,
        "root_index_divisor": 1 << 2 * spec.m - 10,
        "root_seed_factor": 1 << spec.m - 16,
        "reciprocal_shift": spec.K + spec.h,
        "t_half": 1 << spec.s1 - 1,
        "t_divisor": 1 << spec.s1,
        "y_half": 1 << spec.s2 - 1,
        "y_divisor": 1 << spec.s2,
        "y_low": spec.output.dtype.lo,
        "y_high": spec.output.dtype.hi,
        "y_type": int(ir.DataType.from_numpy(spec.output.dtype.numpy)),
    }
    if spec.lane == 64:
        values["reciprocal_cut"] = proof.reciprocal_bits(spec.n)
    if spec.input.exponents is not None or spec.kind is NormKind.RMSNORM:
        values["zero_point"] = spec.input.zero_point
    return values


def tensors(spec: LayerNormSpec, shape: Sequence[int]) -> dict[str, npt.NDArray[Any]]:
    """Return the channel inputs of the subgraph, of the normalized dimensions' shape."""
    lane = np.int64 if spec.lane == 64 else np.int32
    values = {"G": np.array(spec.G, dtype=lane), "B": np.array(spec.B, dtype=lane)}
    if spec.input.exponents is not None:
        values["P"] = np.left_shift(lane(1), np.array(spec.input.exponents, dtype=lane))
    return {name: value.reshape(shape) for name, value in values.items()}


class Body:
    """Writes the subgraph's nodes.

    Parameters
    ----------
    layout : Layout
    literals : mapping, optional
        The attributes, to write their values out; without them they are references to the function's attributes.
    tape : Tape, optional
        Takes the nodes.
    """

    def __init__(
        self, layout: Layout, literals: Mapping[str, int | tuple[int, ...]] | None = None, tape: Tape | None = None
    ) -> None:
        self.layout = layout
        self.tape = tape or Tape()
        self._literals = literals
        self._constants: dict[tuple[object, ir.DataType], ir.Value] = {}

    def write(self, q: ir.Value, channels: Mapping[str, ir.Value]) -> ir.Value:
        """Append the nodes from the input codes to the output codes, and return the latter."""
        op, lane = self.tape.op, self.layout.lane
        u = op("Cast", [q], {"to": lane})  # (0)
        if self.layout.exponents or self.layout.kind is NormKind.RMSNORM:
            u = op("Sub", [u, self._attribute("zero_point", lane)])
        if self.layout.exponents:
            u = op("Mul", [u, channels["P"]])
        S, Q = self._sums(u)
        R, c, D = self._row_stage(S, Q)
        if c is not None:
            u = op("Sub", [u, self._to_lane(c)])
        p = op("Mul", [u, self._to_lane(R)])  # (6), with D and the half of (7) taken off together
        if D is not None:
            p = op("Sub", [p, op("Sub", [self._to_lane(D), self._attribute("t_half", lane)])])
        else:
            p = op("Add", [p, self._attribute("t_half", lane)])
        t = self._floor_divide(p, self._attribute("t_divisor", lane), lane)  # (7)
        offset = op("Add", [channels["B"], self._attribute("y_half", lane)])
        a = op("Add", [op("Mul", [t, channels["G"]]), offset])  # (8), with the half of (9)
        y = self._floor_divide(a, self._attribute("y_divisor", lane), lane)  # (9); below 2**31 by the spec's proof
        if lane != INT32:
            y = op("Cast", [y], {"to": INT32})
        y = op("Min", [op("Max", [y, self._attribute("y_low", INT32)]), self._attribute("y_high", INT32)])
        to = self._reference("to", "y_type") if self._literals is None else ir.AttrInt64("to", self._literal("y_type"))
        return op("Cast", [y], {"to": to})

    def _sums(self, u: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(1) and (2)."""
        op, axes = self.tape.op, self._attribute("axes", INT64)

        def total(values: ir.Value) -> ir.Value:
            return op("ReduceSum", [values, axes], {"keepdims": 1})

        if self.layout.sums == "32":
            narrow = op("Cast", [u], {"to": INT32}) if self.layout.lane != INT32 else u
            S, Q = total(narrow), total(op("Mul", [narrow, narrow]))
            return op("Cast", [S], {"to": INT64}), op("Cast", [Q], {"to": INT64})
        wide = op("Cast", [u], {"to": INT64}) if self.layout.lane != INT64 else u
        square = op("Mul", [wide, wide])
        if self.layout.sums == "64":
            return total(wide), total(square)
        unit = self._constant(1 << 26, INT64)
        high = op("Div", [square, unit])
        low = op("Sub", [square, op("Mul", [high, unit])])
        return total(wide), op("Add", [op("Mul", [total(high), unit]), total(low)])

    def _row_stage(self, S: ir.Value, Q: ir.Value) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """(3) to (5): R, and c and D where there is a mean."""
        op, n, one = self.tape.op, self._attribute("n", INT64), self._constant(1, INT64)
        centred = self.layout.kind is NormKind.LAYERNORM
        V0 = op("Mul", [Q, n])  # (3)
        if centred:
            V0 = op("Sub", [V0, op("Mul", [S, S])])
        V = op("Mul", [V0, self._attribute("eps_factor", INT64)])
        V = op("Add", [V, self._attribute("eps_code", INT64)])
        # the bit length of V is the number of powers of two that it reaches, laid along the last axis, whose size is 1
        reached = op("GreaterOrEqual", [V, self._constant(tuple(1 << k for k in range(proof.V_BITS)), INT64)])
        last = self._constant((-1,), INT64)
        bits = op("ReduceSum", [op("Cast", [reached], {"to": INT64}), last], {"keepdims": 1})
        two = self._constant(2, INT64)
        j = op("Sub", [self._attribute("root_bits", INT64), op("Div", [op("Add", [bits, one]), two])])  # (4)
        r = self._root(V, op("Mul", [j, two]))
        x, y = op("Add", [j, self._attribute("reciprocal_shift", INT64)]), None
        if self.layout.lane == INT64:
            cut = op("Min", [x, self._attribute("reciprocal_cut", INT64)])
            x, y = cut, self._power(op("Sub", [x, cut]))
        R = op("Div", [op("Add", [op("Mul", [n, self._power(x)]), op("Div", [r, two])]), r])
        if y is not None:
            R = op("Mul", [R, y])
        R = op("Mul", [R, op("Cast", [op("Greater", [V0, self._constant(0, INT64)])], {"to": INT64})])
        if not centred:
            return R, None, None
        twice = self._attribute("n_twice", INT64)
        bias = self._constant(_MEAN_BIAS, INT64)
        dividend = op("Add", [op("Add", [op("Mul", [S, two]), n]), op("Mul", [twice, bias])])
        c = op("Sub", [op("Div", [dividend, twice]), bias])  # (5)
        d = op("Sub", [S, op("Mul", [n, c])])
        D = self._floor_divide(op("Add", [op("Mul", [op("Mul", [d, two]), R]), n]), twice, INT64)
        return R, c, D

    def _root(self, V: ir.Value, shift: ir.Value) -> ir.Value:
        """The integer square root of V shifted into 2m bits: an upper bound, two steps of Heron's method, a correction.

        The seed is at most 2**-9 too large, in proportion; the steps leave 2**-19 and 2**-39, less than one unit of
        31 bits; and from an upper bound, Heron's method on integers never falls below the root.
        """
        op, two = self.tape.op, self._constant(2, INT64)
        index = op("Add", [shift, self._constant(_NO_SHIFT, INT64)])
        w = op("Mul", [V, op("Gather", [self._table("left", _LEFT), index])])
        w = op("Div", [w, op("Gather", [self._table("right", _RIGHT), index])])
        top = op("Div", [w, self._attribute("root_index_divisor", INT64)])
        r = op("Gather", [self._table("seeds", _ROOT_SEEDS), top])
        r = op("Mul", [r, self._attribute("root_seed_factor", INT64)])
        for _ in range(2):
            r = op("Div", [op("Add", [r, op("Div", [w, r])]), two])
        above = op("Cast", [op("Greater", [op("Mul", [r, r]), w])], {"to": INT64})
        return op("Sub", [r, above])

    def _power(self, exponent: ir.Value) -> ir.Value:
        return self.tape.op("Gather", [self._table("powers", _POWERS), exponent])

    def _floor_divide(self, dividend: ir.Value, divisor: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Floor of a quotient by a positive divisor: Div truncates, one too high where the remainder is negative."""
        op = self.tape.op
        quotient = op("Div", [dividend, divisor])
        above = op("Greater", [op("Mul", [quotient, divisor]), dividend])
        return op("Sub", [quotient, op("Cast", [above], {"to": dtype})])

    def _to_lane(self, value: ir.Value) -> ir.Value:
        return value if self.layout.lane == INT64 else self.tape.op("Cast", [value], {"to": self.layout.lane})

    def _constant(self, value: int | tuple[int, ...], dtype: ir.DataType) -> ir.Value:
        key = (value, dtype)
        if key not in self._constants:
            tensor = ir.tensor(np.array(value, dtype=dtype.numpy()))
            self._constants[key] = self.tape.op("Constant", [], {"value": tensor})
        return self._constants[key]

    def _table(self, name: str, values: npt.NDArray[np.int64]) -> ir.Value:
        key = (name, INT64)
        if key not in self._constants:
            self._constants[key] = self.tape.op("Constant", [], {"value": ir.tensor(values)})
        return self._constants[key]

    def _literal(self, name: str) -> int:
        assert self._literals is not None
        value = self._literals[name]
        assert isinstance(value, int)
        return value

    def _attribute(self, name: str, dtype: ir.DataType) -> ir.Value:
        """Return an attribute of the function as a tensor."""
        if self._literals is not None:
            return self._constant(self._literals[name], dtype)
        key = ("attribute", name), dtype
        if key not in self._constants:
            field = "value_ints" if name == "axes" else "value_int"
            value = self.tape.op("Constant", [], {field: self._reference(field, name)})
            self._constants[key] = value if dtype == INT64 else self.tape.op("Cast", [value], {"to": dtype})
        return self._constants[key]

    @staticmethod
    def _reference(field: str, name: str) -> ir.Attr:
        kind = ir.AttributeType.INTS if name == "axes" else ir.AttributeType.INT
        return ir.RefAttr(field, name, kind)


def function(spec: LayerNormSpec, opset: int) -> ir.Function:
    """Return the model-local function that computes every spec of this spec's layout."""
    layout = Layout.of(spec)
    body = Body(layout)
    names = ["q", *tensors(spec, (spec.n,))]
    inputs = {name: ir.Value(name=name) for name in names}
    output = body.write(inputs["q"], inputs)
    output.name = "y"
    graph = ir.Graph(
        list(inputs.values()), [output], nodes=body.tape.nodes, opset_imports={"": opset}, name=layout.name
    )
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in attributes(spec, (-1,))]
    return ir.Function(DOMAIN, layout.name, graph=graph, attributes=declared)

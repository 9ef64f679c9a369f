"""The integer subgraph: the equations of docs/arithmetic.md in standard ONNX operators, in the word int64.

The row stage is int64; the element stage is int32 for lanes of 24 and 32 bits and int64 for the lane of 64. Only
operators that ONNX Runtime and ONNX's reference compute exactly are used: Div truncates, so that every floor is
either a division of a non-negative number or put right by its remainder; integer Max, Min and Clip of more than 31
bits are avoided (microsoft/onnxruntime#25280); and sums are MatMul by ones, as ONNX Runtime's ReduceSum goes through
float64 beyond 2**53, keeps the shape of a tensor without rows, and takes three to five times as long.

One body serves all specs of a form: what differs between them are the attributes of the function's node and its
inputs G, B and, with channel exponents, their powers of two. The inline form is the same body with the attributes
written out.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    sums : onnx_ir.DataType
        Type of the sums: int32 where that holds the sum of squares.
    exponents : bool
        Whether the input has channel exponents.
    flatten : bool
        Whether the input must become a matrix first: several dimensions are normalized together, or all.
    """

    kind: NormKind
    lane: ir.DataType
    sums: ir.DataType
    exponents: bool
    flatten: bool

    @classmethod
    def of(cls, spec: LayerNormSpec, rank: int | None = None) -> Layout:
        """Return the layout of a spec for an input of `rank` dimensions, where that is known.

        Raises
        ------
        ModelError
            If the word int64 doesn't hold the spec.
        """
        if spec.m < 16:
            raise ModelError(f"the word int64 needs a root of at least 16 bits; the spec has m = {spec.m}")
        largest = spec.row_stage.codes.largest
        return cls(
            kind=spec.kind,
            lane=INT64 if spec.lane == 64 else INT32,
            sums=INT32 if spec.n * largest * largest < 1 << 31 else INT64,
            exponents=spec.input.exponents is not None,
            flatten=len(spec.normalized_shape) > 1 or rank == 1,
        )

    @property
    def opset(self) -> int:
        """The lowest opset that has the operators: Max, Min and GreaterOrEqual of integers, and Reshape's allowzero."""
        return 14 if self.flatten else 12

    @property
    def name(self) -> str:
        """The name of the function."""
        kind = "LayerNorm" if self.kind is NormKind.LAYERNORM else "RMSNorm"
        options = ("_exponents" if self.exponents else "") + ("_flatten" if self.flatten else "")
        return f"{kind}_{self.lane.name.lower()}_sum_{self.sums.name.lower()}{options}"


def attributes(spec: LayerNormSpec) -> dict[str, int]:
    """Return the attributes of a function node: every integer of the spec that is not one a channel."""
    values: dict[str, int] = {
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
        "y_low": spec.output.lo,
        "y_high": spec.output.hi,
        "y_type": int(ir.DataType.from_numpy(spec.output.dtype.numpy)),
    }
    if spec.lane == 64:
        values["reciprocal_cut"] = proof.reciprocal_bits(spec.n)
    if spec.input.exponents is not None or spec.kind is NormKind.RMSNORM:
        values["zero_point"] = spec.input.zero_point
    return values


def tensors(spec: LayerNormSpec) -> dict[str, npt.NDArray[Any]]:
    """Return the channel inputs of the subgraph, of shape (n,)."""
    lane = np.int64 if spec.lane == 64 else np.int32
    values = {"G": np.array(spec.G, dtype=lane), "B": np.array(spec.B, dtype=lane)}
    if spec.input.exponents is not None:
        values["P"] = np.left_shift(lane(1), np.array(spec.input.exponents, dtype=lane))
    return values


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

    def __init__(self, layout: Layout, literals: Mapping[str, int] | None = None, tape: Tape | None = None) -> None:
        self.layout = layout
        self.tape = tape or Tape()
        self._literals = literals
        self._constants: dict[tuple[str, ir.DataType], ir.Value] = {}
        #: The values of docs/arithmetic.md's letters, by these, for whoever must find the stage that a consumer gets
        #: wrong. Of a value in parts, "V.12" is the part that counts 2**12 fold.
        self.stages: dict[str, ir.Value] = {}

    def write(self, q: ir.Value, channels: Mapping[str, ir.Value]) -> ir.Value:
        """Append the nodes from the input codes to the output codes, and return the latter."""
        op, lane = self.tape.op, self.layout.lane
        codes = op("Reshape", [q, self._shape(-1, None)]) if self.layout.flatten else q
        u = op("Cast", [codes], {"to": lane})  # (0)
        if self.layout.exponents or self.layout.kind is NormKind.RMSNORM:
            u = op("Sub", [u, self._attribute("zero_point", lane)])
        if self.layout.exponents:
            u = op("Mul", [u, channels["P"]])
        S, Q = self._sums(u)
        self.stages |= {"u": u, "S": S, "Q": Q}
        R, c, D = self._row_stage(S, Q)
        if c is not None:
            u = op("Sub", [u, self._to_lane(c)])
        p = op("Mul", [u, self._to_lane(R)])  # (6), with D and the half of (7) taken off together
        if D is not None:
            p = op("Sub", [p, op("Sub", [self._to_lane(D), self._attribute("t_half", lane)])])
        else:
            p = op("Add", [p, self._attribute("t_half", lane)])
        t = self.stages["t"] = self._floor_divide(p, self._attribute("t_divisor", lane), lane)  # (7)
        offset = op("Add", [channels["B"], self._attribute("y_half", lane)])
        a = op("Add", [op("Mul", [t, channels["G"]]), offset])  # (8), with the half of (9)
        y = self._floor_divide(a, self._attribute("y_divisor", lane), lane)  # (9); below 2**31 by the spec's proof
        if lane != INT32:
            y = op("Cast", [y], {"to": INT32})
        y = op("Min", [op("Max", [y, self._attribute("y_low", INT32)]), self._attribute("y_high", INT32)])
        y = op("Cast", [y], {"to": self._attribute_of("to", "y_type")})
        return op("Reshape", [y, op("Shape", [q])], {"allowzero": 1}) if self.layout.flatten else y

    def _sums(self, u: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(1) and (2)."""
        op, dtype = self.tape.op, self.layout.sums
        u = u if dtype == self.layout.lane else op("Cast", [u], {"to": dtype})
        sums = (op("MatMul", [value, self._ones(dtype)]) for value in (u, op("Mul", [u, u])))
        S, Q = (value if dtype == INT64 else op("Cast", [value], {"to": INT64}) for value in sums)
        return S, Q

    def _row_stage(self, S: ir.Value, Q: ir.Value) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """(3) to (5): R, and c and D where there is a mean."""
        op, n, two = self.tape.op, self._attribute("n", INT64), self._constant(2, INT64)
        centred = self.layout.kind is NormKind.LAYERNORM
        V0 = op("Mul", [Q, n])  # (3)
        if centred:
            V0 = op("Sub", [V0, op("Mul", [S, S])])
        V = op("Mul", [V0, self._attribute("eps_factor", INT64)])
        V = op("Add", [V, self._attribute("eps_code", INT64)])
        r, R = self.reciprocal_root(V)
        R = op("Mul", [R, op("Cast", [op("Greater", [V0, self._constant(0, INT64)])], {"to": INT64})])
        self.stages |= {"V": V, "r": r, "R": R}
        if not centred:
            return R, None, None
        twice = self._attribute("n_twice", INT64)
        bias = self._constant(_MEAN_BIAS, INT64)
        dividend = op("Add", [op("Add", [op("Mul", [S, two]), n]), op("Mul", [twice, bias])])
        c = op("Sub", [op("Div", [dividend, twice]), bias])  # (5)
        d = op("Sub", [S, op("Mul", [n, c])])
        D = self._floor_divide(op("Add", [op("Mul", [op("Mul", [d, two]), R]), n]), twice, INT64)
        self.stages |= {"c": c, "D": D}
        return R, c, D

    def reciprocal_root(self, V: ir.Value) -> tuple[ir.Value, ir.Value]:
        """(4) for V > 0: r and R; for V = 0 they are of no meaning, but no operator fails."""
        op, n = self.tape.op, self._attribute("n", INT64)
        one, two = self._constant(1, INT64), self._constant(2, INT64)
        # the bit length of V is the number of powers of two that it reaches
        reached = op("GreaterOrEqual", [V, self._table("limits", _POWERS[None, : proof.V_BITS])])
        ones = self._table("ones", np.ones((proof.V_BITS, 1), dtype=np.int64))
        bits = op("MatMul", [op("Cast", [reached], {"to": INT64}), ones])
        j = op("Sub", [self._attribute("root_bits", INT64), op("Div", [op("Add", [bits, one]), two])])
        r = self._root(V, op("Mul", [j, two]))
        x, y = op("Add", [j, self._attribute("reciprocal_shift", INT64)]), None
        if self.layout.lane == INT64:
            cut = op("Min", [x, self._attribute("reciprocal_cut", INT64)])
            x, y = cut, self._power(op("Sub", [x, cut]))
        R = op("Div", [op("Add", [op("Mul", [n, self._power(x)]), op("Div", [r, two])]), r])
        if y is not None:
            R = op("Mul", [R, y])
        return r, R

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

    def _constant(self, value: int, dtype: ir.DataType) -> ir.Value:
        """Return a number as a tensor of shape (1, 1); ONNX Runtime broadcasts shapes of lower rank more slowly."""
        return self._table(str(value), np.array([[value]], dtype=dtype.numpy()))

    def _table(self, name: str, values: npt.NDArray[Any]) -> ir.Value:
        key = name, ir.DataType.from_numpy(values.dtype)
        if key not in self._constants:
            self._constants[key] = self.tape.op("Constant", [], {"value": ir.tensor(values)})
        return self._constants[key]

    def _ones(self, dtype: ir.DataType) -> ir.Value:
        """Return the column of n ones that sums a row by MatMul."""
        if self._literals is not None:
            return self._table("row", np.ones((self._literals["n"], 1), dtype=dtype.numpy()))
        one = ir.tensor(np.ones(1, dtype=dtype.numpy()))
        return self.tape.op("ConstantOfShape", [self._shape(None, 1)], {"value": one})

    def _shape(self, *sizes: int | None) -> ir.Value:
        """Return a shape in which None stands for n."""
        if self._literals is not None:
            literal = [self._literals["n"] if size is None else size for size in sizes]
            return self._table(str(literal), np.array(literal, dtype=np.int64))
        op, vector = self.tape.op, self._table("vector", np.ones(1, dtype=np.int64))
        parts = [
            op("Reshape", [self._reference("n"), vector])
            if size is None
            else self._table(f"[{size}]", np.array([size], dtype=np.int64))
            for size in sizes
        ]
        return op("Concat", parts, {"axis": 0})

    def _attribute(self, name: str, dtype: ir.DataType) -> ir.Value:
        """Return an attribute of the function as a tensor of shape (1, 1)."""
        if self._literals is not None:
            return self._constant(self._literals[name], dtype)
        key = f"attribute {name}", dtype
        if key not in self._constants:
            value = self.tape.op("Reshape", [self._reference(name), self._table("scalar", np.ones(2, dtype=np.int64))])
            self._constants[key] = value if dtype == INT64 else self.tape.op("Cast", [value], {"to": dtype})
        return self._constants[key]

    def _reference(self, name: str) -> ir.Value:
        return self.tape.op("Constant", [], {"value_int": ir.RefAttr("value_int", name, ir.AttributeType.INT)})

    def _attribute_of(self, field: str, name: str) -> ir.Attr:
        """Return an attribute of the function as the attribute `field` of one of its nodes."""
        if self._literals is None:
            return ir.RefAttr(field, name, ir.AttributeType.INT)
        return ir.AttrInt64(field, self._literals[name])


def function(spec: LayerNormSpec, layout: Layout, opset: int) -> ir.Function:
    """Return the model-local function that computes every spec of a layout, of which `spec` is one."""
    body = Body(layout)
    inputs = {name: ir.Value(name=name) for name in ("q", *tensors(spec))}
    output = body.write(inputs["q"], inputs)
    output.name = "y"
    for name, value in body.stages.items():
        value.name = name
    graph = ir.Graph(
        list(inputs.values()), [output], nodes=body.tape.nodes, opset_imports={"": opset}, name=layout.name
    )
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in attributes(spec)]
    return ir.Function(DOMAIN, layout.name, graph=graph, attributes=declared)

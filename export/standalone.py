"""Writing one norm by itself, from codes to codes, as a model."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_ir as ir
from onnx_ir.tape import Tape

from .._version import __version__
from ..errors import ModelError
from ..quantization import DType
from ..spec import LayerNormSpec
from . import subgraph
from .subgraph import Form, Word, Writing

#: The opset of a norm that is exported by itself; in a model, the layout's `opset` is the lowest.
OPSET = 17


def to_onnx(
    spec: LayerNormSpec,
    word: Word | str = Word.INT64,
    form: Form | str = Form.INLINE,
    *,
    leading: Sequence[str | int] = ("rows",),
    io: DType | str | None = None,
    opset: int = OPSET,
) -> onnx.ModelProto:
    """Return a model that maps input codes ``q`` to output codes ``y``.

    Where the spec adds a residual, its codes are a second input, ``residual``; where the sum has codes of its own, they
    are a second output, ``sum``.

    Parameters
    ----------
    spec : LayerNormSpec
    word : Word
        ``int64``; or ``int24`` or ``float24``, in which no value reaches 2**24, for specs planned with the hardware
        ``carried24``.
    form : Form
        ``inline``, the nodes; or ``function``, one node of the domain ``fxp_layernorm`` with the nodes as its body.
    leading : sequence of str or int
        The dimensions that are not normalized: a name for each dynamic one, a number for each fixed one.
    io : {"int32"}, optional
        Type of all codes, for consumers that don't take their own types.
    opset : int
        The opset of the model, 13 or later.

    Raises
    ------
    ModelError
        If the word doesn't hold the spec, there are fewer dimensions than the axes of the spec need, or an option is
        unknown.
    """
    writing = Writing.of(form, word, opset, io)
    if writing.form is Form.QDQ:
        raise ModelError("a norm by itself has no form qdq: it is for norms of a model, with `quantize_model`")
    shape = _shape(spec, leading)
    operands = [
        _typed(name, writing.codes(params), shape)
        for name, params in zip(("q", "residual"), spec.operands, strict=False)
    ]
    tape = Tape()
    written = subgraph.append(tape, spec, operands, writing, rank=len(shape), name="")
    for letter, value in written.stages.items():
        value.name = letter
    outputs = [_typed("y", writing.codes(spec.output), shape, written.codes)]
    if written.codes_sum is not None and spec.sum_output is not None:
        outputs.append(_typed("sum", writing.codes(spec.sum_output), shape, written.codes_sum))
    graph = ir.Graph(
        operands, outputs, nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": opset}, name="norm"
    )
    model = ir.Model(graph, ir_version=subgraph.IR_VERSION, producer_name="fxp-layernorm", producer_version=__version__)
    subgraph.add_functions(model, written.functions)
    return ir.to_proto(model)


def _typed(name: str, dtype: ir.DataType, shape: Sequence[str | int], value: ir.Value | None = None) -> ir.Value:
    """Return a value, by default a new one, with a name, a type and a shape."""
    value = ir.Value() if value is None else value
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    return value


def _shape(spec: LayerNormSpec, leading: Sequence[str | int]) -> list[str | int]:
    """Return the leading dimensions and the normalized ones in their places."""
    rank = len(leading) + len(spec.axes)
    if rank < -spec.axes[0]:
        raise ModelError(f"the axes {spec.axes} need at least {-spec.axes[0] - len(spec.axes)} leading dimensions")
    sizes: dict[int, int] = dict(zip(spec.axes, spec.normalized_shape, strict=True))
    others = iter(leading)
    return [sizes[axis] if axis in sizes else next(others) for axis in range(-rank, 0)]

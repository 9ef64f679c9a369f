"""Showing inner values of a model, also of the bodies of its If, Loop and Scan nodes, as outputs.

A body's value exists once a pass, or not at all. Each becomes one array of rows in the main graph: If hands on the
rows of the branch that ran, Loop gathers those of its passes in a state of its own, and Scan stacks them. Where a
Scan's body has bodies of its own, whose rows are not always as many, it becomes the Loop that does the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .errors import ModelError

#: The nodes whose bodies can be observed.
CONTROL_FLOW = ("If", "Loop", "Scan")
_PREFIX = "fxp_layernorm.exposed"


def expose(model: onnx.ModelProto, values: Mapping[str, tuple[int, ...]], *, copied: bool = False) -> dict[str, str]:
    """Make values of a model its outputs.

    Parameters
    ----------
    model : onnx.ModelProto
        Changed in place. No two values of its graph and their bodies may have the same name.
    values : mapping of str to tuple of int
        The names of the values, and the shape of a row of each as it lies there (`row_shape`), 1 in the dimensions that
        are not the row's: values of bodies have the shape (rows, *row).
    copied : bool
        Whether values of the main graph are shown as copies, with names of their own. ONNX Runtime gives an output that
        a QuantizeLinear reads behind a Transpose as what its codes stand for.

    Returns
    -------
    dict of str to str
        The output of each value. The model's inputs are left out: they can't be outputs.

    Raises
    ------
    ModelError
        If there is no such value, or it is in a body that can't be observed.
    """
    graph = model.graph
    inputs = {value.name for value in graph.input}
    outer = {value for value in values if value in _defined(graph)}
    present = {value.name for value in graph.output}
    typed = {value.name: value for value in graph.value_info}
    exposed = {name: name for name in values if name in outer - inputs}
    for name in exposed.keys() - present if copied else ():
        exposed[name] = f"{_PREFIX}/{name}"
        graph.node.append(helper.make_node("Identity", [name], [exposed[name]]))
    for name, shown in exposed.items():
        if name not in present:
            kind = typed[name].type if name in typed else onnx.TypeProto()
            graph.output.append(helper.make_value_info(shown, kind))
    inner = {name: row for name, row in values.items() if name not in outer}
    if inner:
        rows = _Exposer(inner).rows(graph)
        graph.output.extend(value.info() for value in rows.values())
        exposed.update((name, value.name) for name, value in rows.items())
        missing = [name for name in inner if name not in rows]
        if missing:
            raise ModelError(f"the model has no value {missing[0]!r} that can be observed")
    return exposed


@dataclass(frozen=True)
class _Rows:
    """An array of rows: the name of its value, and its type."""

    name: str
    dtype: int

    def info(self) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(self.name, self.dtype, None)


@dataclass
class _Exposer:
    wanted: Mapping[str, tuple[int, ...]]
    _count: int = field(default=0)

    def rows(self, graph: onnx.GraphProto) -> dict[str, _Rows]:
        """Return, for each wanted value of the graph's bodies, its rows as a value of the graph, which is extended."""
        found: dict[str, _Rows] = {}
        for node in list(graph.node):
            if node.domain in ("", "ai.onnx") and node.op_type in CONTROL_FLOW:
                bodies = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
                nested = [self.rows(body) for body in bodies]
                inner = [self._own(body) | rows for body, rows in zip(bodies, nested, strict=True)]
                if node.op_type == "Scan" and any(nested):
                    self._become_loop(graph, node, bodies[0])
                if node.op_type == "If":
                    found.update(self._of_if(node, bodies, inner))
                elif node.op_type == "Loop":
                    found.update(self._of_loop(graph, node, bodies[0], inner[0]))
                else:
                    found.update(self._of_scan(graph, node, bodies[0], inner[0]))
        return found

    def _own(self, body: onnx.GraphProto) -> dict[str, _Rows]:
        """Return the rows of the wanted values that the body itself defines."""
        typed = [*body.value_info, *body.input, *body.output]
        types = {value.name: value.type.tensor_type for value in typed}
        found = {}
        for name in sorted(_defined(body) & self.wanted.keys()):
            value, kind = name, types.get(name, onnx.TypeProto.Tensor())
            dtype = kind.elem_type
            if dtype == TensorProto.UNDEFINED:
                value, dtype = self._new(name), TensorProto.FLOAT
                body.node.append(helper.make_node("Cast", [name], [value], to=dtype))
            value = self._rows_last(body, name, value, len(kind.shape.dim))
            found[name] = self._to_rows(body, name, value, dtype)
        return found

    def _rows_last(self, body: onnx.GraphProto, name: str, value: str, rank: int) -> str:
        """Return the value with the dimensions of its rows last, transposed where they are not."""
        row = self.wanted[name]
        normalized = [axis for axis, size in zip(range(-len(row), 0), row, strict=True) if size != 1]
        if normalized == list(range(-len(normalized), 0)):
            return value
        if not rank:
            raise ModelError(f"{name!r} can't be observed: its rank is not known")
        last = [axis + rank for axis in normalized]
        order = [axis for axis in range(rank) if axis not in last] + last
        moved = self._new(name)
        body.node.append(helper.make_node("Transpose", [value], [moved], perm=order))
        return moved

    def _of_if(
        self, node: onnx.NodeProto, branches: list[onnx.GraphProto], inner: list[dict[str, _Rows]]
    ) -> Iterator[tuple[str, _Rows]]:
        for name in inner[0] | inner[1]:
            dtype = next(rows[name].dtype for rows in inner if name in rows)
            for branch, rows in zip(branches, inner, strict=True):
                value = rows.get(name) or self._none(branch, name, dtype)
                branch.output.append(value.info())
            result = _Rows(self._new(name), dtype)
            node.output.append(result.name)
            yield name, result

    def _of_loop(
        self, graph: onnx.GraphProto, node: onnx.NodeProto, body: onnx.GraphProto, inner: dict[str, _Rows]
    ) -> Iterator[tuple[str, _Rows]]:
        for name, value in inner.items():
            states = len(body.input) - 2  # behind the count and the condition
            before, after, result = (_Rows(self._new(name), value.dtype) for _ in range(3))
            body.input.append(before.info())
            body.node.append(helper.make_node("Concat", [before.name, value.name], [after.name], axis=0))
            body.output.insert(1 + states, after.info())
            initial = _Rows(self._new(name), value.dtype)
            graph.initializer.append(helper.make_tensor(initial.name, value.dtype, (0, *self.wanted[name]), []))
            node.input.extend([""] * (2 + states - len(node.input)))
            node.input.append(initial.name)
            node.output.extend(self._new(name) for _ in range(states - len(node.output)))
            node.output[:] = [*node.output[:states], result.name, *node.output[states:]]
            yield name, result

    def _of_scan(
        self, graph: onnx.GraphProto, node: onnx.NodeProto, body: onnx.GraphProto, inner: dict[str, _Rows]
    ) -> Iterator[tuple[str, _Rows]]:
        for name, value in inner.items():
            stacked = self._new(name)
            node.output.extend(self._new(name) for _ in range(len(body.output) - len(node.output)))
            body.output.append(value.info())
            node.output.append(stacked)
            for attribute in node.attribute:
                if attribute.name in ("scan_output_axes", "scan_output_directions"):
                    attribute.ints.append(0)
            yield name, self._to_rows(graph, name, stacked, value.dtype)

    def _become_loop(self, graph: onnx.GraphProto, node: onnx.NodeProto, body: onnx.GraphProto) -> None:
        """Turn a Scan into a Loop that takes the elements of what is scanned by their numbers."""
        lists = {attribute.name: list(attribute.ints) for attribute in node.attribute}
        (taken,) = (attribute.i for attribute in node.attribute if attribute.name == "num_scan_inputs")
        states = len(node.input) - taken
        scanned, results = node.input[states:], len(body.output) - states
        axes, back = (lists.get(f"scan_input_{what}", [0] * taken) for what in ("axes", "directions"))
        out_axes, out_back = (lists.get(f"scan_output_{what}", [0] * results) for what in ("axes", "directions"))
        before, within, behind = list[onnx.NodeProto](), list[onnx.NodeProto](), list[onnx.NodeProto]()

        def op(to: list[onnx.NodeProto], name: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
            output = output or self._new(name)
            to.append(helper.make_node(name, inputs, [output], **attributes))
            return output

        def constant(values: bool | int | list[int]) -> str:
            name = self._new("constant")
            graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
            return name

        count = op(before, "Gather", [op(before, "Shape", [scanned[0]]), constant(axes[0])])
        number, condition, go_on = (self._new(name) for name in ("number", "condition", "go_on"))
        for x, element, axis, reverse in zip(scanned, body.input[states:], axes, back, strict=True):
            place = op(within, "Sub", [op(within, "Sub", [count, constant(1)]), number]) if reverse else number
            op(within, "Gather", [x, place], element.name, axis=axis)
        op(within, "Identity", [condition], go_on)
        for index, (name, result) in enumerate(zip(node.output[states:], body.output[states:], strict=False)):
            axis, reverse, rank = out_axes[index], out_back[index], 1 + len(result.type.tensor_type.shape.dim)
            if not name or not (axis or reverse):
                continue
            if axis and rank == 1:
                raise ModelError(f"{name!r} is stacked along its axis {axis}, and its rank is not known")
            value = node.output[states + index] = self._new("stacked")
            if reverse:
                whole = [constant([bound]) for bound in (-1, np.iinfo(np.int64).min, 0, -1)]
                value = op(behind, "Slice", [value, *whole], "" if axis else name)
            if axis:
                order = list(range(1, rank))
                order.insert(axis % rank, 0)
                op(behind, "Transpose", [value], name, perm=order)

        del body.input[states:]
        body.input.insert(0, helper.make_tensor_value_info(number, TensorProto.INT64, ()))
        body.input.insert(1, helper.make_tensor_value_info(condition, TensorProto.BOOL, ()))
        body.output.insert(0, helper.make_tensor_value_info(go_on, TensorProto.BOOL, ()))
        position = list(graph.node).index(node)
        for to, start, nodes in ((body, 0, within), (graph, position + 1, behind), (graph, position, before)):
            for extra in reversed(nodes):
                to.node.insert(start, extra)
        node.op_type = "Loop"
        node.input[:] = [count, constant(values=True), *node.input[:states]]
        for attribute in [attribute for attribute in node.attribute if attribute.name != "body"]:
            node.attribute.remove(attribute)

    def _to_rows(self, graph: onnx.GraphProto, name: str, value: str, dtype: int) -> _Rows:
        result, shape = _Rows(self._new(name), dtype), self._new(name)
        graph.initializer.append(helper.make_tensor(shape, TensorProto.INT64, [1 + len(self.wanted[name])],
                                                    [-1, *self.wanted[name]]))  # fmt: skip
        graph.node.append(helper.make_node("Reshape", [value, shape], [result.name]))
        return result

    def _none(self, graph: onnx.GraphProto, name: str, dtype: int) -> _Rows:
        """Return no rows."""
        result = _Rows(self._new(name), dtype)
        empty = helper.make_tensor("", dtype, (0, *self.wanted[name]), [])
        graph.node.append(helper.make_node("Constant", [], [result.name], value=empty))
        return result

    def _new(self, name: str) -> str:
        self._count += 1
        return f"{_PREFIX}/{self._count}/{name}"


def _defined(graph: onnx.GraphProto) -> set[str]:
    names = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    return names.union(*(node.output for node in graph.node))

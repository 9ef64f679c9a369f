"""Showing inner values of a model, also of the bodies of its If, Loop and Scan nodes, as outputs.

A body's value exists once a pass, or not at all. Each becomes one matrix of rows in the main graph: If hands on the
rows of the branch that ran, Loop gathers those of its passes in a state of its own, and Scan stacks them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx
from onnx import TensorProto, helper

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
        The names of the values, and the shape of a row of each: values of bodies have the shape (rows, *row).
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
    """A matrix of rows: the name of its value, and its type."""

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
                inner = [self._own(body) | self.rows(body) for body in bodies]
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
        types = {value.name: value.type.tensor_type.elem_type for value in typed}
        found = {}
        for name in sorted(_defined(body) & self.wanted.keys()):
            value, dtype = name, types.get(name, TensorProto.UNDEFINED)
            if dtype == TensorProto.UNDEFINED:
                value, dtype = self._new(name), TensorProto.FLOAT
                body.node.append(helper.make_node("Cast", [name], [value], to=dtype))
            found[name] = self._to_rows(body, name, value, dtype)
        return found

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

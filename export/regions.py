"""Regions of a graph around a tensor: what it alone decides, backwards and forwards, and what of it can go."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import onnx_ir as ir

from .evaluation import MEASURES, Evaluator

#: Nodes that a region may have on either side of its tensor.
MOST_NODES = 64


class Regions:
    """Walks a graph.

    Attributes
    ----------
    nodes : list of onnx_ir.Node
        Of the graph itself, without its bodies.
    order : dict of onnx_ir.Node to int
        Where each stands among them.
    """

    def __init__(self, graph: ir.Graph, evaluator: Evaluator) -> None:
        self.nodes = list(graph)
        self.order = {node: index for index, node in enumerate(self.nodes)}
        self._evaluator = evaluator
        self._constants, self._shapes = evaluator.constants, evaluator.shapes
        self._runs = evaluator.runs

    def inputs(self, argument: ir.Value) -> Iterator[tuple[ir.Value, list[ir.Node]]]:
        """Yield each value that alone decides `argument`, the nearest first, with the nodes from it, in order."""
        open_values, nodes, given = {argument}, list[ir.Node](), self._evaluator.given
        while len(nodes) <= MOST_NODES:
            if len(open_values) == 1 and nodes:
                yield next(iter(open_values)), nodes[::-1]
            producers = {value.producer() for value in open_values}
            latest = max(producers, key=lambda node: -1 if node is None else self.order.get(node, -1))
            if latest is None or latest not in self.order or not self._runs(latest):
                return
            open_values.difference_update(latest.outputs)
            open_values.update(value for value in latest.inputs if value is not None and not given(value))
            nodes.append(latest)

    def consumers(self, x: ir.Value) -> list[ir.Node]:
        """Return the nodes behind x that read nothing else but constants, in order."""
        known, nodes = {x}, list[ir.Node]()
        queue = [self.order[node] for node in x.consumers() if node in self.order]
        seen = set(queue)
        heapq.heapify(queue)
        while queue and len(nodes) < MOST_NODES:
            node = self.nodes[heapq.heappop(queue)]
            if not self._runs(node) or not all(
                v is None or v in known or self._evaluator.given(v) for v in node.inputs
            ):
                continue
            if all(value in self._shapes for value in node.outputs):
                continue
            nodes.append(node)
            known.update(node.outputs)
            for consumer in (consumer for value in node.outputs for consumer in value.consumers()):
                index = self.order.get(consumer)
                if index is not None and index not in seen:
                    seen.add(index)
                    heapq.heappush(queue, index)
        return nodes

    def members(self, x: ir.Value, output: ir.Value) -> tuple[tuple[ir.Node, ...], str | None]:
        """Return the nodes from x to output that can go, in order, and an inner value that the model needs."""
        last = output.producer()
        assert last is not None
        between, stack = set[ir.Node](), [last]
        while stack:
            node = stack.pop()
            if node not in between:
                between.add(node)
                if node.op_type in MEASURES:
                    continue
                inner = (value for value in node.inputs if value is not x and value not in self._constants)
                stack += [producer for value in inner if value is not None and (producer := value.producer())]
        members, used = {last}, None
        for node in sorted(between - {last}, key=self.order.__getitem__, reverse=True):
            outside = [v for v in node.outputs if v.is_graph_output() or not members.issuperset(v.consumers())]
            if not outside:
                members.add(node)
            elif outside[0] not in self._shapes:  # a shape stays where others need it
                used = used or outside[0].name
        return tuple(sorted(members, key=self.order.__getitem__)), used

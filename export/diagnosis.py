"""Where a consumer goes wrong: the codes that differ, and the first stage of the norm that does.

The subgraph's stages carry the letters of docs/arithmetic.md. Each is held against the same subgraph, written anew
from the spec and run by ONNX's reference operators, so that it doesn't matter in which form a word keeps a stage.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx.reference import ReferenceEvaluator

from ..errors import DataError
from ..spec import LayerNormSpec
from .standalone import to_onnx
from .subgraph import Word

Array = npt.NDArray[Any]

#: What each stage is, in the order of computation; of a stage in parts, "V.high" is one of V.
STAGES = {
    "u": "the input codes as integers (Cast, zero point, channel exponents)",
    "S": "the sum of a row",
    "Q": "the sum of a row's squares",
    "V": "the variance, n*Q - S^2 and eps",
    "r": "the integer square root",
    "R": "its reciprocal, by division",
    "c": "the mean, by division",
    "D": "what the mean leaves, by division",
    "t": "the normalized value: times R, shifted to the right",
    "y": "the output code: gain, offset, shift and clamp",
}
LETTER = re.compile(rf"([{''.join(STAGES)}])(\..+)?")
#: Rows that are examined, and codes that are listed, at most.
MOST_ROWS, MOST_CODES = 16, 5


@dataclass(frozen=True)
class CodeDifference:
    """A code of the output, or of the sum_output, that differs; feed, row and channel are counted from 0."""

    side: str
    feed: int
    row: int
    channel: int
    expected: int
    got: int


@dataclass(frozen=True)
class BorderDifference:
    """A code that no float32 quantizer gives for its float value, or a float value that none gives for its code.

    `side` is the border: the input, the residual, the output or the sum_output of the spec. `of` is what is quantized,
    or dequantized. None is what is not finite.
    """

    side: str
    feed: int
    row: int
    channel: int
    of: float | None
    expected: float | None
    got: float | None


@dataclass(frozen=True)
class StageDifference:
    """The first stage that differs.

    Attributes
    ----------
    stage : str
        Its letter in docs/arithmetic.md, or an empty string where no stage differs once the stages are outputs.
    value : str
        The name of the stage's value: in the model, or as the stages were given.
    row : int or None
        The row of the first value that differs, counted from 0.
    expected, got : float or None
        The first value that differs; integers, whatever type the word carries them in. None where it is not finite.
    values, differ : int
        How many values were compared, and how many of them differ.
    hint : str
        What is known to have such an effect.
    """

    stage: str
    value: str
    row: int | None
    expected: float | None
    got: float | None
    values: int
    differ: int
    hint: str

    def __str__(self) -> str:
        if self.row is None:
            return self.hint
        found = (
            f"{self.stage}, {STAGES[self.stage]}: {self.differ:,} of {self.values:,} values of {self.value} differ, "
        )
        got, expected = ("not finite" if value is None else f"{value:,}" for value in (self.got, self.expected))
        return f"{found}the first, in row {self.row}, is {got} and should be {expected}. {self.hint}"


#: What is found where nothing differs any more.
OTHERWISE_RIGHT = StageDifference(
    "",
    "",
    None,
    None,
    None,
    0,
    0,
    "No code differs once the stages are outputs: the consumer's optimizations change the norm.",
)


def differing_codes(side: str, feed: int, bad: Array, expected: Array, got: Array, most: int) -> list[CodeDifference]:
    """Return the first bad codes, of matrices of rows."""
    return [
        CodeDifference(side, feed, row, channel, int(expected[row, channel]), int(got[row, channel]))
        for row, channel in np.argwhere(bad)[:most].tolist()
    ]


def differing_values(
    side: str, feed: int, bad: Array, of: Array, expected: Array, got: Array
) -> list[BorderDifference]:
    """Return the first bad values at a border, of matrices of rows."""
    return [
        BorderDifference(side, feed, *where, *(_finite(array[tuple(where)]) for array in (of, expected, got)))
        for where in np.argwhere(bad)[:MOST_CODES].tolist()
    ]


def first_difference(
    spec: LayerNormSpec, word: Word | str, codes: Sequence[Array], got: Array, stages: Mapping[str, Array]
) -> StageDifference:
    """Return the first stage in which a consumer differs from the definition.

    Parameters
    ----------
    spec : LayerNormSpec
    word : Word
        The word of the subgraph that the consumer ran.
    codes : sequence of ndarray of shape (rows, n)
        Input codes, and those of the residual where there is one.
    got : ndarray of shape (rows, n)
        The output codes that the consumer made of them.
    stages : mapping of str to ndarray
        The consumer's stages by their letters, of as many rows.
    """
    expected = expected_stages(spec, word, codes)
    rows = len(got)
    for name in sorted(set(stages) & set(expected), key=lambda name: list(STAGES).index(name[0])):
        wanted, found = _numbers(expected[name], stages[name], rows)
        if not np.array_equal(wanted, found):
            return _difference(name, wanted, found, word)
    wanted, found = _numbers(expected["y"], got, rows)
    if not np.array_equal(wanted, found):
        return _difference("y", wanted, found, word)
    return OTHERWISE_RIGHT


def expected_stages(spec: LayerNormSpec, word: Word | str, codes: Sequence[Array]) -> dict[str, Array]:
    """Return every stage of rows of codes, and the output codes as `y`, by ONNX's reference operators."""
    last = tuple(range(-len(spec.axes), 0))  # rows have the normalized dimensions last
    proto = to_onnx(dataclasses.replace(spec, axes=last), word=word)
    named = {output for node in proto.graph.node for output in node.output if LETTER.fullmatch(output)} - {"y"}
    proto.graph.output.extend(onnx.helper.make_value_info(name, onnx.TypeProto()) for name in sorted(named))
    shape = (-1, *spec.normalized_shape)
    feed = {name: array.reshape(shape) for name, array in zip(("q", "residual"), codes, strict=False)}
    names = [output.name for output in proto.graph.output]
    with np.errstate(over="ignore"):  # sums and products may wrap where only their difference counts
        results = ReferenceEvaluator(proto).run(None, feed)
    return dict(zip(names, results, strict=True))


def _numbers(expected: Array, got: Array, rows: int) -> tuple[Array, Array]:
    """Return a stage as matrices of rows; unsigned integers, in which a word may keep signed ones, as signed ones."""
    try:
        got = np.asarray(got).reshape(rows, -1)
    except ValueError:
        raise DataError(f"a stage of {rows} rows has the shape {np.shape(got)}") from None
    expected = expected.reshape(rows, -1)
    if expected.dtype.kind == "u" and expected.dtype.itemsize >= 4:
        signed = np.dtype(f"i{expected.dtype.itemsize}")
        return expected.astype(signed), got.astype(signed) if got.dtype.kind in "iu" else got
    return expected, got


def _difference(name: str, expected: Array, got: Array, word: str) -> StageDifference:
    if expected.shape != got.shape:
        hint = f"{name} has {got.shape[1]} values a row; it must have {expected.shape[1]}."
        return StageDifference(name[0], name, None, None, None, expected.size, expected.size, hint)
    bad = expected != got
    first = tuple(np.argwhere(bad)[0])
    return StageDifference(
        name[0], name, int(first[0]), _finite(expected[first]), _finite(got[first]), expected.size, int(bad.sum()),
        _hint(name[0], expected, got, word),
    )  # fmt: skip


def _finite(value: Any) -> float | None:
    if not np.isfinite(value):
        return None
    number: float = value.item()
    return int(number) if number == int(number) else number


def _carriers() -> list[tuple[Callable[[Array], Array], str]]:
    """Return what consumers are known to make of integers, silently."""
    import ml_dtypes

    return [
        (lambda v: v.astype(np.int64).astype(np.int32), "wrapped to 32 bits: the consumer has no 64-bit integers"),
        (lambda v: np.clip(v.astype(np.float64), -(2.0**31), 2.0**31 - 1), "saturated to 32 bits"),
        (lambda v: v.astype(np.float32), "rounded to float32: the consumer carries integers in floats"),
        (lambda v: v.astype(np.float16), "rounded to float16: the consumer computes in half precision"),
        (lambda v: v.astype(ml_dtypes.bfloat16), "rounded to bfloat16: the consumer computes in half precision"),
    ]


def _hint(stage: str, expected: Array, got: Array, word: str) -> str:
    """Return what may have made of the expected values those that were got."""
    narrower = " Words with narrower integers: --word int24, --word float24." if word == Word.INT64 else ""
    with np.errstate(over="ignore", invalid="ignore"):
        for carry, effect in _carriers():
            if np.array_equal(carry(expected).astype(np.float64), got.astype(np.float64)):
                return f"All are the right values {effect}.{narrower}"
    bad = expected != got
    wide, found = expected[bad].astype(np.float64), got[bad].astype(np.float64)
    if np.all(np.abs(found - wide) == 1):
        return (
            "All are off by one: a quotient or a shift is rounded another way. See how the consumer divides negative "
            "numbers, whether it replaces a division by a product with the reciprocal, and how it rounds ties."
        )
    before = "No stage before it differs: see the operators that lead to it."
    largest = float(np.max(np.abs(wide)))
    if stage != "y" and largest >= 2**24:
        reach = f"The right values go up to 2^{np.log2(largest):.1f}; floats carry integers to 2^24 only."
        return f"{before} {reach}{narrower}"
    return before

"""Vectors of 512 bits for the kernels, of one row or of several, and what moves them.

An operation takes vectors, or tuples with a vector for each row, and does for each row what it does for one: several
rows at once hide each other's latency, and share what they have in common. What an operation means doesn't depend on
the CPU: one with AVX2 alone takes two instructions of 256 bits, and another one whatever LLVM makes of it.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import extending, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import models, register_model

#: Numba's hints give the function that is decorated, with its typing context, where kernels see another.
intrinsic: Any = extending.intrinsic


class Vector(types.Type):
    """512 bits in lanes of 8, 16, 32 or 64."""

    def __init__(self, bits):
        self.bits = bits
        super().__init__(name=f"vector of {bits}-bit lanes")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        super().__init__(manager, vector, lanes(vector.bits))


def for_rows(define):
    """Return the intrinsic of a definition for one row, which takes tuples of what differs between rows as well."""

    @functools.wraps(define)
    def defined(typing_context, *kinds):
        counts = {kind.count for kind in kinds if isinstance(kind, types.UniTuple)}
        if not counts:
            return define(typing_context, *kinds)
        (count,) = counts
        one, codegen = define(typing_context, *(k.dtype if isinstance(k, types.UniTuple) else k for k in kinds))
        result = one.return_type
        if isinstance(result, types.UniTuple):
            rows = types.UniTuple(types.UniTuple(result.dtype, count), result.count)
        else:
            rows = result if result == types.void else types.UniTuple(result, count)

        def for_each(context, builder, signature, values):
            done = [
                codegen(
                    context, builder, one,
                    [
                        builder.extract_value(value, row) if isinstance(kind, types.UniTuple) else value
                        for kind, value in zip(kinds, values, strict=True)
                    ],
                )
                for row in range(count)
            ]  # fmt: skip
            if result == types.void:
                return context.get_dummy_value()
            if isinstance(result, types.UniTuple):
                parts = [[builder.extract_value(value, k) for value in done] for k in range(result.count)]
                done = [context.make_tuple(builder, rows.dtype, part) for part in parts]
            return context.make_tuple(builder, rows, done)

        return rows(*kinds), for_each

    return intrinsic(defined)


def lanes(bits, count=None):
    """Return LLVM's type of a vector."""
    return ir.VectorType(ir.IntType(bits), count or 512 // bits)


def constant(kind, values):
    """Return a vector of constants."""
    values = [values] * kind.count if isinstance(values, int) else values
    return ir.Constant(kind, [ir.Constant(kind.element, value) for value in values])


def pick(builder, first, second, positions):
    """Return the lanes at these positions of two vectors, which count on from the first to the second."""
    return builder.shuffle_vector(first, second, constant(lanes(32, len(positions)), positions))


def fill(builder, kind, value):
    """Return a vector with a number in each lane."""
    empty = ir.Constant(kind, ir.Undefined)
    return pick(builder, builder.insert_element(empty, value, ir.IntType(32)(0)), empty, [0] * kind.count)


def features(context):
    """Return the features of the CPU that the code is for; Numba's cache is keyed on them."""
    return set(context.codegen().magic_tuple()[2].split(","))


def call(builder, name, result, arguments):
    """Call a function of LLVM's."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), arguments)


def _plain(name):
    """Return the operation on two vectors that LLVM has under a name."""

    @for_rows
    def operation(typing_context, x, y):
        return x(x, y), lambda context, builder, signature, arguments: getattr(builder, name)(*arguments)

    return operation


add, subtract, multiply, xor, both = map(_plain, ("add", "sub", "mul", "xor", "and_"))
shift_left, shift_right, shift_right_unsigned = map(_plain, ("shl", "ashr", "lshr"))


@intrinsic
def widest(typing_context):
    """Let the caller use 512-bit vectors, where the CPU has them, and vpdpwssd.

    Hints, no operations: LLVM prefers 256 bits on Intel's AVX-512 cores, where its own loops then take 1.3 times as
    long, and it splits vpdpwssd in two where it finds that faster, which makes the elements take 1.15 times as long.
    """

    def codegen(context, builder, signature, arguments):
        attributes = {'"prefer-vector-width"="512"'}
        if "+avx512vnni" in features(context) and llvm_version_info >= (20,):
            attributes.add(f'"target-features"="{context.codegen().magic_tuple()[2]},+fast-dpwssd"')
        for attribute in attributes:
            # set.add, because llvmlite knows no attributes in quotes but prints whatever the set holds
            set.add(builder.function.attributes, attribute)
        return context.get_dummy_value()

    return types.void(), codegen


def _available(*names):
    """Return the operation that says whether the CPU has these features; it is known when the code is compiled."""

    @intrinsic
    def operation(typing_context):
        def codegen(context, builder, signature, arguments):
            return ir.IntType(1)(int(features(context).issuperset(names)))

        return types.boolean(), codegen

    return operation


#: Whether the operations on words, on bytes and on 64 bits are worth it: elsewhere LLVM's own loops are faster.
has_words = _available("+avx2")
has_bytes = _available("+avx512bw", "+avx512vnni")
has_longs = _available("+avx512bw", "+avx512ifma")


def rows(count):
    """Return the numbers of the rows that are worth doing at once: all where there are 32 registers of 512 bits."""
    return tuple(range(count if "+avx512bw" in features(cpu_target.target_context) else 1))


@for_rows
def place(typing_context, row, last, first, step):
    """Return the index at which a row begins, some steps after the first, or that of the last row beyond it."""

    def codegen(context, builder, signature, arguments):
        row, last, first, step = arguments
        within = builder.select(builder.icmp_signed("<", row, last), row, last)
        return builder.add(first, builder.mul(within, step))

    return types.int64(*[types.int64] * 4), codegen


def _address(context, builder, array_type, array, index, kind):
    data = context.make_array(array_type)(context, builder, value=array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def read(context, builder, array_type, array, index, kind):
    """Return what an array holds from an index on, as another type."""
    value = builder.load(_address(context, builder, array_type, array, index, kind))
    value.align = 1
    return value


def _loader(bits):
    """Return the operation that takes the 512 bits of an array that begin at an index as lanes."""

    @for_rows
    def operation(typing_context, array, row, index):
        def codegen(context, builder, signature, arguments):
            array_value, row, index = arguments
            return read(context, builder, array, array_value, builder.add(row, index), lanes(bits))

        return Vector(bits)(array, types.int64, types.int64), codegen

    return operation


load_bytes, load_words, load_ints, load_longs = map(_loader, (8, 16, 32, 64))


@for_rows
def store(typing_context, array, row, index, vector):
    """Put a vector into an array from an index on; lanes that are wider than its items are saturated: vpmovswb."""
    bits = array.dtype.bitwidth

    def codegen(context, builder, signature, arguments):
        values, row, index, vector = arguments
        if bits < vector.type.element.width:
            limits = array.dtype.minval, array.dtype.maxval
            vector = builder.trunc(_within(builder, vector, limits, "icmp_signed"), lanes(bits, vector.type.count))
        address = _address(context, builder, array, values, builder.add(row, index), vector.type)
        builder.store(vector, address).align = 1
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64, vector), codegen


@intrinsic
def fetch(typing_context, array, row, index):
    """Ask for the lines of the next 64 items of an array from an index on, wherever that is: prefetcht1.

    The second cache then has them when the arithmetic on others is done. Of what comes from the third one, codes and
    outputs of 16 bits take four fifths of the time, those of 8 bits up to a tenth less.
    """

    def codegen(context, builder, signature, arguments):
        values, row, index = arguments
        first = _address(context, builder, array, values, builder.add(row, index), ir.IntType(8))
        kinds = [first.type, *3 * [ir.IntType(32)]]
        prefetch = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), kinds), "llvm.prefetch.p0i8"
        )
        for line in range(0, 64 * array.dtype.bitwidth // 8, 64):
            address = builder.gep(first, [ir.IntType(64)(line)])
            # to be read, by the second cache, as data
            builder.call(prefetch, [address, *(kind(k) for kind, k in zip(kinds[1:], (0, 2, 1), strict=True))])
        return context.get_dummy_value()

    return types.void(array, types.int64, types.int64), codegen


@for_rows
def zero(typing_context, row):
    """Return a vector of zeros in 32 bits for a row."""

    def codegen(context, builder, signature, arguments):
        return constant(lanes(32), 0)

    return Vector(32)(types.int64), codegen


@for_rows
def spread(typing_context, value):
    """Return a vector with an integer in each lane of its width."""
    vector = Vector(value.bitwidth)

    def codegen(context, builder, signature, arguments):
        return fill(builder, lanes(vector.bits), arguments[0])

    return vector(value), codegen


@for_rows
def as_words(typing_context, vector):
    """Return the same bits as words."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], lanes(16))

    return Vector(16)(vector), codegen


@for_rows
def clamp(typing_context, vector, lo, hi, like):
    """Return the lanes within two limits: vpmaxsb and vpminsb.

    They have the sign of the array `like`, or one if they are wider than its items.
    """
    name = "icmp_signed" if like.dtype.signed or vector.bits > like.dtype.bitwidth else "icmp_unsigned"

    def codegen(context, builder, signature, arguments):
        vector, *limits, _ = arguments
        return _within(builder, vector, [builder.trunc(limit, vector.type.element) for limit in limits], name)

    return vector(vector, types.int64, types.int64, like), codegen


def _within(builder, vector, limits, compare):
    for sign, bound in zip("<>", limits, strict=True):
        limit = constant(vector.type, bound) if isinstance(bound, int) else fill(builder, vector.type, bound)
        vector = builder.select(getattr(builder, compare)(sign, vector, limit), limit, vector)
    return vector


@intrinsic
def add_sums(typing_context, array, index, rows, shift):
    """Add the sums of the signed lanes of 1 or 8 rows' vectors, shifted to the left, to an array's from an index on.

    Vectors are merged by twos, so that all 8 sums take 30 operations, where one by one each takes 8 and a wait.
    The sums of any lanes of 32 bits must fit them, but for that of all 16 in a row.
    """

    def codegen(context, builder, signature, arguments):
        values, index, rows, shift = arguments
        vectors = cgutils.unpack_tuple(builder, rows)
        if len(vectors) == 1 and vectors[0].type.count == 8:
            total = call(builder, "vector.reduce.add.v8i64", ir.IntType(64), vectors)
        elif len(vectors) == 1:
            wide = builder.sext(vectors[0], lanes(64, 16))
            total = call(builder, "vector.reduce.add.v16i64", ir.IntType(64), [wide])
        else:
            total = _merge(builder, vectors)
        by = fill(builder, total.type, shift) if len(vectors) > 1 else shift
        total = builder.shl(total, by)
        address = _address(context, builder, array, values, index, total.type)
        before = builder.load(address)
        before.align = 8
        builder.store(builder.add(before, total), address).align = 8
        return context.get_dummy_value()

    return types.void(array, types.int64, rows, types.int64), codegen


def _merge(builder, vectors):
    """Return the sums of the lanes of 8 vectors as one vector of 64-bit lanes."""
    distance = vectors[0].type.count // 2
    while len(vectors) > 1:
        half, count = len(vectors) // 2, vectors[0].type.count
        merged = []
        for x, y in zip(vectors[:half], vectors[half:], strict=True):
            kept = pick(builder, x, y, [k + count * bool(k & distance) for k in range(count)])
            other = pick(builder, x, y, [(k ^ distance) + count * bool(k & distance) for k in range(count)])
            merged.append(builder.add(kept, other))
        vectors, distance = merged, distance // 2
    (total,) = vectors
    if total.type.count == 8:
        return total
    by = constant(lanes(64), 32)
    total = builder.bitcast(total, lanes(64))
    return builder.add(builder.ashr(builder.shl(total, by), by), builder.ashr(total, by))

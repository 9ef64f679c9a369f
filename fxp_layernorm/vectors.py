"""Vectors of 512 bits for the kernels, where LLVM doesn't find the best instruction by itself.

Left alone, LLVM widens every code to 32 bits, multiplies there (two operations for 16 products) and narrows again. Each
function here is one operation on vectors and says which instruction it is for. Its meaning doesn't depend on the CPU:
one with AVX2 alone takes two instructions of 256 bits, and another one whatever LLVM makes of it.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from typing import Any

from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import extending, types
from numba.core import cgutils
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
        super().__init__(manager, vector, _lanes(vector.bits))


def _lanes(bits, count=None):
    return ir.VectorType(ir.IntType(bits), count or 512 // bits)


def _constant(kind, values):
    values = [values] * kind.count if isinstance(values, int) else values
    return ir.Constant(kind, [ir.Constant(kind.element, value) for value in values])


def _pick(builder, first, second, positions):
    """Return the lanes at these positions of two vectors, which count on from the first to the second."""
    return builder.shuffle_vector(first, second, _constant(_lanes(32, len(positions)), positions))


def _fill(builder, kind, value):
    empty = ir.Constant(kind, ir.Undefined)
    return _pick(builder, builder.insert_element(empty, value, ir.IntType(32)(0)), empty, [0] * kind.count)


def _in_turn(builder, even, odd):
    """Return the even lanes of one vector beside the odd ones of another."""
    return builder.select(_constant(_lanes(1, odd.type.count), [0, 1] * (odd.type.count // 2)), odd, even)


def _features(context):
    """Return the features of the CPU that the code is for; Numba's cache is keyed on them."""
    return set(context.codegen().magic_tuple()[2].split(","))


def _call(builder, name, result, arguments):
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}"), arguments)


def _x86(context, builder, result, arguments, avx512, avx2):
    """Return an instruction's result, by two of 256 bits where there is no AVX-512; None without AVX2."""
    if "+avx512bw" in _features(context):
        return _call(builder, f"x86.avx512.{avx512}.512", result, arguments)
    if "+avx2" not in _features(context):
        return None
    halves = []
    for half in (0, 1):
        sizes = [x.type.count // 2 for x in arguments]
        parts = [_pick(builder, x, x, range(half * k, half * k + k)) for x, k in zip(arguments, sizes, strict=True)]
        kind = _lanes(result.element.width, result.count // 2)
        halves.append(_call(builder, f"x86.avx2.{avx2}", kind, parts))
    return _pick(builder, halves[0], halves[1], range(result.count))


def _address(context, builder, array_type, array, index, kind):
    data = context.make_array(array_type)(context, builder, value=array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def _read(context, builder, array_type, array, index, kind):
    value = builder.load(_address(context, builder, array_type, array, index, kind))
    value.align = 1
    return value


def _plain(name):
    """Return the operation on two vectors that LLVM has under a name."""

    @intrinsic
    def operation(typing_context, x, y):
        return x(x, y), lambda context, builder, signature, arguments: getattr(builder, name)(*arguments)

    return operation


add, subtract, multiply, xor = _plain("add"), _plain("sub"), _plain("mul"), _plain("xor")
shift_left, shift_right, shift_right_unsigned = _plain("shl"), _plain("ashr"), _plain("lshr")


@intrinsic
def widest(typing_context):
    """Let the caller use 512-bit vectors, where the CPU has them, and vpdpwssd.

    Hints, no operations: LLVM prefers 256 bits on Intel's AVX-512 cores, where its own loops then take 1.3 times as
    long, and it splits vpdpwssd in two where it finds that faster, which makes the elements take 1.15 times as long.
    """

    def codegen(context, builder, signature, arguments):
        attributes = {'"prefer-vector-width"="512"'}
        if "+avx512vnni" in _features(context) and llvm_version_info >= (20,):
            attributes.add(f'"target-features"="{context.codegen().magic_tuple()[2]},+fast-dpwssd"')
        for attribute in attributes:
            # set.add, because llvmlite knows no attributes in quotes but prints whatever the set holds
            set.add(builder.function.attributes, attribute)
        return context.get_dummy_value()

    return types.void(), codegen


def _available(*features):
    """Return the operation that says whether the CPU has these features; it is known when the code is compiled."""

    @intrinsic
    def operation(typing_context):
        def codegen(context, builder, signature, arguments):
            return ir.IntType(1)(int(_features(context).issuperset(features)))

        return types.boolean(), codegen

    return operation


#: Whether the operations on words, on bytes and on 64 bits are worth it: elsewhere LLVM's own loops are faster.
has_words = _available("+avx2")
has_bytes = _available("+avx512bw", "+avx512vnni")
has_longs = _available("+avx512bw", "+avx512ifma")


def _loader(bits):
    """Return the operation that takes the 512 bits of an array that begin at an index as lanes."""

    @intrinsic
    def operation(typing_context, array, index):
        def codegen(context, builder, signature, arguments):
            return _read(context, builder, array, arguments[0], arguments[1], _lanes(bits))

        return Vector(bits)(array, types.int64), codegen

    return operation


load_bytes, load_words, load_ints, load_longs = map(_loader, (8, 16, 32, 64))


@intrinsic
def store(typing_context, array, index, vector):
    """Put 512 bits into an array from an index on."""

    def codegen(context, builder, signature, arguments):
        values, index, vector = arguments
        builder.store(vector, _address(context, builder, array, values, index, vector.type)).align = 1
        return context.get_dummy_value()

    return types.void(array, types.int64, vector), codegen


@intrinsic
def spread(typing_context, value):
    """Return a vector with an integer in each lane of its width."""
    vector = Vector(value.bitwidth)

    def codegen(context, builder, signature, arguments):
        return _fill(builder, _lanes(vector.bits), arguments[0])

    return vector(value), codegen


@intrinsic
def as_words(typing_context, vector):
    """Return the same bits as words."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _lanes(16))

    return Vector(16)(vector), codegen


@intrinsic
def clamp(typing_context, vector, lo, hi, like):
    """Return the lanes within two limits, by the sign that the array `like` has: vpmaxsb and vpminsb."""
    name = "icmp_signed" if like.dtype.signed else "icmp_unsigned"

    def codegen(context, builder, signature, arguments):
        vector = arguments[0]
        for sign, bound in (("<", arguments[1]), (">", arguments[2])):
            limit = _fill(builder, vector.type, builder.trunc(bound, vector.type.element))
            vector = builder.select(getattr(builder, name)(sign, vector, limit), limit, vector)
        return vector

    return vector(vector, types.int64, types.int64, like), codegen


@intrinsic
def code_words(typing_context, codes, index):
    """Return 64 codes, less the middle of an unsigned type, as words in two vectors.

    Bytes stand in the upper halves of the words: of each four, the first and the third in the first vector, the others
    in the second (vpsllw; vpand). Widening (vpmovsxbw) is one operation for 32 codes too, but all of one port.
    """
    bits = codes.dtype.bitwidth

    def codegen(context, builder, signature, arguments):
        kind, words = _lanes(bits), _lanes(16)

        def read(offset):
            index = builder.add(arguments[1], ir.IntType(64)(offset))
            value = _read(context, builder, codes, arguments[0], index, kind)
            return value if codes.dtype.signed else builder.xor(value, _constant(kind, 1 << (bits - 1)))

        if bits == 8:
            pairs = builder.bitcast(read(0), words)
            parts = builder.shl(pairs, _constant(words, 8)), builder.and_(pairs, _constant(words, 0xFF00))
        else:
            step = kind.count
            narrow = [builder.trunc(read(k), _lanes(16, step)) if bits > 16 else read(k) for k in range(0, 64, step)]
            if bits > 16:
                narrow = [_pick(builder, narrow[k], narrow[k + 1], range(32)) for k in (0, 2)]
            parts = narrow[0], narrow[1]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(Vector(16), 2)(codes, types.int64), codegen


@intrinsic
def code_longs(typing_context, codes, index):
    """Return 8 codes, less the lowest of their type, in 64 bits: vpmovzxwq."""

    def codegen(context, builder, signature, arguments):
        kind = _lanes(codes.dtype.bitwidth, 8)
        value = _read(context, builder, codes, arguments[0], arguments[1], kind)
        if codes.dtype.signed:
            value = builder.xor(value, _constant(kind, 1 << (codes.dtype.bitwidth - 1)))
        return builder.zext(value, _lanes(64))

    return Vector(64)(codes, types.int64), codegen


@intrinsic
def multiply_52(typing_context, total, x, y):
    """Return `total` plus x*y modulo 2**52, of x and y modulo 2**52: vpmadd52luq (AVX-512 IFMA).

    vpmullq is three operations, and the sum one.
    """

    def codegen(context, builder, signature, arguments):
        total, *factors = arguments
        if {"+avx512ifma", "+avx512bw"} <= _features(context):
            return _call(builder, "x86.avx512.vpmadd52l.uq.512", _lanes(64), arguments)
        kept = _constant(_lanes(64), (1 << 52) - 1)
        product = builder.mul(*(builder.and_(v, kept) for v in factors))
        return builder.add(total, builder.and_(product, kept))

    return total(total, x, y), codegen


@intrinsic
def multiply_32(typing_context, x, y):
    """Return the products of the lower 32 bits of each 64, signed: vpmuldq."""

    def codegen(context, builder, signature, arguments):
        half = _constant(_lanes(64), 32)
        return builder.mul(*(builder.ashr(builder.shl(v, half), half) for v in arguments))

    return x(x, y), codegen


@intrinsic
def dot(typing_context, total, x, y):
    """Return `total` plus the sums of the products of two words each: vpdpwssd (AVX-512 VNNI), or vpmaddwd and vpaddd.

    16 products, with their sum, for one operation. vpmulld alone is two.
    """

    def codegen(context, builder, signature, arguments):
        total, *factors = arguments
        sums = _x86(context, builder, _lanes(32), factors, "pmaddw.d", "pmadd.wd")
        if sums is None:
            wide = [[builder.sext(_pick(builder, v, v, range(k, 32, 2)), _lanes(32)) for v in factors] for k in (0, 1)]
            sums = builder.add(*(builder.mul(*pair) for pair in wide))
        return builder.add(total, sums)

    return total(total, x, y), codegen


@intrinsic
def dot_bytes(typing_context, total, x, y):
    """Return `total` plus the sums of the products of four bytes each, those of x unsigned: vpdpbusd (AVX-512 VNNI).

    64 products for one operation: that is the sum of 64 codes, or of their squares.
    """

    def codegen(context, builder, signature, arguments):
        total, x, y = arguments
        if {"+avx512bw", "+avx512vnni"} <= _features(context):
            quads = [total, *(builder.bitcast(v, _lanes(32)) for v in (x, y))]
            return _call(builder, "x86.avx512.vpdpbusd.512", _lanes(32), quads)
        for k in range(4):
            unsigned = builder.zext(_pick(builder, x, x, range(k, 64, 4)), _lanes(32))
            signed = builder.sext(_pick(builder, y, y, range(k, 64, 4)), _lanes(32))
            total = builder.add(total, builder.mul(unsigned, signed))
        return total

    return total(total, x, y), codegen


@intrinsic
def multiply_high(typing_context, x, y):
    """Return the upper halves of the products of words: vpmulhw."""

    def codegen(context, builder, signature, arguments):
        wide = [builder.sext(v, _lanes(32, 32)) for v in arguments]
        return builder.trunc(builder.ashr(builder.mul(*wide), _constant(_lanes(32, 32), 16)), _lanes(16))

    return x(x, y), codegen


@intrinsic
def add_above(typing_context, total, words):
    """Return `total` with the even words added to its upper halves, and with the odd ones: vpslld, vpaddd; vpaddw."""

    def codegen(context, builder, signature, arguments):
        total, words = arguments
        even = builder.add(total, builder.shl(builder.bitcast(words, _lanes(32)), _constant(_lanes(32), 16)))
        halves = builder.bitcast(total, _lanes(16))
        odd = builder.bitcast(_in_turn(builder, halves, builder.add(halves, words)), _lanes(32))
        return context.make_tuple(builder, signature.return_type, [even, odd])

    return types.UniTuple(total, 2)(total, words), codegen


@intrinsic
def shift_in_turn(typing_context, even, odd, shift):
    """Return the lanes of two vectors in turn, shifted into half their width: vpsravd, and vpsravw under a mask.

    One operation a vector, where to shift both and to pack them is three. The shift is at least half the width.
    """
    half = Vector(even.bits // 2)

    def codegen(context, builder, signature, arguments):
        even, odd, shift = arguments
        narrow = _lanes(half.bits)
        by = builder.trunc(shift, even.type.element) if even.type.element.width < 64 else shift
        less = builder.trunc(builder.sub(by, by.type(half.bits)), narrow.element)
        low = builder.bitcast(builder.ashr(even, _fill(builder, even.type, by)), narrow)
        return _in_turn(builder, low, builder.ashr(builder.bitcast(odd, narrow), _fill(builder, narrow, less)))

    return half(even, odd, types.int64), codegen


@intrinsic
def narrow(typing_context, first, second, codes, out):
    """Return the lanes of two vectors as output codes: vpacksswb (or vpackssdw) and one permutation.

    Two operations for 64 codes, where vpmovsdb is two for 16. Saturates to the type of `out`. The lanes come in the
    order of `code_words`, or in pairs of 8, and leave in that of the codes.
    """
    result = Vector(first.bits // 2)
    count = 512 // result.bits
    if first.bits == 32:
        codes_of = [16 * (k // 16) + 8 * (k % 2) + k % 16 // 2 for k in range(count)]
    elif codes.dtype.bitwidth == 8:
        codes_of = [4 * (k % 32 // 2) + 2 * (k % 2) + k // 32 for k in range(count)]
    else:
        codes_of = list(range(count))
    lane_of = sorted(range(count), key=codes_of.__getitem__)

    def codegen(context, builder, signature, arguments):
        kind, wide = _lanes(result.bits), arguments[0].type
        name = f"pack{'ss' if out.dtype.signed else 'us'}{'wb' if first.bits == 16 else 'dw'}"
        packed = _x86(context, builder, kind, arguments[:2], name, name)
        if packed is not None:
            # pieces of 64 bits, from both vectors in turn
            piece = 64 // result.bits
            return _pick(
                builder, packed, packed,
                [(k % wide.count // piece * 2 + k // wide.count) * piece + k % piece for k in lane_of],
            )  # fmt: skip
        low = -1 << (result.bits - 1) if out.dtype.signed else 0
        value = _pick(builder, arguments[0], arguments[1], lane_of)
        for sign, bound in (("<", low), (">", low + (1 << result.bits) - 1)):
            limit = _constant(value.type, bound)
            value = builder.select(builder.icmp_signed(sign, value, limit), limit, value)
        return builder.trunc(value, kind)

    return result(first, second, codes, out), codegen


@intrinsic
def sum_lanes(typing_context, vector):
    """Return the sum of lanes of 32 bits, which 32 bits hold."""

    def codegen(context, builder, signature, arguments):
        total = _call(builder, "vector.reduce.add.v16i32", ir.IntType(32), arguments)
        return builder.sext(total, ir.IntType(64))

    return types.int64(vector), codegen

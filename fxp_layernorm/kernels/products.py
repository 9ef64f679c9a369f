"""The vectors' operations that stand for one instruction each, which LLVM doesn't find by itself.

Left alone, LLVM widens every code to 32 bits, multiplies there (two operations for 16 products) and narrows again. Each
function says which instruction it is for, and what that gains.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from llvmlite import ir
from numba import types

from .vectors import Vector, call, constant, features, fill, for_rows, lanes, pick, read


def _in_turn(context, builder, even, odd):
    """Return the even lanes of one vector beside the odd ones of another."""
    count = odd.type.count
    mask = constant(lanes(1, count), [0, 1] * (count // 2))
    if "+avx512bw" in features(context):
        # a constant mask is made anew for each block (kmovd), which takes turns with vpacksswb; what passes through
        # assembly, be it empty, stays in its register: 3 % of the time at n = 768
        word = ir.IntType(count)
        same = ir.InlineAsm(ir.FunctionType(word, [word]), "", "=r,0")
        kept = builder.call(same, [word(sum(2 << k for k in range(0, count, 2)))])
        kept.attributes.add("nounwind")
        kept.attributes.add("readnone")
        mask = builder.bitcast(kept, mask.type)
    return builder.select(mask, odd, even)


def _x86(context, builder, result, arguments, avx512, avx2):
    """Return an instruction's result, by two of 256 bits where there is no AVX-512; None without AVX2."""
    if "+avx512bw" in features(context):
        return call(builder, f"x86.avx512.{avx512}.512", result, arguments)
    if "+avx2" not in features(context):
        return None
    halves = []
    for half in (0, 1):
        sizes = [x.type.count // 2 for x in arguments]
        parts = [pick(builder, x, x, range(half * k, half * k + k)) for x, k in zip(arguments, sizes, strict=True)]
        kind = lanes(result.element.width, result.count // 2)
        halves.append(call(builder, f"x86.avx2.{avx2}", kind, parts))
    return pick(builder, halves[0], halves[1], range(result.count))


def _code_words(half):
    """Return the operation for one half of a block, of which both are 64 codes."""

    @for_rows
    def operation(typing_context, codes, row, index):
        bits = codes.dtype.bitwidth

        def codegen(context, builder, signature, arguments):
            kind, words = lanes(bits), lanes(16)
            array, row, index = arguments
            begin = builder.add(row, index)

            def part(offset):
                at = builder.add(begin, ir.IntType(64)(offset))
                value = read(context, builder, codes, array, at, kind)
                return value if codes.dtype.signed else builder.xor(value, constant(kind, 1 << (bits - 1)))

            if bits == 8:
                pairs = builder.bitcast(part(0), words)
                return builder.and_(pairs, constant(words, 0xFF00)) if half else builder.shl(pairs, constant(words, 8))
            if bits == 16:
                return part(32 * half)
            low, high = (builder.trunc(part(k), lanes(16, kind.count)) for k in (32 * half, 32 * half + 16))
            return pick(builder, low, high, range(32))

        return Vector(16)(codes, types.int64, types.int64), codegen

    return operation


#: Half a block's codes, less the middle of an unsigned type, as words. Codes of 8 bits stand in the upper halves: of a
#: pair the first (vpsllw), or the second (vpand). Widening (vpmovsxbw) is one operation for 32 codes too, but all of
#: one port.
first_words, second_words = _code_words(0), _code_words(1)


def _weighted_words(half):
    """Return the operation for one half of a block, of which both are 64 codes."""

    @for_rows
    def operation(typing_context, codes, row, index, weights):
        def codegen(context, builder, signature, arguments):
            array, row, index, table = arguments
            value = read(context, builder, codes, array, builder.add(row, index), lanes(8))
            if not codes.dtype.signed:
                value = builder.xor(value, constant(lanes(8), 128))
            at = builder.add(builder.add(index, index), ir.IntType(64)(64 * half))
            weight = read(context, builder, weights, table, at, lanes(8))
            words = _x86(context, builder, lanes(16), [weight, value], "pmaddubs.w", "pmadd.ub.sw")
            if words is not None:
                return words
            wide = builder.mul(builder.zext(weight, lanes(16, 64)), builder.sext(value, lanes(16, 64)))
            return builder.add(*(pick(builder, wide, wide, range(k, 64, 2)) for k in (0, 1)))

        return Vector(16)(codes, types.int64, types.int64, weights), codegen

    return operation


#: The same of codes of 8 bits times their weights: vpmaddubsw. Of a block's 128 weights every other one is 0, so that
#: one of each pair of codes counts. To separate the bytes and to shift them is two operations for 32 codes.
first_weighted, second_weighted = _weighted_words(0), _weighted_words(1)


@for_rows
def code_longs(typing_context, codes, row, index):
    """Return 8 codes in 64 bits: vpmovsxwq or vpmovzxwq."""

    def codegen(context, builder, signature, arguments):
        array, row, index = arguments
        value = read(context, builder, codes, array, builder.add(row, index), lanes(codes.dtype.bitwidth, 8))
        return (builder.sext if codes.dtype.signed else builder.zext)(value, lanes(64))

    return Vector(64)(codes, types.int64, types.int64), codegen


@for_rows
def multiply_52(typing_context, total, x, y):
    """Return `total` plus x*y modulo 2**52, of x and y modulo 2**52: vpmadd52luq (AVX-512 IFMA).

    vpmullq is three operations, and the sum one.
    """

    def codegen(context, builder, signature, arguments):
        total, *factors = arguments
        if {"+avx512ifma", "+avx512bw"} <= features(context):
            return call(builder, "x86.avx512.vpmadd52l.uq.512", lanes(64), arguments)
        kept = constant(lanes(64), (1 << 52) - 1)
        product = builder.mul(*(builder.and_(v, kept) for v in factors))
        return builder.add(total, builder.and_(product, kept))

    return total(total, x, y), codegen


@for_rows
def multiply_32(typing_context, x, y):
    """Return the products of the lower 32 bits of each 64, signed: vpmuldq."""

    def codegen(context, builder, signature, arguments):
        half = constant(lanes(64), 32)
        return builder.mul(*(builder.ashr(builder.shl(v, half), half) for v in arguments))

    return x(x, y), codegen


@for_rows
def dot(typing_context, total, x, y):
    """Return `total` plus the sums of the products of two words each: vpdpwssd (AVX-512 VNNI), or vpmaddwd and vpaddd.

    16 products, with their sum, for one operation. vpmulld alone is two.
    """

    def codegen(context, builder, signature, arguments):
        total, *factors = arguments
        sums = _x86(context, builder, lanes(32), factors, "pmaddw.d", "pmadd.wd")
        if sums is None:
            wide = [[builder.sext(pick(builder, v, v, range(k, 32, 2)), lanes(32)) for v in factors] for k in (0, 1)]
            sums = builder.add(*(builder.mul(*pair) for pair in wide))
        return builder.add(total, sums)

    return total(total, x, y), codegen


@for_rows
def dot_bytes(typing_context, total, x, y):
    """Return `total` plus the sums of the products of four bytes each, those of x unsigned: vpdpbusd (AVX-512 VNNI).

    64 products for one operation: that is the sum of 64 codes, or of their squares.
    """

    def codegen(context, builder, signature, arguments):
        total, x, y = arguments
        if {"+avx512bw", "+avx512vnni"} <= features(context):
            quads = [total, *(builder.bitcast(v, lanes(32)) for v in (x, y))]
            return call(builder, "x86.avx512.vpdpbusd.512", lanes(32), quads)
        for k in range(4):
            unsigned = builder.zext(pick(builder, x, x, range(k, 64, 4)), lanes(32))
            signed = builder.sext(pick(builder, y, y, range(k, 64, 4)), lanes(32))
            total = builder.add(total, builder.mul(unsigned, signed))
        return total

    return total(total, x, y), codegen


@for_rows
def multiply_high(typing_context, x, y):
    """Return the upper halves of the products of words: vpmulhw."""

    def codegen(context, builder, signature, arguments):
        wide = [builder.sext(v, lanes(32, 32)) for v in arguments]
        return builder.trunc(builder.ashr(builder.mul(*wide), constant(lanes(32, 32), 16)), lanes(16))

    return x(x, y), codegen


@for_rows
def add_above(typing_context, total, words):
    """Return `total` with the even words added to its upper halves, and with the odd ones: vpslld, vpaddd; vpaddw."""

    def codegen(context, builder, signature, arguments):
        total, words = arguments
        even = builder.add(total, builder.shl(builder.bitcast(words, lanes(32)), constant(lanes(32), 16)))
        halves = builder.bitcast(total, lanes(16))
        odd = builder.bitcast(_in_turn(context, builder, halves, builder.add(halves, words)), lanes(32))
        return context.make_tuple(builder, signature.return_type, [even, odd])

    return types.UniTuple(total, 2)(total, words), codegen


@for_rows
def upper_words(typing_context, value):
    """Return the upper halves of 32 bits, rounded by the lower ones as a signed number, in both words."""

    def codegen(context, builder, signature, arguments):
        above = builder.lshr(builder.add(arguments[0], constant(lanes(32), 0x8000)), constant(lanes(32), 16))
        return builder.bitcast(builder.or_(above, builder.shl(above, constant(lanes(32), 16))), lanes(16))

    return Vector(16)(value), codegen


@for_rows
def split(typing_context, vector, low):
    """Return 32 bits as two words, of which the lower one is shifted so that so many bits are left: vpsrlw with a mask.

    If `low` is None, the lower one is not used, and can stay.
    """

    def codegen(context, builder, signature, arguments):
        vector, left = arguments
        words = builder.bitcast(vector, lanes(16))
        if isinstance(low, types.NoneType):
            return words
        by = builder.sub(ir.IntType(16)(16), builder.trunc(left, ir.IntType(16)))
        return _in_turn(context, builder, builder.lshr(words, fill(builder, words.type, by)), words)

    return Vector(16)(vector, low), codegen


@for_rows
def widen(typing_context, vector):
    """Return the sums of two lanes of 32 bits each, as unsigned numbers, in 64."""

    def codegen(context, builder, signature, arguments):
        pairs, half = builder.bitcast(arguments[0], lanes(64)), constant(lanes(64), 32)
        return builder.add(builder.and_(pairs, constant(lanes(64), 0xFFFFFFFF)), builder.lshr(pairs, half))

    return Vector(64)(vector), codegen


@for_rows
def shift_in_turn(typing_context, even, odd, shift):
    """Return the lanes of two vectors in turn, shifted into half their width: vpsravd, and vpsravw under a mask.

    One operation a vector, where to shift both and to pack them is three. The shift is at least half the width.
    """
    half = Vector(even.bits // 2)

    def codegen(context, builder, signature, arguments):
        even, odd, shift = arguments
        narrow = lanes(half.bits)
        by = builder.trunc(shift, even.type.element) if even.type.element.width < 64 else shift
        less = builder.trunc(builder.sub(by, by.type(half.bits)), narrow.element)
        low = builder.bitcast(builder.ashr(even, fill(builder, even.type, by)), narrow)
        return _in_turn(context, builder, low, builder.ashr(builder.bitcast(odd, narrow), fill(builder, narrow, less)))

    return half(even, odd, types.int64), codegen


@for_rows
def narrow(typing_context, first, second, codes, out):
    """Return the lanes of two vectors as output codes: vpacksswb (or vpackssdw) and one permutation.

    Two operations for 64 codes, where vpmovsdb is two for 16. Saturates to the type of `out`, or to signed words if
    that is narrower. The lanes come in the order of `first_words` and `second_words`, or in pairs of 8, and leave in
    that of the codes.
    """
    result = Vector(first.bits // 2)
    signed = out.dtype.signed or result.bits > out.dtype.bitwidth
    count = 512 // result.bits
    if first.bits == 32:
        codes_of = [16 * (k // 16) + 8 * (k % 2) + k % 16 // 2 for k in range(count)]
    elif codes.dtype.bitwidth == 8:
        codes_of = [4 * (k % 32 // 2) + 2 * (k % 2) + k // 32 for k in range(count)]
    else:
        codes_of = list(range(count))
    lane_of = sorted(range(count), key=codes_of.__getitem__)

    def codegen(context, builder, signature, arguments):
        kind, wide = lanes(result.bits), arguments[0].type
        name = f"pack{'ss' if signed else 'us'}{'wb' if first.bits == 16 else 'dw'}"
        packed = _x86(context, builder, kind, arguments[:2], name, name)
        if packed is not None:
            # pieces of 64 bits, from both vectors in turn
            piece = 64 // result.bits
            return pick(
                builder, packed, packed,
                [(k % wide.count // piece * 2 + k // wide.count) * piece + k % piece for k in lane_of],
            )  # fmt: skip
        low = -1 << (result.bits - 1) if signed else 0
        value = pick(builder, arguments[0], arguments[1], lane_of)
        for sign, bound in (("<", low), (">", low + (1 << result.bits) - 1)):
            limit = constant(value.type, bound)
            value = builder.select(builder.icmp_signed(sign, value, limit), limit, value)
        return builder.trunc(value, kind)

    return result(first, second, codes, out), codegen

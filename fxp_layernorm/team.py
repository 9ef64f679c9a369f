"""A team of threads that share one compiled call, without Python: how parts of it are taken, offered and joined.

Handing work over in Python costs as much as half a million elements: the other thread has to be woken, and the two then
wait for the interpreter's lock before their work and after it. So here a thread that has nothing to do looks for work
for a while before it sleeps, as OpenMP's do, and neither it nor the caller is in Python between two parts.

A caller writes down what is to be done in a line of memory that only its call uses, an *offer*:

- word 0: in its lower half how many threads may still join, in its upper half how many are at work;
- words 1 and 2: the addresses of the function to call, and of what it is called with, which lies on the caller's stack;
- word 3: how many threads may join, which Python writes down before a call; 0 when they may.

What is called gets a *ticket*, with which it takes its parts: the address of the counter of those that are taken, from
the first on in its lower half and from the last on in its upper half, plus 1 in threads that help.

The words 1 and 2 are written before word 0 lets threads in, and the caller returns only when nobody may join any more
and nobody is at work. So whatever a thread that has joined finds there is valid until it leaves.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import os
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils, imputils

#: Bytes of an offer: no two share a line of the cache, nor a pair of lines that CPUs fetch together.
OFFER = 128

#: After so many looks at threads that are still at work, the caller lets others have its core.
_PATIENCE = 1 << 10

intrinsic: Any = extending.intrinsic
#: llvmlite's types.
_WORD, _BYTES = ir.IntType(64), ir.IntType(8).as_pointer()
_WORK = ir.FunctionType(ir.VoidType(), [_BYTES, _WORD])
#: The seats in word 0, and what joining adds to it: one seat less, one more at work.
_SEATS = _JOINED = _WORD((1 << 32) - 1)


def _word(builder, address, index=0):
    return builder.gep(builder.inttoptr(address, _WORD.as_pointer()), [ir.IntType(32)(index)])


def _read(builder, pointer):
    return builder.load_atomic(pointer, "acquire", 8)


def _pause(context, builder):
    """Leave the core's units to its other thread for a moment: pause (x86), yield (ARM)."""
    triple = builder.module.triple
    if triple.startswith("x86_64"):
        name, arguments = "llvm.x86.sse2.pause", []
    elif triple.startswith(("aarch64", "arm64")):
        name, arguments = "llvm.aarch64.hint", [ir.IntType(32)(1)]
    else:
        return
    kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@intrinsic
def take(typing_context, ticket, parts):
    """Return the number of the next part of so many that this thread is to do, or -1 when all are taken.

    The caller takes them from the first on and threads that help from the last on. In the next call on the same arrays
    a core then finds most of its parts in its own cache, and doesn't have to fetch what another one has written.
    """

    def codegen(context, builder, signature, arguments):
        ticket, parts = arguments
        helps = builder.and_(ticket, _WORD(1))
        counter = _word(builder, builder.xor(ticket, helps))
        step = builder.shl(_WORD(1), builder.shl(helps, _WORD(5)))
        taken = builder.atomic_rmw("add", counter, step, "monotonic")
        first, last = builder.and_(taken, _WORD((1 << 32) - 1)), builder.lshr(taken, _WORD(32))
        part = builder.select(
            builder.trunc(helps, ir.IntType(1)), builder.sub(builder.sub(parts, _WORD(1)), last), first
        )
        return builder.select(builder.icmp_signed("<", builder.add(first, last), parts), part, _WORD(-1))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def direction(typing_context, ticket):
    """Return 1 where this thread takes the parts from the first on, and -1 where it does from the last on."""

    def codegen(context, builder, signature, arguments):
        helps = builder.and_(arguments[0], _WORD(1))
        return builder.sub(_WORD(1), builder.add(helps, helps))

    return types.int64(types.int64), codegen


@intrinsic
def frozen(typing_context, array):
    """Return an array as a read-only one, which is the type that what is compiled for inputs takes."""

    def codegen(context, builder, signature, arguments):
        return imputils.impl_ret_borrowed(context, builder, signature.return_type, arguments[0])

    return array.copy(readonly=True)(array), codegen


@intrinsic
def together(typing_context, offer, function, *arguments):
    """Call a compiled function in this thread and in those that accept an offer; return whether a call failed.

    Each calls it with its ticket before the arguments, and they `take` their parts with it. At the address 0 there is
    no offer, and this thread does all.
    """
    signature = function.get_call_type(typing_context, (types.int64, *arguments), {})

    def codegen(context, builder, _, values):
        offer, _, values = values
        values = cgutils.unpack_tuple(builder, values)
        compiled = function.dispatcher.get_compile_result(signature)
        context.active_code_library.add_linking_library(compiled.library)

        def call(builder, counter, helps, failed, values):
            ticket = builder.or_(builder.ptrtoint(counter, _WORD), helps)
            status, _ = context.call_internal_no_propagate(builder, compiled.fndesc, signature, [ticket, *values])
            with builder.if_then(status.is_error, likely=False):
                builder.store_atomic(_WORD(1), failed, "monotonic", 8)

        # what all of them work with: the counter, whether a call has failed, and the arguments
        kind = ir.LiteralStructType([_WORD, _WORD, *(value.type for value in values)])
        work = ir.Function(builder.module, _WORK, builder.module.get_unique_name("work"))
        work.linkage = "internal"
        inner = ir.IRBuilder(work.append_basic_block())
        counter, failed, *given = _fields(inner, inner.bitcast(work.args[0], kind.as_pointer()))
        call(inner, counter, work.args[1], failed, [inner.load(place) for place in given])
        inner.ret_void()

        job = cgutils.alloca_once(builder, kind)
        counter, failed, *given = _fields(builder, job)
        builder.store(_WORD(0), counter)
        builder.store(_WORD(0), failed)
        with builder.if_else(builder.icmp_unsigned("!=", offer, _WORD(0))) as (shared, alone):
            with shared:
                for value, place in zip(values, given, strict=True):
                    builder.store(value, place)
                address = builder.bitcast(job, _BYTES)
                builder.store(builder.ptrtoint(work, _WORD), _word(builder, offer, 1))
                builder.store(builder.ptrtoint(address, _WORD), _word(builder, offer, 2))
                seats = builder.load(_word(builder, offer, 3))
                builder.store_atomic(seats, _word(builder, offer), "release", 8)
                builder.store_atomic(_WORD(0), _word(builder, offer, 3), "release", 8)
                builder.call(work, [address, _WORD(0)])
                builder.atomic_rmw("and", _word(builder, offer), builder.not_(_SEATS), "acquire")
                _wait(context, builder, offer)
            with alone:  # without the way through memory
                call(builder, counter, _WORD(0), failed, values)
        return builder.icmp_unsigned("!=", builder.load(failed), _WORD(0))

    return types.boolean(offer, function, types.StarArgTuple(arguments)), codegen


def _fields(builder, job):
    return [cgutils.gep_inbounds(builder, job, 0, index) for index in range(len(job.type.pointee))]


def _wait(context, builder, offer):
    """Wait until nobody is at work: a part takes microseconds, if its thread has a core."""
    looks = cgutils.alloca_once_value(builder, _WORD(0))
    look = builder.append_basic_block("look")
    rest = builder.append_basic_block("rest")
    done = builder.append_basic_block("done")
    builder.branch(look)
    builder.position_at_end(look)
    builder.cbranch(builder.icmp_unsigned("==", _read(builder, _word(builder, offer)), _WORD(0)), done, rest)
    builder.position_at_end(rest)
    _pause(context, builder)
    count = builder.add(builder.load(looks), _WORD(1))
    builder.store(count, looks)
    if os.name == "posix":
        with builder.if_then(builder.icmp_unsigned(">", count, _WORD(_PATIENCE))):
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
    builder.branch(look)
    builder.position_at_end(done)


@intrinsic
def join(typing_context, offer):
    """Accept an offer, if it is one, and do its work; return whether it was."""

    def codegen(context, builder, signature, arguments):
        state = _word(builder, arguments[0])
        joined = cgutils.alloca_once_value(builder, ir.IntType(1)(0))
        seen = _read(builder, state)
        with builder.if_then(builder.icmp_unsigned("!=", builder.and_(seen, _SEATS), _WORD(0)), likely=False):
            swapped = builder.cmpxchg(state, seen, builder.add(seen, _JOINED), "acq_rel", "monotonic")
            with builder.if_then(builder.extract_value(swapped, 1)):
                function, job = (builder.load(_word(builder, arguments[0], index)) for index in (1, 2))
                builder.call(builder.inttoptr(function, _WORK.as_pointer()), [builder.inttoptr(job, _BYTES), _WORD(1)])
                builder.atomic_rmw("sub", state, _WORD(1 << 32), "release")
                builder.store(ir.IntType(1)(1), joined)
        return builder.load(joined)

    return types.boolean(types.int64), codegen


@intrinsic
def rest(typing_context):
    """Tell the CPU that a loop waits for other cores."""

    def codegen(context, builder, signature, arguments):
        _pause(context, builder)
        return context.get_dummy_value()

    return types.void(), codegen

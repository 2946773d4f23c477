"""Several launches in one call to a kernel, of which each may begin before the one before it has ended.

Between two kernels memory rests: the last programs end, the next launch comes up, its first bytes are on their way. A
programmatic launch lets a kernel begin when all programs of the one before it have said so, and wait, when it has
asked for what does not depend on that one, for its end. XLA knows no such edges between two calls, and puts each call's
launches into a graph of their own; but within that graph they are what the stream was told. So one call makes them all:

    host function of the call                              stream, or graph
    for step in 0 .. steps - 1:      one kernel, whose     step 0 ▓▓▓▓▓▓▓▓▓▓▓░
        launch kernel(step)          programs ask which           step 1  ░▓▓▓▓▓▓▓▓▓▓░      ░ asking, waiting
                                     step this is                        step 2   ░▓▓▓▓▓▓▓▓▓▓
"""

import contextlib
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, scf


def launched(times: int) -> ir.Value:
    """Has the kernel that is being emitted launched `times` times: which of them this is, int32.

    To be called once, in `inline_mgpu`. Mosaic has one launch in a call's host function, whose status the function
    returns: it becomes what a loop does before it asks whether to go on, and the status is the last one's.
    """
    launch = _around(ir.InsertionPoint.current.block.owner, "gpu.launch")
    _around(launch, "builtin.module").attributes["mosaic_gpu.uses_pdl"] = ir.UnitAttr.get()
    i32 = ir.IntegerType.get_signless(32)
    with ir.InsertionPoint(launch):
        loop = scf.WhileOp([i32], [mgpu.c(0, i32)])
    step = loop.before.blocks.append(i32).arguments[0]
    with ir.InsertionPoint(loop.before.blocks[0]):
        following = arith.addi(step, mgpu.c(1, i32))
        end = scf.ConditionOp(_less(following, times), [following])
    after = loop.after.blocks.append(i32)
    with ir.InsertionPoint(after):
        scf.YieldOp([after.arguments[0]])
    launch.move_before(end.operation)
    return step


def only(step: ir.Value, this: int, program: ir.Value, programs: int) -> contextlib.AbstractContextManager[None]:
    """What is emitted within is for that step and its programs, of which other steps may have more."""
    here = arith.cmpi(arith.CmpIPredicate.eq, step, mgpu.c(this, step.type))
    return mgpu.utils.when(arith.andi(here, _less(program, programs)))


def _around(op: Any, name: str) -> ir.Operation:
    """The operation of that name that this one is in."""
    found = op.operation
    while found.name != name:
        found = found.parent
    return found


def _less(value: ir.Value, limit: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.slt, value, mgpu.c(limit, value.type))

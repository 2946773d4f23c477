"""What one lane does, said once and run twice: as machine code on a GPU, and in NumPy on any machine.

Pallas speaks of arrays. A kernel that wants a value in this register of that lane, 16 bytes of shared memory that only
the lane itself will read, a `mma.sync` fed from there, has to be written for a lane. Such a program is Python that
calls `o`, whose integers and pointers know `+ - * & | << >> // %` and comparisons; what a GPU has beyond that are
methods of `o`: here as MLIR and PTX, in `lanes_numpy` on arrays `[programs, warps, 32]`.

Integers are 32 bits, comparisons signed, shifts to the right and `//` unsigned; pointers are bytes in device memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic import gpu as mgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

from pallas_kernels.pairs import PAIR, both, byte_pair, pair, with_exponent

_ORDER = arith.CmpIPredicate


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


class Int:
    """A 32-bit register, or an address of 64 bits to which such are added."""

    def __init__(self, value: ir.Value) -> None:
        self.value = value

    def _with(self, op: Callable[..., ir.Value], other: Any) -> Int:
        if isinstance(other, Int) and other.value.type != self.value.type:
            wide = arith.extui(self.value.type, other.value)
        else:
            wide = other.value if isinstance(other, Int) else mgpu.c(int(other), self.value.type)
        return Int(op(self.value, wide))

    def __add__(self, other: Any) -> Int:
        return self if isinstance(other, int) and other == 0 else self._with(arith.addi, other)

    def __sub__(self, other: Any) -> Int:
        return self._with(arith.subi, other)

    def __mul__(self, other: Any) -> Int:
        return self._with(arith.muli, other)

    def __and__(self, other: Any) -> Int:
        return self._with(arith.andi, other)

    def __or__(self, other: Any) -> Int:
        return self._with(arith.ori, other)

    def __lshift__(self, other: int) -> Int:
        return self._with(arith.shli, other) if other else self

    def __rshift__(self, other: int) -> Int:
        return self._with(arith.shrui, other) if other else self

    def __floordiv__(self, other: int) -> Int:
        return self._with(arith.divui, other)

    def __mod__(self, other: int) -> Int:
        return self._with(arith.remui, other)

    def __lt__(self, other: Any) -> Int:
        return self._with(lambda a, b: arith.cmpi(_ORDER.slt, a, b), other)

    def __gt__(self, other: Any) -> Int:
        return self._with(lambda a, b: arith.cmpi(_ORDER.sgt, a, b), other)


class Lanes:
    """Emits a program.

    Attributes:
      lane, warp, thread, program: where this is.
    """

    def __init__(self, program: ir.Value, shared: ir.Value, sizes: dict[str, int]) -> None:
        """shared: an array in shared memory, of `sizes` bytes by the names that the program has for its parts."""
        self.program, self.thread = Int(program), Int(mgpu.utils.thread_idx())
        self.lane, self.warp = self.thread & 31, self.thread >> 5
        self._shared = {}
        at = self._ptx("mov.b32 $0, $1;", mgpu.utils.memref_ptr(shared), out="r", effects=False)[0]
        for name, size in sizes.items():
            self._shared[name], at = at, at + size

    def _ptx(self, text: str, *given: Any, out: Sequence[str] = (), effects: bool = True) -> list[Any]:
        """Runs PTX: `$0 ...` are results, "r", "l" or "f" each, then the operands."""
        kinds = {"r": _i32(), "l": ir.IntegerType.get_signless(64), "f": ir.F32Type.get()}
        types = [kinds[kind] for kind in out]
        values = [v.value if isinstance(v, Int) else v for v in given]
        if not types:
            mgpu.utils.inline_ptx(text, *values, has_side_effects=True)
            return []
        found = mgpu.utils.inline_ptx(text, *values, result_types=types, has_side_effects=effects)
        return [v if kind == "f" else Int(v) for v, kind in zip(found, out, strict=True)]

    def integer(self, value: int) -> Int:
        """A constant."""
        return Int(mgpu.c(value, _i32()))

    def real(self, value: float) -> ir.Value:
        """A float32 constant."""
        return mgpu.c(value, ir.F32Type.get())

    def minimum(self, a: Int, b: Any) -> Int:
        """The smaller one, signed."""
        return a._with(arith.minsi, b)

    def choose(self, condition: Int, a: Any, b: Any) -> Any:
        """`a` where the condition holds, else `b`; integers or reals."""
        if isinstance(a, ir.Value):
            return arith.select(condition.value, a, b)
        a, b = (v if isinstance(v, Int) else self.integer(v) for v in (a, b))
        return Int(arith.select(condition.value, a.value, b.value))

    def repeat(self, times: int, body: Callable[..., Sequence[Any]], carry: Sequence[Any]) -> list[Any]:
        """`carry = body(i, *carry)` for i in 0 .. times - 1."""
        if times == 1:
            return list(body(self.integer(0), *carry))
        kinds = [isinstance(v, Int) for v in carry]

        def wrap(values: Any) -> list[Any]:
            return [Int(v) if kind else v for v, kind in zip(values, kinds, strict=True)]

        def unwrap(values: Any) -> list[ir.Value]:
            return [v.value if kind else v for v, kind in zip(values, kinds, strict=True)]

        def turn(i: ir.Value, values: Any) -> list[ir.Value]:
            return unwrap(body(Int(i), *wrap(values)))

        loop = mgpu.utils.fori(mgpu.c(times, _i32()), unwrap(carry))(turn)
        return wrap(loop.results)

    # Memory

    def pointer(self, ref: ir.Value) -> Int:
        """Where an array in device memory begins."""
        return self._ptx("mov.b64 $0, $1;", mgpu.utils.memref_ptr(ref), out="l", effects=False)[0]

    def load(self, at: Int, size: int, offset: int = 0, when: Int | None = None) -> list[Int]:
        """`size` bytes, 1, 2 or a multiple of 4, aligned to their size or to 16: registers; zeros where not `when`."""
        count = max(1, size // 4)
        kind = {1: "u8", 2: "u16", 4: "b32", 8: "v2.b32", 16: "v4.b32"}[size]
        names = [f"${i}" for i in range(count)]
        into = f"{{{', '.join(names)}}}" if count > 1 else names[0]
        load = f"ld.global.{kind} {into}, [${count} + {offset}];"
        if when is None:
            return self._ptx(load, at, out="r" * count)
        zeros = " ".join(f"mov.b32 {name}, 0;" for name in names)
        return self._ptx(f"{zeros} @${count + 1} {load}", at, when, out="r" * count)

    def store(self, at: Int, value: ir.Value, dtype: str, when: Int) -> None:
        """A float32 as an element of `dtype`, where `when`."""
        if dtype == "float32":
            self._ptx("@$2 st.global.f32 [$0], $1;", at, value, when)
            return
        short = {"bfloat16": "bf16", "float16": "f16"}[dtype]
        self._ptx(f"{{ .reg .b16 h; cvt.rn.{short}.f32 h, $1; @$2 st.global.b16 [$0], h; }}", at, value, when)

    def copy(
        self,
        name: str,
        to: Int,
        offset: int,
        at: Int,
        from_offset: int,
        size: int,
        when: Int,
        at_all: Int | None = None,
    ) -> None:
        """4, 8 or 16 bytes from device memory to shared memory, some time before `wait` says so; zeros where not
        `when`, nothing where not `at_all`."""
        kind, some = "cg" if size == 16 else "ca", "" if at_all is None else "@$3 "
        self._ptx(
            f"{some}cp.async.{kind}.shared.global.L2::128B [$0 + {offset}], [$1 + {from_offset}], {size}, $2;",
            self._shared[name] + to, at, self.choose(when, size, 0), *[] if at_all is None else [at_all],
        )  # fmt: skip

    def commit(self) -> None:
        """Ends a group of copies of this lane."""
        self._ptx("cp.async.commit_group;")

    def wait(self, but: int) -> None:
        """Until the groups of copies of this lane have come, except for the last `but`."""
        self._ptx(f"cp.async.wait_group {but};")

    def read(self, name: str, at: Int, size: int, offset: int = 0) -> list[Int]:
        """4, 8 or 16 bytes of shared memory."""
        kind, names = {4: "", 8: ".v2", 16: ".v4"}[size], [f"${i}" for i in range(size // 4)]
        into = f"{{{', '.join(names)}}}" if size > 4 else names[0]
        return self._ptx(
            f"ld.shared{kind}.b32 {into}, [${len(names)} + {offset}];", self._shared[name] + at, out="r" * len(names)
        )

    def read_matrices(self, name: str, at: Int) -> list[Int]:
        """`ldmatrix`: register j of lane `4r + c` is word c of the 16 bytes at which lane `8j + r` points."""
        return self._ptx(
            "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];", self._shared[name] + at, out="rrrr"
        )

    def read_real(self, name: str, at: Int, offset: int = 0, when: Int | None = None) -> ir.Value:
        """A float32 of shared memory, 0 where not `when`."""
        load, at = f"ld.shared.f32 $0, [$1 + {offset}];", self._shared[name] + at
        if when is None:
            return self._ptx(load, at, out="f")[0]
        return self._ptx(f"mov.f32 $0, 0f00000000; @$2 {load}", at, when, out="f")[0]

    def write_real(self, name: str, at: Int, offset: int, value: ir.Value, when: Int | None = None) -> None:
        """A float32 to shared memory, where `when`."""
        store, at = f"st.shared.f32 [$0 + {offset}], $1;", self._shared[name] + at
        self._ptx(store, at, value) if when is None else self._ptx(f"@$2 {store}", at, value, when)

    def warp_barrier(self) -> None:
        """Until what this warp's lanes have written or awaited is to be seen by all of them."""
        self._ptx("bar.warp.sync 0xffffffff;")

    def barrier(self) -> None:
        """Until all threads of the program are here, and what they wrote to shared memory is to be seen."""
        self._ptx("bar.sync 0;")

    def wait_for_launch_before(self) -> None:
        """Until all that the launches before this one write is to be seen."""
        self._ptx("griddepcontrol.wait;")

    def let_next_launch_begin(self) -> None:
        """The next launch's programs may take what room there is, once all programs of this one have said so."""
        self._ptx("griddepcontrol.launch_dependents;")

    # Values

    def sum_of_lanes(self, value: ir.Value) -> ir.Value:
        """Of a warp, the same in all its lanes."""
        for distance in (16, 8, 4, 2, 1):
            other = self._ptx(f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;", value, out="f")[0]
            value = self.add(value, other)
        return value

    def inverse_root(self, value: ir.Value) -> ir.Value:
        """`1 / sqrt(value)`, off by 2^-22.9 of it."""
        return self._ptx("rsqrt.approx.f32 $0, $1;", value, out="f", effects=False)[0]

    def silu(self, value: ir.Value) -> ir.Value:
        """`value / (1 + exp(-value))`, off by some 2^-21 of it."""
        return self._ptx(
            "{ .reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.f32 e, e; add.f32 e, e, 0f3F800000; "
            "div.full.f32 $0, $1, e; }",
            value, out="f", effects=False,
        )[0]  # fmt: skip

    def pair(self, word: Int, nibble: int, weight: str, dtype: str, less: Int | None) -> Int:
        """The values of the codes at a nibble of both halves of a word (`pallas_kernels.pairs.pair`)."""
        text = pair(nibble, weight, dtype, "$2" if less is not None else None)
        return self._ptx(text, word, *[] if less is None else [less], out="r", effects=False)[0]

    def offset_pair(self, word: Int, nibble: int, dtype: str) -> Int:
        """The codes at a nibble of both halves of a word, plus `pallas_kernels.pairs.MAGIC`'s offset."""
        text = f"{{ .reg .b32 s; shr.b32 s, $1, {4 * nibble}; {with_exponent(4, dtype, '$0', 's')} }}"
        return self._ptx(text, word, out="r", effects=False)[0]

    def byte_pair(self, word: Int, second: int, weight: str, dtype: str) -> Int:
        """The values of the first or second two bytes of a word (`pallas_kernels.pairs.byte_pair`)."""
        return self._ptx(byte_pair(second, weight, dtype), word, out="r", effects=False)[0]

    def both(self, value: ir.Value, dtype: str) -> Int:
        """A float32 in both halves of a register, rounded."""
        return self._ptx(both(dtype), value, out="r", effects=False)[0]

    def as_reals(self, word: Int, dtype: str) -> list[ir.Value]:
        """A register's elements of `dtype`, the lowest first, in float32."""
        f32 = ir.F32Type.get()
        if dtype == "float32":
            return [arith.bitcast(f32, word.value)]
        if dtype == "bfloat16":
            return [arith.bitcast(f32, v.value) for v in (word << 16, word & -65536)]
        if dtype == "float8_e8m0fnu":
            exponents = [((word >> (8 * i)) & 255) << 23 for i in range(4)]
            return [arith.bitcast(f32, v._with(arith.maxui, 1 << 22).value) for v in exponents]  # 2^-127 is no normal
        if dtype == "int8":
            signed = [f"bfe.s32 v, $4, {8 * i}, 8; cvt.rn.f32.s32 ${i}, v;" for i in range(4)]
            return self._ptx(f"{{ .reg .s32 v; {' '.join(signed)} }}", word, out="ffff", effects=False)
        halves = "cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;"
        if dtype == "float16":
            return self._ptx(f"{{ .reg .b16 l, h; mov.b32 {{l, h}}, $2; {halves} }}", word, out="ff", effects=False)
        assert dtype == "float8_e4m3fn", dtype
        more = halves.replace("$0", "$2").replace("$1", "$3")
        return self._ptx(
            "{ .reg .b16 a, b, l, h; .reg .b32 v; mov.b32 {a, b}, $4; "
            f"cvt.rn.f16x2.e4m3x2 v, a; mov.b32 {{l, h}}, v; {halves} "
            f"cvt.rn.f16x2.e4m3x2 v, b; mov.b32 {{l, h}}, v; {more} }}",
            word, out="ffff", effects=False,
        )  # fmt: skip

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """`a * b + c`, rounded once."""
        return self._ptx("fma.rn.f32 $0, $1, $2, $3;", a, b, c, out="f", effects=False)[0]

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """`a + b`."""
        return arith.addf(a, b)

    def multiply(self, a: ir.Value, b: ir.Value) -> ir.Value:
        """`a * b`."""
        return arith.mulf(a, b)

    def mma(self, a: Sequence[Int], b: Sequence[Int], c: Sequence[ir.Value], dtype: str) -> list[ir.Value]:
        """`c + a @ b` of 16 x 16 x 8, each register where `mma.m16n8k16` has it."""
        short = PAIR[dtype].removesuffix("x2")
        return self._ptx(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{short}.{short}.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            *a, *b, *c, out="ffff", effects=False,
        )  # fmt: skip

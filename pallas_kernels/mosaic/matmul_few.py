"""y = residual + activation(x @ w + bias) on Hopper for few rows of x, with weights of 4 or 8 bits: a stream of codes.

    y[m, n] = sum_k x[m, k] * value(code[n, k]) * scale[n, k // g]
    value(code) = code - zero_point, or a table's entry

Operands
    x          bfloat16 or float16 [M, K], M <= 16
    packed     uint32 [N, B, 16], B = ceil(K / 128): the packed order; or int8 or float8_e4m3fn [N, K], 64 dividing K
    scale      float16, bfloat16, float32, e4m3 or e8m0 [N, ceil(K / g)], g = 16, 32, 64 or a multiple of 128, of bytes
               no less than 64; or [1, 1]
    zero_point int8, like scale, of 4 bits; bias [N]; residual [M, N]; global_scale float32 [] or [N]

Work: a program owns `16 * strips` rows of the weight and all of K, so that one wave of programs, one or two to a
multiprocessor, shares any weight evenly. Its warps share K; each has x of a few blocks in registers, the second operand
of `mma.m16n8k16`, and walks over the strips:

    device memory ──cp.async, 16 bytes a lane──▶ ring ──LDS.128──▶ words ──▶ values: the first operand
                                                                         part [16, 8] = values @ x.T
                                                                         sum += part * scale
    sums of a strip ──▶ shared memory [warps, M, rows];   at the end: their sum, epilogue, y

There is nobody to wait for: the packed order is that operand's order, and where codes are bytes x is brought to theirs,
so that a lane needs just what it has copied itself. The ring is the lane's own, its copies are awaited by itself, and
the one barrier is that before the end.

Codes of integers of 4 bits are `128 + code` in bfloat16, exactly (`pallas_kernels.pairs`). What they are off by, 136 or
with a zero point `128 + zero`, is not taken from each of them but, times the sum of x, from the sum.

Numerics: products of values and x are exact in the tensor cores, sums float32 in a fixed order, one rounding, of the
result. Exception: NF4 and FP4 values are rounded to x's type.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.finish import finish
from pallas_kernels.grouped import why_not
from pallas_kernels.mosaic import columns
from pallas_kernels.mosaic.few_plan import (
    BYTES,
    MOST_ROWS,
    Few,
    Plan,
    block_of,
    candidates,
    first_choice,
    offset_by_sums,
)
from pallas_kernels.mosaic.lanes import Lanes
from pallas_kernels.mosaic.lanes_numpy import NumpyLanes
from pallas_kernels.mosaic.launch import launch
from pallas_kernels.mosaic.launches import launched, only
from pallas_kernels.mosaic.step_program import program_of


@dataclasses.dataclass(frozen=True)
class Made:
    """What an earlier launch of the same call makes: an operand of a later one.

    Attributes:
      launch, result: which one's, by its number; by its name in `Plan.results`.
      (others: an array's)
    """

    launch: int
    result: str
    shape: tuple[int, ...]
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Product:
    """A launch: its plan, and its operands by name."""

    plan: Plan
    operands: dict[str, jax.Array | Made]

    def made(self, launch: int, result: str) -> Made:
        """A result of this, which is that launch of a call."""
        shape, dtype = self.plan.results[result]
        return Made(launch, result, shape, jnp.dtype(dtype))


def unsupported(m: int, k: int, n: int, *, transposed: bool, **facts: Any) -> str | None:
    """Why this kernel cannot do a product, or None."""
    if transposed:
        return "it multiplies by the weight, not by its transpose"
    if m > MOST_ROWS:
        return f"it is made for up to {MOST_ROWS} rows of x, not {m}"
    if facts["weight"] in BYTES:
        block = block_of(facts["weight"])
        if k % block or facts["group"] < min(k, block) or "zero_point" in facts["features"]:
            return f"of bytes it takes K and groups by {block}, not {k} and {facts['group']}, and no zero points"
    return why_not(k, n, **(facts | {"scale_dtype": "float32"}))  # which scales of any type are, here


def configs(
    m: int, k: int, n: int, *, weight: str, group: int, x_dtype: str, sms: int, **_: Any
) -> list[dict[str, int]]:
    """Configurations worth measuring; those that need too much shared memory do not compile."""
    sums = offset_by_sums(weight, x_dtype)
    return [dataclasses.asdict(one) for one in candidates(m, n, k, group, sums, sms, block_of(weight))]


def matmul(
    x: jax.Array,
    packed: jax.Array,
    scale: jax.Array,
    *,
    weight: str,
    group: int,
    zero_point: jax.Array | None = None,
    global_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    config: dict[str, int] | None = None,
    sms: int = 132,
    interpret: bool = False,
    **_: Any,
) -> jax.Array:
    """The product of the module's docstring.

    Args:
      weight: "int4", "e2m1", "nf4", "fp4", "int8" or "e4m3".
      group: elements of K that share a scale; K or more for one scale a row.
      config: fields of `Few`; empty takes `first_choice` for the shape.
      sms: multiprocessors of the chip.
      interpret: run the same program in NumPy, on any machine.
      (others: shapes and dtypes in the module's docstring)

    Returns:
      `[M, N]` in `out_dtype`, default x's.
    """
    given: dict[str, Any] = dict(global_scale=global_scale, bias=bias, residual=residual)
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    facts: dict[str, Any] = dict(weight=weight, group=group, zero_point=zero_point, config=config, sms=sms)
    if activation is None:
        (y,) = run([product(x, packed, scale, out=out_dtype.name, **given, **facts)], interpret)[0].values()
        return y
    scale, given["global_scale"] = _per_row(scale, global_scale, packed.shape[0])
    (y,) = run([product(x, packed, scale, out="float32", **facts)], interpret)[0].values()
    return finish(y, out_dtype, activation=activation, **given)


def product(
    x: jax.Array | Made,
    packed: jax.Array,
    scale: jax.Array,
    *,
    weight: str,
    group: int,
    out: str,
    zero_point: jax.Array | None = None,
    global_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | Made | None = None,
    norm: jax.Array | None = None,
    squares_of_x: jax.Array | Made | None = None,
    epsilon: float = 0.0,
    ends: str = "plain",
    place: str = "alone",
    config: dict[str, int] | None = None,
    sms: int,
) -> Product:
    """A product that `ends` so, in that `place` of a call; operands as in `matmul` and `layer_steps`."""
    (m, k), n, block = x.shape, packed.shape[0], block_of(weight)
    scale, global_scale = _per_row(scale, global_scale, n)
    facts = m, n, k, group, offset_by_sums(weight, x.dtype.name), sms, block
    few = Few(**config) if config else first_choice(*facts, all_warps=4 if place == "alone" else 8)
    of_rows = scale.shape[1] == 1
    given = dict(global_scale=global_scale, bias=bias, residual=residual, norm=norm, squares_of_x=squares_of_x)
    inside = {name: a for name, a in given.items() if a is not None}
    dtypes = {name: a.dtype.name for name, a in inside.items()}
    if k % 8:
        assert isinstance(x, jax.Array), "rows of 16 bytes are what a launch before makes"
        x = jnp.pad(x, ((0, 0), (0, -k % 8)))
    plan = Plan(
        m=m,
        n=n,
        k=x.shape[1],
        weight=weight,
        x=x.dtype.name,
        scale=None if of_rows else scale.dtype.name,
        group=-(-k // block) * block if of_rows else group,
        groups=scale.shape[1],
        zeros=zero_point is not None,
        row_scale=scale.dtype.name if of_rows else None,
        global_scale=None if global_scale is None else global_scale.ndim,
        bias=dtypes.get("bias"),
        residual=dtypes.get("residual"),
        out=out,
        config=few,
        ends=ends,
        norm=dtypes.get("norm"),
        mean=None if squares_of_x is None else (squares_of_x.shape[1], k, epsilon),
        place=place,
    )
    codes = jax.lax.bitcast_convert_type(packed, jnp.int8) if weight in BYTES else packed.reshape(n, -1)
    arrays = [x, codes, columns.as_loaded(scale)]
    arrays += [a for a in (zero_point, *inside.values()) if a is not None]
    return Product(plan, dict(zip(plan.operands, arrays, strict=True)))


def _per_row(scale: jax.Array, global_scale: jax.Array | None, n: int) -> tuple[jax.Array, jax.Array | None]:
    """Scales of rows, and a global one into which a scale of the whole weight goes."""
    if scale.size != 1 or n == 1:
        return scale, global_scale
    one = scale.reshape(()).astype(jnp.float32)
    return jnp.ones((n, 1), jnp.float32), one if global_scale is None else one * global_scale


def run(products: Sequence[Product], interpret: bool) -> list[dict[str, jax.Array]]:
    """Products, one launch each, in one call: results by name.

    Args:
      interpret: run the same programs in NumPy, on any machine.
    """
    given = [{name: a for name, a in p.operands.items() if not isinstance(a, Made)} for p in products]
    out = [{name: jax.ShapeDtypeStruct(*facts) for name, facts in p.plan.results.items()} for p in products]
    places = jax.tree.structure((given, out))

    def arrays(*flat: Any) -> list[dict[str, Any]]:
        """Of each launch, operands and results by name."""
        of_calls, made = jax.tree.unflatten(places, flat)
        return [
            {n: made[a.launch][a.result] if isinstance(a, Made) else own[n] for n, a in p.operands.items()} | results
            for p, own, results in zip(products, of_calls, made, strict=True)
        ]

    if interpret:

        def interpreted(*flat: Any) -> list[np.ndarray]:
            made = [np.full(a.shape, np.nan, a.dtype) for a in jax.tree.leaves(out)]
            for p, named in zip(products, arrays(*map(np.asarray, flat), *made), strict=True):
                lanes = NumpyLanes(p.plan.programs, p.plan.config.all_warps, p.plan.shared)
                program_of(p.plan)(lanes, p.plan, named).run()
            return made

        flat = jax.pure_callback(interpreted, jax.tree.leaves(out), *jax.tree.leaves(given), vmap_method="sequential")
    else:
        flat = _kernel([p.plan for p in products], arrays, jax.tree.leaves(out))(*jax.tree.leaves(given))
    return jax.tree.unflatten(jax.tree.structure(out), flat)


def _kernel(plans: list[Plan], arrays: Callable[..., list[dict[str, Any]]], out: list[Any]) -> Callable[..., Any]:
    """One kernel for all launches: shared memory and programs are those of the largest.

    Args:
      arrays: from refs of operands and results to the launches' arrays by name.
      out: shapes and dtypes of the results.
    """
    shared = max(sum(p.shared.values()) for p in plans)
    (threads,) = {p.config.threads for p in plans}

    def body(*refs: Any, inside: Any) -> None:
        def emit(_: Any, index: Any, inside: Any, *given: Any) -> None:
            program, steps = index.registers.item(), list(zip(plans, arrays(*given), strict=True))
            which = launched(len(steps)) if len(steps) > 1 else None
            for i, (plan, outside) in enumerate(steps):
                with contextlib.nullcontext() if which is None else only(which, i, program, plan.programs):
                    program_of(plan)(Lanes(program, inside, plan.shared), plan, outside).run()

        types = (plgpu.Layout.WG_SPLAT(()), *[plgpu.RefType()] * (1 + len(refs)))
        plgpu.inline_mgpu(arg_types=types)(emit)(jax.lax.axis_index("program"), inside, *refs)

    ends = plans[0].ends if len(plans) == 1 else "layer"
    return launch(
        body,
        out,
        programs=max(p.programs for p in plans),
        warpgroups=threads // 128,
        name=f"qjax_{plans[0].weight}_hopper_few" + ("" if ends == "plain" else f"_{ends}"),
        scratch={"inside": plgpu.SMEM((shared // 4,), jnp.uint32)},
    )

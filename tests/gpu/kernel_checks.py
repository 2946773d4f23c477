"""What a kernel's results are held to on a GPU, each check a function that returns what is wrong, in words.

- accuracy: every element within a bound derived from the arithmetic, the whole within a multiple of rounding once;
- bounds: the result's memory and what lies on either side of it held NaN: all of it is written, and nothing else;
- repeatability: the same operands, the same bits;
- rows: with all other rows of x replaced, one of them by NaN, a row's result has the same bits;
- graph: launched from a CUDA graph, with operands at other addresses each time, results are right.
"""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from aot.compile import Step, steps_of
from cases import ROUNDOFF, oracle, tolerance
from products import (
    ACTIVATION,
    Operands,
    Product,
    can_run,
    exact_rows,
    exact_weight,
    operand_shapes,
    program,
    random_operands,
    random_rows,
)

import qjax
from qjax import devices
from qjax.activations import Rows
from qjax.dispatch.choose import choose
from qjax.dispatch.routes import Route
from qjax.quantize_call import quantized

FUSED = 1.25  # times the error of rounding the exact result to its type
ROUNDED = 2.5  # where something else is rounded to that type too, as the kernel's docstring says
ROUNDS = {
    "mosaic.matmul_few": ("nf4", "fp4", "higgs4"),  # values of the table
    "mosaic.matmul_packed": ("nf4", "fp4", "higgs4"),  # values of the table
    "mosaic.matmul_folded": ("float16",),  # the weight, in float16: next to bfloat16 that is little
    "mosaic.matmul_w4a8": ("int4",),  # the total, where it has the size of 1.5 * 2^23 scales
    "mosaic.matmul_w8a8": ("e4m3",),  # sums of 256 products, which Hopper's tensor cores keep in about 14 bits
    "triton.matmul_packed": ("nf4", "fp4", "higgs4"),  # values of the table
    "triton.matmul_tall": None,  # the weight
    "triton.transposed": None,  # the weight
    "triton.transposed_8bit": None,  # x times scale
    "triton.matmul_w8a8": ("e4m3",),  # sums of 512 products, which Hopper's tensor cores keep in about 14 bits
    "triton.dequantize_dot": None,  # the weight
    "cublaslt.matmul": ("e4m3", "e5m2"),  # sums, by fast accumulation
    "cublaslt.dense": None,  # the weight
    "xla.dequantize_dot": None,  # the weight
}  # formats of the weight or of x; None: for every one
_ALIGNMENT = 256  # of the allocator


@dataclasses.dataclass(frozen=True)
class Case:
    """A product by one kernel, on operands from a seed."""

    route: Route
    product: Product
    seed: int

    def __str__(self) -> str:
        return f"{self.route.name} {self.product}"

    @property
    def allowed(self) -> float:
        """How many times the error of rounding once."""
        formats = ROUNDS.get(self.route.name, ())
        its = {self.product.weight.scheme.weight, self.product.x_dtype}
        return ROUNDED if formats is None or its & set(formats) else FUSED

    @property
    def rounded_to(self) -> str | None:
        """What the kernel rounds operands to."""
        if self.route.name == "mosaic.matmul_folded":
            return "float16"
        return self.product.x_dtype if self.allowed > FUSED else None

    @property
    def depends_on_all_rows(self) -> bool:
        """Whether x is quantized with one scale for all of it."""
        activation = self.product.weight.scheme.activation
        return activation is not None and (activation.granularity, activation.mode) == ("tensor", "dynamic")

    def operands(self, index: int = 0) -> Operands:
        """The operands, or others of the same shapes."""
        return random_operands(self.product, np.random.default_rng((self.seed, index)))


# ---- programs --------------------------------------------------------------------------------------------------------
def function_of(case: Case) -> Callable[[Operands], tuple[jax.Array, Rows | None]]:
    """The product, and x as it was quantized: by `qjax.matmul` where its backend would take this kernel."""
    p, by_kernel = case.product, program(case.route, case.product)
    activation = None if p.transposed else p.weight.scheme.activation
    choice = None if p.transposed else choose(p.problem, devices.current(), case.route.backend)

    def run(o: Operands) -> tuple[jax.Array, Rows | None]:
        if choice is None or choice.route != case.route:
            y, rows = by_kernel(o)
        else:
            with qjax.use(backend=case.route.backend):
                y = qjax.matmul(o.x, o.w, o.bias, activation=ACTIVATION if p.epilogue else None, residual=o.residual)
                rows = quantized(
                    o.x, activation, None if o.w.act_scale is None else o.w.act_scale[..., None, None], None
                )
        return y, None if activation is None else rows

    return run


@dataclasses.dataclass(frozen=True)
class Programs:
    """A case, compiled: `plain` writes its result over its first argument; `graph` is launched from a CUDA graph."""

    result: jax.ShapeDtypeStruct
    plain: Any
    graph: Any = None
    steps: tuple[Step, ...] = ()


def compile_case(case: Case, with_graph: bool) -> Programs:
    """Compiles without running anything: for a pool of threads."""
    shapes, run = operand_shapes(case.product), function_of(case)
    y, _ = jax.eval_shape(run, shapes)

    def over(poison: jax.Array, o: Operands) -> tuple[jax.Array, Rows | None]:
        del poison
        return run(o)

    plain = jax.jit(over, donate_argnums=0, keep_unused=True).lower(y, shapes).compile()
    if not with_graph:
        return Programs(y, plain)
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_gpu_graph_min_graph_size": 1, "xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        graph = jax.jit(run).lower(shapes).compile(compiler_options=options)
        return Programs(y, plain, graph, tuple(steps_of(Path(folder))))


# ---- checks ----------------------------------------------------------------------------------------------------------
def fenced(shape: tuple[int, ...], dtype: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """An array of NaN, and the two like it on either side of it in memory; none where the allocator lays them apart."""
    size = -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
    for _ in range(4):
        parts = [jax.device_put(np.full(shape, np.nan, dtype)) for _ in range(7)]
        parts.sort(key=lambda a: a.unsafe_buffer_pointer())
        at = [a.unsafe_buffer_pointer() for a in parts]
        for i in range(1, len(parts) - 1):
            if at[i] - at[i - 1] == at[i + 1] - at[i] == size:
                return parts[i], (parts[i - 1], parts[i + 1])
    return parts[0], ()


def bits(y: Any) -> np.ndarray:
    """An array's bytes, row by row."""
    y = np.asarray(y)
    return np.ascontiguousarray(y).view(np.uint8).reshape(*y.shape[:-1], -1)


def exact_result(case: Case, o: Operands, rows: Rows | None) -> tuple[np.ndarray, np.ndarray]:
    """The product in float64, and how far each element may be from it."""
    w = exact_weight(o.w)
    w = w if case.product.transposed else w.swapaxes(-1, -2)
    x = exact_rows(Rows(o.x) if rows is None else rows)
    lead = None if o.bias is None else np.asarray(o.bias, np.float64)[..., None, :]
    activation = ACTIVATION if case.product.epilogue else None
    exact = oracle(x, w, lead, activation, o.residual)
    argument = np.abs(x @ w) + np.abs(lead) if lead is not None else 0.0
    bound = tolerance(x, w, exact, o.x.dtype, epilogue=argument)
    if case.rounded_to:  # independent errors of up to u each, five sigma
        bound = bound + 5 * 1.13 * ROUNDOFF[case.rounded_to] * np.sqrt((x * x) @ (w * w))
    return exact, bound


def quantization(x: np.ndarray, rows: Rows) -> Iterator[str]:
    """What is wrong with the codes of x: each is a nearest one, unless x is beyond what a given scale reaches."""
    codes, scale = np.asarray(rows.values), np.asarray(rows.scale, np.float64)
    x, found = np.asarray(x, np.float64), exact_rows(rows)
    step = np.broadcast_to(scale if scale.shape[-1] == 1 else np.repeat(scale, 128, -1)[..., : x.shape[-1]], x.shape)
    if codes.dtype.kind == "i":
        lowest, largest, apart = -128 * step, 127 * step, step
    else:  # e4m3: three bits of mantissa, the smallest step 2^-9
        lowest, largest = -448 * step, 448 * step
        apart = np.maximum(np.exp2(np.floor(np.log2(np.maximum(np.abs(x) / step, 2.0**-6))) - 3) * step, 2.0**-9 * step)
    off = np.abs(found - np.clip(x, lowest, largest)) / apart
    if (off > 0.5 + 1e-4).any():
        yield f"a code of x is {off.max():.3f} steps off"


def accuracy(case: Case, o: Operands, y: Any, rows: Rows | None) -> Iterator[str]:
    """What is wrong with a result."""
    if rows is not None:
        yield from quantization(o.x, rows)
    exact, bound = exact_result(case, o, rows)
    got = np.asarray(y, np.float64)
    if got.shape != exact.shape:
        yield f"shape {got.shape}, not {exact.shape}"
        return
    if not np.isfinite(got).all():
        yield f"{np.sum(~np.isfinite(got))} of {got.size} elements are not finite: not written, or wrong"
        return
    worst = np.max(np.abs(got - exact) / bound, initial=0.0)
    if worst > 1:
        yield f"an element is {worst:.3g} times as far off as allowed"
    if exact.size >= 64:
        rounding = np.linalg.norm(np.asarray(exact.astype(o.x.dtype), np.float64) - exact)
        ratio = np.linalg.norm(got - exact) / rounding
        if ratio > case.allowed:
            yield f"the error is {ratio:.3f} times that of rounding, {case.allowed} are allowed"


def placed(o: Operands) -> Operands:
    """Operands on the device, in memory of their own."""
    return jax.tree.map(jnp.array, o)


def other_rows(o: Operands, row: int, rng: np.random.Generator) -> Operands:
    """All rows of x replaced but one, another by NaN."""
    x = random_rows(o.x.shape, o.x.dtype, rng) * np.asarray(3, o.x.dtype)
    x[..., (row + 1) % x.shape[-2], :] = np.nan
    x[..., row, :] = o.x[..., row, :]
    return dataclasses.replace(o, x=x)


def check(case: Case, programs: Programs) -> tuple[list[str], set[str]]:
    """Runs a case: what is wrong with it, and which checks could be made."""
    o = case.operands()
    there, wrong, made = placed(o), [], {"accuracy", "repeatability"}

    def run(given: Operands) -> tuple[np.ndarray, Rows | None]:
        poison, fences = fenced(programs.result.shape, programs.result.dtype)
        at = poison.unsafe_buffer_pointer()
        y, rows = programs.plain(poison, given)
        if y.unsafe_buffer_pointer() == at:
            made.update({"written"} | ({"fences"} if fences else set()))
        if not all(np.isnan(np.asarray(fence, np.float32)).all() for fence in fences):
            wrong.append("memory beside the result was written")
        return np.asarray(y), jax.tree.map(np.asarray, rows)

    y, rows = run(there)
    wrong += accuracy(case, o, y, rows)
    if (bits(run(there)[0]) != bits(y)).any():
        wrong.append("a second run has other bits")
    if case.product.m > 1 and not case.depends_on_all_rows:
        made.add("rows")
        rng = np.random.default_rng((case.seed, 2))
        row = int(rng.integers(case.product.m))
        changed = run(placed(other_rows(o, row, rng)))[0]
        if (bits(changed)[..., row, :] != bits(y)[..., row, :]).any():
            wrong.append(f"row {row} changes with the other rows of x")
    if programs.graph is not None:
        made.add("graph")
        wrong += _check_graph(case, programs)
    return wrong, made


def _check_graph(case: Case, programs: Programs) -> Iterator[str]:
    outside = [f"{s.kind} {s.name}" for s in programs.steps if not s.in_graph]
    if outside or not programs.steps:
        yield f"outside of the CUDA graph: {outside}"
    given = [case.operands(index) for index in (0, 1)]
    kept, results = [], []  # kept: no two runs have their operands at one address
    for index in (0, 1, 0, 1):
        kept.append(placed(given[index]))
        results.append(jax.tree.map(np.asarray, programs.graph(kept[-1])))
    for index in (0, 1):
        yield from (f"in a CUDA graph, {wrong}" for wrong in accuracy(case, given[index], *results[index]))
        if (bits(results[index][0]) != bits(results[index + 2][0])).any():
            yield "in a CUDA graph, the same operands elsewhere give other bits"


def claimed(route: Route, product: Product) -> bool:
    """Whether a kernel claims a product on the device at hand."""
    return can_run(route, product, devices.current())

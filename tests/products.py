"""Products as data, for the suites that take kernels one by one: what to multiply, operands for it, what is right.

`tests/aot` compiles them for GPUs that are not there, `tests/gpu` runs them on the one that is. Operands are random
codes, scales and zero points, also in K's padding, not a quantized matrix: any code may meet any scale. What they stand
for is computed here in float64 numpy from the formulas of `docs/design.md`, not by qjax.
"""

import dataclasses
import functools
import heapq
import itertools
import math
import random
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qjax.activations import Rows
from qjax.devices import Device
from qjax.dispatch.choose import refusal
from qjax.dispatch.problem import Problem
from qjax.dispatch.routes import ROUTES, Route
from qjax.formats import FORMATS
from qjax.kernel_call import problem_of, run_route
from qjax.qtensor import QTensor
from qjax.quantize import quantize_array
from qjax.quantize_call import quantized
from qjax.schemes import parse_scheme

ACTIVATION = "silu"  # of a product with an epilogue


@dataclasses.dataclass(frozen=True)
class Product:
    """`m` rows of x by a weight `[k, n]`, or `[m, n]` by its transpose; with an epilogue, for a stack of weights, or
    with zero points that are no integers (HQQ's), where the scheme has any."""

    scheme: str
    m: int
    k: int
    n: int
    x_dtype: str = "bfloat16"
    epilogue: bool = False
    transposed: bool = False
    stack: int = 0
    real_zero: bool = False

    def __str__(self) -> str:
        extras = [self.x_dtype, *(f for f in ("epilogue", "transposed", "real_zero") if getattr(self, f))]
        extras += [f"stack-{self.stack}"] if self.stack else []
        return f"{self.scheme}-{self.m}x{self.k}x{self.n}-{'-'.join(extras)}"

    @property
    def lead(self) -> tuple[int, ...]:
        """Axes in front of every operand's own."""
        return (self.stack,) if self.stack else ()

    @property
    def weight(self) -> QTensor:
        """The weight's shapes and dtypes."""
        return _weight(self.scheme, (*self.lead, self.k, self.n), self.transposed, self.real_zero)

    @property
    def variant(self) -> tuple[Any, ...]:
        """What is not scheme and shape."""
        return self.x_dtype, self.epilogue, self.transposed, self.stack, self.real_zero

    @property
    def problem(self) -> Problem:
        """What dispatch sees."""
        return _problem(self)


def variants_of(scheme: str, m: int, k: int, n: int, variants: Iterable[dict[str, Any]]) -> Iterator[Product]:
    """A product in those variants that there are for its scheme."""
    for variant in variants:
        if not (variant.get("real_zero") and parse_scheme(scheme).symmetric):
            yield Product(scheme, m, k, n, **variant)


@functools.cache
def _problem(p: Product) -> Problem:
    activation = ACTIVATION if p.epilogue else None
    options = dict(bias=p.epilogue, activation=activation, residual=p.epilogue, transposed=p.transposed)
    return problem_of(p.weight, m=p.m, x_dtype=p.x_dtype, **options)


@functools.cache
def _weight(scheme: str, shape: tuple[int, ...], transposed: bool, real_zero: bool) -> QTensor:
    make = functools.partial(quantize_array, scheme=scheme, partial_groups=True)
    w = jax.eval_shape(make, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    if real_zero:
        assert w.zero_point is not None, f"{scheme} has no zero points"
        w = dataclasses.replace(w, zero_point=jax.ShapeDtypeStruct(w.zero_point.shape, jnp.float32))
    activation = parse_scheme(scheme).activation
    if activation is None or activation.mode == "dynamic" or transposed:
        return w
    return dataclasses.replace(w, act_scale=jax.ShapeDtypeStruct(shape[:-2], jnp.float32))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """The arrays of a product, or their shapes."""

    x: Any
    w: QTensor
    bias: Any
    residual: Any


def operand_shapes(product: Product) -> Operands:
    """Shapes and dtypes of a product's operands."""
    rows, columns = (product.n, product.k) if product.transposed else (product.k, product.n)
    make = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(product.x_dtype))
    bias = make((*product.lead, columns)) if product.epilogue else None
    residual = make((*product.lead, product.m, columns)) if product.epilogue else None
    return Operands(make((*product.lead, product.m, rows)), product.weight, bias, residual)


# ---- which kernel can do which product -------------------------------------------------------------------------------
def gpu_routes() -> tuple[Route, ...]:
    """Every kernel for GPUs; the reference, which XLA makes of plain operations, is none of ours."""
    return tuple(r for r in ROUTES if not r.is_reference and (r.platforms is None or "gpu" in r.platforms))


def can_run(route: Route, product: Product, device: Device) -> bool:
    """Whether a route claims a product on a device."""
    return refusal(route, product.problem, device) is None


def covering[T](items: Iterable[T], facets: Callable[[T], Iterable[Hashable]], seed: int = 0) -> list[T]:
    """A part of `items` in which every facet of any of them occurs: each time one that adds most of them.

    Among those that add as many the seed decides.
    """
    shuffled = list(items)
    random.Random(seed).shuffle(shuffled)
    missing = [set(facets(item)) for item in shuffled]
    # What an item adds only shrinks, so one that still adds what it did when it was put here is ahead of all the rest.
    most = [(-len(new), i) for i, new in enumerate(missing)]
    heapq.heapify(most)
    seen: set[Hashable] = set()
    taken = []
    while most:
        added, i = heapq.heappop(most)
        missing[i] -= seen
        if len(missing[i]) == -added:
            seen |= missing[i]
            taken.append(shuffled[i])
        elif missing[i]:
            heapq.heappush(most, (-len(missing[i]), i))
    return taken


def program(route: Route, product: Product, config: dict[str, Any] | None = None) -> Callable[..., Any]:
    """The product by one kernel in one config, as a function of its `Operands`; returns y and what met the weight."""
    activation = None if product.transposed else product.weight.scheme.activation

    def run(o: Operands) -> tuple[jax.Array, Rows]:
        rows = quantized(o.x, activation, None if o.w.act_scale is None else o.w.act_scale[..., None, None], None)
        w = dataclasses.replace(o.w, act_scale=None)
        return run_route(route, config or {}, rows, w, product.problem, bias=o.bias, residual=o.residual), rows

    return run


# ---- random operands -------------------------------------------------------------------------------------------------
def random_operands(product: Product, rng: np.random.Generator) -> Operands:
    """Operands of a product whose results are of the order of one, in numpy arrays."""
    shapes = operand_shapes(product)
    size = 1 / (FORMATS[shapes.w.scheme.weight].maximum * math.sqrt(product.n if product.transposed else product.k))
    return dataclasses.replace(
        shapes,
        x=random_rows(shapes.x.shape, shapes.x.dtype, rng),
        w=_random_weight(shapes.w, size, rng),
        bias=None if shapes.bias is None else random_rows(shapes.bias.shape, shapes.bias.dtype, rng),
        residual=None if shapes.residual is None else random_rows(shapes.residual.shape, shapes.residual.dtype, rng),
    )


def random_rows(shape: tuple[int, ...], dtype: Any, rng: np.random.Generator) -> np.ndarray:
    """Unit variance, with a few large columns as activations have."""
    large = np.where(rng.uniform(size=shape[-1]) < 0.02, 8.0, 1.0)
    return (rng.standard_normal(shape) * large).astype(dtype)


def _random_weight(w: QTensor, size: float, rng: np.random.Generator) -> QTensor:
    """A weight of the given structure with scales of about `size`."""
    made: dict[str, Any] = {"packed": _random_codes(w.packed, rng)}
    if isinstance(w.scale, QTensor):
        made["scale"] = _random_weight(w.scale, size / 2, rng)
    else:
        above = 8 / size if w.global_scale is not None else 1.0  # e4m3 scales are around 8
        made["scale"] = _random_scales(w.scale, size * above, rng)
        if w.global_scale is not None:
            made["global_scale"] = np.full(w.global_scale.shape, 1 / above, np.float32)
    if w.offset is not None:
        made["offset"] = np.full(w.offset.shape, 2 * size, np.float32)
    if w.zero_point is not None:
        low = 0 if w.is_packed else -128
        zero = rng.uniform(low, low + 2**w.scheme.bits - 1, w.zero_point.shape)
        whole = np.issubdtype(w.zero_point.dtype, np.integer)
        made["zero_point"] = (np.round(zero) if whole else zero).astype(w.zero_point.dtype)
    if w.act_scale is not None:
        made["act_scale"] = np.full(w.act_scale.shape, 4 / FORMATS[w.scheme.activation.format].maximum, np.float32)
    return dataclasses.replace(w, **made)


def _random_codes(leaf: Any, rng: np.random.Generator) -> np.ndarray:
    """Any codes but those of infinities and NaN."""
    dtype = np.dtype(leaf.dtype)
    bits = rng.integers(0, 256, (*leaf.shape, dtype.itemsize), np.uint8)
    if dtype.kind in "iu":
        return bits.view(dtype)[..., 0]
    special = ~np.isfinite(bits.view(dtype).astype(np.float32))
    return np.where(special, np.uint8(0x31), bits).view(dtype)[..., 0]


def _random_scales(leaf: Any, size: float, rng: np.random.Generator) -> np.ndarray:
    scale = size * rng.uniform(1, 2, leaf.shape)
    if np.dtype(leaf.dtype) == ml_dtypes.float8_e8m0fnu:
        scale = 2.0 ** np.floor(np.log2(scale) + rng.integers(-1, 2, leaf.shape))
    return scale.astype(leaf.dtype)


# ---- what is right ---------------------------------------------------------------------------------------------------
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}


def codes_of(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[..., K]` of words `[..., B, 4 * bits]`, one by one from the formula of the packed order."""
    codes, first, below = np.zeros((*packed.shape[:-1], 128), np.uint32), 0, 0
    for plane in _PLANES[bits]:
        for j, s, h, c, l in itertools.product(range(4), (0, 1), (0, 1), range(4), (0, 1)):  # noqa: E741
            t = 4 * j + 2 * s + h
            word, bit = plane * c + t // (16 // plane), 16 * l + plane * (t % (16 // plane))
            part = (packed[..., first + word] >> np.uint32(bit)) & np.uint32(2**plane - 1)
            codes[..., 32 * j + 16 * s + 8 * h + 2 * c + l] |= part << np.uint32(below)
        first, below = first + 4 * plane, below + plane
    return codes.reshape(*packed.shape[:-2], packed.shape[-2] * 128)


def _spread(blocks: np.ndarray, block: tuple[int | None, int | None], n: int, k: int) -> np.ndarray:
    """A value a block, `[..., R, C]`, at each weight: `[..., N, K]`."""
    rows, columns = np.arange(n) // (block[0] or n), np.arange(k) // (block[1] or k)
    return np.asarray(blocks, np.float64)[..., rows[:, None], columns]


def exact_weight(w: QTensor) -> np.ndarray:
    """What a weight of numpy arrays stands for: float64 `[..., N, K]`."""
    scheme, n, k = w.scheme, w.out_features, w.in_features
    form = FORMATS[scheme.weight]
    codes = codes_of(w.packed, scheme.bits)[..., :k] if w.is_packed else w.packed
    if form.codebook is not None:
        values = np.array(form.codebook, np.float64)[codes]
    elif w.zero_point is not None:
        values = codes.astype(np.float64) - _spread(w.zero_point, scheme.block, n, k)
    else:
        values = codes.astype(np.float64) - form.zero
    scale = exact_weight(w.scale) if isinstance(w.scale, QTensor) else np.asarray(w.scale, np.float64)
    values = values * _spread(scale, scheme.block, n, k)
    if w.global_scale is not None:
        values = values * np.asarray(w.global_scale, np.float64)[..., None, None]
    return values if w.offset is None else values + np.asarray(w.offset, np.float64)[..., None, None]


def exact_rows(rows: Rows) -> np.ndarray:
    """What met the weight: float64 `[..., K]`."""
    values = np.asarray(rows.values, np.float64)
    if rows.scale is None:
        return values
    scale = np.asarray(rows.scale, np.float64)
    columns = np.arange(values.shape[-1]) // (values.shape[-1] if scale.shape[-1] == 1 else 128)
    return values * scale[..., columns]

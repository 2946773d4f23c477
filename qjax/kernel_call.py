"""From a QTensor on one device to a kernel that knows arrays only: builds the `Problem`, asks dispatch, calls."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax import devices, reference
from qjax.activations import Rows
from qjax.dequantize import block_scales
from qjax.devices import Device
from qjax.dispatch.choose import choose, facts, load, seen_by
from qjax.dispatch.problem import Problem
from qjax.dispatch.routes import Route
from qjax.epilogue import ACTIVATIONS, apply_epilogue
from qjax.qtensor import QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class _Arrays:
    """What a kernel reads, each with the stack's axes in front."""

    x: jax.Array
    packed: jax.Array
    scale: jax.Array
    x_scale: jax.Array | None
    zero_point: jax.Array | None
    global_scale: jax.Array | None
    codebook: jax.Array | None
    bias: jax.Array | None
    residual: jax.Array | None


def features_of(w: QTensor) -> frozenset[str]:
    """What a QTensor carries beyond codes and scales, in the words of `Problem.features`."""
    optional = ("input_perm", "codebook", "offset", "global_scale")
    found = {name for name in optional if getattr(w, name) is not None}
    if w.zero_point is not None:
        found.add("zero_point" if w.zero_point.dtype == np.int8 else "zero_point_real")
    if w.scheme.format.dims > 1:
        found.add("points")
    if isinstance(w.scale, QTensor):
        found.add("nested_scale")
    if _padded_pieces(w) > 1:
        found.add("pieces_cut_groups" if w.k_piece[1] % (w.scheme.block[1] or 1) else "padded_pieces")
    return frozenset(found)


def _padded_pieces(w: QTensor) -> int:
    """How many pieces K is stored in that are padded; 1 where none is, or only all of K."""
    logical, padded = w.k_piece
    return w.in_features // logical if logical != padded else 1


def problem_of(
    w: QTensor,
    *,
    m: int,
    x_dtype: Any,
    out_dtype: Any = None,
    bias: bool = False,
    activation: str | None = None,
    residual: bool = False,
    transposed: bool = False,
) -> Problem:
    """The static description of `m` rows of x meeting `w`."""
    scale = w.scale.scale if isinstance(w.scale, QTensor) else w.scale
    return Problem(
        m=m,
        n=w.out_features,
        k=w.in_features,
        scheme=w.scheme,
        scale_dtype=np.dtype(scale.dtype),
        x_dtype=np.dtype(x_dtype),
        out_dtype=np.dtype(x_dtype if out_dtype is None else out_dtype),
        bias=bias,
        activation=activation,
        residual=residual,
        batch=int(np.prod(w.stack_shape, dtype=int)),
        transposed=transposed,
        features=features_of(w),
    )


def call_kernel(
    x: Rows,
    w: QTensor,
    *,
    bias: jax.Array | None,
    activation: str | None,
    residual: jax.Array | None,
    out_dtype: np.dtype,
    transposed: bool,
    backend: str | None,
) -> jax.Array:
    """One product of local arrays by the kernel that dispatch chooses.

    Args:
      x: `[*stack, M, K]` (`N` if transposed), axes of the stack possibly 1.
      w: `[*stack, K, N]`.
      bias: `[*stack, N]`; residual: `[*stack, M, N]`.
      activation, out_dtype, transposed, backend: as `qjax.product.Call`.

    Returns:
      `[*stack, M, N]` (K if transposed), in `out_dtype`.

    Raises:
      BackendError: if the forced backend cannot do it.
    """
    problem = problem_of(
        w,
        m=x.values.shape[-2],
        x_dtype=x.values.dtype,
        out_dtype=out_dtype,
        bias=bias is not None,
        activation=activation,
        residual=residual is not None,
        transposed=transposed,
    )
    choice = choose(problem, devices.current(), backend)
    return run_route(choice.route, dict(choice.config), x, w, problem, bias=bias, residual=residual)


def run_route(
    route: Route,
    config: Mapping[str, Any],
    x: Rows,
    w: QTensor,
    problem: Problem,
    *,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """One product by one kernel in one configuration, whether or not dispatch would take it.

    Args:
      route: the kernel; it can run `problem` (`qjax.dispatch.choose.refusal`).
      config: one of its `configs`; empty for its own choice.
      problem: of `problem_of`, for these operands.
      (others: as `call_kernel`)
    """
    if route.is_reference:
        y = reference.matmul(x, w, problem.transposed)
        wide = None if bias is None else bias[..., None, :]
        return apply_epilogue(y, wide, problem.activation, residual, problem.out_dtype)
    seen = seen_by(route, problem)
    if seen is not problem:
        assert x.scale is not None, problem
        codes = Rows(x.values.astype(seen.x_dtype))
        y = run_route(route, config, codes, w, seen) * x.scale
        wide = None if bias is None else bias[..., None, :]
        return apply_epilogue(y, wide, problem.activation, residual, problem.out_dtype)
    arrays = _Arrays(
        x=x.values,
        packed=w.packed,
        scale=block_scales(w) if isinstance(w.scale, QTensor) else w.scale,
        x_scale=x.scale,
        zero_point=w.zero_point,
        global_scale=w.global_scale,
        codebook=w.codebook,
        bias=bias,
        residual=residual,
    )
    kernel = functools.partial(
        load(route).matmul,
        **statics(problem, devices.current()),
        activation=None if problem.activation is None else ACTIVATIONS[problem.activation],
        out_dtype=problem.out_dtype,
        config=dict(config),
    )
    y = _over_stack(kernel, w.stack_shape, in_padded_pieces(arrays, w, problem.transposed))
    return without_padding(y, w) if problem.transposed else y


_STATICS = ("weight", "bits", "group", "block_n", "x_granularity", "transposed", "sms", "cc", "smem")


def statics(problem: Problem, device: Device) -> dict[str, Any]:
    """What a kernel's `matmul` is told by keyword besides arrays: some of the facts its `unsupported` judged by, and
    `table`, the values of a codebook format's codes."""
    known = facts(problem, device)
    return {name: known[name] for name in _STATICS} | {"table": problem.scheme.format.codebook or ()}


def in_padded_pieces(arrays: _Arrays, w: QTensor, transposed: bool) -> _Arrays:
    """Operands whose x and scales have the padding that codes have where K is stored as several padded pieces.

    A kernel then sees one K, longer by the padding, whose x is zero there.
    """
    (logical, piece), pieces = w.k_piece, _padded_pieces(w)
    if pieces == 1:
        return arrays
    assert arrays.x_scale is None or arrays.x_scale.shape[-1] == 1, "blocks of x would straddle pieces"
    assert piece % (w.scheme.block[1] or 1) == 0, (w.scheme, w.k_piece)

    def pad(a: jax.Array, unit: int, mode: str = "edge") -> jax.Array:
        """Pads each piece of `a`'s last axis, of which one element stands for `unit` of K; e8m0 scales have no zero."""
        a = a.reshape(*a.shape[:-1], pieces, logical // unit)
        a = jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, (piece - logical) // unit)], mode=mode)
        return a.reshape(*a.shape[:-2], pieces * (piece // unit))

    group = w.scheme.block[1]
    found = {} if transposed else {"x": pad(arrays.x, 1, "constant")}
    if group is not None:
        found |= {
            name: pad(value, group) for name in ("scale", "zero_point") if (value := getattr(arrays, name)) is not None
        }
    return dataclasses.replace(arrays, **found)


def without_padding(y: jax.Array, w: QTensor) -> jax.Array:
    """The columns of a transposed product that are columns of the weight: `[..., M, padded K]` -> `[..., M, K]`."""
    logical, piece = w.k_piece
    if y.shape[-1] == w.in_features:
        return y
    y = y.reshape(*y.shape[:-1], y.shape[-1] // piece, piece)[..., :logical]
    return y.reshape(*y.shape[:-2], w.in_features)


def _over_stack(kernel: Any, stack: tuple[int, ...], arrays: _Arrays) -> jax.Array:
    """Calls a kernel of 2-D operands once for each weight of the stack, by vmap: one launch for batchable kernels."""

    def one(arrays: _Arrays) -> jax.Array:
        given = {field.name: getattr(arrays, field.name) for field in dataclasses.fields(arrays)}
        return kernel(given.pop("x"), given.pop("packed"), given.pop("scale"), **given)

    for _ in stack:
        one = jax.vmap(one)
    return one(jax.tree.map(lambda a: jnp.broadcast_to(a, (*stack, *a.shape[len(stack) :])), arrays))

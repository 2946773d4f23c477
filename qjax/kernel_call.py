"""From a QTensor on one device to a kernel that knows arrays only: builds the `Problem`, asks dispatch, calls."""

import functools
from typing import Any

import jax
import numpy as np

from qjax import devices, reference
from qjax.activations import Rows
from qjax.dispatch.choose import choose, load
from qjax.dispatch.problem import Problem
from qjax.epilogue import apply_epilogue
from qjax.qtensor import QTensor


def features_of(w: QTensor) -> frozenset[str]:
    """What a QTensor carries beyond codes and scales, in the words of `Problem.features`."""
    optional = ("input_perm", "codebook", "offset", "global_scale")
    found = {name for name in optional if getattr(w, name) is not None}
    if w.zero_point is not None:
        found.add("zero_point" if w.zero_point.dtype == np.int8 else "zero_point_real")
    if isinstance(w.scale, QTensor):
        found.add("nested_scale")
    return frozenset(found)


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
    if choice.route.backend == "xla":
        y = reference.matmul(x, w, transposed)
        wide = None if bias is None else bias[..., None, :]
        return apply_epilogue(y, wide, activation, residual, out_dtype)
    kernel = functools.partial(
        load(choice.route).matmul,
        activation=activation,
        out_dtype=out_dtype,
        transposed=transposed,
        config=dict(choice.config),
    )
    arrays = dict(
        x_scale=x.scale,
        zero_point=w.zero_point,
        global_scale=w.global_scale,
        codebook=w.codebook,
        bias=bias,
        residual=residual,
    )
    return _over_stack(kernel, x.values, w, arrays)


def _over_stack(kernel: Any, x: jax.Array, w: QTensor, arrays: dict[str, Any]) -> jax.Array:
    """Calls a kernel of 2-D operands once for each weight of the stack, by vmap: one launch for batchable kernels."""

    def one(x: jax.Array, packed: jax.Array, scale: jax.Array, arrays: dict[str, Any]) -> jax.Array:
        return kernel(x, packed, scale, **arrays)

    for axis in reversed(range(len(w.stack_shape))):
        del axis
        one = jax.vmap(one)
    stack = w.stack_shape
    whole = jax.tree.map(lambda a: jax.numpy.broadcast_to(a, (*stack, *a.shape[len(stack) :])), (x, arrays))
    return one(whole[0], w.packed, w.scale, whole[1])  # type: ignore[arg-type]

"""`matmul`: the only door to kernels, and the gradient of what is behind it.

What belongs to x (`input_scale`, `input_perm`, a rotation, its quantization) happens here, before the product is cut
over devices; the gradient of quantizing x is taken as the identity. Weights have no gradient: asking for one is an
error, since integer leaves would give silent zeros.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType

from qjax.activations import Rows
from qjax.epilogue import ACTIVATIONS, GATED, apply_epilogue
from qjax.errors import QTensorError
from qjax.hadamard import rotate
from qjax.outliers import outlier_product, split_outliers
from qjax.partition import mesh_of
from qjax.product import Call, Operands, check_placed, product
from qjax.qtensor import QTensor
from qjax.quantize_call import quantized
from qjax.schemes import Activation

X_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class _Static:
    """Static arguments of the differentiable product; shardings of x, bias, residual on an Explicit mesh, else None."""

    call: Call
    quantize: Activation | None
    x_dtype: np.dtype
    shardings: tuple[Any, ...] = (None, None, None)


def _forward(static: _Static, x: jax.Array, w: QTensor, act_scale: Any, bias: Any, residual: Any) -> jax.Array:
    call, split = static.call, None
    if static.quantize is not None and static.quantize.outliers is not None:
        split = split_outliers(x, static.quantize.outliers, call.stack)
        x = split.rest
    rows = quantized(x, static.quantize, act_scale, call.backend)
    if split is None and call.activation not in GATED:
        return product(call)(Operands(rows, w, bias, residual))
    # A gate joins columns that lie far apart, maybe on other devices: it follows the product, in XLA's next fusion.
    bare = dataclasses.replace(call, activation=None, out_dtype=np.dtype("float32"))
    y = product(bare)(Operands(rows, w, bias))
    beside = None if split is None else outlier_product(split, w, y)
    return apply_epilogue(y, beside, call.activation, residual, call.out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(static: _Static, x: jax.Array, w: QTensor, act_scale: Any) -> jax.Array:
    """`x @ w`, or by the transpose of w, without an epilogue."""
    return _forward(static, x, w, act_scale, None, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(static: _Static, x: jax.Array, w: QTensor, act_scale: Any, bias: Any, residual: Any) -> jax.Array:
    """`residual + activation(x @ w + bias)`."""
    return _forward(static, x, w, act_scale, bias, residual)


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")


def _frozen(w: QTensor, act_scale: Any) -> Any:
    """The values of a weight's leaves.

    Raises:
      TypeError: if a gradient with respect to one was asked for.
    """
    for leaf in jax.tree.leaves((w, act_scale), is_leaf=_is_primal):
        if leaf.perturbed:
            raise TypeError(
                "a QTensor has no gradient: its codes are integers. Differentiate with respect to x, a bias or "
                "adapters beside it (QLoRA), or train the float kernel (QAT)"
            )
    return _values((w, act_scale))


def _values(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.value, tree, is_leaf=_is_primal)


def _dense(g: Any) -> jax.Array:
    return jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g


def _like(cotangent: Any, sharding: Any) -> Any:
    """A cotangent where its primal lies: its type has to match on an Explicit mesh."""
    return cotangent if sharding is None or cotangent is None else jax.sharding.reshard(cotangent, sharding)


def _linear_forward(static: _Static, x: Any, w: Any, act_scale: Any) -> tuple[jax.Array, QTensor]:
    w, act_scale = _frozen(w, act_scale)
    return _linear(static, _values(x), w, act_scale), w


def _linear_backward(static: _Static, w: QTensor, g: Any) -> tuple[Any, ...]:
    back = dataclasses.replace(static.call, transposed=not static.call.transposed, out_dtype=static.x_dtype)
    g = _dense(g)
    dx = _linear(_Static(back, None, np.dtype(g.dtype)), g, w, None)
    return _like(dx, static.shardings[0]), None, None


def _fused_forward(static: _Static, x: Any, w: Any, act_scale: Any, bias: Any, residual: Any) -> tuple[jax.Array, Any]:
    w, act_scale = _frozen(w, act_scale)
    x, bias, residual = _values((x, bias, residual))
    return _fused(static, x, w, act_scale, bias, residual), (x, w, act_scale, bias, residual)


def _fused_backward(static: _Static, saved: Any, g: Any) -> tuple[Any, ...]:
    """By the same function with its epilogue outside of the kernel; what the cotangents don't need is not computed."""
    x, w, act_scale, bias, residual = saved
    bare = dataclasses.replace(static.call, activation=None, out_dtype=np.dtype("float32"))
    bare_static = dataclasses.replace(static, call=bare)

    def unfused(x: jax.Array, bias: Any, residual: Any) -> jax.Array:
        y = _linear(bare_static, x, w, act_scale)
        return apply_epilogue(y, _bias_rows(bias, y.ndim), static.call.activation, residual, static.call.out_dtype)

    _, pull = jax.vjp(unfused, x, bias, residual)
    dx, dbias, dresidual = map(_like, pull(_dense(g)), static.shardings)
    return dx, None, None, dbias, dresidual


def _bias_rows(bias: jax.Array | None, rank: int) -> jax.Array | None:
    """`[*stack, N]` with axes of 1 for the rows."""
    return None if bias is None else bias.reshape(*bias.shape[:-1], *(1,) * (rank - bias.ndim), bias.shape[-1])


_linear.defvjp(_linear_forward, _linear_backward, symbolic_zeros=True)
_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)


@functools.partial(jax.jit, static_argnums=0)
def _qjax_matmul(static: _Static, x: jax.Array, w: QTensor, bias: Any, residual: Any) -> jax.Array:
    """Prepares x and multiplies: jitted, so that a call outside of `jit` is one program too."""
    if w.input_scale is not None:
        x = x * _rows_axes(w.input_scale, x.ndim).astype(x.dtype)
    if w.input_perm is not None:
        x = jnp.take_along_axis(x, _rows_axes(w.input_perm, x.ndim), axis=-1)
    if w.scheme.hadamard:
        x = rotate(x, w.scheme.hadamard)
    act_scale = None
    if static.quantize is not None and static.quantize.mode == "static":
        assert w.act_scale is not None, "checked in matmul"
        act_scale = w.act_scale.reshape(*w.act_scale.shape, *(1,) * (x.ndim - w.act_scale.ndim))
    bare = dataclasses.replace(w, input_scale=None, input_perm=None, act_scale=None)
    if bias is None and residual is None and static.call.activation is None:
        return _linear(static, x, bare, act_scale)
    return _fused(static, x, bare, act_scale, bias, residual)


def _rows_axes(a: jax.Array, rank: int) -> jax.Array:
    """`[*stack, K]` with axes of 1 for the rows."""
    return a.reshape(*a.shape[:-1], *(1,) * (rank - a.ndim), a.shape[-1])


def _check(x: Any, w: Any, bias: Any, activation: str | None, residual: Any) -> None:
    if not isinstance(w, QTensor):
        raise QTensorError(f"matmul multiplies by a QTensor; got {type(w).__name__}; quantize it, or use jnp.matmul")
    codes, stored = w.packed.dtype, np.dtype("uint32") if w.is_packed else w.scheme.format.dtype
    if codes != stored:
        raise QTensorError(
            f"the codes of a {w.scheme} weight are {codes}; they have to stay {stored}: cast floats only"
        )
    stack = w.stack_shape
    if np.dtype(x.dtype).name not in X_DTYPES:
        raise QTensorError(f"x has dtype {x.dtype}; allowed: {', '.join(X_DTYPES)}")
    if x.ndim < len(stack) + 1 or x.shape[-1] != w.in_features or x.shape[: len(stack)] != stack:
        want = ", ".join(map(str, (*stack, "...", w.in_features)))
        raise QTensorError(f"x of shape {tuple(x.shape)} does not meet a weight of shape {w.shape}: x must be [{want}]")
    if bias is not None and tuple(bias.shape) != (*stack, w.out_features):
        raise QTensorError(
            f"bias of shape {tuple(bias.shape)} for a weight of shape {w.shape}: {(*stack, w.out_features)}"
        )
    if activation is not None and activation not in ACTIVATIONS and activation not in GATED:
        raise QTensorError(f"unknown activation {activation!r}; known: {', '.join((*ACTIVATIONS, *GATED))}")
    halves, odd = divmod(w.out_features, 2)
    if activation in GATED and odd:
        raise QTensorError(f"{activation!r} takes gates and as many factors; the weight has {w.out_features} outputs")
    result = (*x.shape[:-1], halves if activation in GATED else w.out_features)
    if residual is not None and tuple(residual.shape) != result:
        raise QTensorError(f"residual of shape {tuple(residual.shape)}; the product has {result}")
    if w.scheme.hadamard and w.in_features % w.scheme.hadamard:
        raise QTensorError(f"{w.scheme} rotates blocks of K={w.in_features}, which a shard of this weight would cut")
    quantize = w.scheme.activation
    if quantize is not None and quantize.mode == "static" and w.act_scale is None:
        raise QTensorError(
            f"{w.scheme} quantizes x with a static scale, and the QTensor of shape {w.shape} has no act_scale"
        )


def matmul(
    x: jax.Array,
    w: QTensor,
    bias: jax.Array | None = None,
    *,
    activation: str | None = None,
    residual: jax.Array | None = None,
    out_dtype: Any = None,
    backend: str | None = None,
) -> jax.Array:
    """`residual + activation(x @ w + bias)`, accumulated in float32 and rounded once.

    Works under jit, vmap (of x, of stacked weights, of both), grad with respect to x, bias and residual, checkpoint,
    scan, and on Auto, Explicit and Manual meshes. Gradients are of reverse mode; second ones are `jacrev(grad(...))`.

    Args:
      x: float32, bfloat16 or float16 `[*stack, ..., K]`; any leading axes, also of length 0.
      w: `[*stack, K, N]`.
      bias: `[*stack, N]`.
      activation: "relu", "silu", "gelu" (exact) or "gelu_tanh"; or, of a gate and a factor merged into one weight
        (`concat_rows([gate, up])`), "silu_mul", "gelu_mul" or "gelu_tanh_mul": `f(gate) * up`, N / 2 columns.
      residual: shaped like the result, added after the activation.
      out_dtype: of the result; default x's.
      backend: the kernel family to use, one kernel ("triton.matmul_tall"), one in a configuration
        ("xla.multiply_reduce:copy_x=0,rows=1,shares=1"), or a name from a Hugging Face config; default the fastest that
        can. Gradients take a kernel's family.

    Returns:
      `[*stack, ..., N]`, or half of N.

    Raises:
      QTensorError: shapes or dtypes that do not meet, naming both.
      ShardingError: a cut through a packed block or a scale group. (Under jit, on a mesh of Auto axes, XLA cuts the
        product, and a JaxRuntimeError carries its text.)
      BackendError: an unknown backend, or one that cannot do this product, with its reason.
      TypeError: when a gradient with respect to w is taken.
    """
    if isinstance(x, QTensor):
        raise QTensorError(f"x is a {x!r}; the weight comes second: matmul(x, w)")
    x = jnp.asarray(x)
    _check(x, w, bias, activation, residual)
    leaves = [x, *jax.tree.leaves(w)]
    mesh, kind = mesh_of(leaves)
    shardings: tuple[Any, ...] = (None, None, None)
    if kind == AxisType.Explicit:
        shardings = tuple(None if a is None else jax.typeof(a).sharding for a in (x, bias, residual))
    if kind == AxisType.Manual:
        x = _vary_like(x, leaves)
    call = Call(
        stack=len(w.stack_shape),
        transposed=False,
        activation=activation,
        out_dtype=np.dtype(x.dtype if out_dtype is None else out_dtype),
        backend=backend,
    )
    if kind != AxisType.Manual:
        check_placed(call, Operands(Rows(x), dataclasses.replace(w, input_scale=None, input_perm=None, act_scale=None)))
    return _qjax_matmul(_Static(call, w.scheme.activation, np.dtype(x.dtype), shardings), x, w, bias, residual)


def _vary_like(x: jax.Array, leaves: list[jax.Array]) -> jax.Array:
    """Inside a shard_map: x marked as varying over the mesh axes of the weight, so that its gradients add."""
    varying = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in leaves))
    missing = tuple(sorted(varying - jax.typeof(x).manual_axis_type.varying))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

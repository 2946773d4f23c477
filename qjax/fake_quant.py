"""Training through rounding: float kernels with the values that quantizing will give them, gradients untouched."""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from qjax import learned_scale
from qjax.convert import plan_params
from qjax.flax_kernel import KernelUse, quantize_kernel
from qjax.learned_scale import refuse_unknown
from qjax.schemes import Scheme, as_scheme


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def _rounded(kernel: jax.Array, scheme: Scheme, use: KernelUse, where: str, partial: bool, pieces: int) -> jax.Array:
    w = quantize_kernel(kernel, scheme, use, where=where, partial_groups=partial, k_pieces=pieces)
    return w.dequantize(kernel.dtype)


def _forward(kernel: jax.Array, *static: Any) -> tuple[jax.Array, None]:
    return _rounded(kernel, *static), None


def _backward(*static_and_gradient: Any) -> tuple[jax.Array]:
    return (static_and_gradient[-1],)


_rounded.defvjp(_forward, _backward)


def fake_quant(
    kernel: jax.Array,
    scheme: Scheme | str,
    *,
    scale: jax.Array | None = None,
    contracted: tuple[int, ...] = (-2,),
    stacked: tuple[int, ...] = (),
    where: str = "kernel",
    partial_groups: bool = False,
    k_pieces: int = 1,
) -> jax.Array:
    """A kernel as it reads after quantization, in its own dtype; its gradient passes as if it were the kernel's.

    `y = w'`, `dy/dw = 1`: the straight-through estimator. Source: Bengio et al. (2013); Jacob et al., Quantization and
    Training of Neural Networks (2018).

    With a `scale`, which is trained too, gradients are those of learned step sizes (`qjax.learned_scale`).

    Quantizing the trained kernel, by the trained scale, gives the very codes that the last step saw. (One exception:
    where a float16 scale would be subnormal, and none is given, `qjax.quantize_array` looks at the values and takes
    float32 scales; a trace cannot.)

    Args:
      kernel: float, any rank.
      scheme: a `qjax.Scheme` or its string.
      scale: float32 `[*stack, N, G]`, of symmetric integers; None for the scheme's formula.
      contracted: its axes that meet x; `[..., K, N]` unless told otherwise.
      stacked: its axes over which layers are stacked; they lead.
      where: the path that errors name.
      partial_groups, k_pieces: as of `qjax.quantize_array`.

    Returns:
      An array like `kernel`.

    Raises:
      QuantizeError: as `qjax.quantize_array`.
    """
    static = (as_scheme(scheme), KernelUse(contracted, stacked), where, partial_groups, k_pieces)
    return _rounded(kernel, *static) if scale is None else learned_scale.rounded(kernel, scale, *static)


def fake_quantize(
    params: Any,
    scheme_or_rules: Any,
    model: Any = None,
    inputs: Any = None,
    *,
    partial_groups: bool = False,
    scales: Mapping[str, jax.Array] | None = None,
    **apply_options: Any,
) -> Any:
    """A linen params tree with each kernel that `qjax.quantize` would quantize as `fake_quant` has it.

    Call it inside of the loss: `model.apply({"params": qjax.fake_quantize(params, scheme)}, x)`; `qjax.quantize(params,
    scheme)` afterwards gives a model of the same values. With `scales` that are trained beside the params, pass the
    trained ones to `qjax.quantize` too.

    Args:
      params, scheme_or_rules, model, inputs, partial_groups, **apply_options: as of `qjax.quantize`.
      scales: by paths of kernels, float32 `[*stack, N, G]`; `qjax.scales_of` a quantized tree is where to begin.

    Returns:
      The same tree, of floats, boxes kept.

    Raises:
      RuleError, QuantizeError, NotImplementedError: as `qjax.quantize`.
    """
    from qjax.linen.boxes import is_box

    plan = plan_params(params, scheme_or_rules, model, inputs, apply_options)
    refuse_unknown(scales, {task.path for task in plan.tasks})
    for task in plan.tasks:
        assert task.rule.scheme is not None, task.rule
        value = fake_quant(
            plan.kernel(task),
            task.rule.scheme,
            scale=(scales or {}).get(task.path),
            contracted=task.use.contracted,
            stacked=task.use.stacked,
            where=task.path,
            partial_groups=partial_groups or task.rule.partial_groups,
            k_pieces=task.rule.k_pieces,
        )
        leaf = plan.leaves[task.leaf]
        plan.leaves[task.leaf] = leaf.replace_boxed(value) if is_box(leaf) else value
    return plan.result()

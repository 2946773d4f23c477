"""`fake_quantize`: a copy of an nnx module whose kernels have the values that quantizing gives them; `scales_of`."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from qjax.fake_quant import fake_quant
from qjax.learned_scale import collected, refuse_unknown
from qjax.nnx.convert import plan
from qjax.nnx.qparam import QParam


def fake_quantize[M: nnx.Module](
    module: M,
    scheme_or_rules: Any,
    *,
    partial_groups: bool = False,
    scales: Mapping[str, jax.Array] | None = None,
) -> M:
    """A copy of a module with each kernel that `qjax.nnx.quantize` would quantize as `qjax.fake_quant` has it.

    Call it inside of the loss, on the module that gradients are taken of: `qjax.nnx.fake_quantize(model, scheme)(x)`.
    `qjax.nnx.quantize(model, scheme)` afterwards gives a model of the same values. With `scales` that are trained too,
    pass the trained ones to `qjax.nnx.quantize`.

    Args:
      module: any nnx module; it is left as it is.
      scheme_or_rules, partial_groups: as of `qjax.nnx.quantize`.
      scales: by paths of kernels, float32 `[*stack, N, G]`; `qjax.nnx.scales_of` a quantized module is where to begin.

    Returns:
      The copy, of float layers; what was shared in the module is shared in it.

    Raises:
      RuleError, QuantizeError, NotImplementedError: as `qjax.nnx.quantize`.
    """
    copy = nnx.clone(module)
    done: set[int] = set()
    tasks = plan(copy, scheme_or_rules)
    refuse_unknown(scales, {task.where for task in tasks})
    for task in tasks:
        param, rule = task.param, task.rule
        if id(param) in done:
            continue
        done.add(id(param))
        assert rule.scheme is not None, task.path
        kernel = param.get_value()
        use = task.swap.axes(task.layer).use(kernel.ndim)
        param.set_value(
            fake_quant(
                kernel,
                rule.scheme,
                scale=(scales or {}).get(task.where),
                contracted=use.contracted,
                stacked=use.stacked,
                where=task.where,
                partial_groups=partial_groups or rule.partial_groups,
                k_pieces=rule.k_pieces,
            )
        )
    return copy


def scales_of(module: nnx.Module) -> dict[str, jax.Array]:
    """The scales of a quantized module, to begin training from: those of `qjax.nnx.quantize`, or of a recipe.

    Returns:
      Path of a kernel -> float32 `[*stack, N, G]`, as `fake_quantize` and `qjax.nnx.quantize` take them.

    Raises:
      QuantizeError: as `qjax.scales_of`.
    """
    found = {}
    for path, layer in nnx.iter_modules(module, graph=True):
        for name, param in vars(layer).items():
            if isinstance(param, QParam):
                found["/".join(map(str, (*path, name)))] = param.get_value()
    return collected(found)

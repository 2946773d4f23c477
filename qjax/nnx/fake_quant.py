"""`fake_quantize`: a copy of an nnx module whose kernels have the values that quantizing will give them."""

from typing import Any

from flax import nnx

from qjax.fake_quant import fake_quant
from qjax.nnx.convert import plan


def fake_quantize[M: nnx.Module](module: M, scheme_or_rules: Any, *, partial_groups: bool = False) -> M:
    """A copy of a module with each kernel that `qjax.nnx.quantize` would quantize as `qjax.fake_quant` has it.

    Call it inside of the loss, on the module that gradients are taken of: `qjax.nnx.fake_quantize(model, scheme)(x)`.
    `qjax.nnx.quantize(model, scheme)` afterwards gives a model of the same values.

    Args:
      module: any nnx module; it is left as it is.
      scheme_or_rules, partial_groups: as of `qjax.nnx.quantize`.

    Returns:
      The copy, of float layers; what was shared in the module is shared in it.

    Raises:
      RuleError, QuantizeError, NotImplementedError: as `qjax.nnx.quantize`.
    """
    copy = nnx.clone(module)
    done: set[int] = set()
    for task in plan(copy, scheme_or_rules):
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
                contracted=use.contracted,
                stacked=use.stacked,
                where=task.where,
                partial_groups=partial_groups or rule.partial_groups,
                k_pieces=rule.k_pieces,
            )
        )
    return copy

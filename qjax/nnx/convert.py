"""`quantize`: swaps the layers of an nnx module for quantized ones, in place.

A layer stays the same Python object and changes its class. Whoever holds it sees the quantized layer: a list, a dict, a
tuple, two modules that share it, a closure, the caller whose module is itself a layer.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging
from flax import nnx

from qjax.errors import QuantizeError, RuleError
from qjax.learned_scale import refuse_unknown
from qjax.nnx.layer import refuse_custom_product, stand_in
from qjax.nnx.qeinsum import QEinsum, einsum_axes
from qjax.nnx.qembed import EMBED_AXES, QEmbed
from qjax.nnx.qlinear import LINEAR_AXES, QLinear
from qjax.nnx.qlinear_general import QLinearGeneral, linear_general_axes
from qjax.nnx.qlora_linear import QLoRALinear
from qjax.nnx.qparam import KernelAxes, QParam, quantize_param
from qjax.progress import track
from qjax.rules import Kind, Rule, RuleUse, as_rules


@dataclasses.dataclass(frozen=True)
class Swap:
    """How one class of Flax is quantized.

    Attributes:
      axes: of the kernel of a layer.
      build: the quantized layer from the Flax one and its kernel.
      kind: as rules know it.
      name: the kernel's attribute.
    """

    axes: Callable[[Any], KernelAxes]
    build: Callable[[Any, QParam], nnx.Module]
    kind: Kind = "dense"
    name: str = "kernel"


SWAPS: dict[type[nnx.Module], Swap] = {
    nnx.Linear: Swap(lambda _: LINEAR_AXES, lambda layer, kernel: stand_in(QLinear, layer, kernel)),
    nnx.LinearGeneral: Swap(
        lambda layer: linear_general_axes(len(layer.in_features), len(layer.out_features)),
        lambda layer, kernel: stand_in(QLinearGeneral, layer, kernel),
    ),
    nnx.Einsum: Swap(
        lambda layer: einsum_axes(layer.einsum_str), lambda layer, kernel: stand_in(QEinsum, layer, kernel)
    ),
    nnx.Embed: Swap(
        lambda _: EMBED_AXES,
        lambda layer, table: stand_in(QEmbed, layer, table, name="embedding"),
        kind="embedding",
        name="embedding",
    ),
    nnx.LoRALinear: Swap(
        lambda _: LINEAR_AXES, lambda layer, kernel: QLoRALinear(stand_in(QLinear, layer, kernel), layer.lora)
    ),
}

CUSTOM_PRODUCTS = ("dot_general", "dot_general_cls", "einsum_op")  # attributes in which users put products of their own


@dataclasses.dataclass(frozen=True)
class Task:
    """One layer to be quantized: where it is, its row of `SWAPS`, the rule that won."""

    path: str
    layer: nnx.Module
    swap: Swap
    rule: Rule

    @property
    def param(self) -> nnx.Variable:
        """Its float kernel."""
        return getattr(self.layer, self.swap.name)

    @property
    def outcome(self) -> tuple[Any, ...]:
        """What has to agree among layers that share a kernel."""
        return (self.swap.axes(self.layer), self.rule.scheme, self.rule.partial_groups, self.rule.k_pieces)

    @property
    def where(self) -> str:
        """The path of its kernel."""
        return f"{self.path}/{self.swap.name}".lstrip("/")

    def swap_in(self, kernel: QParam) -> None:
        """Makes the layer its quantized namesake around a kernel."""
        become(self.layer, self.swap.build(self.layer, kernel))


def _plan(modules: dict[str, nnx.Module], rules: RuleUse) -> list[Task]:
    """The layers that rules speak of.

    Raises:
      RuleError: for a rule that matches nothing.
      NotImplementedError: for a layer with a product of its own.
    """
    tasks, subclasses = [], []
    for path, module in modules.items():
        swap = SWAPS.get(type(module))
        if swap is None:
            why = ""
            if any(isinstance(value, QParam) for value in vars(module).values()):
                why = "is quantized already"
            elif isinstance(module, tuple(SWAPS)):
                why = f"is a {type(module).__name__}, a subclass, which may do more than its parent"
                subclasses.append(f"{path} ({type(module).__name__})")
            rules.pass_over(path, why)
            continue
        rule = rules.match(path, swap.kind)
        if rule is not None and rule.scheme is not None:
            refuse_custom_product(path, **{name: getattr(module, name, None) for name in CUSTOM_PRODUCTS})
            tasks.append(Task(path, module, swap, rule))
    if subclasses:
        logging.warning("left alone, since a subclass may do more than its parent: %s", ", ".join(subclasses))
    rules.check("module")
    return tasks


def _check_ties(modules: dict[str, nnx.Module], tasks: list[Task]) -> None:
    """Raises where quantizing would part a kernel from another user of its Param.

    Raises:
      RuleError: naming both users.
    """

    def is_node(a: Any) -> bool:
        return isinstance(a, nnx.Variable | nnx.Module)

    users: dict[int, list[str]] = defaultdict(list)
    for path, module in modules.items():
        held = [v for name, v in vars(module).items() if module._pytree__nodes.get(name)]
        for node in jax.tree.leaves(held, is_leaf=is_node):
            if isinstance(node, nnx.Variable):
                users[id(node)].append(path)
    outcomes = {task.path: task.outcome for task in tasks}
    for task in tasks:
        for other in users[id(task.param)]:
            if outcomes.get(other) != task.outcome:
                fate = "stays float" if other not in outcomes else "is quantized otherwise"
                raise RuleError(
                    f"{task.path}: its kernel is the same Param as one of {other or 'the root'}, which {fate}; "
                    "give both one scheme in the rules, or both None"
                )


def become(layer: nnx.Module, new: nnx.Module) -> None:
    """Turns an object into another one, under nnx's own rules for setting attributes."""
    for name in list(vars(layer)):
        if not name.startswith("_pytree__"):
            delattr(layer, name)
    layer.__class__ = type(new)
    object.__setattr__(layer, "_pytree__nodes", new._pytree__nodes)
    for name, value in vars(new).items():
        if not name.startswith("_pytree__"):
            setattr(layer, name, nnx.data(value) if new._pytree__nodes[name] else nnx.static(value))


def plan(module: Any, scheme_or_rules: Any) -> list[Task]:
    """The layers of a module that are to be quantized, nothing changed yet.

    Raises:
      RuleError, QuantizeError, NotImplementedError: as `quantize`, for what the kernels' values have no part in.
    """
    if not isinstance(module, nnx.Module):
        raise QuantizeError(
            f"a flax.nnx.Module is wanted; got {type(module).__name__}; qjax.quantize takes params trees"
        )
    modules = {"/".join(map(str, path)): m for path, m in nnx.iter_modules(module, graph=True)}
    tasks = _plan(modules, RuleUse(as_rules(scheme_or_rules)))
    _check_ties(modules, tasks)
    return tasks


def quantize[M: nnx.Module](
    module: M,
    scheme_or_rules: Any,
    *,
    partial_groups: bool = False,
    scales: Mapping[str, jax.Array] | None = None,
    progress: bool | None = None,
) -> M:
    """Quantizes the layers of a module in place.

    `nnx.Linear`, `LinearGeneral`, `Einsum`, `LoRALinear` (its adapter stays) and, where a rule names it, `Embed` become
    their quantized namesakes; anything else is left alone, subclasses of these too, with a warning. What was shared
    stays shared: a layer, a kernel's Param, a bias. Kernels with leading axes, as `nnx.vmap` makes them, are quantized
    layer by layer and go on under `nnx.scan`. Each float kernel is let go before the next one is quantized.

    Args:
      module: any nnx module, also one layer; of arrays, not abstract ones, though it may be called in `nnx.eval_shape`.
      scheme_or_rules: a scheme, its string, or rules (`qjax.rules.as_rules`). Paths are those of `nnx.iter_modules`,
        joined by '/': `layers/0/mlp/up_proj`. Layers know their axes: `axis` and `stacked` of a rule are not asked.
      partial_groups: allow a short last group where the group size does not divide K.
      scales: by paths of kernels, for those that have learned theirs (`qjax.nnx.fake_quantize`).
      progress: True, False, or None for a bar on a terminal when the work takes longer than two seconds.

    Returns:
      The module itself.

    Raises:
      RuleError: a malformed rule, one that matches nothing, or rules that part a tied kernel.
      QuantizeError: a kernel that cannot be quantized as asked, naming its path; those before it are by then.
      NotImplementedError: a layer with a dot_general or an einsum of its own, before anything is changed.
      ShardingError: as `qjax.nnx.quantize_param`.
    """
    tasks = plan(module, scheme_or_rules)
    refuse_unknown(scales, {task.where for task in tasks})
    kernels: dict[int, QParam] = {}
    for task in track(tasks, "quantizing", show=progress):
        key = id(task.param)
        if key not in kernels:
            kernels[key] = _quantize(task, partial_groups, (scales or {}).get(task.where))
        task.swap_in(kernels[key])
    return module


def _quantize(task: Task, partial_groups: bool, scale: jax.Array | None) -> QParam:
    rule = task.rule
    assert rule.scheme is not None, task.path
    kernel = quantize_param(
        task.param,
        task.swap.axes(task.layer),
        rule.scheme,
        where=task.where,
        partial_groups=partial_groups or rule.partial_groups,
        k_pieces=rule.k_pieces,
        scale=scale,
    )
    return jax.block_until_ready(kernel)

"""`quantize`: a tree of float params -> the same tree with QTensors for kernels, by rules.

What a kernel's axes mean is learned from the model, told by a rule, or, for a matrix, known. One layer at a time is on
the device in float, so that the peak is the result plus one layer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from qjax.errors import QuantizeError
from qjax.flax_kernel import KernelUse, quantize_kernel
from qjax.learned_scale import refuse_unknown
from qjax.progress import track
from qjax.qtensor import QTensor, is_qtensor
from qjax.rules import EVERYTHING, KINDS, Kind, Rule, RuleUse, as_rules, is_convolution, match


def _told(rule: Rule, rank: int, kind: Kind) -> KernelUse | None:
    """What a rule, or a rank of 2, says of a kernel's axes."""
    stacked = rule.stacked or ()
    if rule.axis is not None:
        return KernelUse(rule.axis, stacked)
    if rank - len(stacked) != 2:
        return None
    left = [a for a in range(rank) if a not in {s % rank for s in stacked}]
    return KernelUse((left[-1] if kind == "embedding" else left[0],), stacked) if len(left) == 2 else None


@dataclasses.dataclass
class _Planner:
    """Which leaf is quantized, how: by rules, and by what was learned of the model (None: no model).

    `idle` are the kernels that rules speak of, but whose modules the model did not call.
    """

    rules: RuleUse
    learned: Mapping[str, set[KernelUse]] | None
    idle: list[str] = dataclasses.field(default_factory=list)

    def plan(self, path: str, leaf: Any) -> tuple[Rule, KernelUse] | None:
        """The rule and the axes of one leaf (without its box), or None to leave it alone."""
        module, _, name = path.rpartition("/")
        if is_qtensor(leaf):
            self.rules.pass_over(module, "is quantized already")
            return None
        shape = getattr(leaf, "shape", None)
        if shape is None or name not in KINDS or (self.learned is not None and path not in self.learned):
            self.rules.pass_over(module)
            return None
        kind = KINDS[name]
        rule = match(self.rules.rules, module, kind)
        if self.learned is not None and not self.learned[path]:
            self.rules.pass_over(module, "is not called")
            if rule is not None and rule.scheme is not None and not is_convolution(module):
                self.idle.append(path)
            return None
        if rule is not None and rule.scheme is not None and self._is_convolution(module, shape, rule):
            if rule.pattern != EVERYTHING:
                raise QuantizeError(
                    f"{path}: shape {shape} is a convolution's, by its name, and those are not quantized; leave it out "
                    f"of the rule {rule.pattern!r}, or give model= and inputs= if it is a dense layer"
                )
            self.rules.pass_over(module, "is a convolution, by its name")
            return None
        use = None if rule is None or rule.scheme is None else self._use(path, shape, rule, kind)
        if rule is not None and rule.scheme is not None and use is None:
            self.rules.pass_over(module)
            self.rules.unexplained.append(f"{path} {tuple(shape)}")
            return None
        self.rules.match(module, kind)
        return None if rule is None or use is None else (rule, use)

    def _is_convolution(self, module: str, shape: tuple[int, ...], rule: Rule) -> bool:
        """By its name, where no model tells; a matrix is none, nor are stacked ones."""
        return self.learned is None and len(shape) - len(rule.stacked or ()) > 2 and is_convolution(module)

    def _use(self, path: str, shape: tuple[int, ...], rule: Rule, kind: Kind) -> KernelUse | None:
        known = self.learned[path] if self.learned is not None else set()
        if len(known) > 1 and rule.axis is None:
            raise QuantizeError(f"{path}: shape {shape} is used in several ways, {known}; choose by axis= in its rule")
        if known and rule.axis is None:
            return next(iter(known))
        told = _told(rule, len(shape), kind)
        if told is None and rule.pattern != EVERYTHING:
            raise QuantizeError(
                f"{path}: shape {shape} does not tell contracted from stacked axes; give axis= and stacked= in the "
                f"rule {rule.pattern!r}, or model= and inputs="
            )
        return told


def _inner(params: Any) -> Any:
    """The params of a dict of variables, or the params themselves."""
    if not isinstance(params, Mapping):
        raise QuantizeError(
            f"params is a {type(params).__name__}; a tree of params (a mapping) is wanted; for an nnx module there is "
            "qjax.nnx.quantize"
        )
    if type(params).__module__.startswith("flax.nnx"):
        raise QuantizeError(
            f"params is an nnx {type(params).__name__}; quantize the module that it belongs to by qjax.nnx.quantize"
        )
    return params["params"] if isinstance(params.get("params"), Mapping) else params


def _with_inner(params: Any, inner: Any) -> Any:
    """`params` with its inner tree replaced; its own type."""
    return type(params)({**params, "params": inner}) if isinstance(params.get("params"), Mapping) else inner


@dataclasses.dataclass(frozen=True)
class KernelTask:
    """One kernel to be quantized: its place among the leaves of the inner tree, its path, its rule, its axes."""

    leaf: int
    path: str
    rule: Rule
    use: KernelUse


@dataclasses.dataclass
class ParamsPlan:
    """Which kernels of a params tree are to be quantized, and the tree as it is after those that have been.

    Attributes:
      params: what the caller gave.
      leaves: of the inner tree, boxes and QTensors whole.
      tree: its structure.
      tasks: the kernels.
      idle: paths of kernels that rules speak of, and that the model did not use; they stay.
    """

    params: Any
    leaves: list[Any]
    tree: Any
    tasks: list[KernelTask]
    idle: list[str]

    def kernel(self, task: KernelTask) -> Any:
        """A kernel without its box."""
        from qjax.linen.boxes import unboxed

        return unboxed(self.leaves[task.leaf])

    def put(self, task: KernelTask, w: QTensor) -> None:
        """A QTensor in its kernel's place, boxed as that was."""
        from qjax.linen.boxes import boxed_like

        self.leaves[task.leaf] = boxed_like(self.leaves[task.leaf], w, where=task.path)

    def result(self) -> Any:
        """What the caller gets."""
        inner = jax.tree.unflatten(self.tree, self.leaves)
        return _with_inner(self.params, inner)


def plan_params(
    params: Any, scheme_or_rules: Any, model: Any, inputs: Any, apply_options: Mapping[str, Any]
) -> ParamsPlan:
    """The kernels of a params tree that are to be quantized, nothing changed yet; as of `quantize`."""
    # Here and not above: flax costs more to import than the rest of qjax.
    from qjax.linen.boxes import is_box, unboxed
    from qjax.linen.survey import survey

    if model is None and (inputs is not None or apply_options):
        raise QuantizeError(f"inputs and {sorted(apply_options)} are for a model; give model=")
    if model is not None and inputs is None:
        raise QuantizeError(f"{type(model).__name__} is traced on sample inputs; give inputs=(x,), arrays or shapes")
    inner = _inner(params)
    variables = {"params": inner} if inner is params else params
    learned = None if model is None else survey(model, variables, inputs, apply_options)
    planner = _Planner(RuleUse(as_rules(scheme_or_rules)), learned)
    found, tree = jax.tree_util.tree_flatten_with_path(inner, is_leaf=lambda a: is_qtensor(a) or is_box(a))
    tasks = []
    for i, (key, leaf) in enumerate(found):
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        planned = planner.plan(path, leaf if is_qtensor(leaf) else unboxed(leaf))
        if planned is not None:
            tasks.append(KernelTask(i, path, *planned))
    planner.rules.check()
    if planner.rules.unexplained:
        logging.warning(
            "left alone, since neither a model nor a rule tells what their axes mean: %s",
            ", ".join(planner.rules.unexplained),
        )
    return ParamsPlan(params, [leaf for _, leaf in found], tree, tasks, planner.idle)


def quantize(
    params: Any,
    scheme_or_rules: Any,
    model: Any = None,
    inputs: Any = None,
    *,
    partial_groups: bool = False,
    scales: Mapping[str, jax.Array] | None = None,
    progress: bool | None = None,
    **apply_options: Any,
) -> Any:
    """Quantizes the kernels of a linen params tree.

    A bare scheme is for every dense kernel but those of heads (`qjax.rules.HEADS`); embeddings are quantized where a
    rule names them; norms and convolutions never. With a model, each kernel's contracted, output and stacked axes are
    learned by tracing it on shapes. Without one, only matrices are quantized (x meets their first axis), a kernel of
    higher rank needs `axis=` and `stacked=` in its rule, and convolutions are told by their names (`Conv_0`,
    `stem_conv`): one that is named otherwise is the rule's to leave out, and raises when Flax runs it.

    Args:
      params: the inner tree or `{"params": ..., ...}`; arrays of NumPy or JAX. What is a QTensor already stays.
      scheme_or_rules: a scheme, its string, or rules (`qjax.rules.as_rules`) on the paths of modules, joined by '/'.
      model: the linen module that the params belong to.
      inputs: a tuple of its sample inputs, arrays or ShapeDtypeStructs (anything else is the only one).
      partial_groups: allow a short last group where the group size does not divide K.
      scales: by paths of kernels, for those that have learned theirs (`qjax.fake_quantize`).
      progress: True, False, or None for a bar on a terminal when the work takes longer than two seconds.
      **apply_options: further arguments of `model.apply`, such as `method=`, `rngs=`, `train=False`.

    Returns:
      The same tree with QTensors for kernels. Where a kernel was boxed by `nn.with_partitioning` or its logical twin,
      each array of the QTensor has a box of its own with the names that are right for it, so that
      `nn.get_partition_spec`, `nn.get_sharding` and `nn.unbox` go on working.

    Raises:
      RuleError: a malformed rule, or one that matches nothing.
      QuantizeError: a kernel that cannot be quantized as asked, naming its path: a rank that nobody explained, a
        convolution that a rule names; scales of no such kernel.
      NotImplementedError: layers stacked over an axis that is not the first.
    """
    plan = plan_params(params, scheme_or_rules, model, inputs, apply_options)
    refuse_unknown(scales, {task.path for task in plan.tasks})
    for task in track(plan.tasks, "quantizing", show=progress):
        assert task.rule.scheme is not None, task.rule
        w = quantize_kernel(
            plan.kernel(task),
            task.rule.scheme,
            task.use,
            where=task.path,
            partial_groups=partial_groups or task.rule.partial_groups,
            k_pieces=task.rule.k_pieces,
            scale=(scales or {}).get(task.path),
        )
        plan.put(task, jax.block_until_ready(w))
    return plan.result()

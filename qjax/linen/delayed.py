"""Delayed scales of x in linen: each layer's `AmaxHistory` in the collection `delayed_scaling`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from qjax.delayed import AmaxHistory, delayed_of, fixed, observe, start
from qjax.errors import QTensorError
from qjax.qtensor import QTensor, is_qtensor

COLLECTION = "delayed_scaling"
FIELDS = ("amax_history", "act_scale")


def with_delayed_scale(layer: Any, x: jax.Array, w: QTensor) -> QTensor:
    """The weight with the scale that the layer's history has for x; itself where its scheme delays none.

    Where the collection is mutable, x becomes part of the history, but for `init`.

    Raises:
      QTensorError: a layer without a history, and one that is to begin may not be kept.
    """
    if delayed_of(w) is None:
        return w
    scope = layer.scope
    known, mutable = scope.has_variable(COLLECTION, FIELDS[0]), scope.is_mutable_collection(COLLECTION)
    if not known and not mutable and w.act_scale is None:
        raise QTensorError(
            f"{'/'.join(layer.path)}: {w.scheme} keeps the scale of x in the collection {COLLECTION!r}, which has none "
            f"for this layer: apply the model with mutable=[{COLLECTION!r}] first, and pass on what it returns"
        )
    seen = AmaxHistory(*(scope.get_variable(COLLECTION, name) for name in FIELDS)) if known else start(w)
    if mutable:
        after = seen if layer.is_initializing() else observe(seen, x, w)
        for name, value in zip(FIELDS, (after.amax, after.scale), strict=True):
            scope.put_variable(COLLECTION, name, value)
    return dataclasses.replace(w, act_scale=seen.scale)


def fix_scales(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a model whose delayed scales have become static ones, and without their history.

    Args:
      variables: `{"params": ..., "delayed_scaling": ...}` and other collections.

    Returns:
      The other collections, with params of schemes with `mode=static`, which no longer change.
    """

    def fix(params: Any, seen: Any) -> Any:
        if is_qtensor(params):
            return params if delayed_of(params) is None or "act_scale" not in seen else fixed(params, seen["act_scale"])
        if not isinstance(params, Mapping):
            return params
        # A layer's history lies beside its kernel, one level above.
        fixed_ones = {k: fix(v, seen if is_qtensor(v) else seen.get(k, {})) for k, v in params.items()}
        rebuilt: Any = type(params)
        return rebuilt(fixed_ones)

    rest = {name: value for name, value in variables.items() if name != COLLECTION}
    return rest | {"params": fix(variables["params"], variables.get(COLLECTION, {}))}

"""Which output of a kernel each element of an array is a multiple of, followed through the steps of a program.

Labels are integers of the array's rank, of size 1 along axes on which they do not depend: an array `[B, T, N]` that a
kernel `[K, N]` makes has `[[[0, 1, .., N - 1]]]`. Where an output of the kernel is divided by a number, so is each
element with its label; a step for which this does not hold has no rule here.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qjax.calibration.program import Step

type Labels = np.ndarray
type Shapes = Sequence[tuple[int, ...]]

WIDEST = 2**20  # elements of axes that are followed through a reshape: more than a layer has, fewer than all tokens do


def after(step: Step, at: int, labels: Labels, shapes: Shapes) -> Labels | None:
    """Labels of what a step makes of an array, whatever its other inputs are.

    Args:
      step: any.
      at: which of its inputs the array is.
      labels: of the array.
      shapes: of the step's inputs.

    Returns:
      None where the step does not divide its output by what its input is divided by.
    """
    rule = RULES.get(step.name)
    return None if rule is None else rule(step.params, at, labels, shapes)


def _same(params: Any, at: int, labels: Labels, shapes: Shapes) -> Labels | None:
    return labels


def _cast(params: Any, at: int, labels: Labels, shapes: Shapes) -> Labels | None:
    return labels if jnp.issubdtype(params["new_dtype"], jnp.floating) else None


def _quotient(params: Any, at: int, labels: Labels, shapes: Shapes) -> Labels | None:
    return labels if at == 0 else None


def _transpose(params: Any, at: int, labels: Labels, shapes: Shapes) -> Labels | None:
    return labels.transpose(params["permutation"])


def _squeeze(params: Any, at: int, labels: Labels, shapes: Shapes) -> Labels | None:
    return labels.squeeze(tuple(params["dimensions"]))


def _broadcast(params: Any, at: int, labels: Labels, shapes: Shapes) -> Labels | None:
    sizes = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], labels.shape, strict=True):
        sizes[axis] = size
    return labels.reshape(sizes)


def _reshape(params: Any, at: int, labels: Labels, shapes: Shapes) -> Labels | None:
    """Axes that are merged or split together are labelled together, if any of them is."""
    before, now = shapes[at], tuple(params["new_sizes"])
    if params.get("dimensions") is not None or 0 in before:
        return None
    repeats: list[int] = []
    sizes: list[int] = []
    i = j = 0
    while i < len(before) or j < len(now):
        first, start, left, right = i, j, 1, 1
        while left != right or (i, j) == (first, start):
            if i < len(before) and (left <= right or j == len(now)):
                left, i = left * before[i], i + 1
            else:
                right, j = right * now[j], j + 1
        is_labelled = math.prod(labels.shape[first:i]) > 1
        if is_labelled and left > WIDEST:
            return None
        repeats += before[first:i] if is_labelled else [1] * (i - first)
        sizes += now[start:j] if is_labelled else [1] * (j - start)
    return np.broadcast_to(labels, repeats).reshape(sizes)


def _product(params: Any, at: int, labels: Labels, shapes: Shapes) -> Labels | None:
    """Sums have to be over elements of one label."""
    contracted, batch = ([tuple(axes[side]) for side in (0, 1)] for axes in params["dimension_numbers"])
    if any(labels.shape[a] > 1 for a in contracted[at]):
        return None
    free = [a for a in range(labels.ndim) if a not in (*contracted[at], *batch[at])]
    sizes = [labels.shape[a] for a in (*batch[at], *free)]
    others = [1] * (len(shapes[1 - at]) - len(contracted[1 - at]) - len(batch[1 - at]))
    sizes[len(sizes) if at == 0 else len(batch[at]) : len(sizes) if at == 0 else len(batch[at])] = others
    return labels.transpose(*batch[at], *free, *contracted[at]).reshape(sizes)


RULES: dict[str, Callable[[Any, int, Labels, Shapes], Labels | None]] = {
    "mul": _same,
    "neg": _same,
    "div": _quotient,
    "convert_element_type": _cast,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "dot_general": _product,
}

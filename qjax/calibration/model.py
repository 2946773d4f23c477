"""What a caller gives to calibration, checked: batches of one shape, and a model of either Flax as a `Subject`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from qjax.calibration import linen_model, nnx_model
from qjax.calibration.subject import Subject
from qjax.errors import CalibrationError


def check_batches(batches: Iterable[Any] | None) -> list[tuple[Any, ...]]:
    """Each as a tuple of the model's arguments.

    Raises:
      CalibrationError: batches of several shapes.
    """
    found = [batch if isinstance(batch, tuple) else (batch,) for batch in batches or ()]
    shapes = [[(np.shape(a), np.dtype(a.dtype).name) for a in jax.tree.leaves(batch)] for batch in found]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise CalibrationError(f"batch {number} has {shape}, batch 0 {shapes[0]}: batches have to be of one shape")
    return found


def subject_of(
    model: Any, params: Any, scheme_or_rules: Any, batches: Sequence[tuple[Any, ...]], options: Mapping[str, Any]
) -> Subject:
    """An nnx module, or a linen one with its params.

    Raises:
      CalibrationError: params for an nnx module, or none for a linen one.
      RuleError, QuantizeError, NotImplementedError: as `qjax.quantize` and `qjax.nnx.quantize`.
    """
    if isinstance(model, nnx.Module):
        if params is not None or options:
            raise CalibrationError(f"params and {sorted(options)} are for a linen module; an nnx one has its own")
        return nnx_model.subject(model, scheme_or_rules)
    if params is None:
        raise CalibrationError(f"{type(model).__name__} is no nnx module; give params= of a linen one")
    return linen_model.subject(model, params, scheme_or_rules, batches[0] if batches else None, options)

"""Functions that are lowered once, however often XLA's partitioner asks for them.

It calls back for each `custom_partitioning` of a program, and JAX lowers what it is given anew each time: a second for
a kernel of Hopper's, minutes for a model of a hundred products of which four differ.
"""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.export
import numpy as np

from qjax import devices
from qjax.dispatch import backends
from qjax.dispatch.routes import CUSTOM_CALLS

_LOWERED: dict[Hashable, jax.export.Exported] = {}


def call_lowered(f: Callable[..., Any], key: Hashable, leaves: list[jax.Array], platform: str) -> Any:
    """`f(*leaves)`, of a function that does the same wherever `key` is equal.

    Args:
      f: of arrays, on one device.
      key: all that `f` depends on beside the arrays and what this context says of devices, backends and precision.
      leaves: its arguments.
      platform: that of the mesh's devices.
    """
    shapes = tuple((tuple(a.shape), np.dtype(a.dtype)) for a in leaves)
    precision = jax.config.jax_default_matmul_precision, jax.config.jax_enable_x64
    full = key, shapes, platform, devices.current(), backends.override.value, precision
    if full not in _LOWERED:
        target = "cpu" if platform == "cpu" else "cuda" if devices.current().cc else "rocm"
        allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in CUSTOM_CALLS]
        export = jax.export.export(jax.jit(f), platforms=[target], disabled_checks=allowed)
        _LOWERED[full] = export(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
    return _LOWERED[full].call(*leaves)

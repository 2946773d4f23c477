"""A QTensor in `flax.serialization`: `to_bytes`, `from_bytes` and state dicts take params trees that hold some.

A state dict holds arrays by name, and beside them what is static, as text: restoring into a target of another scheme
would fit many an array and mean other weights. Importing this module tells Flax, which asks a registry of its own.
"""

import dataclasses
from typing import Any

from flax import serialization

from qjax.errors import QTensorError
from qjax.qtensor import QTensor, validate_qtensor

STATIC = "static"


def _static(w: QTensor) -> dict[str, str]:
    names = [f.name for f in dataclasses.fields(QTensor) if f.metadata.get("static")]
    return {name: str(getattr(w, name)) for name in names}


def _arrays(w: QTensor) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(QTensor) if not f.metadata.get("static")]
    return {name: getattr(w, name) for name in names if getattr(w, name) is not None}


def to_state(w: QTensor) -> dict[str, Any]:
    """The arrays of a QTensor by their names, and `static`."""
    return {STATIC: _static(w)} | {name: serialization.to_state_dict(a) for name, a in _arrays(w).items()}


def from_state(target: QTensor, state: dict[str, Any]) -> QTensor:
    """The QTensor of a state dict.

    Args:
      target: of the same scheme and shape; its values don't matter.
      state: what `to_state` gave.

    Raises:
      QTensorError: for a state that is none of a QTensor like the target, naming what differs.
    """
    wanted, arrays = _static(target), _arrays(target)
    if not isinstance(state, dict) or state.keys() != {STATIC, *arrays}:
        found = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise QTensorError(f"the state of {target!r} holds {found}; expected {sorted({STATIC, *arrays})}")
    differing = {name: state[STATIC].get(name) for name, value in wanted.items() if state[STATIC].get(name) != value}
    if differing:
        raise QTensorError(f"a state of {differing} cannot be restored into {target!r}")
    restored = {name: serialization.from_state_dict(a, state[name], name=name) for name, a in arrays.items()}
    return validate_qtensor(dataclasses.replace(target, **restored), f"the state of {target!r}")


serialization.register_serialization_state(QTensor, to_state, from_state, override=True)

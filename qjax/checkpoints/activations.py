"""How x is quantized on its way into a weight of a folder: as the folder says, or as the caller asks instead."""

import dataclasses
from typing import Any

from qjax.errors import SchemeError
from qjax.qtensor import QTensor
from qjax.schemes import Activation, parse_scheme

# (constructor of a weight-only scheme, x) -> constructor of the scheme with the same weights that makes x so.
WITH_ACTIVATIONS = {("w8a16", "int8"): "w8a8_int8", ("w4a16", "int8"): "w4a8_int8", ("fp8", "fp8"): "w8a8_fp8"}
WEIGHT_ONLY = {name: weights for (weights, _), name in WITH_ACTIVATIONS.items()}

CHOICES = ("checkpoint", "none", *dict.fromkeys(x for _, x in WITH_ACTIVATIONS))

_NAMES = {"int8": "int8", "e4m3": "fp8"}


def as_stored(w: QTensor, activation: Activation, act_scale: Any = None) -> QTensor | None:
    """A weight-only QTensor under the scheme that quantizes x so; None where there is no such scheme."""
    name, _, options = w.scheme.spec.partition(":")
    target = WITH_ACTIVATIONS.get((name, _NAMES[activation.format]))
    if target is None:
        return None
    own = [*filter(None, options.split(",")), f"activation={activation.granularity}", f"mode={activation.mode}"]
    twin = parse_scheme(f"{target}:{','.join(own)}")
    scheme = dataclasses.replace(w.scheme, spec=twin.spec, activation=twin.activation)
    return dataclasses.replace(w, scheme=scheme, act_scale=act_scale)


def with_activations(w: QTensor, activations: str, where: str) -> QTensor:
    """The weight under the scheme that treats x as one of `CHOICES` says; see `qjax.load`.

    Raises:
      SchemeError: where there is no such scheme.
    """
    scheme = w.scheme
    wanted = {"int8": "int8", "fp8": "e4m3", "none": None}.get(activations)
    has = scheme.activation.format if scheme.activation else None
    if activations == "checkpoint" or has == wanted:
        return w
    name, _, options = scheme.spec.partition(":")
    weights = WEIGHT_ONLY.get(name, name)
    target = weights if wanted is None else WITH_ACTIVATIONS.get((weights, activations))
    if target is None or (wanted is None and name not in WEIGHT_ONLY):
        pairs = ", ".join(f"{x} with {name}" for name, x in WITH_ACTIVATIONS)
        raise SchemeError(f"{where}: no scheme is {weights} with activations={activations!r}; there are {pairs}")
    kept = [option for option in options.split(",") if option and not option.startswith(("activation=", "mode="))]
    twin = parse_scheme(f"{target}:{','.join(kept)}")
    scheme = dataclasses.replace(scheme, spec=twin.spec, activation=twin.activation)
    return dataclasses.replace(w, scheme=scheme, act_scale=None)

"""Scheme <-> JSON values, for files; what is read is checked field by field."""

import dataclasses
from typing import Any, get_args, get_type_hints

from qjax.errors import SchemeError
from qjax.formats import FORMATS
from qjax.schemes import Activation, Delayed, Scheme

SCALE_DTYPES = ("float16", "bfloat16", "float32", "float8_e8m0fnu", "float8_e4m3fn")


def scheme_to_dict(scheme: Scheme) -> dict[str, Any]:
    """The scheme as JSON values."""
    return dataclasses.asdict(scheme)


def _is_size(size: Any) -> bool:
    return size is None or (type(size) is int and size > 0)


def _is_block(block: Any) -> bool:
    return len(block) == 2 and all(map(_is_size, block))


def _is_delayed(history: Any, margin: Any, amax: Any) -> bool:
    allowed = get_args(get_type_hints(Delayed)["amax"])
    return type(history) is int and history > 0 and type(margin) is int and margin >= 0 and amax in allowed


def _is_activation(activation: Activation) -> bool:
    allowed, given = get_type_hints(Activation), dataclasses.asdict(activation)
    outliers, delayed = given.pop("outliers"), given.pop("delayed")
    if outliers is not None and not (isinstance(outliers, float) and outliers > 0):
        return False
    if delayed is not None and not _is_delayed(**delayed):
        return False
    return all(value in get_args(allowed[name]) for name, value in given.items())


def scheme_from_dict(fields: dict[str, Any]) -> Scheme:
    """A scheme back from `scheme_to_dict`.

    Raises:
      SchemeError: for fields or values that no scheme has.
    """
    try:
        given = dict(fields)
        given["block"] = tuple(given["block"])
        if given.get("activation") is not None:
            fields_of_x = dict(given["activation"])
            if fields_of_x.get("delayed") is not None:
                fields_of_x["delayed"] = Delayed(**fields_of_x["delayed"])
            given["activation"] = Activation(**fields_of_x)
        scheme = Scheme(**given)
    except (TypeError, KeyError, ValueError) as error:
        raise SchemeError(f"not a stored scheme: {fields!r} ({error})") from error
    checks = {
        "spec; a string": isinstance(scheme.spec, str),
        "symmetric, global_scale; booleans": all(isinstance(b, bool) for b in (scheme.symmetric, scheme.global_scale)),
        "nested; a positive integer or null": _is_size(scheme.nested),
        f"weight; known: {', '.join(FORMATS)}": scheme.weight in FORMATS,
        f"scale_dtype; known: {', '.join(SCALE_DTYPES)}": scheme.scale_dtype in SCALE_DTYPES,
        "hadamard; a power of two or null": _is_size(scheme.hadamard) and not (h := scheme.hadamard or 1) & (h - 1),
        "block; two positive integers or nulls": _is_block(scheme.block),
        "activation": scheme.activation is None or _is_activation(scheme.activation),
    }
    wrong = [field for field, right in checks.items() if not right]
    if wrong:
        raise SchemeError(f"not a stored scheme: {fields!r}; wrong: {'; '.join(wrong)}")
    return scheme

"""Constructors as strings: `name:key=value,...`, as on the command line and in files. Schemes and recipes are such."""

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

from qjax.errors import QJaxError

type Table[T] = Mapping[str, Callable[..., T]]


def write_spec(name: str, table: Table[Any], options: Mapping[str, Any], always: tuple[str, ...] = ()) -> str:
    """The canonical string of a constructor: options in `always`, and those that differ from the default."""
    defaults = {k: p.default for k, p in inspect.signature(table[name]).parameters.items()}
    kept = {k: v for k, v in options.items() if k in always or v != defaults[k]}
    text = ",".join(f"{k}={str(v).lower()}" for k, v in kept.items())
    return f"{name}:{text}" if text else name


def _option(name: str, key: str, text: str, error: type[QJaxError]) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text.removeprefix("-").isdecimal() and text.isascii():
        return int(text)
    if re.fullmatch(r"-?[0-9]+\.[0-9]+", text):
        return float(text)
    if not text:
        raise error(f"{name}: option {key} has no value; write {key}=VALUE")
    return None if text.lower() == "none" else text


def read_spec[T](text: str, table: Table[T], what: str, error: type[QJaxError]) -> T:
    """What a string names.

    Args:
      text: such as `w4a16:group_size=64,symmetric=false`.
      table: constructors by name.
      what: such as "scheme", for errors.
      error: the class of errors.

    Raises:
      QJaxError: of class `error`, for an unknown name or option, naming the known ones.
    """
    name, _, rest = text.strip().partition(":")
    if name.lower() not in table:
        raise error(f"unknown {what} {name!r}; known: {', '.join(table)}")
    make = table[name.lower()]
    allowed = list(inspect.signature(make).parameters)
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        key = key.strip()
        if key not in allowed:
            raise error(f"{name}: unknown option {key!r}; known: {', '.join(allowed) or 'none'}")
        if key in options:
            raise error(f"{name}: option {key} is given twice")
        options[key] = _option(name, key, value.strip(), error)
    return make(**options)

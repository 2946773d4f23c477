"""`set_backends`: which kernels the layers of a module run, by a regex over their paths."""

import re
from collections.abc import Mapping

from flax import nnx

from qjax.dispatch import backends
from qjax.errors import BackendError, RuleError


def set_backends(module: nnx.Module, by_path: Mapping[str, str | None]) -> dict[str, str | None]:
    """Sets `backend` of quantized layers, in place; it wins over what tuning tables say.

    Args:
      module: with quantized layers in it.
      by_path: a pattern that has to match the whole path of a layer (`layers/0/mlp/up`; written with dots it matches
        too) -> what `backend=` of `qjax.matmul` takes: a family ("triton"), a kernel ("triton.matmul_tall"), a kernel
        in a configuration ("triton.matmul_tall:tile_m=128,tile_n=128,split_k=1,warps=8,stages=3"), or None. The first
        pattern that matches counts.

    Returns:
      What was set, by path. `qjax.explain` shows what comes of it.

    Raises:
      RuleError: a pattern that is no regular expression, or that no quantized layer's path matches.
      BackendError: a backend that there is none of. Whether a layer can have it is found when it runs, or is explained.
    """
    patterns = {_compiled(pattern): pattern for pattern in by_path}
    for name in by_path.values():
        if name is not None and backends.selection(name) is None:
            raise BackendError(
                f"unknown backend {name!r}; a family of {', '.join(backends.BACKENDS)}, or a kernel's name"
            )
    layers = {"/".join(map(str, path)): one for path, one in nnx.iter_modules(module) if hasattr(one, "backend")}
    found = {path: next((p for p in patterns if p.fullmatch(path)), None) for path in layers}
    idle = [text for pattern, text in patterns.items() if pattern not in found.values()]
    if idle:
        raise RuleError(
            f"{idle[0]!r} is the first match of no quantized layer; there are {', '.join(layers) or 'none'}"
        )
    taken = {path: by_path[patterns[pattern]] for path, pattern in found.items() if pattern is not None}
    for path, name in taken.items():
        layers[path].backend = name
    return taken


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise RuleError(f"{pattern!r} is no regular expression: {error}") from error

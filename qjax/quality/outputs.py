"""What enters and leaves chosen layers of an nnx module while it runs; the module itself is not modified."""

import functools
from collections.abc import Collection
from typing import Any

import jax
from flax import nnx

from qjax.errors import QJaxError


def modules_of(model: nnx.Module) -> dict[str, nnx.Module]:
    """The modules of a model by their paths, `layers/0/mlp/up_proj`; one that has several has its first."""
    return {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}


@functools.cache
def _recording(kind: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass whose calls leave `(inputs, outputs)` in its attribute `seen`."""

    def call(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        y = kind.__call__(self, inputs, *args, **kwargs)
        self.seen.set_value((*self.seen.get_value(), (inputs, y)))
        return y

    return type(f"Recording{kind.__name__}", (kind,), {"__call__": call})


class Recorded:
    """A model that has run once, with what passed through some of its layers."""

    def __init__(self, definition: Any, state: Any, paths: Collection[str], *args: Any) -> None:
        """Merges a copy of the model and calls it; to be used under `jit`, which drops what nobody asks for.

        Args:
          definition, state: of `nnx.split`.
          paths: of the layers to look at.
          *args: the model's arguments.
        """
        model = nnx.merge(definition, state)
        found = modules_of(model)
        self._layers: dict[str, Any] = {path: found[path] for path in paths}
        self._kinds: dict[str, type[nnx.Module]] = {path: type(layer) for path, layer in self._layers.items()}
        for path, layer in self._layers.items():
            layer.__class__ = _recording(self._kinds[path])
            layer.seen = nnx.Intermediate(())
        self.output = model(*args)

    def calls(self, path: str) -> tuple[tuple[Any, jax.Array], ...]:
        """`(inputs, outputs)` of each call of a layer.

        Raises:
          QJaxError: it was not called, or where that cannot be seen: inside of another transformation.
        """
        seen = self._layers[path].seen.get_value()
        if not seen:
            raise QJaxError(
                f"{path}: no call of this layer was seen; is it used, and outside of nested transformations?"
            )
        return seen

    def apply(self, path: str, inputs: Any) -> jax.Array:
        """The layer by itself, on other inputs."""
        return self._kinds[path].__call__(self._layers[path], inputs)

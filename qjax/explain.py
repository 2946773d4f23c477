"""`qjax.explain`: which kernel runs each product of a model, why, and why not each of the others.

Enters a model, a params tree or one QTensor; leaves dispatch's own table, by the very `choose` that a product asks.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qjax import devices
from qjax.devices import Device
from qjax.dispatch.explain import Explanation, Row, explain_rows
from qjax.dispatch.problem import Problem
from qjax.errors import QTensorError
from qjax.formats import FORMATS
from qjax.kernel_call import problem_of
from qjax.qtensor import QTensor, is_qtensor

DENSE = ("jax", "not quantized")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A kernel in a model.

    Attributes:
      path: of its module, or of the leaf in a tree.
      name: of the module's attribute, or the last part of the path.
      kernel: a QTensor, or an array (or its shape) of `[..., K, N]`.
      backend, dtype: what its module says.
    """

    path: str
    name: str
    kernel: Any
    backend: str | None = None
    dtype: DTypeLike | None = None


def explain(
    obj: Any,
    m: int = 1,
    *,
    device: str | Device | None = None,
    backend: str | None = None,
    x_dtype: DTypeLike | None = None,
) -> Explanation:
    """What runs each product with the weights in `obj`. Prints itself, also in a notebook.

    Args:
      obj: an nnx module, a params tree or a QTensor; arrays may be ShapeDtypeStructs. Kernels that are not quantized
        are listed as dense, other arrays are not listed.
      m: rows of x: 1 for a token at a time, batch times length for a prompt.
      device: a row of the capability table or its name, at hand or not; by default the one that products run on.
      backend: what to force on every layer, as `qjax.use(backend=...)`; by default what its module, or `use`, says.
      x_dtype: of x; by default what the module computes in, else what the QTensor dequantizes to.

    Returns:
      One row for each kernel, by path.

    Raises:
      BackendError: a backend that does not exist or cannot run a layer, naming it.
      QJaxError: an unknown device.
      QTensorError: `obj` holds no kernel.
    """
    row = devices.find_device(device) if isinstance(device, str) else device or devices.current()
    rows: list[Row] = []
    notes: dict[str, None] = dict.fromkeys(getattr(obj, "notes", ()))
    for layer in layers(obj):
        if not is_qtensor(layer.kernel):
            rows.append(_dense_row(layer, m))
            continue
        named = [(layer.path, _problem(layer, m, x_dtype))]
        found = explain_rows(named, row, backend or layer.backend)
        rows += found.rows
        notes |= dict.fromkeys(found.notes)
    if not rows:
        raise QTensorError(
            f"{type(obj).__name__} holds no QTensor and no kernel: there is no product to explain (of a linen model, "
            "give the params)"
        )
    return Explanation(tuple(rows), row, tuple(notes))


def _problem(layer: Layer, m: int, x_dtype: DTypeLike | None) -> Problem:
    """The product as `kernel_call` will put it: x quantized, permuted and scaled by then."""
    w: QTensor = layer.kernel
    bare = dataclasses.replace(w, input_scale=None, input_perm=None, act_scale=None)
    outside = jnp.dtype(x_dtype or layer.dtype or w.dtype)
    inside = FORMATS[w.scheme.activation.format].dtype if w.scheme.activation else outside
    return problem_of(bare, m=m, x_dtype=inside, out_dtype=outside)


def _dense_row(layer: Layer, m: int) -> Row:
    # Of more than two axes nobody says which are contracted, and a convolution is no product.
    shape = tuple(layer.kernel.shape)
    product = f"{m} x {shape[0]} x {shape[1]}" if len(shape) == 2 else str(shape)
    return Row(layer.path, product, jnp.dtype(layer.kernel.dtype).name, *DENSE, ())


def layers(obj: Any) -> Iterator[Layer]:
    """The kernels in an nnx module (by path), a params tree or a QTensor, quantized or not."""
    from flax import nnx

    if isinstance(obj, nnx.Module):
        yield from _module_layers(obj)
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(obj, is_leaf=is_qtensor):
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        name = where.rpartition("/")[2]
        if is_qtensor(leaf) or (name == "kernel" and getattr(leaf, "ndim", 0) >= 2):
            yield Layer(where or "-", name, leaf)


def _module_layers(model: Any) -> Iterator[Layer]:
    """The kernels of an nnx module, each once: those that are tied belong to the first that has them."""
    from flax import nnx

    seen: set[int] = set()
    for path, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            if not isinstance(value, nnx.Variable) or id(value) in seen:
                continue
            kernel = value.get_value()
            if is_qtensor(kernel) or (name == "kernel" and getattr(kernel, "ndim", 0) >= 2):
                seen.add(id(value))
                where = ".".join(map(str, path)) or type(module).__name__
                yield Layer(where, name, kernel, getattr(module, "backend", None), getattr(module, "dtype", None))

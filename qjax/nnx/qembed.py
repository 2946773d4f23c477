"""QEmbed: `flax.nnx.Embed` over a quantized table. A lookup gathers rows of packed arrays and decodes only those."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as default_promote_dtype
from flax.nnx.nn.linear import default_embed_init

from qjax.errors import QTensorError
from qjax.lookup import look_up
from qjax.matmul import matmul
from qjax.nnx.delayed import DelayedScale, delayed_scale, scaled
from qjax.nnx.layer import NO_RNGS, draw_kernel, place, promote, stand_in
from qjax.nnx.qparam import KernelAxes, QParam, quantize_param
from qjax.qtensor import QTensor
from qjax.schemes import Scheme

EMBED_AXES = KernelAxes(contracted=(-1,), rank=2)


class QEmbed(nnx.Module):
    """A quantized table of embeddings; argument for argument `nnx.Embed`.

    Attributes:
      embedding: QParam of a QTensor `[num_embeddings, features]`, stored by rows: groups run along `features`.
      delayed: the scale of a query where the scheme delays it, or None.
    """

    embedding: QParam
    delayed: DelayedScale | None

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        scheme: Scheme | str,
        backend: str | None = None,
        partial_groups: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        embedding_init: Callable[..., Any] = default_embed_init,
        promote_dtype: Any = default_promote_dtype,
        rngs: nnx.Rngs,
        embedding_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Draws the float table as `nnx.Embed` does, and quantizes it.

        Args:
          scheme, backend, partial_groups: as `QLinear`; `backend` is for `attend`.
          embedding_init: may also return a QTensor of that scheme, which is taken as it is.
          num_embeddings, features, and the rest: as `nnx.Embed`.

        Raises:
          QuantizeError: as `qjax.quantize_array`.
        """
        shape = (num_embeddings, features)
        self.embedding = draw_kernel(
            embedding_init,
            rngs,
            shape,
            param_dtype,
            embedding_metadata,
            EMBED_AXES,
            scheme,
            partial_groups=partial_groups,
        )
        self.delayed = delayed_scale(self.embedding)
        self.num_embeddings = num_embeddings
        self.features = features
        self.dtype = dtype or self.embedding.get_value().dtype
        self.param_dtype = param_dtype
        self.promote_dtype = promote_dtype
        self.backend = backend

    @classmethod
    def from_qtensor(
        cls, qtensor: QTensor, *, dtype: Any = None, backend: str | None = None, **options: Any
    ) -> "QEmbed":
        """A layer around a QTensor that is already there.

        Args:
          qtensor: stored by rows of `features`: as a table `[num_embeddings, features]`, or as the head's kernel
            `[features, num_embeddings]`, which is the same storage.
          dtype, backend, **options: as `QLinear.from_qtensor`.
        """
        table = dataclasses.replace(qtensor, axes=(1, 0))
        options |= dict(scheme=table.scheme, param_dtype=table.dtype, embedding_init=lambda *_: table)
        size = (table.out_features, table.in_features)
        return cls(*size, dtype=dtype, backend=backend, **options, rngs=NO_RNGS)

    @classmethod
    def from_embed(
        cls, layer: nnx.Embed, scheme: Scheme | str, *, backend: str | None = None, **options: Any
    ) -> "QEmbed":
        """The quantized stand-in of an Embed, as `QLinear.from_linear`."""
        table = quantize_param(layer.embedding, EMBED_AXES, scheme, **options)
        return stand_in(cls, layer, table, name="embedding", backend=backend)

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        """Integers `[...]` -> `[..., features]`; an index outside the table gives NaN, as `jnp.take` does.

        Raises:
          QTensorError: for inputs that are no integers.
        """
        inputs = jnp.asarray(inputs)
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise QTensorError(f"an embedding is looked up by integers; got {inputs.dtype} of shape {inputs.shape}")
        table = self.embedding.get_value()
        if self.num_embeddings == 1:
            inputs = jnp.zeros_like(inputs)
        gather = look_up if out_sharding is None else jax.sharding.auto_axes(look_up, out_sharding=out_sharding)
        (values,) = self.promote_dtype((gather(table, inputs),), dtype=self.dtype, inexact=False)
        return values

    def attend(self, query: Any, out_sharding: Any = None) -> jax.Array:
        """The product with every embedding: `[..., features]` -> `[..., num_embeddings]`."""
        table = self.embedding.get_value()
        (x,) = promote(self.promote_dtype, query, table, dtype=self.dtype)
        return place(matmul(x, scaled(self.delayed, x, table), backend=self.backend), out_sharding)

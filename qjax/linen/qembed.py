"""QEmbed: `nn.Embed` over a quantized table."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from flax.linen.linear import default_embed_init

from qjax.flax_kernel import KernelUse
from qjax.linen.param import quantized_param
from qjax.linen.products import attend, embed
from qjax.schemes import W4A16, Scheme


class QEmbed(nn.Module):
    """An embedding whose table is a QTensor; argument for argument `nn.Embed`.

    The param `embedding` has the shape of Flax's, `(num_embeddings, features)`, and is stored by rows of features:
    groups run along features, a lookup decodes its own rows alone, and `attend` is an ordinary product.

    Attributes:
      scheme, backend: as `QDense`; `backend` is for `attend`.
      num_embeddings and the rest: as `nn.Embed`.
    """

    num_embeddings: int
    features: int
    dtype: Any = None
    param_dtype: Any = jnp.float32
    embedding_init: Callable[..., Any] = default_embed_init
    promote_dtype: Callable[..., Any] = promote_dtype
    scheme: Scheme | str = W4A16()
    backend: str | None = None

    def setup(self) -> None:
        shape = (self.num_embeddings, self.features)
        self.embedding = quantized_param(self, "embedding", self.embedding_init, shape, KernelUse((1,)))

    def __call__(self, inputs: Any) -> jax.Array:
        """Integers `[...]` -> `[..., features]`; NaN for an index outside the table.

        Raises:
          QuantizeError: inputs that are no integers.
        """
        return embed(self, jnp.asarray(inputs), self.embedding)

    def attend(self, query: Any) -> jax.Array:
        """The product with every embedding: `[..., features]` -> `[..., num_embeddings]`."""
        return attend(self, query, self.embedding, self.backend)

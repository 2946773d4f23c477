"""What follows a product: inside the library where it can do all of it, else in plain JAX, which XLA fuses."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xla_ffi.cublaslt.call import BIAS, DEFAULT, GELU_TANH, RELU
from xla_ffi.finish import finish

Activation = Callable[[jax.Array], jax.Array]


def _code_of(activation: Activation | None) -> int | None:
    """cuBLASLt's number for an activation that it has."""
    if activation is None:
        return DEFAULT
    if activation is jax.nn.relu:
        return RELU
    if isinstance(activation, functools.partial) and activation.func is jax.nn.gelu and not activation.args:
        return GELU_TANH if activation.keywords.get("approximate", True) else None
    return GELU_TANH if activation is jax.nn.gelu else None  # whose default is tanh


@dataclasses.dataclass(frozen=True, eq=False)
class Epilogue:
    """`residual + activation(y + bias)` of a product y `[M, N]`.

    Attributes:
      bias: `[N]`; activation: elementwise, in float32; residual: `[M, N]`; any may be None.
    """

    bias: jax.Array | None = None
    activation: Activation | None = None
    residual: jax.Array | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing follows."""
        return self.bias is None and self.activation is None and self.residual is None

    def code(self, out_dtype: Any) -> int | None:
        """The `cublasLtEpilogue_t` with which the library computes all of it, rounded once; None if it cannot.

        The library adds a residual before the activation, so it takes only one of them, and reads bias and residual
        in the result's dtype of 16 bits only.
        """
        code = _code_of(self.activation)
        if code is None or (self.residual is not None and code != DEFAULT):
            return None
        given = [a for a in (self.bias, self.residual) if a is not None]
        if given and (out_dtype not in (jnp.bfloat16, jnp.float16) or any(a.dtype != out_dtype for a in given)):
            return None
        if self.bias is None:
            return code
        return BIAS if code == DEFAULT else code + BIAS

    def finish(self, y: jax.Array, out_dtype: Any) -> jax.Array:
        """The same in plain JAX: float32, rounded once to `out_dtype`."""
        return finish(y, out_dtype, bias=self.bias, activation=self.activation, residual=self.residual)

"""The experts of a gpt-oss layer over quantized weights: every expert's output; which to use is the router's business.

    gate, up = even and odd columns of x @ gate_up + bias
    y = ((min(max(up, -limit), limit) + 1) * g * sigmoid(1.702 * g)) @ down + bias,   g = min(gate, limit)

Source: huggingface/transformers `models/gpt_oss/modeling_gpt_oss.py`.
"""

import dataclasses
import os

import jax
import jax.numpy as jnp

from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.weights import read_weights
from qjax.errors import CheckpointError
from qjax.matmul import matmul
from qjax.qtensor import QTensor

ALPHA = 1.702


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Experts:
    """E experts of a layer, from H features to H by way of I.

    Attributes:
      gate_up: `[E, H, 2 I]`, gates in even columns.
      gate_up_bias: `[E, 2 I]`.
      down: `[E, I, H]`.
      down_bias: `[E, H]`.
      limit: what gates and ups are clamped to.
    """

    gate_up: QTensor
    gate_up_bias: jax.Array
    down: QTensor
    down_bias: jax.Array
    limit: float = dataclasses.field(default=7.0, metadata={"static": True})

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[M, H]` -> `[M, E, H]`: each expert's output."""
        each = jnp.broadcast_to(x, (self.gate_up.stack_shape[0], *x.shape))
        both = matmul(each, self.gate_up) + self.gate_up_bias[:, None].astype(x.dtype)
        gate = jnp.minimum(both[..., ::2], self.limit)
        up = jnp.clip(both[..., 1::2], -self.limit, self.limit)
        inner = (up + 1) * gate * jax.nn.sigmoid(ALPHA * gate)
        y = matmul(inner, self.down) + self.down_bias[:, None].astype(x.dtype)
        return y.swapaxes(0, 1)


def load_experts(path: str | os.PathLike[str], layer: int = 0) -> Experts:
    """The experts of one layer of a gpt-oss folder (`quant_method: mxfp4`).

    Raises:
      CheckpointError: the folder is malformed, or has no such experts.
    """
    prefix = f"model.layers.{layer}.mlp.experts"
    files, weights = CheckpointFiles.open(path), read_weights(path)
    names = [f"{prefix}.{name}" for name in ("gate_up_proj", "down_proj")]
    if missing := [name for name in names if name not in weights]:
        raise CheckpointError(f"{files.path}: {missing[0]} is missing; the folder has {', '.join(weights) or 'none'}")
    biases = [jnp.array(files[f"{name}_bias"]) for name in names]
    limit = files.config.get("swiglu_limit", 7.0)
    if type(limit) not in (int, float) or not limit > 0:
        raise CheckpointError(f"{files.path}/config.json: swiglu_limit={limit!r}; expected a positive number")
    return Experts(weights[names[0]], biases[0], weights[names[1]], biases[1], float(limit))

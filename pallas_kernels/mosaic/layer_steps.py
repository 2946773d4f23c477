"""What lies between a layer's attention and the next layer's, in four launches on Hopper, for few rows.

    h   = residual + attended @ o
    act = silu(n(h) @ gate) * (n(h) @ up)           n(h) = h / sqrt(mean(h^2) + epsilon) * norm
    h'  = h + act @ down
    row = n'(h') @ qkv + bias                       of the next layer; absent behind the last

Four products of `matmul_few`, which leave nothing for a kernel between them: norms, the gate and the residual are in
how they end (`step_program`).

Operands
    attended [M, K], residual [M, N] bfloat16 or float16, M <= 16; weights as `matmul_few` has them; norms
    [N], of a type that scales may have.

Numerics: sums are float32 in a fixed order; h, h * norm, act and row are rounded once each.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.mosaic import matmul_few


@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight in the packed order, as `matmul_few` takes it.

    Attributes:
      weight, group: "int4", "e2m1", "nf4" or "fp4"; elements of K that share a scale.
      (others: arrays of `matmul_few`)
    """

    weight: str
    group: int
    packed: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None = None
    global_scale: jax.Array | None = None
    bias: jax.Array | None = None


def rest_of_layer(
    attended: jax.Array,
    residual: jax.Array,
    weights: Sequence[Stored],
    norms: Sequence[jax.Array],
    *,
    epsilon: float,
    sms: int = 132,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """The layer of the module's docstring.

    Args:
      weights: of o; gate and up, one below the other; down; and, but for the last layer, qkv.
      norms: before gate and up, and, but for the last layer, before qkv.
      epsilon: of the norms.
      sms: multiprocessors of the chip.
      interpret: run the same programs in NumPy, on any machine.
      (others: shapes and dtypes in the module's docstring)

    Returns:
      h' `[M, hidden]`, and row `[M, heads' features]` or None.
    """
    steps: list[matmul_few.Product] = []

    def step(x: Any, w: Stored, ends: str, **more: Any) -> list[matmul_few.Made]:
        stored = {field.name: getattr(w, field.name) for field in dataclasses.fields(w)}
        common: dict[str, Any] = dict(out=residual.dtype.name, sms=sms, place="behind" if steps else "first")
        steps.append(matmul_few.product(x, ends=ends, **stored, **common, **more))
        return [steps[-1].made(len(steps) - 1, name) for name in steps[-1].plan.results]

    o, gate_up, down, *qkv = weights
    hidden, weighted, squares = step(attended, o, "residual", residual=residual, norm=norms[0])
    (act,) = step(weighted, gate_up, "gate", squares_of_x=squares, epsilon=epsilon)
    if not qkv:
        step(act, down, "residual", residual=hidden)
        return matmul_few.run(steps, interpret)[-1]["out"], None
    hidden, weighted, squares = step(act, down, "residual", residual=hidden, norm=norms[1])
    step(weighted, qkv[0], "plain", squares_of_x=squares, epsilon=epsilon)
    *_, by_down, by_qkv = matmul_few.run(steps, interpret)
    return by_down["out"], by_qkv["out"]

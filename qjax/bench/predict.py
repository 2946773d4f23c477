"""What the roofline expects of a product, from the capability table alone: no GPU, and no array is made."""

from typing import NamedTuple

from qjax import devices
from qjax.bench.operands import product_of
from qjax.devices import Device
from qjax.dispatch import roofline
from qjax.schemes import Scheme


class Prediction(NamedTuple):
    """One product by the best kernel there could be.

    Attributes:
      scheme, m, n, k: the product.
      bytes: read and written.
      operations: a multiply and an add being two.
      us: microseconds.
      bound: what takes longest: "memory", "compute" or the "fixed" cost of a launch.
      bf16_us: of the dense product.
      speedup: over that.
    """

    scheme: str
    m: int
    n: int
    k: int
    bytes: int
    operations: int
    us: float
    bound: str
    bf16_us: float
    speedup: float


def predict(device: Device, scheme: Scheme, m: int, n: int, k: int) -> Prediction:
    """The estimate with `roofline.CEILING`: what plain copies and dense products were measured to reach."""
    problem = product_of(scheme, m, n, k, devices.compute_dtype(device))
    expected = roofline.estimate(problem, device, roofline.CEILING)
    dense = roofline.dense_estimate(problem, device)
    return Prediction(
        str(scheme), m, n, k, expected.bytes, expected.operations, expected.seconds * 1e6, expected.bound,
        dense.seconds * 1e6, dense.seconds / expected.seconds,
    )  # fmt: skip

"""What a decoder layer's products on Hopper are held to on a GPU: float64, the same bits again, rows of their own."""

from typing import Any

import jax
import numpy as np
from decoder_layer import ALLOWED, EPSILON, Layer, exact, off, operands

from qjax import devices
from qjax.dispatch.choose import load_if_present
from qjax.models.decode_layers import KERNEL

CASES = (
    Layer("w4a16", 1, 4096, 11008, 4096, 12288),
    Layer("w4a16", 4, 4096, 14336, 4096, 6144),
    Layer("w4a16:symmetric=false", 2, 5120, 13824, 5120, 15360),
    Layer("w4a16:group_size=32,symmetric=false", 3, 200, 328, 136, 96),
    Layer("w4a16:group_size=-1", 16, 256, 384, 256, 320, "float16"),
    Layer("mxfp4", 1, 4096, 11008, 4096, 12288),
    Layer("nvfp4", 9, 256, 384, 256, 512),
    Layer("nf4", 2, 320, 136, 64, 80),
    Layer("w8a16", 1, 4096, 11008, 4096, 12288),
    Layer("fp8", 2, 4096, 11008, 4096, 12288),
    Layer("w8a16", 9, 256, 384, 256, 512),
)


def claimed() -> bool:
    """Whether the device at hand has the kernels."""
    device = devices.current()
    return device.platform == "gpu" and device.cc == KERNEL.cc_min and load_if_present(KERNEL) is not None


def check_layer(layer: Layer, **options: Any) -> list[str]:
    """Runs a layer twice, and its first row alone: what is wrong with it. `options` go to the kernels."""
    o, module = operands(layer, seed=layer.rows), load_if_present(KERNEL)
    assert module is not None, "claimed"

    def run(rows: slice) -> list[np.ndarray]:
        @jax.jit
        def rest(attended: jax.Array, residual: jax.Array) -> Any:
            given = {"sms": devices.current().sms, "epsilon": EPSILON} | options
            return module.rest_of_layer(attended, residual, o.stored, o.norms, **given)

        return [np.asarray(a) for a in rest(o.attended[rows], o.residual[rows])]

    found, again, one = run(slice(None)), run(slice(None)), run(slice(1))
    allowed, wrong = ALLOWED.get(layer.scheme, 1.0), []
    for name, a, b, first, expected in zip(("h", "row"), found, again, one, exact(o), strict=True):
        error = off(a, expected)
        if not error <= allowed:
            wrong.append(f"{name} is {error:.3g} half ulps off, {allowed:.3g} are allowed")
        if (a.view(np.uint16) != b.view(np.uint16)).any():
            wrong.append(f"{name} has other bits in a second run")
        if not off(first, expected[:1]) <= 2 * allowed:
            wrong.append(f"{name} of the first row alone is {off(first, expected[:1]):.3g} half ulps off")
    return wrong

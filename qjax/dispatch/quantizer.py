"""Who quantizes x on its way into a product: a kernel of `routes.QUANTIZERS`, or XLA by `qjax.activations`' formula."""

import functools

from qjax import devices
from qjax.devices import Device
from qjax.dispatch import backends
from qjax.dispatch.backends import Selection
from qjax.dispatch.choose import load_if_present
from qjax.dispatch.routes import QUANTIZERS, Quantizer
from qjax.formats import FORMATS
from qjax.schemes import Activation

_BLOCK_K = 128  # `granularity="block"`


def choose_quantizer(
    activation: Activation, k: int, device: Device | None = None, backend: str | None = None
) -> Quantizer | None:
    """The kernel that quantizes rows of `k` elements; None where XLA does.

    Args:
      activation: how.
      device: where; `devices.current()` by default.
      backend: as `choose` takes it: who asks for "xla" has XLA here, too.
    """
    name = backend or backends.override.value or "auto"
    return _choose(activation, k, devices.current() if device is None else device, name)


@functools.lru_cache(maxsize=1024)
def _choose(activation: Activation, k: int, device: Device, name: str) -> Quantizer | None:
    # an unknown name is the product's to report
    if activation.mode == "static" or k == 0 or (backends.selection(name) or Selection(None)).backend == "xla":
        return None
    return next((row for row in QUANTIZERS if _can(row, activation, k, device)), None)


def _can(row: Quantizer, activation: Activation, k: int, device: Device) -> bool:
    fits = device.platform in row.platforms and device.cc >= row.cc_min and activation.granularity in row.granularities
    module = load_if_present(row) if fits else None
    if module is None:
        return False
    return module.unsupported(k, FORMATS[activation.format].dtype, unit_of(activation, k), device.cc) is None


def unit_of(activation: Activation, k: int) -> int:
    """Elements of K that share a scale."""
    return _BLOCK_K if activation.granularity == "block" else k

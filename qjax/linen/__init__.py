"""Quantized layers for `flax.linen`, and unmodified linen models on quantized params."""

from . import serialization as serialization
from .delayed import fix_scales as fix_scales
from .intercept import apply as apply
from .intercept import intercept as intercept
from .qdense import QDense as QDense
from .qdense import QDenseGeneral as QDenseGeneral
from .qeinsum import QEinsum as QEinsum
from .qembed import QEmbed as QEmbed

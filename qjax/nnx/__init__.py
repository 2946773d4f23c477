"""Quantized `flax.nnx` layers, argument for argument Flax's own, and `quantize`, which swaps them into a module."""

from .backends import set_backends as set_backends
from .convert import quantize as quantize
from .delayed import fix_scales as fix_scales
from .fake_quant import fake_quantize as fake_quantize
from .fake_quant import scales_of as scales_of
from .lora import add_lora as add_lora
from .lora import merge_lora as merge_lora
from .qeinsum import QEinsum as QEinsum
from .qembed import QEmbed as QEmbed
from .qlinear import QLinear as QLinear
from .qlinear_general import QLinearGeneral as QLinearGeneral
from .qlora_linear import QLoRALinear as QLoRALinear
from .qparam import QParam as QParam

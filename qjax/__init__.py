"""QJAX: quantized inference for JAX on NVIDIA GPUs, as drop-in Flax layers over packed weights and fused kernels."""

import importlib
from typing import TYPE_CHECKING, Any

from qjax import errors as errors
from qjax import sharding as sharding
from qjax._version import __version__ as __version__
from qjax.contract import dot_general as dot_general
from qjax.contract import einsum as einsum
from qjax.convert import quantize as quantize
from qjax.dispatch.choose import use as use
from qjax.explain import explain as explain
from qjax.fake_quant import fake_quant as fake_quant
from qjax.fake_quant import fake_quantize as fake_quantize
from qjax.learned_scale import scales_of as scales_of
from qjax.matmul import matmul as matmul
from qjax.qtensor import QTensor as QTensor
from qjax.qtensor import concat_rows as concat_rows
from qjax.quantize import quantize_array as quantize_array
from qjax.rules import Rule as Rule
from qjax.schemes import FP4 as FP4
from qjax.schemes import FP8 as FP8
from qjax.schemes import HIGGS as HIGGS
from qjax.schemes import MXFP4 as MXFP4
from qjax.schemes import MXFP8 as MXFP8
from qjax.schemes import NF4 as NF4
from qjax.schemes import NVFP4 as NVFP4
from qjax.schemes import SCHEMES as SCHEMES
from qjax.schemes import W2A16 as W2A16
from qjax.schemes import W3A16 as W3A16
from qjax.schemes import W4A16 as W4A16
from qjax.schemes import W5A16 as W5A16
from qjax.schemes import W6A16 as W6A16
from qjax.schemes import W8A8FP8 as W8A8FP8
from qjax.schemes import W8A16 as W8A16
from qjax.schemes import Scheme as Scheme
from qjax.schemes import W4A8Int8 as W4A8Int8
from qjax.schemes import W8A8Int8 as W8A8Int8
from qjax.schemes import parse_scheme as parse_scheme

if TYPE_CHECKING:
    from qjax import budget as budget
    from qjax import calibration as calibration
    from qjax import linen as linen
    from qjax import models as models
    from qjax import nnx as nnx
    from qjax import quality as quality
    from qjax.budget.search import search as search
    from qjax.calibration.calibrate import calibrate as calibrate
    from qjax.checkpoints.load import load as load
    from qjax.checkpoints.save import save as save
    from qjax.models.tokenizer import load_tokenizer as load_tokenizer
    from qjax.quality.compare import compare as compare

# What brings Flax, tokenizers or checkpoint readers with it is imported when first asked for.
_LAZY = {
    "budget": ("qjax.budget", None),
    "calibration": ("qjax.calibration", None),
    "calibrate": ("qjax.calibration.calibrate", "calibrate"),
    "search": ("qjax.budget.search", "search"),
    "compare": ("qjax.quality.compare", "compare"),
    "linen": ("qjax.linen", None),
    "nnx": ("qjax.nnx", None),
    "models": ("qjax.models", None),
    "quality": ("qjax.quality", None),
    "load": ("qjax.checkpoints.load", "load"),
    "save": ("qjax.checkpoints.save", "save"),
    "load_tokenizer": ("qjax.models.tokenizer", "load_tokenizer"),
}


def __getattr__(name: str) -> Any:
    """A public name of `_LAZY`."""
    if name not in _LAZY:
        raise AttributeError(f"module 'qjax' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    found = importlib.import_module(module)
    return found if attribute is None else getattr(found, attribute)


def __dir__() -> list[str]:
    """Public names, those imported later too."""
    return sorted({*globals(), *_LAZY})

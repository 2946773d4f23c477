"""QJAX: quantized inference for JAX on NVIDIA GPUs, as drop-in Flax layers over packed weights and fused kernels."""

from qjax import errors as errors
from qjax._version import __version__ as __version__
from qjax.dispatch.choose import use as use
from qjax.matmul import matmul as matmul
from qjax.qtensor import QTensor as QTensor
from qjax.qtensor import concat_rows as concat_rows
from qjax.quantize import quantize_array as quantize_array
from qjax.schemes import FP4 as FP4
from qjax.schemes import FP8 as FP8
from qjax.schemes import MXFP4 as MXFP4
from qjax.schemes import MXFP8 as MXFP8
from qjax.schemes import NF4 as NF4
from qjax.schemes import NVFP4 as NVFP4
from qjax.schemes import SCHEMES as SCHEMES
from qjax.schemes import W2A16 as W2A16
from qjax.schemes import W3A16 as W3A16
from qjax.schemes import W4A8Int8 as W4A8Int8
from qjax.schemes import W4A16 as W4A16
from qjax.schemes import W5A16 as W5A16
from qjax.schemes import W6A16 as W6A16
from qjax.schemes import W8A8FP8 as W8A8FP8
from qjax.schemes import W8A8Int8 as W8A8Int8
from qjax.schemes import W8A16 as W8A16
from qjax.schemes import Scheme as Scheme
from qjax.schemes import parse_scheme as parse_scheme

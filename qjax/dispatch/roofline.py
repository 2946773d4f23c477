"""How long a product takes: bytes over bandwidth, operations over rate, fixed costs.

    fused        fixed + beside * (elements of x and y)
                       + max((codes + scales + x + y) / bandwidth, operations / rate)
    dequantize   fixed + (codes + scales + dense) / bandwidth
                       + max((dense + x + y) / bandwidth, operations / rate)

with `dense` the weight in 16 or 32 bits, `beside` what bringing x into a kernel's order and y out of it takes.
Bandwidth and rate are the device's peaks times what a kernel was measured to reach of them.
"""

import dataclasses
from typing import Literal

import numpy as np

from qjax.devices import Device
from qjax.dispatch.problem import Problem

_PACKED_BLOCK = 128  # K is padded to it below 8 bits
_FLOAT32 = np.dtype("float32")


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """What a kernel reaches of a device's peaks.

    Attributes:
      bandwidth, rate: parts of the device's peaks.
      fixed: seconds to start.
      source: what was measured.
      dense: bytes of an element of the dense weight that is written first; 0 where codes go straight into the product.
      m_max: the most rows of x that this holds for; None for any number.
      beside: seconds for each element of x and y, before and after the product.
      weights: the formats that this holds for; empty for any.
      format: that operands are multiplied in; empty for x's own.
    """

    bandwidth: float
    rate: float
    fixed: float
    source: str
    dense: int = 0
    m_max: int | None = None
    beside: float = 0.0
    weights: tuple[str, ...] = ()
    format: str = ""


PEAK = Efficiency(1.0, 1.0, 0.0, "the device's own peaks")

# What the best plain kernels reach: no product does better, so that a kernel without a row of its
# own is judged by its bytes and operations alone.
CEILING = Efficiency(
    0.95, 0.79, 0.8e-6,
    "H200: 4.6 of 4.8 TB/s read, 781 of 989 TFLOP/s in bf16 8192^3, empty kernel in a CUDA graph",
)  # fmt: skip

# A kernel that compiles and has met no GPU yet: behind whatever was measured, for the asking.
UNMEASURED = Efficiency(0.1, 0.1, 1e-5, "not measured: placed behind what was")

# The fixed 4 us are two kernels: in a graph one that converts 4096 numbers takes 1.4 us, and 0.4 to 0.8 lie before it.
# By (route, platform, whether codes are packed); the first row whose m_max is large enough holds.
# XLA turns a product with one row into multiply-and-sum and fuses the dequantization into it.
_H200 = "H200, jax 0.11.2, 22016 x 4096: "
_TABLES = ("nf4", "fp4", "e2m1")
_LOOKED_UP = ("nf4", "fp4", "higgs4")
_IN = "float32"  # kernels on a CPU, whatever x is
_EPYC = "2 cores of an EPYC 9005, jax 0.11.2, 4096 x 4096: "
MEASURED: dict[tuple[str, str, bool], tuple[Efficiency, ...]] = {
    ("xla.reference", "gpu", True): (
        Efficiency(0.12, 0.75, 4e-6, _H200 + "79 us (int4 g128), 90 us (nf4)", m_max=1),
        Efficiency(
            0.33, 0.75, 4e-6,
            _H200 + "667 us (int4 g128), 309 us (nf4) at M=16; 7.8 and 7.5 ms at M=2048",
            4,
        ),
    ),
    ("xla.reference", "gpu", False): (
        Efficiency(0.5, 0.75, 4e-6, _H200 + "46 us (int8), 33 us (e4m3)", m_max=1),
        Efficiency(
            0.55, 0.75, 4e-6,
            _H200 + "303 us (int8), 300 us (e4m3) at M=16; 7.5 ms at M=2048",
            4,
        ),
    ),
    ("triton.matmul_packed", "gpu", True): (
        Efficiency(0.26, 0.42, 3.8e-6, _H200 + "25 us (int2 g64) at M=1", 0, 1, 0.0, ("int2",)),
        Efficiency(0.186, 0.42, 3.8e-6, _H200 + "34 us (int2 g64) at M=16", 0, 16, 0.0, ("int2",)),
        Efficiency(0.117, 0.42, 7e-6, _H200 + "55 us (int2 g64) at M=64", 0, 64, 0.0, ("int2",)),
        Efficiency(0.22, 0.42, 3.8e-6, _H200 + "36 us (int3 g128) at M=1", 0, 1, 0.0, ("int3",)),
        Efficiency(0.168, 0.42, 3.8e-6, _H200 + "47 us (int3 g128) at M=16", 0, 16, 0.0, ("int3",)),
        Efficiency(0.137, 0.42, 5.6e-6, _H200 + "59 us (int3 g128) at M=64", 0, 64, 0.0, ("int3",)),
        Efficiency(0.32, 0.42, 3.8e-6, _H200 + "35 us (nf4) at M=1", 0, 1, 0.0, ("nf4", "fp4")),
        Efficiency(0.4, 0.42, 3.8e-6, _H200 + "26 us (mxfp4), 34 (nvfp4) at M=1", 0, 1, 0.0, ("e2m1",)),
        Efficiency(0.3, 0.42, 3.8e-6, _H200 + "38 us (nf4), 35 (mxfp4), 48 (nvfp4) at M=16", 0, 16, 0.0, _TABLES),
        Efficiency(0.2, 0.42, 5.6e-6, _H200 + "55 us (nf4), 54 (mxfp4), 90 (nvfp4) at M=64", 0, 64, 0.0, _TABLES),
        Efficiency(0.55, 0.42, 3.8e-6, _H200 + "20 us (int4 g128) at M=1, 23 at 16", m_max=16),
        Efficiency(0.3, 0.07, 3.6e-6, _H200 + "6.1 ms (nf4) at M=2048", weights=("nf4", "fp4")),
        Efficiency(0.3, 0.3, 3.6e-6, _H200 + "839 us (mxfp4), 1563 (nvfp4) at M=2048", weights=("e2m1",)),
        Efficiency(0.32, 0.42, 3.2e-6, _H200 + "30 us (int4 g128) at M=32", m_max=32),
        Efficiency(0.31, 0.42, 5.6e-6, _H200 + "37 us (int4 g128) at M=64", m_max=64),
        Efficiency(0.3, 0.34, 3.6e-6, _H200 + "90 us (int4 g128) at M=128, 141 at 256", m_max=256),
        Efficiency(0.3, 0.42, 3.6e-6, _H200 + "870 us (int4 g128) at M=2048"),
    ),
    ("triton.matmul_tall", "gpu", True): (
        Efficiency(0.3, 0.2, 1.1e-5, _H200 + "470 us (nf4), 274 (mxfp4), 503 (nvfp4) at M=512", weights=_TABLES),
        Efficiency(0.3, 0.35, 1.1e-5, _H200 + "77 us (int4 g128) at M=128", m_max=128),
        Efficiency(0.3, 0.34, 3e-6, _H200 + "140 us (int4 g128) at M=256", m_max=256),
        Efficiency(0.3, 0.46, 3e-6, _H200 + "828 us (int4 g128) at M=2048"),
    ),
    ("mosaic.matmul_few", "gpu", True): (
        Efficiency(0.45, 1.0, 3.6e-6, _H200 + "26 us (nf4) at M=1", 0, 1, 0.0, ("nf4", "fp4")),
        Efficiency(0.4, 1.0, 7.5e-6, _H200 + "32 us (nf4) at M=16", 0, None, 0.0, ("nf4", "fp4")),
        Efficiency(0.72, 1.0, 3.6e-6, _H200 + "17 us (mxfp4), 19 (nvfp4) at M=1", 0, 1, 0.0, ("e2m1",)),
        Efficiency(0.5, 1.0, 7.5e-6, _H200 + "27 us (mxfp4), 28 (nvfp4) at M=16", 0, None, 0.0, ("e2m1",)),
        Efficiency(0.81, 1.0, 3.6e-6, _H200 + "16 us (int4 g128) at M=1", m_max=1),
        Efficiency(0.79, 1.0, 5.5e-6, _H200 + "18 us (int4 g128) at M=8", m_max=8),
        Efficiency(0.72, 1.0, 7.5e-6, _H200 + "21 us (int4 g128) at M=16"),
    ),
    ("mosaic.matmul_few", "gpu", False): (
        Efficiency(0.76, 1.0, 3.6e-6, _H200 + "29 us (int8) at M=1, 8 of 4096 x 4096", m_max=1),
        Efficiency(0.66, 1.0, 6.5e-6, _H200 + "35 us (int8) at M=16, 11 of 4096 x 4096"),
    ),
    ("mosaic.matmul_packed", "gpu", True): (
        Efficiency(0.41, 0.4, 7.6e-6, _H200 + "32 us (nf4) at M=1", 0, 32, 0.0, ("nf4", "fp4")),
        Efficiency(0.29, 0.43, 8e-6, _H200 + "42 us (nf4) at M=64", 0, 64, 0.0, ("nf4", "fp4")),
        Efficiency(0.21, 0.4, 8e-6, _H200 + "54 us (mxfp4), 83 (nvfp4) at M=64", 0, 64, 0.0, ("e2m1",)),
        Efficiency(0.21, 0.36, 8e-6, _H200 + "90 us (nf4), 75 (mxfp4) at M=128, 279, 219 at 512", weights=_TABLES),
        Efficiency(0.64, 0.4, 7.6e-6, _H200 + "23 us (int4 g128) at M=1, 31 at 16, 23 at 32", m_max=32),
        Efficiency(0.41, 0.43, 6e-6, _H200 + "30 us (int4 g128) at M=64, 24 at 8192 x 8192", m_max=64),
        Efficiency(0.41, 0.43, 5e-6, _H200 + "55 us (int4 g128) at M=128, 36 at 8192 x 8192", m_max=128),
        Efficiency(0.41, 0.53, 3e-6, _H200 + "90 us (int4 g128) at M=256, 19 at 4096 x 4096", m_max=256),
        Efficiency(0.41, 0.57, 3e-6, _H200 + "641 us (int4 g128) at M=2048"),
    ),
    ("mosaic.matmul_folded", "gpu", False): (
        Efficiency(0.58, 0.4, 8e-6, _H200 + "39 us (int8), 42 (fp8) at M=64, 13 of 4096 x 4096", m_max=64),
        Efficiency(0.58, 0.59, 1.2e-5, _H200 + "47 us (int8), 49 (fp8) at M=128, 92 and 96 at 256", m_max=256),
        Efficiency(0.58, 0.7, 1.6e-5, _H200 + "536 us (int8) at M=2048, 444 at 8192 x 8192"),
    ),
    ("mosaic.matmul_folded", "gpu", True): (
        Efficiency(0.34, 0.4, 1.65e-5, _H200 + "47 us (nf4) at M=64, 22 of 4096 x 4096", 0, 64, 0.0, _LOOKED_UP),
        Efficiency(0.39, 0.4, 1.5e-5, _H200 + "37 us (mxfp4), 40 (nvfp4) at M=64", 0, 64, 0.0, ("e2m1",)),
        Efficiency(0.34, 0.5, 1.6e-5, _H200 + "60 us (nf4) at M=128, 115 at 256", 0, 256, 0.0, _LOOKED_UP),
        Efficiency(0.34, 0.65, 1.6e-5, _H200 + "151 us (nf4) at M=512, 586 at 2048", weights=_LOOKED_UP),
        Efficiency(0.36, 0.57, 1.6e-5, _H200 + "99 us (mxfp4), 110 (nvfp4) at M=256", weights=("e2m1",)),
        Efficiency(0.36, 0.4, 6e-6, _H200 + "28 us (int4 g128) at M=64", m_max=64),
        Efficiency(0.36, 0.75, 1.3e-5, _H200 + "42 us (int4 g128) at M=128, 76 at 256, 25 of 4096 x 4096", m_max=256),
        Efficiency(0.36, 0.7, 1.3e-5, _H200 + "546 us (int4 g128) at M=2048, 394 at 8192 x 8192"),
    ),
    ("triton.matmul_8bit", "gpu", False): (
        Efficiency(0.7, 0.3, 3e-6, _H200 + "28 us (int8) at M=1, 30 at 16", m_max=16),
        Efficiency(0.31, 0.3, 3e-6, _H200 + "64 us (int8) at M=64, 1230 at 2048"),
    ),
    ("triton.matmul_w8a8", "gpu", False): (
        Efficiency(0.9, 0.5, 5.7e-6, _H200 + "25 us (int8) at M=1, 10 of 4096 x 4096", m_max=16),
        Efficiency(0.88, 0.5, 8e-6, _H200 + "29 us (int8) at M=64, 12 of 4096 x 4096", m_max=64),
        Efficiency(0.68, 0.42, 3e-6, _H200 + "57 us (int8) at M=256", m_max=256),
        Efficiency(0.7, 0.6, 5e-6, _H200 + "324 us (int8) at M=2048", weights=("int8",)),
        Efficiency(0.7, 0.38, 5e-6, _H200 + "539 us (e4m3, blocks) at M=2048, 337 (rows) at 8192 x 8192"),
    ),
    ("mosaic.matmul_w8a8", "gpu", False): (
        Efficiency(0.5, 0.5, 1e-5, "placed behind what was measured", m_max=512),
        Efficiency(0.6, 0.68, 6e-6, _H200 + "275 us (int8) at M=2048", weights=("int8",)),
        Efficiency(0.6, 0.48, 6e-6, _H200 + "284 us (e4m3) at M=2048 of 8192 x 8192, 80 of 4096 x 4096"),
    ),
    ("mosaic.matmul_w4a8", "gpu", True): (
        Efficiency(0.5, 0.49, 6e-6, _H200 + "364 us (int4 g128 by int8) at M=2048, 301 at 8192 x 8192"),
    ),
    ("triton.dequantize_dot", "gpu", True): (
        Efficiency(0.8, 0.62, 4e-6, _H200 + "114 us (int4 g128) at M=64, 662 at 2048", 2),
    ),
    ("triton.transposed", "gpu", True): (
        Efficiency(0.31, 0.42, 4e-6, _H200 + "34 us (int4 g128) at M=1, 36 at 16", m_max=16),
        Efficiency(0.24, 0.42, 4e-6, _H200 + "46 us (int4 g128) at M=64, 114 at 256"),
    ),
    ("triton.transposed_8bit", "gpu", False): (
        Efficiency(0.47, 0.4, 4e-6, _H200 + "42 us (int8) at M=1, 43 at 16", m_max=16),
        Efficiency(0.34, 0.27, 4e-6, _H200 + "59 us (int8) at M=64, 177 at 256"),
    ),
    ("xla.multiply_reduce", "gpu", True): (
        Efficiency(0.21, 1.0, 4.5e-6, _H200 + "31 us (int2 g64) at M=1", 0, 1, 0.0, ("int2",)),
        Efficiency(0.175, 1.0, 2.5e-6, _H200 + "46 us (int3 g128) at M=1", 0, 1, 0.0, ("int3",)),
        Efficiency(0.29, 1.0, 2.5e-6, _H200 + "35 us (nf4), 37 (mxfp4), 40 (nvfp4) at M=1", 0, 1, 0.0, _TABLES),
        Efficiency(0.36, 1.0, 2.5e-6, _H200 + "29 us (int4 g128) at M=1", m_max=1),
        Efficiency(0.28, 1.0, 2.5e-6, _H200 + "37 us (int4 g128) at M=2", m_max=2),
        Efficiency(0.14, 1.0, 5e-6, _H200 + "37 us (int4 g128) at M=2, which is done twice"),
    ),
    ("xla.multiply_reduce", "gpu", False): (
        Efficiency(0.65, 1.0, 3e-6, _H200 + "30 us (int8) at M=1", m_max=1),
        Efficiency(0.4, 1.0, 3e-6, _H200 + "73 us (int8) at M=4"),
    ),
    ("xla.dequantize_dot", "gpu", True): (
        Efficiency(0.5, 0.62, 4e-6, _H200 + "171 us (int4 g128) at M=64, 694 at 2048", 2),
    ),
    ("xla.dequantize_dot", "gpu", False): (
        Efficiency(0.6, 0.62, 4e-6, _H200 + "163 us (e4m3) at M=64, 752 at 2048", 2),
    ),
    ("xla.int8_dot", "gpu", False): (
        Efficiency(0.87, 0.5, 6e-6, _H200 + "28 us at M=1, 10 of 4096 x 4096", m_max=1),
        Efficiency(0.75, 0.5, 6.4e-6, _H200 + "31 us at M=16, 11 of 4096 x 4096", m_max=16),
        Efficiency(0.73, 0.5, 8.5e-6, _H200 + "33 us at M=64, 13 of 4096 x 4096", m_max=64),
        Efficiency(0.66, 0.52, 6e-6, _H200 + "374 us at M=2048"),
    ),
    ("cublaslt.matmul", "gpu", False): (
        Efficiency(0.57, 0.5, 4e-6, _H200 + "37 us (e4m3), 39 us (int8) at M=64", m_max=64),
        Efficiency(0.62, 0.54, 6e-6, _H200 + "347 to 374 us (int8) at M=2048", weights=("int8",)),
        Efficiency(0.62, 0.63, 6e-6, _H200 + "305 us (e4m3) at M=2048"),
    ),
    ("cublaslt.dense", "gpu", False): (
        Efficiency(0.8, 0.62, 4e-6, "as xla.dequantize_dot: 565 us of bf16 product at M=2048", 2),
    ),
    ("cpu.matmul", "cpu", True): (
        Efficiency(0.8, 1.0, 1e-5, _EPYC + "0.57 ms (int4 g128) at M=1, 2.7 ms at M=8", m_max=16, format=_IN),
        Efficiency(
            0.8, 1.75, 1e-5, _EPYC + "29 ms (int4 g128) at M=130, 222 at 1024; 768 x 256: 0.8, 6.1 ms",
            beside=3.2e-9, format=_IN,
        ),
    ),
    ("cpu.matmul", "cpu", False): (
        Efficiency(0.9, 1.0, 1e-5, _EPYC + "0.92 ms (int8) at M=1, 3.1 ms at M=8", m_max=16, format=_IN),
        Efficiency(
            0.9, 1.75, 1e-5, _EPYC + "29 ms (int8) at M=130, 226 at 1024; 768 x 256: 0.7, 5.4 ms",
            beside=3.2e-9, format=_IN,
        ),
    ),
    ("cpu.matmul_int8", "cpu", True): (
        Efficiency(0.85, 1.6, 1e-5, _EPYC + "0.5 ms (w4a8 g128) at M=1, 1.8 ms at M=8", m_max=16, format=_IN),
        Efficiency(
            0.85, 2.6, 1e-5, _EPYC + "20 ms (w4a8 g128) at M=130, 162 at 1024; 768 x 256: 0.8, 4.9 ms",
            beside=3.2e-9, format=_IN,
        ),
    ),
    ("cpu.matmul_int8", "cpu", False): (
        Efficiency(0.95, 1.7, 1e-5, _EPYC + "0.9 ms (w8a8) at M=1, 1.8 ms at M=8", m_max=16, format=_IN),
        Efficiency(
            0.95, 3.5, 1e-5, _EPYC + "17 ms (w8a8) at M=130, 115 at 1024; 768 x 256: 0.7, 4.6 ms",
            beside=3.2e-9, format=_IN,
        ),
    ),
    ("xla.reference", "cpu", True): (
        Efficiency(
            0.2, 1.6, 1e-5, _EPYC + "39 ms (int4 g128) at M=1, 72 at 130, 254 at 1024; 768 x 256: 0.5, 2.9 ms", 4
        ),
    ),
    ("xla.reference", "cpu", False): (
        Efficiency(0.2, 1.6, 1e-5, _EPYC + "75 ms (int8) at M=1, 20 ms at M=16", 4),
    ),
}  # fmt: skip

# Seconds on a GPU for codes of x as a float, before, and the scale of x, behind a kernel that knows nothing of them.
OUTSIDE = 3e-6  # H200: int8 by int8 over int8 alone, triton.matmul_8bit, 2.2 to 3.2 us at M=1 to 16; e4m3 3.3 to 3.9


Bound = Literal["memory", "compute", "fixed"]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of one product, what they were computed from, and which term is the largest.

    `bytes` counts every read and write of device memory, `operations` two for a multiply-add.
    """

    seconds: float
    bytes: int
    operations: int
    bound: Bound
    basis: Literal["estimated", "measured"] = "estimated"

    def __str__(self) -> str:
        return f"{format_seconds(self.seconds)} {self.basis}"


def format_seconds(seconds: float) -> str:
    """`9.7 us`, `1.25 ms`: three digits, in the unit that suits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def efficiency(route: str, problem: Problem, device: Device) -> Efficiency:
    """What the route was measured to reach on such a problem; `CEILING` where it was not."""
    rows = MEASURED.get((route, device.platform, problem.scheme.bits < 8), ())

    def fits(row: Efficiency) -> bool:
        known = not row.weights or problem.scheme.weight in row.weights
        return known and (row.m_max is None or problem.m <= row.m_max)

    return next(filter(fits, rows), CEILING)


def weight_bytes(problem: Problem) -> int:
    """Bytes of codes, scales and zero points, of one weight, as stored."""
    n, k, bits = problem.n, problem.k, problem.scheme.bits
    stored_k = -(-k // _PACKED_BLOCK) * _PACKED_BLOCK if bits < 8 else k
    block_n, block_k = problem.block
    blocks = -(-n // block_n) * -(-k // block_k)
    of_block = problem.scale_dtype.itemsize
    of_block += "zero_point" in problem.features
    of_block += _FLOAT32.itemsize * ("zero_point_real" in problem.features)
    return n * stored_k * bits // 8 + blocks * of_block


def activation_bytes(problem: Problem) -> int:
    """Bytes of x, y, bias and residual, of one weight."""
    k, n = (problem.n, problem.k) if problem.transposed else (problem.k, problem.n)
    read = problem.m * k * problem.x_dtype.itemsize
    written = (1 + problem.residual) * problem.m * n + problem.bias * n
    return read + written * problem.out_dtype.itemsize


def compute_format(problem: Problem, device: Device) -> str:
    """The operands' format: that of quantized x where the device takes it; else a float's."""
    if problem.x_format is None:
        return problem.x_dtype.name
    return problem.x_format if device.takes(problem.x_format) else problem.out_dtype.name


def estimate(problem: Problem, device: Device, efficiency: Efficiency = CEILING) -> Estimate:
    """Seconds for the problem on the device by the roofline in the module's docstring."""
    codes = problem.batch * weight_bytes(problem)
    around = problem.batch * activation_bytes(problem)
    dense = problem.batch * problem.n * problem.k * efficiency.dense
    before, during = (codes + dense, dense + around) if dense else (0, codes + around)
    format = efficiency.format
    if not format:
        format = _FLOAT32.name if efficiency.dense == _FLOAT32.itemsize else compute_format(problem, device)
    return _roofline(problem, device, before, during, format, efficiency)


def _roofline(
    problem: Problem,
    device: Device,
    before: int,
    during: int,
    format: str,
    efficiency: Efficiency,
) -> Estimate:
    """Moves `before` bytes, then multiplies in `format` while it moves `during`."""
    operations = 2 * problem.batch * problem.m * problem.n * problem.k
    bandwidth = device.bandwidth * efficiency.bandwidth
    compute = operations / (device.rate(format) * efficiency.rate)
    terms: dict[Bound, float] = {
        "memory": (before + during) / bandwidth,
        "compute": compute,
        "fixed": efficiency.fixed,
    }
    beside = efficiency.beside * problem.batch * problem.m * (problem.n + problem.k)
    seconds = efficiency.fixed + beside + before / bandwidth + max(during / bandwidth, compute)
    return Estimate(seconds, before + during, operations, max(terms, key=lambda b: terms[b]))


def dense_estimate(problem: Problem, device: Device) -> Estimate:
    """The same product with a bfloat16 weight, by the best that plain kernels reach."""
    moved = problem.batch * (2 * problem.n * problem.k + activation_bytes(problem))
    return _roofline(problem, device, 0, moved, "bfloat16", CEILING)


def speedup_over_bf16(of: Estimate, problem: Problem, device: Device) -> float:
    """How many times faster than the product with a bfloat16 weight."""
    return dense_estimate(problem, device).seconds / of.seconds

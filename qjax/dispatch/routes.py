"""Which kernel exists for which formats and devices, as a table: one row, one kernel.

A row states eligibility: all that can be read off formats, device and m. What needs arithmetic
(divisibility, shared memory) is the kernel's own `unsupported`. Among the eligible, time decides;
the order of rows breaks ties. Modules are named by strings: a row whose folder is gone is inert.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Route:
    """One kernel and where it may run. A field that is None restricts nothing.

    Attributes:
      name: `backend.kernel`, as `explain` prints it and tuning tables key it.
      backend: a row of `qjax.dispatch.backends.BACKENDS`.
      module: has `unsupported`, `configs` and `matmul`.
      formats: weight formats that it reads (`qjax.formats`).
      x_formats: formats to which it quantizes x; None in the set stands for x left as it is.
      features: members of `qjax.dispatch.problem.FEATURES` that it understands.
      platforms: as `jax.Device.platform`.
      cc_min, cc_max: compute capabilities, both included.
      m_min, m_max: rows of x, both included.
    """

    name: str
    backend: str
    module: str
    formats: frozenset[str] | None = None
    x_formats: frozenset[str | None] | None = None
    features: frozenset[str] | None = None
    platforms: frozenset[str] | None = None
    cc_min: int = 0
    cc_max: int | None = None
    m_min: int = 0
    m_max: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def is_reference(self) -> bool:
        """Whether it is the product that QJAX itself holds, which can always run and reads QTensors."""
        return self.module == "qjax.reference"


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """One kernel that makes codes and scales of x, and where it may run.

    Attributes:
      name, backend, module, platforms: as a route's; the module has `unsupported(k, dtype, unit, cc)` and
        `quantize_rows(x, dtype, unit)`.
      granularities: what a scale covers, of those of `qjax.schemes.Activation`.
      cc_min: compute capability.
    """

    name: str
    backend: str
    module: str
    granularities: frozenset[str]
    platforms: frozenset[str]
    cc_min: int


INTEGERS = frozenset({"int2", "int3", "int4", "int5", "int6"})
TABLES = frozenset({"nf4", "fp4", "higgs4"})
BYTES = frozenset({"int8", "e4m3", "e5m2"})
GPU = frozenset({"gpu"})
CPU = frozenset({"cpu"})
AS_IT_IS: frozenset[str | None] = frozenset({None})
SCALED = frozenset({"global_scale", "nested_scale"})
ZEROS = frozenset({"zero_point", "zero_point_real"})
PIECES = frozenset({"padded_pieces"})

# fmt: off
ROUTES: tuple[Route, ...] = (
    Route("xla.reference", "xla", "qjax.reference"),
    Route("triton.matmul_tall", "triton", "pallas_kernels.triton.matmul_tall", INTEGERS | TABLES | {"e2m1"},
          AS_IT_IS, SCALED | ZEROS | PIECES, GPU, 80, m_min=65),
    Route("triton.matmul_packed", "triton", "pallas_kernels.triton.matmul_packed", INTEGERS | TABLES | {"e2m1"},
          AS_IT_IS, SCALED | ZEROS | PIECES, GPU, 80, m_min=1),
    Route("mosaic.matmul_few", "mosaic", "pallas_kernels.mosaic.matmul_few",
          TABLES | {"int4", "e2m1", "int8", "e4m3"},
          AS_IT_IS, SCALED | PIECES | {"zero_point"}, GPU, 90, 90, m_min=1, m_max=16),
    Route("mosaic.matmul_packed", "mosaic", "pallas_kernels.mosaic.matmul_packed", TABLES | {"int4", "e2m1"},
          AS_IT_IS, SCALED | PIECES | {"zero_point"}, GPU, 90, 90, m_min=1),
    Route("mosaic.matmul_folded", "mosaic", "pallas_kernels.mosaic.matmul_folded",
          TABLES | {"int4", "e2m1", "int8", "e4m3"},
          AS_IT_IS, SCALED | PIECES | {"zero_point"}, GPU, 90, 90, m_min=33),
    Route("triton.matmul_8bit", "triton", "pallas_kernels.triton.matmul_8bit", BYTES,
          AS_IT_IS, frozenset({"zero_point", "nested_scale"}), GPU, 80, m_min=1),
    Route("triton.matmul_w8a8", "triton", "pallas_kernels.triton.matmul_w8a8", frozenset({"int8", "e4m3"}),
          frozenset({"int8", "e4m3"}), frozenset(), GPU, 80, m_min=1),
    Route("mosaic.matmul_w8a8", "mosaic", "pallas_kernels.mosaic.matmul_w8a8", frozenset({"int8", "e4m3"}),
          frozenset({"int8", "e4m3"}), frozenset(), GPU, 90, 90, m_min=65),
    Route("mosaic.matmul_w4a8", "mosaic", "pallas_kernels.mosaic.matmul_w4a8", frozenset({"int4"}),
          frozenset({"int8"}), frozenset(), GPU, 90, 90, m_min=65),
    Route("triton.transposed", "triton", "pallas_kernels.triton.transposed", INTEGERS | TABLES | {"e2m1"},
          AS_IT_IS, SCALED | ZEROS | PIECES, GPU, 80, m_min=1),
    Route("triton.transposed_8bit", "triton", "pallas_kernels.triton.transposed_8bit", BYTES,
          AS_IT_IS, SCALED | {"zero_point"}, GPU, 80, m_min=1),
    Route("triton.dequantize_dot", "triton", "pallas_kernels.triton.dequantize_dot", INTEGERS | TABLES | {"e2m1"},
          AS_IT_IS, SCALED | ZEROS | PIECES, GPU, 80, m_min=17),
    Route("xla.multiply_reduce", "xla", "pallas_kernels.xla.multiply_reduce", None,
          AS_IT_IS, SCALED | ZEROS | PIECES | {"codebook"}, GPU, m_min=1, m_max=4),
    Route("xla.dequantize_dot", "xla", "pallas_kernels.xla.dequantize_dot", None,
          AS_IT_IS, SCALED | ZEROS | PIECES | {"codebook"}, GPU, m_min=1),
    Route("xla.int8_dot", "xla", "pallas_kernels.xla.int8_dot", frozenset({"int8"}),
          frozenset({"int8"}), ZEROS | {"global_scale"}, GPU, 75, m_min=1),
    Route("cublaslt.matmul", "cublaslt", "xla_ffi.cublaslt.matmul", BYTES,
          frozenset({"int8", "e4m3"}), frozenset({"global_scale"}), GPU, 75, m_min=1),
    Route("cublaslt.dense", "cublaslt", "xla_ffi.cublaslt.dense", BYTES,
          AS_IT_IS, frozenset({"global_scale"}), GPU, 80, m_min=1),
    Route("cublaslt.microscaling", "cublaslt", "xla_ffi.cublaslt.microscaling", frozenset({"e4m3", "e5m2", "e2m1"}),
          frozenset({"e4m3", "e2m1"}), frozenset({"global_scale"}), GPU, 100, m_min=1),
    Route("cpu.matmul", "cpu", "xla_ffi.cpu.matmul", INTEGERS | TABLES | BYTES | {"e2m1"},
          AS_IT_IS, SCALED | ZEROS | PIECES | {"codebook"}, CPU, m_min=1),
    Route("cpu.matmul_int8", "cpu", "xla_ffi.cpu.matmul_int8", frozenset({"int4", "int8"}),
          frozenset({"int8"}), SCALED | ZEROS | PIECES, CPU, m_min=1),
)
# fmt: on

# What kernels are lowered to, as `jax.export` asks to be told.
CUSTOM_CALLS = (
    "mosaic_gpu_v2", "__gpu$xla.gpu.triton", "qjax_cublaslt_matmul", "qjax_cpu_matmul", "qjax_cpu_quantize_rows",
)  # fmt: skip

# What is not in this table is quantized by the formula of `qjax.activations`, as XLA compiles it.
QUANTIZERS = (
    Quantizer(
        "triton.quantize_rows", "triton", "pallas_kernels.triton.quantize_rows", frozenset({"token", "block"}), GPU, 80
    ),
    Quantizer("cpu.quantize_rows", "cpu", "xla_ffi.cpu.quantize_rows", frozenset({"token"}), CPU, 0),
)

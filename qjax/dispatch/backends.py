"""The names of backends: ours, those that Hugging Face configs use, mapped onto ours, and single kernels of ours.

triton                                  any kernel of a family
triton.matmul_packed                    that kernel
triton.matmul_packed:tile_m=16,warps=4  that kernel in that configuration, whatever a tuning table has
"""

import dataclasses
import functools
import re

import jax


@dataclasses.dataclass(frozen=True)
class Backend:
    """A family of kernels.

    Attributes:
      name: what `backend=` takes.
      folder: the package that holds its kernels.
      about: what it is, for listings.
    """

    name: str
    folder: str
    about: str


BACKENDS: dict[str, Backend] = {
    row.name: row
    for row in (
        Backend("xla", "pallas_kernels.xla", "plain JAX operations, on any device; the reference among them"),
        Backend("triton", "pallas_kernels.triton", "Pallas kernels lowered through Triton"),
        Backend("mosaic", "pallas_kernels.mosaic", "Pallas kernels for Hopper and Blackwell"),
        Backend("cublaslt", "xla_ffi.cublaslt", "NVIDIA's cuBLASLt through XLA's FFI"),
        Backend("cpu", "xla_ffi.cpu", "C++ kernels for CPUs through XLA's FFI"),
    )
}


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a name asks for, None being whichever is fastest, and what `explain` says of it.

    Attributes:
      backend: a row of `BACKENDS`.
      note: how the name was understood.
      route: one kernel of the backend, by its name.
      config: its configuration, in the form of `tuning.Config`; None where the tables decide.
    """

    backend: str | None
    note: str = ""
    route: str | None = None
    config: tuple[tuple[str, int], ...] | None = None


def _automatic(name: str, what: str) -> Selection:
    return Selection(None, f"backend {name!r} names {what}: QJAX picks among its own kernels")


# Values of `backend`, `version` and `kernel` in the quantization_config of GPTQ, AWQ, HQQ and
# compressed-tensors checkpoints, and of the Hugging Face config classes that write them.
HUGGING_FACE: dict[str, Selection] = {
    "auto": Selection(None),
    "auto_trainable": Selection(
        None, "backend 'auto_trainable': all of QJAX's kernels have gradients with respect to x"
    ),
    "torch": Selection("xla", "backend 'torch' means the framework's own operations: here, 'xla'"),
    "ipex": _automatic("ipex", "Intel's PyTorch extension"),
    "marlin": _automatic("marlin", "a CUDA kernel of the torch world"),
    "machete": _automatic("machete", "a CUDA kernel of vLLM for Hopper"),
    "exllama": _automatic("exllama", "ExLlama's CUDA kernels"),
    "exllama_v1": _automatic("exllama_v1", "ExLlama's CUDA kernels"),
    "exllamav2": _automatic("exllamav2", "ExLlamaV2's CUDA kernels"),
    "exllama_v2": _automatic("exllama_v2", "ExLlamaV2's CUDA kernels"),
    "gemm": _automatic("gemm", "AutoAWQ's packing for its matrix kernel"),
    "gemv": _automatic("gemv", "AutoAWQ's packing for its vector kernel"),
    "gemv_fast": _automatic("gemv_fast", "AutoAWQ's packing for its second vector kernel"),
    "llm-awq": _automatic("llm-awq", "the packing of AWQ's authors"),
    "bitblas": _automatic("bitblas", "BitBLAS's generated CUDA kernels"),
}

NAMES: dict[str, Selection] = {**{name: Selection(name) for name in BACKENDS}, **HUGGING_FACE}

_KERNEL = re.compile(r"(?P<backend>\w+)\.\w+(:(?P<config>\w+=\d+(,\w+=\d+)*))?")


@functools.lru_cache(maxsize=1024)
def selection(name: str) -> Selection | None:
    """What a name asks for; None if it is none of those in the module's docstring. Whether there is such a kernel, and
    what its configuration has to have, is for `choose` to know."""
    if name.lower() in NAMES:
        return NAMES[name.lower()]
    found = _KERNEL.fullmatch(name)
    if found is None or found["backend"] not in BACKENDS:
        return None
    pairs = (pair.split("=") for pair in (found["config"] or "").split(",") if pair)
    config = tuple(sorted((key, int(value)) for key, value in pairs)) if found["config"] else None
    return Selection(found["backend"], "", name.partition(":")[0], config)


# The name that `qjax.use(backend=...)` asked for. Part of jit's cache key.
override = jax.make_user_context(default_value=None)

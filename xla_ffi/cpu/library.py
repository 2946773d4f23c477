"""The shared library of handlers: found and registered with XLA at first use, or the reason why it is not there.

`scripts/build-ffi` makes it from `handlers.cc`. It links nothing but the C++ runtime, and holds the kernels for every
instruction set of its architecture; `instructions` says which of them this machine has.
"""

import ctypes
import functools
import pathlib
import threading

import jax

from xla_ffi.shared_library import needed, opened

LIBRARY = pathlib.Path(__file__).with_name("libqjax_cpu.so")
TARGET = "qjax_cpu_matmul"
QUANTIZE_ROWS = "qjax_cpu_quantize_rows"
_lock = threading.Lock()


@functools.cache
def _open() -> ctypes.CDLL | str:
    """The library, or why it does not load."""
    return opened(LIBRARY, QjaxCpuInstructions=ctypes.c_char_p, QjaxCpuInt8Instructions=ctypes.c_char_p)


def missing() -> str | None:
    """Why no product can run here, in words for a user; None if one can."""
    library = _open()
    return library if isinstance(library, str) else None


def loaded() -> ctypes.CDLL:
    """The library.

    Raises:
      RuntimeError: it is not built, or does not load.
    """
    return needed(_open())


def instructions() -> tuple[str, ...]:
    """The instruction sets of this machine that there are kernels for, the best first; none without the library."""
    library = _open()
    return () if isinstance(library, str) else tuple(library.QjaxCpuInstructions().decode().split())


def int8_instructions() -> tuple[str, ...]:
    """The same for x as int8."""
    library = _open()
    return () if isinstance(library, str) else tuple(library.QjaxCpuInt8Instructions().decode().split())


@functools.cache
def _register_once() -> None:
    for target, handler in ((TARGET, loaded().QjaxCpuMatmul), (QUANTIZE_ROWS, loaded().QjaxCpuQuantizeRows)):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")


def register() -> None:
    """Makes the custom calls known to XLA, once.

    Raises:
      RuntimeError: the library is not built, or does not load.
    """
    with _lock:
        _register_once()

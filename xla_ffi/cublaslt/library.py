"""The shared library of handlers: found and registered with XLA at first use, or the reason why it is not there.

`scripts/build-ffi` makes it from `handlers.cc`. It needs neither Python's nor CUDA's headers, links nothing of CUDA and
loads anywhere; cuBLASLt itself is looked for when `missing` asks, or a program first runs.
"""

import ctypes
import functools
import pathlib
import threading
from typing import Any

import jax

from xla_ffi.shared_library import needed, opened

LIBRARY = pathlib.Path(__file__).with_name("libqjax_cublaslt.so")
TARGET = "qjax_cublaslt_matmul"
_lock = threading.Lock()


@functools.cache
def _open() -> ctypes.CDLL | str:
    """The library, or why it does not load."""
    return opened(LIBRARY, QjaxCublasLtMissing=ctypes.c_char_p, QjaxCublasLtVersion=ctypes.c_int64)


@functools.cache
def missing() -> str | None:
    """Why no product can run here, in words for a user; None if one can. Looks for cuBLASLt, without calling CUDA."""
    library = _open()
    if isinstance(library, str):
        return library
    return library.QjaxCublasLtMissing().decode() or None


def version() -> int:
    """cuBLASLt's version, as 130100 for 13.1.0; 0 where there is none."""
    library = _open()
    return 0 if isinstance(library, str) else library.QjaxCublasLtVersion()


def _capsule(address: int) -> Any:
    """An unnamed PyCapsule, as JAX takes raw pointers."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(address, None, None)


def register_handlers(library: ctypes.CDLL, platform: str, **stages: Any) -> None:
    """Registers the handlers in `library` as `TARGET`.

    Args:
      library: exports the state's type and the stages' symbols.
      platform: as XLA names it.
      stages: other functions for `initialize` and `execute`; None for a stage that there is not.
    """
    library.QjaxCublasLtTypeId.restype = library.QjaxCublasLtTypeInfo.restype = ctypes.c_void_p
    # The type comes first: registering the handlers looks it up.
    state: Any = {
        "type_id": _capsule(library.QjaxCublasLtTypeId()),
        "type_info": _capsule(library.QjaxCublasLtTypeInfo()),
    }
    jax.ffi.register_ffi_type(f"{TARGET}_state", state, platform=platform)
    functions = {
        "instantiate": library.QjaxCublasLtInstantiate,
        "initialize": library.QjaxCublasLtInitialize,
        "execute": library.QjaxCublasLtExecute,
        **stages,
    }
    handlers = {stage: jax.ffi.pycapsule(f) for stage, f in functions.items() if f is not None}
    jax.ffi.register_ffi_target(TARGET, handlers, platform=platform)


@functools.cache
def _register_once() -> None:
    register_handlers(needed(_open()), "CUDA")


def register() -> None:
    """Makes the custom call known to XLA, once.

    Raises:
      RuntimeError: the library is not built, or does not load.
    """
    with _lock:
        _register_once()

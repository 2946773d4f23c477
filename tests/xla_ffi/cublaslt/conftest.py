"""cuBLASLt's handlers on a CPU: built with a stand-in for the library and registered for XLA's CPU backend."""

import ctypes
import pathlib
import shutil
import subprocess

import jax
import pytest

from xla_ffi.cublaslt import library

HERE = pathlib.Path(__file__).parent
SOURCES = pathlib.Path(library.__file__).parent


def _build(source: str, target: pathlib.Path, *flags: str) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here to build the handlers with")
    command = [compiler, "-O1", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", *flags]
    done = subprocess.run([*command, "-o", target, HERE / source, "-ldl"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def host_library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The stand-in for cuBLASLt, with the handlers that call it registered."""
    folder = tmp_path_factory.mktemp("cublaslt")
    fake, handlers = folder / "fake.so", folder / "handlers.so"
    _build("fake_cublaslt.cc", fake)
    include = ("-isystem", jax.ffi.include_dir(), f"-I{SOURCES}", f'-DFAKE_CUBLASLT="{fake}"')
    _build("host_handlers.cc", handlers, *include)
    library.missing()  # first, so that the handlers proper are in the process too and nothing of theirs may be taken
    jax.devices()  # XLA takes the state's type before the handlers only once its backend is there
    built = ctypes.CDLL(str(handlers))
    library.register_handlers(built, "cpu", execute=built.QjaxHostExecute, initialize=None)
    return ctypes.CDLL(str(fake))


@pytest.fixture
def fake_cublaslt(host_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The stand-in, which products call while a test has it."""
    monkeypatch.setattr(library, "register", lambda: None)
    return host_library

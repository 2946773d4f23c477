"""What the cuBLASLt binding says where it cannot run: in words, from plain values, on any machine."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from xla_ffi.cublaslt import dense, library, matmul, microscaling

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def newest_cublaslt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "missing", lambda: None)
    monkeypatch.setattr(library, "version", lambda: 130200)


def fp8(m: int = 16, k: int = 4096, n: int = 4096, **facts) -> str | None:
    known = dict(
        weight="e4m3", x_format="e4m3", group=k, block_n=1, out_dtype="bfloat16", transposed=False, cc=90,
        features=frozenset(),
    )  # fmt: skip
    return matmul.unsupported(m, k, n, **(known | facts))


def test_eight_bits_on_both_sides_with_scales_that_it_knows_are_fine():
    assert fp8() is None
    assert fp8(weight="e5m2") is None
    assert fp8(group=128, block_n=128) is None
    assert fp8(group=128) is None
    assert fp8(cc=89) is None
    assert fp8(weight="int8", x_format="int8", cc=80) is None


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (dict(transposed=True), "not by its transpose"),
        (dict(x_format=None), "not x as it is by e4m3"),
        (dict(x_format="int8"), "not int8 by e4m3"),
        (dict(weight="e5m2", x_format="e5m2"), "not e5m2 by e5m2"),
        (dict(features=frozenset({"zero_point"})), "zero points"),
        (dict(cc=80), "from compute capability 8.9 on"),
        (dict(k=4104), "K=4104"),
        (dict(n=4100), "N=4100"),
        (dict(group=64), "scales of 1 x 64"),
        (dict(group=128, block_n=128, cc=100), "9.0 only"),
        (dict(x_granularity="block", cc=89), "9.0 only"),
        (dict(weight="int8", x_format="int8", group=128), "one scale a row"),
        (dict(weight="int8", x_format="int8", x_granularity="block"), "one scale a row"),
    ],
)
def test_what_it_cannot_do_is_said(facts, reason):
    said = fp8(**facts)
    assert said is not None
    assert reason in said


def test_a_library_without_the_modes_is_named_by_its_version(monkeypatch):
    monkeypatch.setattr(library, "version", lambda: 120600)
    said = fp8()
    assert said is not None
    assert "120600" in said
    monkeypatch.setattr(library, "version", lambda: 130100)
    assert "corrupts" in str(fp8(cc=100))


def test_dense_and_microscaling_products_say_theirs():
    facts = dict(x_format=None, x_dtype="bfloat16", block_n=1, transposed=False)
    assert dense.unsupported(16, 512, 512, weight="int8", group=512, cc=80, **facts) is None
    assert "8 bits" in dense.unsupported(16, 512, 512, weight="int4", group=512, cc=90, **facts)
    assert "1 x 128" in dense.unsupported(16, 512, 512, weight="int8", group=128, cc=90, **facts)
    facts = dict(weight="e4m3", group=32, scale_dtype="float8_e8m0fnu", transposed=False)
    assert "10.0 on" in microscaling.unsupported(16, 512, 512, x_format="e4m3", cc=90, **facts)
    assert "for each 32" in microscaling.unsupported(16, 512, 512, x_format=None, cc=100, **facts)
    assert microscaling.unsupported(16, 512, 512, x_format="e4m3", x_group=32, cc=100, **facts) is None


def test_candidates_of_the_heuristic_are_what_there_is_to_tune():
    assert matmul.configs(16, 512, 512) == dense.configs(16, 512, 512) == [{"candidate": i} for i in range(4)]


PROGRAM = """
from xla_ffi.cublaslt import call, library
import jax.numpy as jnp
print(library.missing())
try:
    call.multiply(call.Call(jnp.dtype("float32")), call.Operands(jnp.ones((8, 8)), jnp.ones((8, 8))))
except RuntimeError as error:
    print(error)
"""


def test_a_clone_without_a_compiler_imports_and_says_what_is_not_built(tmp_path):
    shutil.copytree(ROOT / "xla_ffi", tmp_path / "xla_ffi", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    env = os.environ | {"PYTHONPATH": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    missing, raised = done.stdout.splitlines()
    assert missing == raised
    assert "libqjax_cublaslt.so is not built" in missing


def test_without_a_compiler_the_build_says_so_in_a_line_and_succeeds(tmp_path):
    (tmp_path / "scripts").mkdir()
    script = tmp_path / "scripts" / "build-ffi"
    script.write_text((ROOT / "scripts" / "build-ffi").read_text())
    (tmp_path / "xla_ffi" / "cublaslt").mkdir(parents=True)
    (tmp_path / "xla_ffi" / "cublaslt" / "handlers.cc").touch()
    env = os.environ | {"CXX": "no-such-compiler"}
    done = subprocess.run(["bash", script, sys.executable], env=env, capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert "no-such-compiler" in line
    assert "'cublaslt'" in line


@pytest.mark.skipif(not library.LIBRARY.exists(), reason="the handlers are not built: make setup")
def test_a_program_exports_for_cuda_with_its_custom_call_allowed():
    def f(x, w, xs, ws):
        return matmul.matmul(x, w, ws, x_scale=xs, group=128, block_n=128)

    shapes = ((5, 256), (64, 256), (5, 2), (1, 2))
    dtypes = (jnp.float8_e4m3fn, jnp.float8_e4m3fn, jnp.float32, jnp.float32)
    arguments = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, dtypes, strict=True)]
    allowed = [jax.export.DisabledSafetyCheck.custom_call(library.TARGET)]
    exported = jax.export.export(jax.jit(f), platforms=["cuda"], disabled_checks=allowed)(*arguments)
    assert exported.out_avals[0].shape == (5, 64)
    assert library.TARGET in exported.mlir_module()
    with pytest.raises(ValueError, match="custom_call"):
        jax.export.export(jax.jit(f), platforms=["cuda"])(*arguments)

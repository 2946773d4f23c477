"""The kernels under the compiler's sanitizers: every form, instruction set and number of rows, without XLA."""

import shutil
import subprocess
from pathlib import Path

import jax
import pytest

HERE = Path(__file__).parent
SOURCES = Path(__file__).parents[3] / "xla_ffi" / "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_products_of_all_forms_are_clean_and_instruction_sets_agree(sanitizer: str, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here to build the kernels with")
    flags = [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-std=c++17", "-pthread", "-w"]
    include = [f"-I{SOURCES}", "-isystem", jax.ffi.include_dir()]
    program = tmp_path / "sanitized_products"
    command = [compiler, "-O0", "-g1", *flags, *include, "-o", program, HERE / "sanitized_products.cc"]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip(f"g++ has no sanitizer for {sanitizer} here")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0 and "products" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]

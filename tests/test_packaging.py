"""What a user gets from `pip install qjax`: the wheel's contents, its imports and their cost."""

import email
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("qjax", "pallas_kernels", "xla_ffi")
BASH = shutil.which("bash") or "/bin/bash"


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Runs a command that must succeed, in `cwd`, this checkout off its path; returns stdout."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} exited {done.returncode}:\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def version() -> str:
    return runpy.run_path(str(ROOT / "qjax" / "_version.py"))["__version__"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network, from a copy: no earlier build's leavings get into it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    (source / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "build-ffi", source / "scripts")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index")
    run(*pip, "--wheel-dir", folder, source, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean_venv(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment whose only qjax is the wheel's, with the dependencies of the one we run in.

    A path that a .pth file adds is searched but its own .pth files are not read, so an editable
    install of this checkout stays out of sight.
    """
    venv = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    python = venv / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, wheel, cwd=venv.parent)
    (site_packages,) = venv.glob("lib/python*/site-packages")
    dependencies = {sysconfig.get_path("purelib"), str(Path(jax.__file__).parents[1])}
    (site_packages / "dependencies.pth").write_text("\n".join(sorted(dependencies)))
    return venv


def test_the_wheel_holds_every_module_of_the_three_packages_and_their_data(wheel: Path) -> None:
    shipped = set(zipfile.ZipFile(wheel).namelist())
    patterns = ("*.py", "py.typed", "*.cc", "*.h", "tuning/*.json", "higgs_grids.json")
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for pattern in patterns
        for path in (ROOT / package).rglob(pattern)
    }
    assert {f"{package}/py.typed" for package in PACKAGES} <= expected
    assert expected <= shipped, f"not shipped: {sorted(expected - shipped)}"
    strangers = {name for name in shipped - expected if ".dist-info/" not in name and not name.endswith(".so")}
    assert not strangers, f"shipped, but no part of the packages: {sorted(strangers)}"


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler here")
def test_the_wheel_is_for_one_platform_and_every_python(wheel: Path) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    with zipfile.ZipFile(wheel) as archive:
        libraries = {name for name in archive.namelist() if name.endswith(".so")}
    assert libraries == {
        f"{h.parent.relative_to(ROOT)}/libqjax_{h.parent.name}.so" for h in ROOT.glob("xla_ffi/*/handlers.cc")
    }


def test_the_wheel_states_its_version_python_licence_and_jax(wheel: Path, version: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
        assert any(n.endswith("/LICENSE") for n in archive.namelist())
    assert (metadata["Name"], metadata["Version"]) == ("qjax", version)
    assert metadata["Requires-Python"] == ">=3.12"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "jax<0.13,>=0.11.2" in metadata.get_all("Requires-Dist", [])
    assert {"cuda13", "dev"} <= set(metadata.get_all("Provides-Extra", []))


def test_the_installed_wheel_imports_and_multiplies_away_from_the_checkout(clean_venv: Path, version: str) -> None:
    program = """
import importlib.metadata
import jax.numpy as jnp, numpy as np
import pallas_kernels, qjax, xla_ffi
w = jnp.asarray(np.random.default_rng(0).normal(size=(256, 64)), jnp.float32)
kernel = qjax.quantize({"kernel": w}, qjax.W8A16())["kernel"]
x = jnp.ones((2, 256), jnp.float32)
error = jnp.abs(qjax.matmul(x, kernel) - x @ w).max() / jnp.abs(x @ w).max()
assert error < 0.02, error
assert importlib.metadata.version("qjax") == qjax.__version__
print(qjax.__version__, *(m.__file__ for m in (qjax, pallas_kernels, xla_ffi)), sep="\\n")
"""
    out = run(clean_venv / "bin" / "python", "-c", program, cwd=clean_venv, JAX_PLATFORMS="cpu")
    printed, *files = out.split()
    assert printed == version
    assert all(Path(file).is_relative_to(clean_venv) for file in files), files


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler here")
def test_the_installed_wheel_passes_what_cibuildwheel_asks_of_it(clean_venv: Path) -> None:
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]["test-command"]
    path = os.pathsep.join((str(clean_venv / "bin"), os.environ["PATH"]))
    assert len(commands) == len(list(ROOT.glob("xla_ffi/*/handlers.cc")))
    for command in commands:
        run("sh", "-c", command, cwd=clean_venv, PATH=path, JAX_PLATFORMS="cpu")


def test_the_installed_wheel_has_the_qjax_command(clean_venv: Path) -> None:
    out = run(clean_venv / "bin" / "qjax", "--help", cwd=clean_venv, JAX_PLATFORMS="cpu")
    for command in ("quantize", "generate", "perplexity", "explain", "devices"):
        assert command in out


def test_importing_qjax_takes_under_one_and_a_half_times_importing_flax(tmp_path: Path) -> None:
    program = "import sys, time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"

    def seconds(package: str) -> float:
        source = program.format(package)
        return float(run(sys.executable, "-c", source, cwd=tmp_path, PYTHONPATH=str(ROOT)))

    # A busy machine only ever adds time, so the minimum over rounds comes down to the truth.
    flax, qjax = seconds("flax"), seconds("qjax")
    for _ in range(6):
        flax, qjax = min(flax, seconds("flax")), min(qjax, seconds("qjax"))
        if qjax < 1.5 * flax:
            break
    assert qjax < 1.5 * flax, f"import qjax takes {qjax:.2f} s, import flax {flax:.2f} s"


def test_importing_qjax_loads_no_library_that_only_some_users_need(tmp_path: Path) -> None:
    listing = "import sys; import {}; print(*sys.modules)"

    def loaded(package: str) -> set[str]:
        source = listing.format(package)
        return set(run(sys.executable, "-c", source, cwd=tmp_path, PYTHONPATH=str(ROOT)).split())

    lazy = {"matplotlib", "safetensors", "tokenizers", "huggingface_hub", "treescope"}
    assert not lazy & (loaded("qjax") - loaded("flax"))


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{BASH}\n{script}\n")
    path.chmod(0o755)


def find_python(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs scripts/find-python with nothing but tmp_path/bin on the PATH."""
    env = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path / "home")} | env
    command = (BASH, str(ROOT / "scripts" / "find-python"))
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_find_python_passes_over_a_broken_shim_to_a_version_under_pyenv(tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "python3.12", "echo 'python3.12: command not found'; exit 127")
    executable(tmp_path / "bin" / "python3", "echo /old/python3; exit 1")
    pyenv = tmp_path / "pyenv"
    executable(pyenv / "versions" / "3.12.1" / "bin" / "python", f'exec "{sys.executable}" "$@"')
    done = find_python(tmp_path, PYENV_ROOT=str(pyenv))
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable), done.stderr


def test_find_python_asks_uv_where_path_and_pyenv_have_none(tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "uv", f'[ "$1 $2" = "python find" ] && echo "{sys.executable}"')
    done = find_python(tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, sys.executable), done.stderr


def test_find_python_says_in_one_line_what_to_install_where_there_is_none(tmp_path: Path) -> None:
    done = find_python(tmp_path)
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "Python >= 3.12" in line
    assert "Install" in line


def test_every_pinned_jax_lies_in_the_range_that_the_package_claims() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "jax>=0.11.2,<0.13" in project["dependencies"]
    assert "jaxlib>=0.11.2,<0.13" in project["dependencies"]
    assert "jax==0.11.2" in (ROOT / "requirements" / "jax-0.11.2.txt").read_text()
    assert "jax>=0.12,<0.13" in (ROOT / "requirements" / "jax-newest.txt").read_text()

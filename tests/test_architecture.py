"""The shape of the code as data: who may import whom, how long things may be, what may be lost."""

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ("pallas_kernels", "xla_ffi")
PACKAGES = ("qjax", *KERNELS)

FILE_LINES = 400
FUNCTION_LINES = 50
KERNEL_LINES = 120
RAISES_WITH_A_VALUE = 0.9


class Row(NamedTuple):
    """What a module may import of ours, each name with what lies below it, and of others'.

    `EVERYWHERE`, the standard library and, within qjax, `qjax.errors` need no mention.
    """

    ours: str = ""
    others: str = ""


EVERYWHERE = {
    "qjax": {"absl", "jax", "ml_dtypes", "numpy"},
    "pallas_kernels": {"jax", "numpy"},
    "xla_ffi": {"jax", "numpy"},
}

TENSOR = "qjax.formats qjax.scheme qjax.schemes qjax.layouts qjax.qtensor"
PRODUCT = f"{TENSOR} qjax.matmul qjax.contract qjax.quantize qjax.dequantize qjax.sharding"
PUBLIC = f"qjax {PRODUCT} qjax.linen qjax.nnx qjax.models qjax.checkpoints qjax.dispatch"
PALLAS = "pallas_kernels.finish pallas_kernels.grouped pallas_kernels.pairs pallas_kernels.result"
FFI = "xla_ffi.finish xla_ffi.manual_axes xla_ffi.shared_library"

# "folder.*" is the row of every module in that folder, which may import each other; the deepest
# that fits counts. A contents page (`__init__.py`) may import what lies below it. As an entry,
# "qjax" stands for its public names alone.
MAY_IMPORT = {
    "qjax": Row(),
    "qjax._version": Row(),
    "qjax.errors": Row(),
    # What a weight is. A QTensor's methods import what reads it and shows it when they are called.
    "qjax.formats": Row(),
    "qjax.spec": Row(),
    "qjax.scheme": Row("qjax.formats"),
    "qjax.schemes": Row("qjax.scheme qjax.spec"),
    "qjax.hadamard": Row(),
    "qjax.scheme_json": Row("qjax.formats qjax.schemes"),
    "qjax.layouts": Row("qjax.formats"),
    "qjax.host_layouts": Row("qjax.layouts"),
    "qjax.qtensor": Row(f"{TENSOR} qjax.dequantize qjax.display"),
    "qjax.dequantize": Row(f"{TENSOR} qjax.hadamard"),
    "qjax.quotient": Row(),
    "qjax.quantize": Row(f"{TENSOR} qjax.dequantize qjax.hadamard qjax.quotient"),
    "qjax.rules": Row("qjax.schemes"),
    "qjax.display": Row(f"{TENSOR} qjax.dequantize", "treescope"),
    # A product, from the door down to the kernel.
    "qjax.contract": Row(f"{TENSOR} qjax.matmul"),
    "qjax.matmul": Row(
        f"{TENSOR} qjax.activations qjax.epilogue qjax.hadamard qjax.outliers qjax.partition qjax.product "
        "qjax.quantize_call"
    ),
    "qjax.outliers": Row(f"{TENSOR} qjax.partition"),
    "qjax.delayed": Row(f"{TENSOR} qjax.partition"),
    "qjax.quantize_call": Row(f"{TENSOR} qjax.activations qjax.partition qjax.dispatch"),
    "qjax.lowered": Row("qjax.devices qjax.dispatch"),
    "qjax.product": Row(f"{TENSOR} qjax.activations qjax.epilogue qjax.partition qjax.kernel_call qjax.lowered"),
    "qjax.partition": Row(TENSOR),
    "qjax.sharding": Row(f"{TENSOR} qjax.partition qjax.contract"),
    "qjax.kernel_call": Row(
        f"{TENSOR} qjax.activations qjax.dequantize qjax.epilogue qjax.reference qjax.dispatch qjax.devices"
    ),
    "qjax.reference": Row(f"{TENSOR} qjax.activations qjax.dequantize"),
    "qjax.activations": Row("qjax.formats qjax.schemes qjax.quotient"),
    "qjax.epilogue": Row(),
    # Which kernel.
    "qjax.devices": Row(),
    "qjax.dispatch": Row(),
    "qjax.dispatch.backends": Row(),
    "qjax.dispatch.routes": Row(),
    "qjax.dispatch.problem": Row("qjax.schemes"),
    "qjax.dispatch.roofline": Row("qjax.dispatch.problem qjax.devices"),
    "qjax.dispatch.tuning": Row("qjax.dispatch.problem qjax.devices"),
    "qjax.dispatch.choose": Row("qjax.dispatch qjax.devices"),
    "qjax.dispatch.quantizer": Row("qjax.dispatch qjax.devices qjax.formats qjax.schemes"),
    "qjax.dispatch.explain": Row("qjax.dispatch qjax.devices"),
    # What a user touches.
    "qjax.progress": Row("", "rich"),
    "qjax.lookup": Row(f"{TENSOR} qjax.dequantize"),
    "qjax.flax_kernel": Row(f"{TENSOR} qjax.quantize qjax.partition qjax.sharding"),
    "qjax.learned_scale": Row(f"{TENSOR} qjax.dequantize qjax.flax_kernel qjax.quantize qjax.quotient", "flax"),
    "qjax.convert": Row(f"{TENSOR} qjax.flax_kernel qjax.learned_scale qjax.progress qjax.rules qjax.linen"),
    "qjax.fake_quant": Row("qjax.convert qjax.flax_kernel qjax.learned_scale qjax.schemes qjax.linen"),
    "qjax.explain": Row(f"{TENSOR} qjax.kernel_call qjax.dispatch qjax.devices", "flax"),
    "qjax.checkpoints.load": Row(f"{TENSOR} qjax.checkpoints qjax.models qjax.devices qjax.sharding"),
    "qjax.checkpoints.save": Row(f"{TENSOR} qjax.checkpoints qjax.models qjax.nnx", "flax"),
    "qjax.linen.*": Row(f"{PRODUCT} qjax.delayed qjax.rules qjax.flax_kernel qjax.lookup", "flax"),
    "qjax.nnx.*": Row(
        f"{PRODUCT} qjax.delayed qjax.fake_quant qjax.rules qjax.flax_kernel qjax.learned_scale qjax.lookup "
        "qjax.partition qjax.progress qjax.dispatch",
        "flax",
    ),
    "qjax.checkpoints.*": Row(
        f"{TENSOR} qjax.host_layouts qjax.scheme_json qjax.dequantize qjax.dispatch",
        "safetensors orbax huggingface_hub gguf",
    ),
    "qjax.models.kv_cache": Row("qjax.activations qjax.schemes"),
    "qjax.models.prefill": Row(f"{TENSOR} qjax.checkpoints.activations qjax.dispatch.choose qjax.kernel_call", "flax"),
    "qjax.models.memory": Row("qjax.devices", "flax"),
    "qjax.models.decode_attention": Row("qjax.dispatch qjax.devices qjax.partition qjax.models"),
    "qjax.models.decode_layers": Row("qjax.dispatch qjax.devices qjax.kernel_call qjax.models qjax.nnx"),
    "qjax.models.*": Row(f"{PRODUCT} qjax.nnx qjax.checkpoints qjax.progress qjax.sharding", "flax tokenizers"),
    "qjax.bench.models": Row(f"qjax {PRODUCT} qjax.nnx qjax.models qjax.sharding qjax.bench", "flax"),
    "qjax.bench.decode": Row(f"qjax {PRODUCT} qjax.models qjax.devices qjax.explain qjax.bench", "flax"),
    "qjax.bench.*": Row(
        f"qjax {PRODUCT} qjax.dispatch qjax.activations qjax.quantize_call qjax.kernel_call qjax.lookup qjax.devices "
        "qjax.progress",
        "matplotlib",
    ),
    "qjax.calibration.*": Row(
        f"{PRODUCT} qjax.quotient qjax.checkpoints qjax.convert qjax.flax_kernel qjax.linen qjax.nnx qjax.progress "
        "qjax.rules qjax.spec",
        "flax",
    ),
    "qjax.budget.*": Row(
        f"{TENSOR} qjax.calibration qjax.flax_kernel qjax.progress qjax.quantize qjax.rules", "matplotlib scipy"
    ),
    "qjax.quality.*": Row(f"{PRODUCT} qjax.explain qjax.models qjax.progress", "flax matplotlib"),
    "qjax.__main__": Row("qjax.cli"),
    "qjax.cli.*": Row(
        f"{PUBLIC} qjax.calibration qjax.budget qjax.quality qjax.bench qjax.explain qjax.rules qjax.devices",
        "rich matplotlib tokenizers",
    ),
    # Kernels know nobody.
    "pallas_kernels": Row(),
    "pallas_kernels.finish": Row(),
    "pallas_kernels.dense_dot": Row(),
    "pallas_kernels.grouped": Row(),
    "pallas_kernels.pairs": Row(),
    "pallas_kernels.result": Row(),
    "pallas_kernels.xla.*": Row("pallas_kernels.finish pallas_kernels.pairs pallas_kernels.dense_dot"),
    "pallas_kernels.triton.*": Row(f"{PALLAS} pallas_kernels.dense_dot"),
    "pallas_kernels.mosaic.*": Row(PALLAS),
    "xla_ffi": Row(),
    "xla_ffi.finish": Row(),
    "xla_ffi.manual_axes": Row(),
    "xla_ffi.shared_library": Row(),
    "xla_ffi.cublaslt.*": Row(FFI),
    "xla_ffi.cpu.*": Row(FFI),
}

# Who may look a module up by its name: the kernels are found so, and may be absent.
LOOK_UP_MODULES = {"qjax", "qjax.dispatch.choose"}

# Names that say nothing about what a room is for, or that hide a module of the standard library.
EMPTY_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "manager", "base"}


class Source(NamedTuple):
    """One parsed file of the three packages."""

    module: str
    path: Path
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    @property
    def is_contents_page(self) -> bool:
        return self.path.name == "__init__.py"


@cache
def sources() -> tuple[Source, ...]:
    """Every Python file of the three packages."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Source(module, path, ast.parse(path.read_text(), str(path))))
    return tuple(found)


each_source = pytest.mark.parametrize("source", sources(), ids=lambda s: s.module)


def key_for(module: str) -> str | None:
    """The key of MAY_IMPORT that speaks of `module`: its own, else the nearest folder's above."""
    parts = module.split(".")
    folders = (".".join(parts[:i]) + ".*" for i in range(len(parts), 0, -1))
    return next((key for key in (module, *folders) if key in MAY_IMPORT), None)


def imported(source: Source) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, at its top or inside a function, with the line."""
    modules = {s.module for s in sources()}
    # Level 1 of a relative import is the file's folder: for a contents page, the module itself.
    here = f"{source.module}.__init__" if source.is_contents_page else source.module
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folder = here.split(".")[: -node.level] if node.level else []
            base = ".".join([*folder, *filter(None, [node.module])])
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                yield (deeper if deeper in modules else base), node.lineno


def may_import(source: Source, key: str, target: str) -> bool:
    """Whether the row under `key` lets `source` import the module `target`."""
    top = target.partition(".")[0]
    if top not in PACKAGES:
        others = EVERYWHERE[source.package] | set(MAY_IMPORT[key].others.split())
        return top in sys.stdlib_module_names or top in others
    ours = set(MAY_IMPORT[key].ours.split())
    if "qjax" in ours and target == "qjax":
        return True
    home = {key.removesuffix(".*")} if key.endswith(".*") or source.is_contents_page else set()
    errors = {"qjax.errors"} if source.package == "qjax" else set()
    return any(f"{target}.".startswith(f"{name}.") for name in (ours - {"qjax"}) | home | errors)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method, nested ones too."""
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def lines_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines from `def` to the end of the body."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return lines


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Functions, classes and their methods whose names do not begin with `_`.

    Left out: `setup`, which Flax documents, and overloads and setters, which stand for another.
    """
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    tops = [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
    for top in tops:
        yield top.name, top
        for node in top.body if isinstance(top, ast.ClassDef) else ():
            if not isinstance(node, kinds) or node.name.startswith("_") or node.name == "setup":
                continue
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            if not any(d.endswith(("overload", ".setter")) for d in decorators):
                yield f"{top.name}.{node.name}", node


@each_source
def test_a_module_imports_only_what_its_row_allows(source: Source) -> None:
    key = key_for(source.module)
    assert key is not None, f"{source.module} is new: add a row for it to MAY_IMPORT"
    strangers = [f"{t} (line {n})" for t, n in imported(source) if not may_import(source, key, t)]
    assert not strangers, f"{source.module} may not import {', '.join(strangers)}"


@each_source
def test_imports_are_plain(source: Source) -> None:
    for node in ast.walk(source.tree):
        where = f"{source.module}, line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom):
            assert node.names[0].name != "*", f"{where}: import names, not *"
            if not source.is_contents_page:
                assert node.level == 0, f"{where}: only an __init__ imports relatively"
        if isinstance(node, ast.Try):
            guarded = [n for n in node.body if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not guarded, f"{where}: a guarded import hides what is missing"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: a bare except swallows everything"


@each_source
def test_only_the_folder_that_jax_will_drop_names_pallas_triton(source: Source) -> None:
    if source.module.startswith("pallas_kernels.triton"):
        return
    named = [n for t, n in imported(source) if t.startswith("jax.experimental.pallas.triton")]
    assert not named, f"{source.module} imports pallas.triton in line {named}"


@each_source
def test_only_who_calls_kernels_looks_modules_up_by_name(source: Source) -> None:
    names = {getattr(n, "attr", getattr(n, "id", None)) for n in ast.walk(source.tree)}
    if names & {"import_module", "find_spec", "__import__"}:
        assert source.module in LOOK_UP_MODULES, f"{source.module} imports a module by its name"


@each_source
def test_a_file_is_named_by_its_concept(source: Source) -> None:
    name = source.module.rpartition(".")[2]
    assert name not in EMPTY_NAMES, f"{source.module}: the name does not say what the file is for"
    assert name not in sys.stdlib_module_names, f"{source.module} is also a standard module's name"


@each_source
def test_files_and_functions_keep_to_their_budgets(source: Source) -> None:
    lines = len(source.path.read_text().splitlines())
    assert lines <= FILE_LINES, f"{source.module} has {lines} lines; at most {FILE_LINES}"
    budget = FUNCTION_LINES if source.package == "qjax" else KERNEL_LINES
    measured = {f"{f.name}:{f.lineno}": lines_without_docstring(f) for f in functions(source.tree)}
    long = {name: lines for name, lines in measured.items() if lines > budget}
    assert not long, f"{source.module}: over {budget} lines without the docstring: {long}"


@each_source
def test_every_module_and_every_public_name_is_documented(source: Source) -> None:
    assert ast.get_docstring(source.tree), f"{source.module} does not say what it is for"
    bare = [name for name, node in public_definitions(source.tree) if not ast.get_docstring(node)]
    assert not bare, f"{source.module}: no docstring on {', '.join(bare)}"


def test_nine_raises_in_ten_carry_a_value() -> None:
    with_value, without = 0, []
    for source in sources():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                if all(isinstance(a, ast.Constant) for a in node.exc.args):
                    without.append(f"{source.module}:{node.lineno}")
                else:
                    with_value += 1
    assert with_value >= RAISES_WITH_A_VALUE * (with_value + len(without)), without


def backend_folders() -> list[str]:
    """Both kernel packages and each folder in them: anything that may be lost."""
    inner = [p.parent for k in KERNELS for p in sorted((ROOT / k).glob("*/__init__.py"))]
    return [*KERNELS, *(p.relative_to(ROOT).as_posix() for p in inner)]


@pytest.mark.parametrize("lost", backend_folders())
def test_a_product_runs_without(lost: str, tmp_path: Path) -> None:
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignore)
    shutil.rmtree(tmp_path / lost)
    program = """
import jax.numpy as jnp, numpy as np, qjax
w = jnp.asarray(np.random.default_rng(0).normal(size=(256, 64)), jnp.float32)
kernel = qjax.quantize_array(w, qjax.W4A16(group_size=128))
x = jnp.ones((2, 256), jnp.float32)
np.testing.assert_allclose(qjax.matmul(x, kernel), x @ kernel.dequantize(), rtol=1e-4, atol=1e-4)
print(qjax.__file__)
"""
    # -S leaves .pth files unread: an editable install would still find what is lost.
    path = os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib")])
    env = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-S", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)

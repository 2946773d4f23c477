"""Compiles products for a described GPU on a machine without one, and says what came out. Nothing is executed.

XLA's CUDA plugin compiles for a GPU that is described to it; the description here is a row of `qjax.devices`. From the
compiled program come its steps (each a kernel launch or a library call, inside a CUDA graph or not) and, from ptxas,
each kernel's registers, spills, stack and shared memory.

    python tests/aot/compile.py --device h200 --route triton.matmul_packed w4a16 16x4096x4096
    python tests/aot/compile.py --device l4,b200 --route triton.matmul_8bit fp8 1x4304x333 --transposed --sass

Without `--route` it is the kernel that dispatch chooses. `--serve` answers requests in JSON, a line each, on stdin:
what `tests/aot/compiler.py` does for pytest. The plugin has to be importable (`make cuda-compiler`).

What it cannot say: anything about time, about results, or about library products, which are not tuned here.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    os.environ["JAX_PLATFORMS"] = "cpu"  # the plugin compiles, but must not look for a GPU
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    os.environ["LLVM_DISABLE_SYMBOLIZATION"] = "1"  # else each warning costs a second of llvm-symbolizer

import jax
from jax.experimental import topologies
from products import Product, operand_shapes, program

import qjax
from qjax.devices import Device, find_device
from qjax.dispatch.choose import choose
from qjax.dispatch.routes import ROUTES

# Threads and float32 units of a multiprocessor: CUDA C++ Programming Guide 13.0, tables of compute capabilities.
_MULTIPROCESSOR = {
    80: (2048, 64), 86: (1536, 128), 89: (1536, 128), 90: (2048, 128), 100: (2048, 128), 120: (1536, 128),
}  # fmt: skip
_ARCHITECTURE_FEATURES = 90  # from here on code is made for one architecture alone: sm_90a has wgmma

# Any step may enter a CUDA graph, so that being left out has another reason than being short.
_OPTIONS: dict[str, Any] = {
    "xla_gpu_graph_min_graph_size": 1,
    "xla_gpu_autotune_level": 0,
    "xla_dump_hlo_as_text": True,
    "xla_dump_emitter_re": ".*",
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a program: what kind, its kernel's name, dynamic shared memory, whether it is in a CUDA graph."""

    kind: str
    name: str
    shared: int
    in_graph: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel as ptxas compiled it: sizes in bytes, `spills` stored and loaded, `shared` the static part.

    `serialized`: whether it had to make asynchronous tensor core instructions wait for one another.
    """

    name: str
    registers: int
    spills: int
    stack: int
    shared: int
    serialized: bool = False
    sass: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a product: an error, or the program's steps and kernels, its HLO and its scratch memory."""

    error: str = ""
    route: str = ""
    steps: tuple[Step, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    scratch: int = 0
    hlo: str = ""


def description(device: Device) -> str:
    """The text of XLA's `GpuTargetConfigProto` for a device."""
    threads, units = _MULTIPROCESSOR[device.cc]
    facts = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": threads,
        "core_count": device.sms, "fpus_per_core": units,
        "clock_rate_ghz": round(device.rate("float32") / (2e9 * device.sms * units), 3),
        "shared_memory_per_block": 48 << 10, "shared_memory_per_core": device.shared.smem_sm,
        "shared_memory_per_block_optin": device.shared.smem_block,
        "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
        "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64,
        "memory_bandwidth": int(device.bandwidth), "l2_cache_size": device.l2, "device_memory_size": device.memory,
    }  # fmt: skip
    feature = "ACCELERATED_FEATURES" if device.cc >= _ARCHITECTURE_FEATURES else "NONE"
    info = " ".join(f"{name}: {value}" for name, value in facts.items())
    return (
        f"gpu_device_info {{ {info} cuda_compute_capability "
        f"{{ major: {device.cc // 10} minor: {device.cc % 10} feature_extension: {feature} }} "
        f'runtime_version: "13.0.0" driver_version: "13.0.0" name: "NVIDIA {device.name}" }} '
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 } runtime_version { major: 13 minor: 0 } '
        f'device_description_str: "NVIDIA {device.name}"'
    )


@functools.cache
def mesh_of(device: Device) -> jax.sharding.Mesh:
    """A mesh of one such device, to compile for."""
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=description(device), topology="1x1x1"
    )
    return topologies.make_mesh(described, (1,), ("one",))


def compile_product(
    product: Product, device: Device, route: str | None = None, config: dict[str, Any] | None = None, sass: bool = False
) -> Report:
    """Compiles a product for a device, by the named route in the given config or by what dispatch chooses."""
    with qjax.use(device=device):
        if route is None:
            choice = choose(product.problem, device)
            route, config = choice.route.name, dict(choice.config)
        run = program(next(r for r in ROUTES if r.name == route), product, config)
        return compile_function(lambda o: run(o)[0], operand_shapes(product), device, route, sass)


def compile_function(
    run: Callable[[Any], Any], operands: Any, device: Device, route: str = "", sass: bool = False
) -> Report:
    """Compiles a function of one tree of operands for a device."""
    mesh = mesh_of(device)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    place = functools.partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole))
    with qjax.use(device=device), tempfile.TemporaryDirectory() as folder:
        # Mosaic GPU compiles by itself, what it has not compiled in this process yet.
        os.environ |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_TO": folder}
        with jax.default_device(mesh.devices.flat[0]), _said() as said:  # Pallas asks it what to lower for
            try:
                lowered = jax.jit(run).trace(place(operands)).lower(lowering_platforms=("cuda",))
                done = lowered.compile(compiler_options={**_OPTIONS, "xla_dump_to": folder})
            except Exception as error:  # whatever it is, it is the answer
                return Report(error=f"{type(error).__name__}: {error}\n{said()}", route=route)
        memory = done.memory_analysis()
        return Report(
            route=route,
            steps=tuple(steps_of(Path(folder))),
            kernels=tuple(k for f in sorted(Path(folder).glob("*.ptx")) for k in _assemble(f, sass)),
            scratch=memory.temp_size_in_bytes if memory else 0,
            hlo=done.as_text() or "",
        )


@contextlib.contextmanager
def _said() -> Iterator[Any]:
    """Collects what compilers write to file descriptor 2; yields a function for the lines about errors."""
    with tempfile.TemporaryFile() as file:

        def errors() -> str:
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines()
            return "\n".join(line[:300] for line in lines if re.search("error|fatal|ptxas", line, re.I))[:1200]

        sys.stderr.flush()
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield errors
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def steps_of(folder: Path) -> Iterator[Step]:
    """The steps of the program that XLA dumped into a folder, in order."""
    (file,) = folder.glob("*thunk_sequence_after_thunk_passes.txt")
    graph: int | None = None  # indentation of the command buffer we are in
    for line in file.read_text().splitlines():
        found = re.match(r"(\s*)\d+: (\w+)\s+\[[^\]]*\]\s*(\S*)(.*)", line)
        if not found:
            continue
        indent, kind = len(found[1]), found[2]
        graph = None if graph is not None and indent <= graph else graph
        if kind == "kCommandBuffer":
            graph = indent
            continue
        shared = re.search(r"shared_memory: (\d+)", found[4])
        yield Step(kind, found[3], int(shared[1]) if shared else 0, graph is not None)


@functools.cache
def _tool(name: str) -> str:
    """A program of the CUDA toolkit: of the wheels, else of an installed toolkit."""
    wheels = [Path(path) / "cu13" for path in sys.modules["nvidia"].__path__] if "nvidia" in sys.modules else []
    for root in (*wheels, *(Path(p) / "nvidia" / "cu13" for p in sys.path), Path("/usr/local/cuda")):
        if (root / "bin" / name).exists():
            return str(root / "bin" / name)
    raise FileNotFoundError(f"{name} is neither among the wheels on sys.path nor in /usr/local/cuda")


def _assemble(ptx: Path, sass: bool) -> list[Kernel]:
    """The kernels of one PTX file, by ptxas: that of the wheels, which may be another version than a target's."""
    text = ptx.read_text()
    if ".entry" not in text:
        return []
    target = re.search(r"^\.target\s+(\w+)", text, re.M)
    assert target is not None, ptx
    cubin = ptx.with_suffix(".ours.cubin")
    command = [_tool("ptxas"), "-v", f"-arch={target[1]}", str(ptx), "-o", str(cubin)]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    code = _disassemble(cubin) if sass else {}
    found = []
    for name, said in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", log, re.S):
        registers, spills, stack, shared = (sum(map(int, re.findall(rf"(\d+) {unit}", said))) for unit in _UNITS)
        serialized = bool(re.search(f"serialized due to .* for the function '{name}'", log))
        found.append(Kernel(name, registers, spills, stack, shared, serialized, code.get(name, "")))
    return found


_UNITS = ("registers", "bytes spill (?:stores|loads)", "bytes stack", "bytes smem")


def _disassemble(cubin: Path) -> dict[str, str]:
    """SASS by kernel."""
    out = subprocess.run([_tool("nvdisasm"), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    sections = re.split(r"(?m)^//-+ \.text\.", out)[1:]
    return {section.split(None, 1)[0]: section for section in sections}


def as_text(report: Report, device: Device) -> str:
    """A report for reading."""
    if report.error:
        return f"{device}: {report.route} failed\n{report.error}"
    lines = [f"{device}: {report.route}, {report.scratch} bytes of scratch, ptxas of {_tool('ptxas')}"]
    for s in report.steps:
        place = "in the graph" if s.in_graph else "OUTSIDE of the graph"
        lines.append(f"  step {s.kind} {s.name}: {s.shared} bytes of shared memory, {place}")
    for k in report.kernels:
        lines.append(f"  kernel {k.name}: {k.registers} registers, {k.spills} bytes spilled, {k.stack} of stack")
    return "\n".join(lines + [k.sass for k in report.kernels if k.sass])


def _serve() -> None:
    """Requests of `compiler.Compiler` from stdin, answers to stdout, which nobody else may write to."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    version = importlib.metadata.version("jax-cuda13-plugin")
    if version != jax.lib.__version__:
        raise SystemExit(f"jax-cuda13-plugin {version} beside jaxlib {jax.lib.__version__}")
    for line in sys.stdin:
        request = json.loads(line)
        device = find_device(request.pop("device"))
        report = compile_product(Product(**request.pop("product")), device, **request)
        answers.write(json.dumps(dataclasses.asdict(report)) + "\n")
        answers.flush()


def main() -> None:
    """The command line of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scheme", nargs="?")
    parser.add_argument("shape", nargs="?", help="MxKxN")
    parser.add_argument("--device", default="h200", help="comma-separated")
    parser.add_argument("--route")
    parser.add_argument("--config", type=json.loads)
    parser.add_argument("--x-dtype", default="bfloat16")
    for flag in ("epilogue", "transposed", "sass", "hlo", "serve"):
        parser.add_argument(f"--{flag}", action="store_true")
    given = parser.parse_args()
    if given.serve:
        return _serve()
    m, k, n = map(int, given.shape.split("x"))
    product = Product(given.scheme, m, k, n, given.x_dtype, given.epilogue, given.transposed)
    for device in map(find_device, given.device.split(",")):
        report = compile_product(product, device, given.route, given.config, given.sass)
        print(as_text(report, device))
        if given.hlo:
            print(report.hlo)


if __name__ == "__main__":
    main()

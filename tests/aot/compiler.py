"""Compilers as child processes: the CUDA plugin stays out of this one, and a compiler that crashes fails one test
instead of all. `Compiler` is `compile.py --serve`, for products; `answer_of` runs a script with programs of its own."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from aot.compile import Kernel, Report, Step
from products import Product

PACKAGES = Path(sys.prefix) / "cuda-compiler"  # `make cuda-compiler`: the plugin apart, so that JAX here stays a CPU's
_PLUGIN = "jax_cuda13_plugin"
_COMPILE = {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}  # what is found compiled leaves no dump to read


def missing() -> str | None:
    """Why nothing can be compiled, or None."""
    if (PACKAGES / _PLUGIN).is_dir() or importlib.util.find_spec(_PLUGIN) is not None:
        return None
    return f"no CUDA compiler: neither {PACKAGES} nor this environment has {_PLUGIN} (make cuda-compiler)"


def answer_of(script: str) -> Any:
    """What a script of this folder prints, parsed (`whole_program.answer`)."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, [PACKAGES, tests.parent, tests]))
    env = os.environ | _COMPILE | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, str(Path(__file__).with_name(script))]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


class Compiler:
    """Answers one request at a time; starts its child again after a crash."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._said = tempfile.TemporaryFile("w+")

    def __call__(self, device: str, product: Product, route: str, config: dict[str, Any]) -> Report:
        """What compiling gives; a crash is an error of the report too."""
        child = self._child = self._child or self._start()
        assert child.stdin is not None and child.stdout is not None
        request = {"device": device, "product": dataclasses.asdict(product), "route": route, "config": config}
        try:
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            return Report(error=f"the compiler exited {self._stop()}: {self._last_words()}", route=route)
        fields = json.loads(answer)
        fields["steps"] = tuple(Step(**step) for step in fields["steps"])
        fields["kernels"] = tuple(Kernel(**kernel) for kernel in fields["kernels"])
        return Report(**fields)

    def close(self) -> None:
        """Ends the child."""
        if self._child is not None:
            self._stop()

    def _start(self) -> "subprocess.Popen[str]":
        path = os.pathsep.join(filter(None, [str(PACKAGES), os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, str(Path(__file__).with_name("compile.py")), "--serve"]
        pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said)
        return subprocess.Popen(command, env=os.environ | _COMPILE | {"PYTHONPATH": path}, text=True, **pipes)

    def _stop(self) -> int:
        child, self._child = self._child, None
        assert child is not None and child.stdin is not None
        child.stdin.close()
        return child.wait()

    def _last_words(self) -> str:
        self._said.seek(0)
        return self._said.read()[-2000:]

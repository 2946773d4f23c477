"""compute-sanitizer over a small selection: writes and reads out of bounds (memcheck), races in shared memory
(racecheck). `Sanitizer` runs this file as a program of its own under the tool; the program runs each case once. Where
it, or the tool, dies in a case, that case has failed, and the program is started again with the one after it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
ERRORS = 99  # exit code
_BEGINS = "begins"  # before the number of a case and its name, in a line of its own
_DIED = "Internal Sanitizer Error"  # in a case: the tool's own end, which it calls an error of the program
_DONE = " done"  # how the line after it ends

_MOST_DEATHS = 5  # of the program, after which the tool is given up

# Every array has memory of its own, so that an access one byte past it is one out of bounds.
_ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
}
# racecheck follows every access to shared memory: our kernels alone. It dies of cuBLASLt's even where it skips them.
_OPTIONS = {"memcheck": (), "racecheck": ("--kernel-name", "kernel_substring=qjax")}
_LEFT_OUT = {"memcheck": (), "racecheck": ("cublaslt",)}  # backends


class Sanitizer:
    """One tool on its way: started at once, looked at later."""

    def __init__(self, tool: str, seed: int) -> None:
        self.tool = tool
        self._started = time.monotonic()
        self._said = tempfile.TemporaryFile("w+")
        self._child: subprocess.Popen[str] | None = None
        found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        if found is not None:
            options = ["--tool", tool, *_OPTIONS[tool], "--error-exitcode", str(ERRORS), "--print-limit", "20"]
            self._command = [found, *options, sys.executable, __file__, tool, str(seed)]
            self._child = self._start(first=0)

    def _start(self, first: int) -> subprocess.Popen[str]:
        both = dict(stdout=self._said, stderr=subprocess.STDOUT, process_group=0)
        return subprocess.Popen([*self._command, str(first)], env=os.environ | _ENVIRONMENT, text=True, **both)

    def _end(self, child: subprocess.Popen[str]) -> None:
        """Ends the tool and the program below it, which may outlive a tool that died."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()

    def outcome(self, limit: float) -> tuple[list[str], str | None]:
        """What it found, and why it was not run or did not end within `limit` seconds of its start."""
        if self._child is None:
            return [], "compute-sanitizer is not installed"
        wrong: list[str] = []
        while True:
            try:
                code = self._child.wait(max(1.0, limit - (time.monotonic() - self._started)))
            except subprocess.TimeoutExpired:
                self._end(self._child)
                late = f"not done after {limit:.0f} s: {self._lines()[-1:]}"
                return (wrong + [late], None) if wrong else ([], late)
            lines = self._lines()
            if any("not supported" in line.lower() for line in lines[:20]):
                return [], f"compute-sanitizer does not run here: {lines[:3]}"
            if code == ERRORS and _DIED not in "\n".join(lines).rpartition(_BEGINS)[2]:
                return [*wrong, "errors: " + " | ".join(lines[-25:])], None
            if code == 0:
                ran = wrong or any(line.endswith(_DONE) for line in lines)
                return wrong, None if ran else "no kernel claims a case here"
            self._end(self._child)
            begun = [line for line in lines if line.startswith(_BEGINS)]
            wrong.append(f"exit code {code} after {begun[-1:]}: " + " | ".join(lines[-8:]))
            if not begun or len(wrong) == _MOST_DEATHS:
                return wrong, None
            self._child = self._start(first=int(begun[-1].split()[1]) + 1)

    def _lines(self) -> list[str]:
        self._said.seek(0)
        return [line.strip() for line in self._said.read().splitlines() if line.strip()]


def main() -> None:
    """Runs what a tool can of the selection of a seed, each case once, from a number on; all three by command line."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import jax
    from gpu.kernel_checks import function_of, placed
    from gpu.kernel_selection import sanitized
    from products import gpu_routes

    tool, seed, first = sys.argv[1], *map(int, sys.argv[2:])
    routes = tuple(route for route in gpu_routes() if route.backend not in _LEFT_OUT[tool])
    for number, case in enumerate(sanitized(routes, seed)):
        if number < first:
            continue
        print(f"{_BEGINS} {number} {case}", flush=True)
        jax.block_until_ready(jax.jit(function_of(case))(placed(case.operands())))
        print(f"{case}{_DONE}", flush=True)


if __name__ == "__main__":
    main()

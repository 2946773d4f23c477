"""compute-sanitizer over a small selection: writes and reads out of bounds (memcheck), races in shared memory
(racecheck). `Sanitizer` runs this file as a program of its own under the tool; the program runs each case once.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
ERRORS = 99  # exit code
_DONE = " done"  # how the line of a case ends

# Every array has memory of its own, so that an access one byte past it is one out of bounds.
_ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
}
# racecheck follows every access to shared memory: our kernels alone.
_OPTIONS = {"memcheck": (), "racecheck": ("--kernel-name", "kernel_substring=qjax")}


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
            command = [found, *options, sys.executable, __file__, str(seed)]
            both = dict(stdout=self._said, stderr=subprocess.STDOUT)
            self._child = subprocess.Popen(command, env=os.environ | _ENVIRONMENT, text=True, **both)

    def outcome(self, limit: float) -> tuple[list[str], str | None]:
        """What it found, and why it was not run or did not end within `limit` seconds of its start."""
        if self._child is None:
            return [], "compute-sanitizer is not installed"
        try:
            code = self._child.wait(max(1.0, limit - (time.monotonic() - self._started)))
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
            return [], f"not done after {limit:.0f} s: {self._lines()[-1:]}"
        lines = self._lines()
        if code == 0:
            return [], None if any(line.endswith(_DONE) for line in lines) else "no kernel claims a case here"
        if any("not supported" in line.lower() for line in lines[:20]):
            return [], f"compute-sanitizer does not run here: {lines[:3]}"
        return [f"exit code {code}: " + " | ".join(lines[-25:])], None

    def _lines(self) -> list[str]:
        self._said.seek(0)
        return [line.strip() for line in self._said.read().splitlines() if line.strip()]


def main() -> None:
    """Runs the selection of the seed in the command line, each case once."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import jax
    from gpu.kernel_checks import function_of, placed
    from gpu.kernel_selection import sanitized
    from products import gpu_routes

    cases = sanitized(gpu_routes(), int(sys.argv[1]))
    for case in cases:
        jax.block_until_ready(jax.jit(function_of(case))(placed(case.operands())))
        print(f"{case}{_DONE}", flush=True)


if __name__ == "__main__":
    main()

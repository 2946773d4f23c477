"""What became of each case of a run, and the document that says so."""

import importlib.metadata
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax

import qjax


class Results:
    """Counts, and what was wrong in words; `absent` says which kernels are not here at all, and why."""

    def __init__(self, seed: int, absent: dict[str, str] | None = None) -> None:
        self.seed = seed
        self.absent = absent or {}
        self.passed = 0
        self.failures: list[dict[str, str]] = []
        self.skipped: list[str] = []
        self.checks: Counter[str] = Counter()
        self._started = time.monotonic()

    def add(self, name: str, wrong: list[str], checks: Iterable[str] = ()) -> None:
        """One case and the checks that it went through; with nothing wrong it passed."""
        self.checks.update(checks)
        if not wrong:
            self.passed += 1
            return
        self.failures.append({"case": name, "wrong": "; ".join(wrong)[:2000]})
        print(f"FAILED {name}: {self.failures[-1]['wrong']}", flush=True)

    def skip(self, name: str, reason: str) -> None:
        """One case that was not run."""
        self.skipped.append(f"{name}: {reason}")

    def document(self, revision: str | None) -> dict[str, Any]:
        """All of it, for JSON."""
        here = jax.devices()[0]
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
        return {
            "machine": {"gpu": here.device_kind, "platform": here.client.platform_version},
            "revision": revision,
            "versions": {**versions, "qjax": qjax.__version__},
            "absent": self.absent,
            "seed": self.seed,
            "seconds": round(time.monotonic() - self._started),
            "passed": self.passed,
            "failed": len(self.failures),
            "skipped": len(self.skipped),
            "checks": dict(sorted(self.checks.items())),
            "failures": self.failures,
            "not_run": self.skipped,
        }

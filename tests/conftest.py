"""The devices of a test run, fixed before anything imports jax: 8 virtual CPUs.

QJAX_TEST_GPU=1 leaves the platform to JAX and runs the tests marked `gpu`, skipped otherwise. `--cases 3` runs three
cases of each test.
"""

import os
import re
from collections import defaultdict

import pytest

ON_GPU = os.environ.get("QJAX_TEST_GPU") == "1"

if not ON_GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    ).strip()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--cases`."""
    parser.addoption(
        "--cases", type=int, metavar="N", help="of each test at most N cases, evenly spaced, the first too"
    )


def _some_cases(items: list[pytest.Item], most: int) -> list[pytest.Item]:
    """At most so many of each test's cases, in their order."""
    cases: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[re.sub(r"(\[.*\]|\d+( \(.*\))?)$", "", item.nodeid)].append(item)  # pytest's cases, and absl's
    kept = {
        item
        for of in cases.values()
        for item in (of[i * len(of) // min(most, len(of))] for i in range(min(most, len(of))))
    }
    return [item for item in items if item in kept]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out cases that were not asked for, puts slow tests first, and skips what needs a GPU unless on one."""
    if most := config.getoption("--cases"):
        kept = _some_cases(items, most)
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # none is left for the end
    if ON_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU: set QJAX_TEST_GPU=1")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)

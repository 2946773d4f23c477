"""The devices of a test run, fixed before anything imports jax: 8 virtual CPUs.

QJAX_TEST_GPU=1 leaves the platform to JAX and runs the tests marked `gpu`, skipped otherwise.
"""

import os

import pytest

ON_GPU = os.environ.get("QJAX_TEST_GPU") == "1"

if not ON_GPU:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    ).strip()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU unless this run is on one."""
    if ON_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU: set QJAX_TEST_GPU=1")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)

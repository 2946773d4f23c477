"""The capability table against facts stated elsewhere, and which row a trace is for."""

import types

import chex
import jax
import jax.numpy as jnp
import pytest
from absl.testing import parameterized

from qjax import devices
from qjax.devices import ARCHITECTURES, TABLE, find_device
from qjax.errors import QJaxError

GPUS = [row for row in TABLE if row.platform == "gpu"]
TERA = 1e12

# What JAX and the driver call each GPU (`jax.Device.device_kind`) -> the row's name.
KINDS = {
    "Tesla V100-SXM2-16GB": "V100-SXM2-16GB",
    "Tesla V100-PCIE-32GB": "V100-PCIE-32GB",
    "Tesla T4": "T4",
    "NVIDIA A100-SXM4-40GB": "A100-SXM4-40GB",
    "NVIDIA A100-SXM4-80GB": "A100-SXM4-80GB",
    "NVIDIA A100-PCIE-40GB": "A100-PCIE-40GB",
    "NVIDIA A100 80GB PCIe": "A100-80GB-PCIe",
    "NVIDIA L4": "L4",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
    "NVIDIA H100 80GB HBM3": "H100-SXM",
    "NVIDIA H100 PCIe": "H100-PCIe",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "cpu": "CPU",
}


def fake_gpu(kind: str, **reported: object) -> types.SimpleNamespace:
    """What `from_jax` reads of a jax.Device, hashable as that is."""

    class Fake(types.SimpleNamespace):
        __hash__ = object.__hash__

    memory = reported.pop("bytes_limit", None)
    stats = None if memory is None else {"bytes_limit": memory}
    return Fake(device_kind=kind, platform="gpu", memory_stats=lambda: stats, **reported)


class TableTest(parameterized.TestCase):
    def test_every_row_names_its_source(self):
        assert all(len(row.source) > 10 for row in TABLE)
        assert len({row.name for row in TABLE}) == len(TABLE)

    @parameterized.parameters(*GPUS)
    def test_a_rate_is_listed_for_just_what_the_tensor_cores_take(self, row):
        assert {name for name, _ in row.rates} == row.formats | {"float32"}

    @parameterized.parameters(*GPUS)
    def test_formats_follow_the_compute_capability(self, row):
        assert row.takes("int4") == (75 <= row.cc <= 89)  # not on Hopper, whatever is written
        assert row.takes("e4m3") == row.takes("e5m2") == (row.cc >= 89)
        assert row.takes("bfloat16") == row.takes("tf32") == row.shared.sparse == (row.cc >= 80)
        assert row.takes("e2m1") == row.takes("e3m2") == (row.cc >= 100)
        assert row.takes("int8") == (row.cc >= 75)
        assert row.takes("float16")

    @parameterized.parameters(*GPUS)
    def test_rates_are_dense_and_double_as_formats_halve(self, row):
        # GeForce halves the rate of floats that accumulate in float32, and not that of integers.
        int8 = 4 if row.name.startswith("RTX") else 2
        expected = {"tf32": 0.5, "int8": int8, "int4": 2 * int8, "e4m3": 2, "e5m2": 2, "e3m2": 2}
        fp16 = row.rate("float16")
        assert row.rate("float32") < fp16
        for name in expected.keys() & row.formats:
            self.assertAlmostEqual(row.rate(name) / fp16 / expected[name], 1, delta=0.03)

    @parameterized.parameters(
        ("A100", "float16", 312), ("A100", "int8", 624), ("T4", "int4", 260),
        ("H200", "bfloat16", 989.4), ("H100-PCIe", "e4m3", 1513), ("B200", "e2m1", 9000),
        ("RTX 4090", "float16", 165.2), ("RTX 5090", "bfloat16", 209.5), ("L4", "e4m3", 242.5),
    )  # fmt: skip
    def test_peaks_are_those_of_the_data_sheets_without_sparsity(self, name, format, tera):
        self.assertAlmostEqual(find_device(name).rate(format) / TERA, tera)

    @parameterized.parameters(*GPUS)
    def test_a_block_gets_at_most_the_shared_memory_of_its_multiprocessor(self, row):
        assert 0 < row.shared.smem_block <= row.shared.smem_sm <= 228 * 1024
        assert row.shared is ARCHITECTURES[row.cc]

    def test_a_format_without_a_rate_of_its_own_runs_at_that_of_float32(self):
        assert find_device("T4").rate("bfloat16") == find_device("T4").rate("float32")

    @parameterized.parameters(
        ("H200", "bfloat16"), ("A100", "bfloat16"), ("T4", "float16"), ("V100", "float16"),
        ("CPU", "float32"),
    )  # fmt: skip
    def test_products_are_computed_in_what_tensor_cores_take(self, name, dtype):
        assert devices.compute_dtype(find_device(name)) == jnp.dtype(dtype)


class FindTest(parameterized.TestCase):
    @parameterized.parameters(*KINDS.items())
    def test_a_row_is_found_by_what_the_driver_calls_it(self, kind, name):
        assert find_device(kind).name == name

    @parameterized.parameters("h200", "NVIDIA H200", "nvidia h200", " H200 ")
    def test_names_are_found_in_any_case(self, name):
        assert find_device(name).cc == 90

    def test_an_unknown_name_is_an_error_that_lists_the_rows(self):
        with pytest.raises(QJaxError, match=r"unknown device 'H9000'.*T4.*B200.*CPU"):
            find_device("H9000")

    def test_an_unknown_gpu_gets_a_row_from_its_capability(self):
        gpu = fake_gpu("NVIDIA H200 NVL", compute_capability="9.0", core_count=66, bytes_limit=7)
        row, h200 = devices.from_jax(gpu), find_device("H200")
        assert row.estimated and row.cc == 90 and row.formats == h200.formats
        assert row.memory == 7 and row.sms == 66
        self.assertAlmostEqual(row.rate("e4m3") / find_device("H100-PCIe").rate("e4m3"), 66 / 114)
        assert "estimated" in str(row) and "SMs" in row.source

    @parameterized.parameters(
        ("8.6", 86, 99, "int4"), ("12.1", 121, 99, "e2m1"), ("10.3", 103, 227, "e2m1"),
    )  # fmt: skip
    def test_an_unlisted_capability_takes_the_architecture_below_it(self, text, cc, smem, takes):
        row = devices.from_jax(fake_gpu("NVIDIA X", compute_capability=text, core_count=10))
        assert (row.cc, row.shared.smem_block) == (cc, smem * 1024)
        assert row.takes(takes) and {name for name, _ in row.rates} == row.formats | {"float32"}

    @parameterized.parameters("gfx942", "6.1", None)
    def test_a_gpu_that_nothing_is_known_of_is_given_no_tensor_cores(self, capability):
        reported = {} if capability is None else {"compute_capability": capability}
        row = devices.from_jax(fake_gpu("AMD Instinct MI300X", **reported))
        assert row.estimated and not row.formats
        assert devices.compute_dtype(row) == jnp.float32


class CurrentTest(chex.TestCase):
    def test_it_is_the_default_backend_where_nothing_else_is_said(self):
        assert devices.current() == devices.from_jax(jax.devices()[0])

    def test_an_override_wins_and_ends(self):
        before = devices.current()
        with devices.override(find_device("H200")):
            assert devices.current().name == "H200"
        assert devices.current() == before

    def test_a_mesh_in_context_says_what_the_trace_is_for(self):
        described = jax.sharding.AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="gpu")
        mesh = jax.sharding.AbstractMesh((2,), ("x",), abstract_device=described)
        with jax.sharding.use_abstract_mesh(mesh):
            assert devices.current().name == "A100-SXM4-80GB"
            with devices.override(find_device("T4")):
                assert devices.current().name == "T4"

    def test_a_mesh_of_unknown_devices_claims_no_capability(self):
        described = jax.sharding.AbstractDevice(device_kind="NVIDIA Z1", num_cores=100, platform="gpu")
        mesh = jax.sharding.AbstractMesh((2,), ("x",), abstract_device=described)
        with jax.sharding.use_abstract_mesh(mesh):
            row = devices.current()
        assert (row.cc, row.sms, row.estimated) == (0, 100, True)

    def test_the_default_device_counts_by_object_and_by_platform(self):
        for default in (jax.devices("cpu")[-1], "cpu"):
            with jax.default_device(default):
                assert devices.current().name == "CPU"

    def test_an_override_traces_a_jitted_function_again(self):
        traced = []

        @jax.jit
        def f(x):
            traced.append(devices.current().name)
            return x + 1

        f(1.0)
        with devices.override(find_device("H200")):
            f(1.0)
            f(2.0)
        f(3.0)
        assert traced == [devices.current().name, "H200"]

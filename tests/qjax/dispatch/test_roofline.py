"""Estimates against numbers worked out by hand and measured elsewhere."""

import dataclasses

import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.devices import find_device
from qjax.dispatch import roofline
from qjax.dispatch.problem import Problem
from qjax.schemes import FP8, W4A16, W8A8FP8, W8A16, W4A8Int8, W8A8Int8

BF16 = np.dtype("bfloat16")
H200 = find_device("H200")
CPU = find_device("CPU")


def wide(m=1, scheme=None, **fields):
    """A gate-and-up projection of a 7B Llama."""
    scheme = scheme or W4A16(group_size=128)
    return Problem(m, 22016, 4096, scheme, x_dtype=BF16, out_dtype=BF16, **fields)


class BytesTest(parameterized.TestCase):
    def test_int4_weights_weigh_half_a_byte_and_a_float16_scale_a_group(self):
        codes, scales = 22016 * 4096 // 2, 22016 * (4096 // 128) * 2
        assert roofline.weight_bytes(wide()) == codes + scales

    def test_k_is_padded_to_128_below_8_bits_only(self):
        scheme = W4A16(group_size=64)
        assert roofline.weight_bytes(Problem(1, 8, 192, scheme)) == 8 * 128 + 8 * 3 * 2
        assert roofline.weight_bytes(Problem(1, 8, 192, W8A16(), np.dtype("float32"))) == 8 * 196

    def test_a_scale_of_the_whole_tensor_is_one(self):
        problem = Problem(1, 8, 128, FP8(granularity="tensor"), np.dtype("float32"))
        assert roofline.weight_bytes(problem) == 8 * 128 + 4

    @parameterized.parameters(("zero_point", 1), ("zero_point_real", 4), ("input_perm", 0))
    def test_zero_points_weigh_what_they_are_stored_as(self, feature, size):
        plain, more = wide(), wide(features=frozenset({feature}))
        groups = 22016 * 32
        assert roofline.weight_bytes(more) - roofline.weight_bytes(plain) == groups * size

    def test_x_and_y_change_places_in_a_transposed_product(self):
        narrow = Problem(4, 1024, 256, W4A16(), x_dtype=BF16, bias=True, residual=True)
        assert roofline.activation_bytes(narrow) == 4 * 256 * 2 + (2 * 4 + 1) * 1024 * 4
        turned = dataclasses.replace(narrow, transposed=True, bias=False, residual=False)
        assert roofline.activation_bytes(turned) == 4 * 1024 * 2 + 4 * 256 * 4


@pytest.mark.parametrize(
    ("m", "n", "k", "fastest"),
    [
        (8, 4096, 4096, "cpu.matmul_int8"),
        (130, 4096, 4096, "cpu.matmul_int8"),
        (1024, 4096, 4096, "cpu.matmul_int8"),
        (130, 768, 256, "xla.reference"),  # x and y cost more than the product
        (1024, 768, 256, "xla.reference"),
    ],
)
def test_on_a_cpu_int8_is_for_weights_that_are_large_beside_x_and_y(m, n, k, fastest):
    problem = Problem(m, n, k, W4A8Int8(), x_dtype=np.dtype("int8"), out_dtype=np.dtype("float32"))
    routes = ("cpu.matmul_int8", "xla.reference")
    times = {r: roofline.estimate(problem, CPU, roofline.efficiency(r, problem, CPU)).seconds for r in routes}
    assert min(times, key=times.get) == fastest, times


@pytest.mark.parametrize("m", [1, 16, 512])
def test_kernels_on_a_cpu_multiply_in_float32_whatever_x_is(m):
    """XLA's own product of bfloat16 is ten times slower there than that of float32."""
    problems = [Problem(m, 4096, 4096, W4A16(), x_dtype=np.dtype(name), out_dtype=BF16) for name in ("float32", BF16)]
    wide, narrow = (roofline.estimate(p, CPU, roofline.efficiency("cpu.matmul", p, CPU)) for p in problems)
    assert narrow.seconds <= wide.seconds


class EstimateTest(parameterized.TestCase):
    def test_one_row_on_an_h200_takes_the_time_to_read_the_weight(self):
        estimate = roofline.estimate(wide(), H200, roofline.PEAK)
        self.assertAlmostEqual(estimate.bytes / 1e6, 46.55, places=2)
        self.assertAlmostEqual(estimate.seconds * 1e6, 9.70, places=2)
        assert estimate.bound == "memory" and estimate.operations == 2 * 22016 * 4096

    def test_many_rows_take_the_time_to_multiply(self):
        estimate = roofline.estimate(wide(m=2048), H200, roofline.PEAK)
        assert estimate.bound == "compute"
        self.assertAlmostEqual(estimate.seconds, 2 * 2048 * 22016 * 4096 / 989.4e12)

    def test_a_tiny_product_takes_the_time_to_start(self):
        estimate = roofline.estimate(Problem(1, 128, 128, W4A16()), H200)
        assert estimate.bound == "fixed" and estimate.seconds < 1e-6

    def test_no_rows_cost_no_operations(self):
        assert roofline.estimate(wide(m=0), H200).operations == 0

    @parameterized.parameters(W8A8FP8(), W8A8Int8())
    def test_quantized_rows_multiply_at_the_rate_of_their_format(self, scheme):
        as_float = roofline.estimate(wide(2048, W8A16()), H200, roofline.PEAK)
        quantized = roofline.estimate(wide(2048, scheme), H200, roofline.PEAK)
        self.assertAlmostEqual(as_float.seconds / quantized.seconds, 2, delta=0.01)

    def test_fp8_rows_gain_nothing_where_tensor_cores_have_no_fp8(self):
        a100 = find_device("A100")
        assert roofline.compute_format(wide(1, W8A8FP8()), a100) == "bfloat16"
        assert roofline.compute_format(wide(1, W8A8FP8()), H200) == "e4m3"

    @parameterized.parameters(
        (W4A16(), 1, 79e-6), (W4A16(), 16, 667e-6), (W4A16(), 2048, 7.8e-3),
        (FP8(), 1, 33e-6), (FP8(), 16, 300e-6), (FP8(), 2048, 7.5e-3),
    )  # fmt: skip
    def test_the_reference_on_an_h200_is_told_within_half_of_what_it_was_measured_at(self, scheme, m, seconds):
        problem = wide(m, scheme)
        reached = roofline.efficiency("xla.reference", problem, H200)
        estimated = roofline.estimate(problem, H200, reached).seconds
        assert seconds / 1.5 < estimated < seconds * 1.5, estimated

    def test_writing_the_dense_weight_costs_its_bytes_twice(self):
        fused = roofline.estimate(wide(4), H200, roofline.PEAK)
        dense = dataclasses.replace(roofline.PEAK, dense=4)
        extra = roofline.estimate(wide(4), H200, dense).bytes - fused.bytes
        assert extra == 2 * 4 * 22016 * 4096

    def test_int4_is_almost_four_times_as_fast_as_bf16_at_one_row_and_no_faster_at_many(self):
        for m, low, high in ((1, 3.5, 4.0), (4096, 0.9, 1.1)):
            estimate = roofline.estimate(wide(m), H200)
            assert low < roofline.speedup_over_bf16(estimate, wide(m), H200) < high

    @settings(max_examples=30, deadline=None)
    @given(
        m=st.integers(0, 4096), n=st.integers(1, 8192), k=st.integers(1, 8192),
        dense=st.sampled_from([0, 2, 4]),
        device=st.sampled_from(["T4", "A100", "H200", "CPU"]),
    )  # fmt: skip
    def test_more_work_never_takes_less_time(self, m, n, k, dense, device):
        def seconds(m, n, k, batch=1):
            scheme = W4A16(group_size=32)
            problem = Problem(m, n, k, scheme, x_dtype=BF16, out_dtype=BF16, batch=batch)
            reached = dataclasses.replace(roofline.CEILING, dense=dense)
            return roofline.estimate(problem, find_device(device), reached).seconds

        least = seconds(m, n, k)
        assert least > 0
        assert least <= min(seconds(m + 1, n, k), seconds(m, n + 1, k), seconds(m, n, k + 1))
        assert least < seconds(m, n, k, batch=2)

    def test_times_are_printed_in_the_unit_that_suits(self):
        printed = [roofline.format_seconds(s) for s in (2.5, 0.00125, 9.7e-6, 8e-7)]
        assert printed == ["2.5 s", "1.25 ms", "9.7 us", "0.8 us"]

"""Element formats against independent statements of them: other libraries' types, files and formulas."""

import hashlib
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax.dequantize import point_index
from qjax.formats import FORMATS, codebook_thresholds
from qjax.quantize import encode

FEW = settings(max_examples=25, deadline=None, derandomize=True, database=None)
CODEBOOKS = tuple(name for name, row in FORMATS.items() if row.kind == "codebook" and row.dims == 1)
POINTS = tuple(name for name, row in FORMATS.items() if row.dims > 1)
FLOAT8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


def table(name: str) -> np.ndarray:
    """A codebook as kernels hold it, float32."""
    return np.array(FORMATS[name].codebook, np.float32)


def nearest(name: str, values: np.ndarray) -> np.ndarray:
    """Codes by brute force: exact distances, then ties; what is smaller than a normal float32 is 0, as XLA has it."""
    row, entries = FORMATS[name], [Fraction(float(v)) for v in table(name)]
    codes = []
    for v in np.where(np.abs(values) < np.finfo(np.float32).tiny, 0, values):
        distance = [abs(entry - Fraction(float(v))) for entry in entries]
        best = [c for c, d in enumerate(distance) if d == min(distance)]
        prefer = {
            "lower": lambda c: entries[c],
            "away": lambda c: -abs(entries[c]),
            "even": lambda c: c % 2,
        }[row.ties]
        codes.append(min(best, key=lambda c: (prefer(c), c)))  # of two codes of one value, the lower
    return np.array(codes)


def hard_values(entries: np.ndarray) -> np.ndarray:
    """Entries, midpoints and their float32 neighbours, and values beyond the ends."""
    entries = np.unique(entries.astype(np.float32))
    middles = ((entries[:-1].astype(np.float64) + entries[1:]) / 2).astype(np.float32)
    near = [np.nextafter(a, np.float32(s * np.inf)) for a in (entries, middles) for s in (1, -1)]
    return np.concatenate([entries, middles, *near, 3 * entries[[0, -1]]])


class TableTest(parameterized.TestCase):
    def test_e2m1_codes_are_those_of_ml_dtypes(self):
        theirs = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
        np.testing.assert_array_equal(table("e2m1"), theirs)
        assert FORMATS["e2m1"].maximum == float(ml_dtypes.finfo(ml_dtypes.float4_e2m1fn).max)

    def test_nf4_is_the_table_of_files_that_bitsandbytes_writes(self):
        digest = hashlib.sha256(table("nf4").tobytes()).hexdigest()
        assert digest == "8501941daa1b8a90ad1bbfeb632e5101b5dddbc4bb52d6e55abcfd777e60c06a"

    def test_nf4_is_made_of_normal_quantiles(self):
        # QLoRA, appendix E, as bitsandbytes evaluates it: 8 quantiles above and 7 below zero, at probabilities evenly
        # spaced from 1 - (1/30 + 1/32) / 2 to one half.
        from statistics import NormalDist

        offset = 1 - (1 / 30 + 1 / 32) / 2
        above = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
        below = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
        quantiles = np.sort(np.array(above + below + [0.0]))
        # The published digits come of an offset rounded to 0.9677083 and float32 arithmetic.
        np.testing.assert_allclose(table("nf4"), quantiles / quantiles.max(), atol=2e-7)

    def test_fp4_is_the_table_of_files_that_bitsandbytes_writes(self):
        magnitudes = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
        np.testing.assert_array_equal(table("fp4"), np.concatenate([magnitudes, 0 - magnitudes]))

    def test_the_dynamic_map_is_that_of_files_that_bitsandbytes_writes(self):
        # `nested_quant_map` of a double-quantized NF4 checkpoint by bitsandbytes 0.50.2.
        digest = hashlib.sha256(table("dynamic8").tobytes()).hexdigest()
        assert digest == "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"

    def test_the_dynamic_map_is_ascending_and_nearly_symmetric(self):
        values = table("dynamic8")
        assert len(values) == 256 and np.all(np.diff(values) > 0)
        assert values[127] == 0.0 and values[-1] == 1.0
        np.testing.assert_array_equal(values[:127], -values[128:-1][::-1])

    def test_the_dynamic_map_has_a_decade_for_each_power_of_two_steps(self):
        positive = table("dynamic8")[128:-1]
        decades = np.floor(np.log10(positive)).astype(int)
        assert [int(np.sum(decades == d)) for d in range(-7, 0)] == [1, 2, 4, 8, 16, 32, 64]

    @parameterized.parameters(*FLOAT8)
    def test_float8_rows_state_what_ml_dtypes_does(self, name):
        row, theirs = FORMATS[name], ml_dtypes.finfo(FLOAT8[name])
        assert row.dtype == np.dtype(FLOAT8[name]) and row.bits == theirs.bits == 8
        assert row.maximum == float(theirs.max)
        assert row.emax == np.floor(np.log2(float(theirs.max)))

    @parameterized.parameters(2, 3, 4, 5, 6, 8)
    def test_integer_rows_state_their_range(self, bits):
        row = FORMATS[f"int{bits}"]
        assert (row.maximum, row.bits) == (2 ** (bits - 1) - 1, bits)
        assert row.zero == (0 if bits == 8 else 2 ** (bits - 1))
        assert row.dtype == (np.int8 if bits == 8 else np.uint8)


class EncodeTest(parameterized.TestCase):
    @parameterized.parameters(*CODEBOOKS)
    def test_codes_are_the_nearest_and_ties_follow_the_row(self, name):
        values = hard_values(table(name))
        got = np.asarray(encode(jnp.asarray(values), FORMATS[name]))
        np.testing.assert_array_equal(got, nearest(name, values))

    @FEW
    @given(
        st.sampled_from(CODEBOOKS),
        st.lists(st.floats(-8, 8, width=32, allow_subnormal=False), min_size=32, max_size=32),
    )
    def test_any_value_is_encoded_as_the_nearest(self, name, values):
        values = np.array(values, np.float32)
        np.testing.assert_array_equal(np.asarray(encode(jnp.asarray(values), FORMATS[name])), nearest(name, values))

    @parameterized.parameters(*CODEBOOKS)
    def test_every_value_of_a_codebook_encodes_to_itself(self, name):
        values = table(name)
        np.testing.assert_array_equal(values[np.asarray(encode(jnp.asarray(values), FORMATS[name]))], values)

    @parameterized.parameters(*POINTS)
    def test_pairs_of_codes_name_the_nearest_point(self, name):
        row = FORMATS[name]
        points = table(name).astype(np.float64).reshape(-1, 2)
        assert len(points) == 4**row.bits
        values = np.random.default_rng(0).normal(size=(500, 6)).astype(np.float32) * 1.5
        codes = np.asarray(encode(jnp.asarray(values), row))
        assert codes.shape == values.shape and codes.dtype == np.uint8 and codes.max() < 2**row.bits
        index = codes[:, 0::2] + 2**row.bits * codes[:, 1::2].astype(int)
        pairs = values.astype(np.float64).reshape(500, 3, 2)
        np.testing.assert_array_equal(index, ((pairs[..., None, :] - points) ** 2).sum(-1).argmin(-1))
        np.testing.assert_array_equal(point_index(jnp.asarray(codes), row), index)
        own = point_index(encode(jnp.asarray(table(name)), row), row)
        np.testing.assert_array_equal(own, np.arange(len(points)))

    def test_e2m1_rounds_as_ml_dtypes_does(self):
        values = np.clip(hard_values(table("e2m1")), -6, 6)
        theirs = values.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
        np.testing.assert_array_equal(table("e2m1")[np.asarray(encode(jnp.asarray(values), FORMATS["e2m1"]))], theirs)

    @parameterized.parameters(("nf4", 7, 8), ("fp4", 6, 7), ("e2m1", 0, 1), ("dynamic8", 200, 201))
    def test_thresholds_are_what_separates_neighbours(self, name, low, high):
        thresholds, order = codebook_thresholds(name)
        assert thresholds.dtype == np.float32 and len(order) == len(thresholds) + 1
        at = list(order).index(high) - 1
        assert order[at] == low and table(name)[low] < thresholds[at] <= table(name)[high]


class Float8CastTest(parameterized.TestCase):
    @parameterized.product(name=tuple(FLOAT8), jitted=(False, True))
    def test_xla_casts_bit_for_bit_as_ml_dtypes_does(self, name, jitted):
        dtype, top = FLOAT8[name], FORMATS[name].maximum
        finite = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
        finite = finite[np.isfinite(finite)]
        rng = np.random.default_rng(0)
        spread = rng.standard_normal(50_000) * 10.0 ** rng.uniform(-9, 5, 50_000)
        values = np.clip(np.concatenate([hard_values(finite), spread.astype(np.float32)]), -top, top)

        def cast(v):
            return encode(v, FORMATS[name])

        got = np.asarray((jax.jit(cast) if jitted else cast)(values))
        np.testing.assert_array_equal(got.view(np.uint8), values.astype(dtype).view(np.uint8))

    @parameterized.parameters(*FLOAT8)
    def test_a_value_beyond_the_range_saturates(self, name):
        top = FORMATS[name].maximum
        got = np.asarray(encode(jnp.array([2 * top, -1e30, np.nextafter(np.float32(top), np.inf)]), FORMATS[name]))
        np.testing.assert_array_equal(got.astype(np.float32), [top, -top, top])

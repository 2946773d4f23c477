"""Rows of x in int8, on a CPU: the formula to the last bit, whatever the instructions, sizes and values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.activations import quantize_rows as formula
from qjax.schemes import Activation
from xla_ffi.cpu import library, quantize_rows

if reason := library.missing():
    pytest.skip(reason, allow_module_level=True)

TOKEN = Activation("int8", "token")


def _assert_formula(x: jax.Array, instructions: str = "") -> None:
    codes, scale = jax.jit(lambda x: quantize_rows.quantize_rows(x, jnp.int8, x.shape[1], instructions=instructions))(x)
    wide = np.asarray(x, np.float32)
    wanted = np.abs(wide).max(axis=1, keepdims=True) / np.float32(127)
    wanted[wanted == 0] = 1
    np.testing.assert_array_equal(scale, wanted)
    np.testing.assert_array_equal(codes, np.round(wide / wanted).astype(np.int8))


@pytest.mark.parametrize("instructions", library.instructions())
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (2, 16), (5, 4099), (64, 8192)])
def test_codes_and_scales_are_those_of_the_formula(shape, dtype, instructions):
    x = jax.random.normal(jax.random.key(0), shape) * jnp.linspace(0.01, 30, shape[0])[:, None]
    _assert_formula(x.astype(dtype), instructions)


@pytest.mark.parametrize("instructions", library.instructions())
def test_halves_go_to_even_codes_and_zeros_have_a_scale_of_one(instructions):
    _assert_formula(jnp.concatenate([jnp.arange(-20, 20) + 0.5, jnp.array([127.0])])[None], instructions)
    _assert_formula(jnp.zeros((2, 33)), instructions)


@pytest.mark.parametrize("instructions", library.instructions())
@pytest.mark.parametrize("strange", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("at", [0, 20, 36])
def test_what_is_not_finite_stays_in_its_row(strange, at, instructions):
    x = jax.random.normal(jax.random.key(0), (3, 37)).at[1, at].set(strange)
    codes, scale = quantize_rows.quantize_rows(x, jnp.int8, 37, instructions=instructions)
    rows = jax.jit(lambda x: formula(x, TOKEN, None))(x)
    np.testing.assert_array_equal(scale, rows.scale)
    np.testing.assert_array_equal(codes, rows.values)


def test_what_it_cannot_do_is_said():
    assert quantize_rows.unsupported(4096, jnp.int8, 4096, 0) is None
    assert "int8" in quantize_rows.unsupported(4096, jnp.float8_e4m3fn, 4096, 0)
    assert "each 128" in quantize_rows.unsupported(4096, jnp.int8, 128, 0)


@pytest.mark.parametrize("x", [jnp.ones((2, 3, 4)), jnp.ones((2, 4), jnp.int8)])
def test_what_the_handler_cannot_read_is_an_error_that_names_it(x):
    results = (jax.ShapeDtypeStruct((2, 4), jnp.int8), jax.ShapeDtypeStruct((2, 1), jnp.float32))
    library.register()
    with pytest.raises(Exception, match=r"qjax_cpu_quantize_rows: x .*\[2,"):
        jax.block_until_ready(jax.ffi.ffi_call(library.QUANTIZE_ROWS, results)(x, instructions=""))

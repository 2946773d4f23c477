"""A model that was not written for these tests: AbLang2's encoder, from the package `ablanx`, as it is installed."""

import ablang_jax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import linen as qlinen
from qjax.convert import quantize
from qjax.errors import QuantizeError
from qjax.qtensor import is_qtensor
from qjax.schemes import W4A16, W8A16

TOKENS = jnp.arange(24).reshape(2, 12) % ablang_jax.VOCAB
MASK = jnp.ones((2, 12)).at[1, 8:].set(0)


@pytest.fixture(scope="module")
def model_and_params():
    model = ablang_jax.Ablanx()
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS, MASK)["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name in ("scale", "bias"):
            return np.full(leaf.shape, name == "scale", np.float32)
        return rng.normal(size=leaf.shape, scale=leaf.shape[0] ** -0.5).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize("scheme, error", [(W8A16(), 0.06), (W4A16(group_size=32), 0.6)])
def test_an_installed_model_is_quantized_in_two_lines(model_and_params, scheme, error) -> None:
    model, params = model_and_params

    quantized = quantize(params, scheme)
    hidden, attention = jax.jit(lambda p: qlinen.apply(model, {"params": p}, TOKENS, MASK))(quantized)

    kernels = [leaf for leaf in jax.tree.leaves(quantized, is_leaf=is_qtensor) if is_qtensor(leaf)]
    assert len(kernels) == 6 * ablang_jax.N_BLOCK
    floats = jax.tree.map(lambda a: a.dequantize() if is_qtensor(a) else a, quantized, is_leaf=is_qtensor)
    apply = jax.jit(lambda p: model.apply({"params": p}, TOKENS, MASK))
    want, want_attention = apply(floats)
    np.testing.assert_allclose(hidden, want, atol=2e-4)
    np.testing.assert_allclose(attention, want_attention, atol=2e-5)
    base, _ = apply(params)
    # Measured: 0.04 and 0.41. Twelve blocks of random weights amplify what each of them rounds.
    assert 0 < jnp.linalg.norm(hidden - base) / jnp.linalg.norm(base) < error


def test_a_group_that_does_not_divide_says_which_do(model_and_params) -> None:
    _, params = model_and_params
    message = "^encoder_blocks_0/ffn_in/kernel: group_size=128 does not divide K=480; these do: 16, 32"
    with pytest.raises(QuantizeError, match=message):
        quantize(params, W4A16())

"""QTensors through Flax's own serialization: bytes and back, and targets that they do not fit."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from cases import SCHEMES, Case
from flax import serialization

import qjax
import qjax.linen
from qjax.errors import QTensorError

K, N = 256, 24


def weight(scheme: str, *shape: int) -> qjax.QTensor:
    return qjax.quantize_array(jax.random.normal(jax.random.key(0), shape or (K, N)), scheme)


def same(got: object, want: object) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


class BytesTest(parameterized.TestCase):
    @parameterized.parameters(*SCHEMES)
    def test_every_scheme_comes_back_bit_for_bit(self, scheme):
        w = Case(scheme, 2, K, N).qtensor()
        same(serialization.from_bytes(jax.tree.map(jnp.zeros_like, w), serialization.to_bytes(w)), w)

    def test_a_params_tree_comes_back_and_runs(self):
        model, x = nn.Dense(N), jnp.ones((2, K))
        params = qjax.quantize(model.init(jax.random.key(0), x), "w4a16")
        target = jax.eval_shape(lambda: params)
        again = serialization.from_bytes(target, serialization.to_bytes(params))
        same(again, params)
        np.testing.assert_array_equal(qjax.linen.apply(model, again, x), qjax.linen.apply(model, params, x))

    def test_stacks_and_kernels_of_many_axes_keep_their_shape(self):
        params = {"a": weight("w3a16:group_size=20", 3, 100, 8)}
        same(serialization.from_bytes(params, serialization.to_bytes(params)), params)


class MisfitTest(parameterized.TestCase):
    @parameterized.parameters(
        ("w4a16", "nf4:block_size=128", r"'scheme': 'w4a16:group_size=128'\} cannot be restored into QTensor\(nf4"),
        ("w4a16", "w4a16:symmetric=false", r"holds \['packed', 'scale', 'static'\]; expected .*'zero_point'"),
        ("w8a16", "fp8", "'scheme': 'w8a16'"),
    )
    def test_another_scheme_is_refused(self, stored, wanted, message):
        data = serialization.to_bytes(weight(stored))
        with pytest.raises(QTensorError, match=message):
            serialization.from_bytes(weight(wanted), data)

    def test_another_dtype_is_refused(self):
        data = serialization.to_bytes(weight("w4a16"))
        target = qjax.quantize_array(jnp.ones((K, N), jnp.bfloat16), "w4a16")
        with pytest.raises(QTensorError, match="'dtype': 'float32'"):
            serialization.from_bytes(target, data)

    def test_a_float_kernel_is_no_state(self):
        data = serialization.to_bytes(jnp.ones((K, N)))
        with pytest.raises(QTensorError, match="holds ndarray; expected"):
            serialization.from_bytes(weight("w4a16"), data)

    def test_arrays_of_other_shapes_are_refused(self):
        state = serialization.to_state_dict(weight("w4a16"))
        with pytest.raises(QTensorError, match=r"scale has shape \(24, 1\); .* ask for \(24, 2\)"):
            serialization.from_state_dict(weight("w4a16"), state | {"scale": np.ones((24, 1), np.float16)})

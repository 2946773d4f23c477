"""Kernels of any rank: the shapes they keep, stacks quantized layer by layer, and meshes they stay on."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.errors import QuantizeError, ShardingError
from qjax.flax_kernel import KernelUse, quantize_kernel
from qjax.quantize import quantize_array

SCHEME = "w4a16:group_size=32"


def kernel(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class QuantizeKernelTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("dense", (64, 24), KernelUse((0,))),
        ("embedding", (24, 64), KernelUse((1,))),
        ("heads out", (64, 4, 6), KernelUse((0,))),
        ("heads in", (4, 16, 24), KernelUse((0, 1))),
        ("contracted in the middle", (4, 64, 6), KernelUse((1,))),
    )
    def test_a_kernel_is_quantized_as_its_matrix_and_keeps_its_shape(self, shape, use):
        w = kernel(*shape)
        q = quantize_kernel(w, SCHEME, use)
        outputs = [a for a in range(len(shape)) if a not in use.contracted]
        k = int(np.prod([shape[a] for a in use.contracted]))
        matrix = w.transpose(*use.contracted, *outputs).reshape(k, -1)
        chex.assert_trees_all_equal(q.packed, quantize_array(matrix, SCHEME).packed)
        assert q.shape == shape
        np.testing.assert_allclose(q.dequantize(), w, atol=0.5)
        assert np.corrcoef(np.ravel(q.dequantize()), np.ravel(w))[0, 1] > 0.98

    @parameterized.parameters(
        "w4a16:group_size=32", "nvfp4", "nf4:double_quant=true", "w8a16:group_size=tensor", "mxfp8"
    )
    def test_a_stack_is_its_layers_one_by_one(self, scheme):
        w = kernel(2, 3, 64, 8)
        stacked = quantize_kernel(w, scheme, KernelUse((2,), (0, 1)))
        assert stacked.shape == w.shape
        for i, j in np.ndindex(2, 3):
            one = jax.tree.map(lambda a, i=i, j=j: a[i, j], stacked)
            chex.assert_trees_all_equal(one, quantize_array(w[i, j], scheme))

    def test_scales_of_a_stack_widen_for_the_layer_that_needs_it(self):
        w = jnp.stack([kernel(64, 8), kernel(64, 8) * 1e-6])  # whose scales are subnormal in float16
        stacked = quantize_kernel(w, SCHEME, KernelUse((1,), (0,)))
        assert stacked.scale.dtype == jnp.float32
        np.testing.assert_array_equal(stacked.dequantize()[0], quantize_array(w[0], SCHEME).dequantize())
        np.testing.assert_array_equal(stacked.dequantize()[1], quantize_array(w[1], SCHEME).dequantize())

    def test_numpy_kernels_do(self):
        w = np.asarray(kernel(3, 64, 8))
        chex.assert_trees_all_equal(
            quantize_kernel(w, SCHEME, KernelUse((1,), (0,))),
            quantize_kernel(jnp.asarray(w), SCHEME, KernelUse((1,), (0,))),
        )

    def test_a_bad_layer_of_a_stack_is_named(self):
        w = kernel(2, 64, 8).at[1, 3, 4].set(jnp.inf)
        with self.assertRaisesRegex(QuantizeError, r"layers/up/kernel\[1\]: 1 of 512 weights are NaN or inf"):
            quantize_kernel(w, SCHEME, KernelUse((1,), (0,)), where="layers/up/kernel")

    @parameterized.named_parameters(
        ("stack inside", (64, 3, 8), KernelUse((0,), (1,)), NotImplementedError, "stacked over axes .1,."),
        ("both", (64, 8), KernelUse((0,), (0,)), QuantizeError, "no axis may be both"),
        ("no output", (64, 8), KernelUse((0, 1)), QuantizeError, "one left for outputs"),
        ("nothing contracted", (64, 8), KernelUse(()), QuantizeError, "one has to be contracted"),
        ("no such axis", (64, 8), KernelUse((2,)), QuantizeError, "axis=.2,. is no set of axes of shape .64, 8."),
        ("twice", (64, 8), KernelUse((0, -2)), QuantizeError, "is no set of axes"),
        ("empty", (64, 0), KernelUse((0,)), QuantizeError, "holds no weights"),
    )
    def test_axes_that_do_not_fit_are_refused(self, shape, use, error, message):
        with self.assertRaisesRegex(error, f"^up: .*{message}"):
            quantize_kernel(jnp.zeros(shape), SCHEME, use, where="up")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_kernel_cut_over_a_mesh_stays_cut(kind: AxisType) -> None:
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind, kind))
    w = jax.device_put(kernel(3, 192, 16), NamedSharding(mesh, P(None, "a", "b")))
    q = quantize_kernel(w, SCHEME, KernelUse((1,), (0,)))
    assert q.packed.sharding.spec == P(None, "b", "a", None)
    assert q.k_piece == (96, 128)
    whole = quantize_kernel(jnp.asarray(np.asarray(w)), SCHEME, KernelUse((1,), (0,)))
    gathered = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), q)
    np.testing.assert_array_equal(gathered.dequantize(), whole.dequantize())


def test_a_shard_that_cuts_a_group_is_named() -> None:
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    w = jax.device_put(kernel(128, 16), NamedSharding(mesh, P("a")))
    with pytest.raises((QuantizeError, ShardingError), match="up: a piece of K=16 cuts groups of 32"):
        quantize_kernel(w, SCHEME, KernelUse((0,)), where="up")

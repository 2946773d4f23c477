"""Boxed kernels: Flax's own tools read, unbox, slice and place the arrays of a QTensor by the kernel's names."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from flax.core import meta
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax import linen as qlinen
from qjax.convert import quantize
from qjax.linen import QDense, QDenseGeneral
from qjax.qtensor import is_qtensor
from qjax.schemes import W4A16

KEY = jax.random.key(0)
W4 = W4A16(group_size=32)
INIT = nn.initializers.lecun_normal()


def boxed_dense(features: int, names: tuple) -> nn.Dense:
    return nn.Dense(features, kernel_init=nn.with_partitioning(INIT, names))


class Mlp(nn.Module):
    """Two boxed layers, cut the way of tensor parallelism."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(boxed_dense(512, (None, "model"))(x))
        return boxed_dense(256, ("model", None))(x)


X = jax.random.normal(KEY, (4, 256))
PARAMS = Mlp().init(KEY, X)


def test_the_names_of_a_kernel_become_those_of_its_arrays() -> None:
    specs = nn.get_partition_spec(quantize(PARAMS, W4))["params"]
    assert specs["Dense_0"]["kernel"].packed == P("model", None, None)
    assert specs["Dense_0"]["kernel"].scale == P("model", None)
    assert specs["Dense_1"]["kernel"].packed == P(None, "model", None)
    assert specs["Dense_1"]["kernel"].scale == P(None, "model")


def test_a_scale_that_all_of_k_shares_is_not_cut_along_k() -> None:
    specs = nn.get_partition_spec(quantize(PARAMS, "w8a16"))["params"]
    assert specs["Dense_1"]["kernel"].packed == P(None, "model")
    assert specs["Dense_1"]["kernel"].scale == P(None, None)


def test_unboxed_params_are_those_quantized_without_boxes() -> None:
    ours = nn.unbox(quantize(PARAMS, W4))
    plain = quantize(nn.unbox(PARAMS), W4)
    assert jax.tree.structure(ours) == jax.tree.structure(plain)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_boxed_params_are_placed_by_get_sharding_and_run(kind: AxisType) -> None:
    mesh = jax.make_mesh((4,), ("model",), axis_types=(kind,))
    boxed = quantize(PARAMS, W4, Mlp(), (X,))
    placed = nn.unbox(jax.device_put(boxed, nn.get_sharding(boxed, mesh)))
    kernel = placed["params"]["Dense_1"]["kernel"]
    assert kernel.packed.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "model", None)), 3)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda v, x: qlinen.apply(Mlp(), v, x))(placed, jax.device_put(X, NamedSharding(mesh, P())))
    want = qlinen.apply(Mlp(), nn.unbox(boxed), X)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_boxed_params_run_as_they_are() -> None:
    got = qlinen.apply(Mlp(), quantize(PARAMS, W4), X)
    np.testing.assert_allclose(got, qlinen.apply(Mlp(), nn.unbox(quantize(PARAMS, W4)), X), rtol=1e-5, atol=1e-5)


def test_a_scan_takes_the_name_of_the_stack_from_every_box() -> None:
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return x + boxed_dense(256, ("in", "out"))(x), None

    model = nn.scan(
        Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()  # fmt: skip
    params = model.init(KEY, X, None)
    boxed = quantize(params, W4, model, (X, None))
    assert nn.get_partition_spec(boxed)["params"]["Dense_0"]["kernel"].packed == P("layers", "out", "in", None)
    got, _ = qlinen.apply(model, boxed, X, None)
    plain = jax.tree.map(lambda a: a.dequantize() if is_qtensor(a) else a, nn.unbox(boxed), is_leaf=is_qtensor)
    np.testing.assert_allclose(got, model.apply(plain, X, None)[0], rtol=1e-5, atol=1e-4)


def test_logical_names_resolve_by_rules() -> None:
    init = nn.with_logical_partitioning(INIT, ("embed", "heads", "head_dim"))
    layer = nn.DenseGeneral((4, 16), kernel_init=init, use_bias=False)
    boxed = quantize(layer.init(KEY, X), W4, layer, (X,))
    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), (("embed", None), ("heads", "model")))
    assert specs["params"]["kernel"].packed == P("model", None, None)


@pytest.mark.parametrize("make", [QDense, QDenseGeneral])
def test_our_layers_box_what_their_initializer_boxes(make) -> None:
    layer = make(8, kernel_init=nn.with_partitioning(INIT, ("k", "n")), scheme=W4)
    variables = layer.init(KEY, X)
    assert nn.get_partition_spec(variables)["params"]["kernel"].packed == P("n", "k", None)
    kernel = nn.unbox(variables)["params"]["kernel"]
    np.testing.assert_allclose(layer.apply(variables, X), X @ kernel.dequantize(), atol=1e-4)


def test_another_kind_of_box_is_refused() -> None:
    class Box(struct.PyTreeNode, meta.AxisMetadata):
        value: jax.Array

        def unbox(self):
            return self.value

        def replace_boxed(self, val):
            return self.replace(value=val)

        def add_axis(self, index, params):
            return self

        def remove_axis(self, index, params):
            return self

    with pytest.raises(NotImplementedError, match="^a/kernel: boxed in Box; nn.Partitioned and nn.Logic"):
        quantize({"a": {"kernel": Box(jnp.ones((64, 8)))}}, W4)

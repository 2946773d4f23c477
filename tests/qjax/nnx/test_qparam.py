"""QParams on a mesh: the kernel's one spec becomes one for each array."""

import chex
import jax
import jax.numpy as jnp
import pytest
from absl.testing import parameterized
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qjax.errors import ShardingError
from qjax.nnx import QLinear, quantize

P = PartitionSpec
MESHES = (AxisType.Auto, AxisType.Explicit)


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    """Two by four devices."""
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


class Block(nnx.Module):
    """An MLP cut over `model`: its first kernel along N, its second along K, in shards of 64 < 128."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        def init(*spec: str | None) -> nnx.Initializer:
            return nnx.with_partitioning(nnx.initializers.lecun_normal(), spec)

        self.up = nnx.Linear(128, 256, kernel_init=init(None, "model"), rngs=rngs)
        self.down = nnx.Linear(256, 128, kernel_init=init("model", None), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.relu(self.up(x)))


def quantized() -> Block:
    """A block of int4 in groups of 32."""
    return quantize(Block(nnx.Rngs(0)), "w4a16:group_size=32")


def single_device(x: jax.Array) -> jax.Array:
    """The block's result where nothing is cut."""
    with nnx.use_eager_sharding(False):
        return quantized()(x)


class ShardingTest(parameterized.TestCase):
    @parameterized.product(kind=MESHES, jitted=(True, False))
    def test_arrays_lie_where_the_kernel_lay(self, kind: AxisType, jitted: bool) -> None:
        with jax.set_mesh(mesh_of(kind)):
            model = nnx.jit(quantized)() if jitted else quantized()
        up, down = model.up.kernel.get_value(), model.down.kernel.get_value()
        assert down.k_piece == (64, 128)

        def shard(a: jax.Array) -> tuple[int, ...]:
            return a.sharding.shard_shape(a.shape)

        assert (shard(up.packed), shard(up.scale)) == ((64, 1, 16), (64, 4))
        assert (shard(down.packed), shard(down.scale)) == ((128, 1, 16), (128, 2))

    @parameterized.parameters(*MESHES)
    def test_a_cut_model_computes_what_one_device_does(self, kind: AxisType) -> None:
        x = jax.random.normal(jax.random.key(1), (8, 128))
        expected = single_device(x)
        mesh = mesh_of(kind)
        with jax.set_mesh(mesh):
            x = jax.device_put(x, NamedSharding(mesh, P("data")))
            y = nnx.jit(lambda m, x: m(x))(quantized(), x)
        chex.assert_trees_all_close(jax.device_get(y), jax.device_get(expected), rtol=1e-4, atol=1e-5)

    def test_flax_derives_specs_and_shardings_for_each_array(self) -> None:
        mesh = mesh_of(AxisType.Auto)
        with jax.set_mesh(mesh):
            state = nnx.state(quantized())
        specs = nnx.get_partition_spec(state)["down"]["kernel"].get_value()
        assert (specs.packed, specs.scale) == (P(None, "model", None), P(None, "model"))
        named = nnx.get_named_sharding(state, mesh)
        assert named["up"]["kernel"].get_value().packed == NamedSharding(mesh, P("model", None, None))
        chex.assert_trees_all_equal(jax.device_put(state, named), state)

    @parameterized.parameters(*MESHES)
    def test_abstract_models_carry_a_sharding_for_each_array(self, kind: AxisType) -> None:
        with jax.set_mesh(mesh_of(kind)):
            abstract = nnx.as_abstract(nnx.eval_shape(quantized))
        down = abstract.down.kernel.get_value()
        assert down.packed.shape == (128, 4, 16) and down.packed.sharding.spec == P(None, "model", None)

    def test_a_kernel_that_was_put_on_a_mesh_without_metadata_stays_there(self) -> None:
        linear = nnx.Linear(256, 64, rngs=nnx.Rngs(0))
        linear.kernel.set_value(jax.device_put(linear.kernel[...], NamedSharding(mesh_of(AxisType.Auto), P("model"))))
        kernel = quantize(linear, "w8a16").kernel.get_value()
        assert kernel.packed.sharding.shard_shape(kernel.packed.shape) == (64, 64)

    def test_a_shard_that_cuts_a_group_is_an_error(self) -> None:
        with jax.set_mesh(mesh_of(AxisType.Auto)), pytest.raises(ValueError, match="groups of 128"):
            quantize(Block(nnx.Rngs(0)), {"down": "w4a16:group_size=128"})
        with jax.set_mesh(mesh_of(AxisType.Auto)), pytest.raises(ShardingError, match="cuts scale groups of 128"):
            quantize(Block(nnx.Rngs(0)), {"up": "fp8:granularity=block"})

    def test_stacked_layers_gain_the_axis_that_vmap_names(self) -> None:
        metadata = {"out_sharding": (None, "model")}

        def make(key: jax.Array) -> QLinear:
            return QLinear(64, 32, scheme="w8a16", kernel_metadata=metadata, rngs=nnx.Rngs(key))

        with jax.set_mesh(mesh_of(AxisType.Auto)):
            stacked = nnx.vmap(make, transform_metadata={nnx.PARTITION_NAME: None})(
                jax.random.split(jax.random.key(0), 3)
            )
        assert stacked.kernel.get_metadata("out_sharding") == (None, None, "model")
        assert nnx.get_partition_spec(nnx.state(stacked))["kernel"].get_value().packed == P(None, "model", None)
        assert jnp.shape(stacked.kernel.get_value().packed) == (3, 32, 64)

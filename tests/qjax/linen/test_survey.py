"""What is learned of a model's kernels by tracing it on shapes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl.testing import parameterized

from qjax.flax_kernel import KernelUse
from qjax.linen.survey import survey

KEY = jax.random.key(0)
STACK = dict(variable_axes={"params": 0}, split_rngs={"params": True})


class SurveyTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("dense", nn.Dense(8), (2, 8), "kernel", KernelUse((0,))),
        ("to heads", nn.DenseGeneral((8, 8)), (2, 8), "kernel", KernelUse((0,))),
        ("from heads", nn.DenseGeneral(8, axis=(-2, -1)), (2, 8, 8), "kernel", KernelUse((0, 1))),
        ("batched", nn.DenseGeneral(8, batch_dims=(0,)), (8, 2, 8), "kernel", KernelUse((1,), (0,))),
        ("stacked", nn.vmap(nn.Dense, **STACK)(8), (8, 2, 8), "kernel", KernelUse((1,), (0,))),
        (
            "stacked twice",
            nn.vmap(nn.vmap(nn.Dense, **STACK), **STACK)(8),
            (8, 8, 2, 8),
            "kernel",
            KernelUse((2,), (0, 1)),
        ),
        ("einsum", nn.Einsum((8, 8, 8), "BTD,NDH->BTNH"), (8, 8, 8), "kernel", KernelUse((1,))),
        ("experts", nn.Einsum((8, 8, 8), "EBD,EDF->EBF"), (8, 8, 8), "kernel", KernelUse((1,), (0,))),
    )
    def test_kernels_of_one_shape_are_told_apart(self, model, shape, path, use):
        x = jnp.ones(shape)
        variables = jax.eval_shape(model.init, KEY, x)
        self.assertEqual(survey(model, variables, (x,), {}), {path: {use}})

    def test_an_embedding_is_contracted_where_it_meets_a_query(self):
        model, ids = nn.Embed(8, 8), jnp.arange(3)
        variables = model.init(KEY, ids)
        self.assertEqual(survey(model, variables, ids, {}), {"embedding": {KernelUse((1,))}})
        query = jnp.ones((2, 8))
        self.assertEqual(survey(model, variables, (query,), dict(method="attend")), {"embedding": {KernelUse((1,))}})

    def test_paths_are_those_of_the_params_inside_scan_and_remat(self):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, None]:
                x = nn.remat(nn.Dense)(8, name="up")(x)
                x = nn.BatchNorm(use_running_average=not train)(x)
                return nn.Conv(8, (1,), name="conv")(x), None

        class Model(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
                axes = {"params": 0, "batch_stats": 0}
                stack = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=8, in_axes=nn.broadcast)
                return stack(name="layers")(x, train)[0]

        x = jnp.ones((2, 8))
        variables = Model().init(KEY, x, train=False)
        want = {"layers/up/kernel": {KernelUse((1,), (0,))}}
        self.assertEqual(survey(Model(), variables, (x,), dict(train=False)), want)
        self.assertEqual(survey(Model(), variables, (x,), dict(train=True, mutable=["batch_stats"])), want)

    def test_what_is_never_called_is_used_in_no_way(self):
        class Model(nn.Module):
            def setup(self):
                self.used, self.idle, self.conv = nn.Dense(8), nn.Dense(8), nn.Conv(8, (1,))

            def __call__(self, x: jax.Array) -> jax.Array:
                y = self.conv(self.used(x))
                return self.idle(y) if self.is_initializing() else y

        x = jnp.ones((2, 8))
        want = {"used/kernel": {KernelUse((0,))}, "idle/kernel": set()}
        self.assertEqual(survey(Model(), Model().init(KEY, x), x, {}), want)

    def test_boxed_params_do_too(self):
        layer = nn.Dense(8, kernel_init=nn.with_partitioning(nn.initializers.ones, ("a", "b")))
        x = jnp.ones((2, 8))
        self.assertEqual(survey(layer, layer.init(KEY, x), x, {}), {"kernel": {KernelUse((0,))}})

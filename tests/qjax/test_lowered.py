"""Functions lowered once: as often as they differ, and the same values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax import lowered

CPU = "cpu"


@pytest.fixture(autouse=True)
def nothing_lowered_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowered, "_LOWERED", {})


class Counted:
    """Its argument's double, and how often it was traced."""

    times = 0

    def __call__(self, a: jax.Array) -> jax.Array:
        self.times += 1
        return 2 * a


def test_calls_alike_are_traced_once_and_others_anew() -> None:
    f, a = Counted(), jnp.arange(4.0)

    def both(a: jax.Array) -> jax.Array:
        return lowered.call_lowered(f, "double", [a], CPU) + lowered.call_lowered(f, "double", [a + 1], CPU)

    np.testing.assert_array_equal(jax.jit(both)(a), 4 * a + 2)
    assert f.times == 1
    lowered.call_lowered(f, "double", [a.astype("bfloat16")], CPU)
    lowered.call_lowered(f, "another", [a], CPU)
    assert len(lowered._LOWERED) == 3


@pytest.mark.parametrize("name", ["backend", "precision"])
def test_what_the_context_says_is_part_of_the_key(name: str) -> None:
    f, a = Counted(), jnp.arange(4.0)
    lowered.call_lowered(f, "double", [a], CPU)
    with qjax.use(backend="xla") if name == "backend" else jax.default_matmul_precision("float32"):
        lowered.call_lowered(f, "double", [a], CPU)
    assert len(lowered._LOWERED) == 2
    lowered.call_lowered(f, "double", [a], CPU)
    assert len(lowered._LOWERED) == 2


@pytest.mark.slow
def test_products_alike_on_a_mesh_are_lowered_once() -> None:
    mesh = jax.make_mesh((2,), ("t",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel = jax.random.normal(jax.random.key(0), (256, 128))
    ws = [qjax.sharding.shard(qjax.quantize_array(kernel + i, "w4a16"), mesh, jax.P(None, "t")) for i in range(4)]
    x = jax.random.normal(jax.random.key(1), (3, 256))
    y = jax.jit(lambda x, ws: sum(qjax.matmul(x, w) for w in ws))(x, ws)
    np.testing.assert_allclose(y, sum(qjax.matmul(x, w) for w in ws), rtol=1e-5, atol=1e-3)
    assert len(lowered._LOWERED) == 1

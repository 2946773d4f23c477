"""Where batches wait between the pieces of a model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qjax
import qjax.nnx
from qjax.calibration.walk import fetched, stored


@pytest.mark.parametrize(
    ("share", "kind"), [(None, "device"), (100, "device"), (95, "pinned_host"), (0, "pinned_host")]
)
def test_a_batch_beyond_its_share_waits_with_the_host(share, kind):
    frontier = {3: jnp.arange(8.0), 5: jnp.ones((4, 4))}
    waiting = stored(frontier, share)
    assert {a.sharding.memory_kind for a in waiting.values()} == {kind}
    back = fetched(waiting)
    for slot, a in frontier.items():
        assert back[slot].sharding == a.sharding
        np.testing.assert_array_equal(back[slot], a)


def test_weights_are_the_same_bits_however_little_the_devices_hold():
    batches = [jax.random.normal(jax.random.key(i), (64, 16)) for i in range(3)]
    kernels = []
    for device_bytes in (None, 64 * 16 * 4, 0):
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(nnx.Linear(16, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 16, rngs=rngs))
        qjax.calibrate(
            model, batches, "gptq:outputs=float", "w4a16:group_size=16", device_bytes=device_bytes, progress=False
        )
        kernels.append(model.layers[2].kernel.get_value())
    for other in kernels[1:]:
        for a, b in zip(jax.tree.leaves(kernels[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(a, b)

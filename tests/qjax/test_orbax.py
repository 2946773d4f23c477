"""QTensors in an orbax checkpoint: saved, and restored bit for bit into a target of shapes."""

import tempfile
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl.testing import parameterized
from cases import SCHEMES, Case
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import qjax
from qjax.qtensor import QTensor


def bits(a: jax.Array) -> np.ndarray:
    return np.asarray(a).view(np.uint8)


def same(got: object, want: object) -> None:
    """Equal trees, static fields and dtypes included, bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(bits(a.reshape(-1)), bits(b.reshape(-1)))


class OrbaxTest(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name).resolve() / "checkpoint"

    def saved(self, tree: object, target: object) -> object:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self.path, tree)
            checkpointer.wait_until_finished()
            return checkpointer.restore(self.path, target)

    def test_weights_of_every_scheme_come_back_bit_for_bit(self):
        tree = {
            scheme: {"kernel": Case(scheme, 2, 256, 8).qtensor(), "bias": np.ones(8, np.float32)} for scheme in SCHEMES
        }
        got = self.saved(tree, jax.eval_shape(lambda: tree))
        same(got, tree)
        assert all(isinstance(layer["kernel"], QTensor) for layer in got.values())

    def test_a_stack_with_padding_and_an_order_of_x_comes_back(self):
        w = qjax.quantize_array(jax.random.normal(jax.random.key(0), (3, 100, 8)), "w3a16:group_size=20")
        same(self.saved({"w": w}, jax.eval_shape(lambda: {"w": w})), {"w": w})

    def test_a_target_on_a_mesh_is_restored_onto_it(self):
        mesh = jax.make_mesh((8,), ("t",), axis_types=(AxisType.Auto,))
        w = Case("w4a16:group_size=16,symmetric=false", 2, 256, 64).qtensor()
        placed = qjax.sharding.shardings(w, mesh, P(None, "t"))
        target = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), w, placed)
        got = self.saved({"w": w}, {"w": target})["w"]
        same(got, w)
        assert all(a.sharding == s for a, s in zip(jax.tree.leaves(got), jax.tree.leaves(placed), strict=True))

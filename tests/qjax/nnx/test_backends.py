"""Layers are given kernels by their paths, and `explain` shows which."""

import jax.numpy as jnp
import pytest
from flax import nnx

import qjax
from qjax.errors import BackendError, RuleError

CONFIG = "triton.matmul_packed:tile_m=16,tile_n=64,split_k=1,warps=4,stages=3"


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(256, 128, rngs=rngs)
        self.down = nnx.Linear(128, 256, rngs=rngs)

    def __call__(self, x):
        return self.down(self.up(x))


class Model(nnx.Module):
    def __init__(self) -> None:
        self.blocks = nnx.List([Block(nnx.Rngs(i)) for i in range(2)])


@pytest.fixture
def model() -> Model:
    return qjax.nnx.quantize(Model(), "w4a16")


def test_the_first_pattern_that_matches_a_path_counts(model: Model):
    taken = qjax.nnx.set_backends(model, {"blocks/0/up": CONFIG, ".*up": "triton", "blocks.1.down": "xla"})
    assert taken == {"blocks/0/up": CONFIG, "blocks/1/up": "triton", "blocks/1/down": "xla"}
    assert model.blocks[0].up.backend == CONFIG and model.blocks[0].down.backend is None
    rows = {row.layer: row for row in qjax.explain(model, 16, device="H200", x_dtype="bfloat16").rows}
    first = rows["blocks.0.up"]
    assert first.kernel == "triton.matmul_packed"
    assert "asked for in split_k=1, stages=3, tile_m=16, tile_n=64, warps=4" in first.reason
    assert rows["blocks.1.down"].kernel.startswith("xla.")
    assert rows["blocks.0.down"].reason.startswith("fastest of")


def test_a_forward_kernel_leaves_gradients_to_its_family(model: Model):
    qjax.nnx.set_backends(model, {".*": "xla.reference"})
    block = model.blocks[0]
    assert nnx.grad(lambda x: block(x).sum())(jnp.ones((2, 256))).shape == (2, 256)


def test_what_is_wrong_with_a_mapping_is_said(model: Model):
    with pytest.raises(RuleError, match="'blocks/2/up' is the first match of no quantized layer; .*blocks/0/down"):
        qjax.nnx.set_backends(model, {"blocks/2/up": "triton"})
    with pytest.raises(RuleError, match="no regular expression"):
        qjax.nnx.set_backends(model, {"(": "triton"})
    with pytest.raises(BackendError, match="unknown backend 'quick'"):
        qjax.nnx.set_backends(model, {".*": "quick"})


def test_a_configuration_that_a_kernel_does_not_take_is_said(model: Model):
    qjax.nnx.set_backends(model, {"blocks/0/up": "triton.matmul_packed:tile_m=16,blocks=2"})
    with pytest.raises(BackendError, match="takes tile_m, tile_n, split_k, warps, stages"):
        qjax.explain(model, 16, device="H200", x_dtype="bfloat16")
    qjax.nnx.set_backends(model, {"blocks/0/up": "triton.dequantize_dot:tile_m=16"})
    with pytest.raises(BackendError, match="it has none for 32 x 256 x 128"):
        qjax.explain(model, 32, device="H200", x_dtype="bfloat16")
    qjax.nnx.set_backends(model, {"blocks/0/up": "triton.no_such_kernel"})
    with pytest.raises(BackendError, match=r"unknown backend 'triton.no_such_kernel'.* kernels are xla.reference"):
        qjax.explain(model, 16, device="H200", x_dtype="bfloat16")
    qjax.nnx.set_backends(model, {"blocks/0/up": "triton.matmul_tall"})
    with pytest.raises(BackendError, match="triton.matmul_tall: it is for 65 or more rows of x, here are 16"):
        qjax.explain(model, 16, device="H200", x_dtype="bfloat16")

"""Calibration that is interrupted and goes on: the weights are those of a run that was not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_llama import small_llama

import qjax
import qjax.linen
import qjax.nnx
from qjax.calibration import calibrate as module
from qjax.checkpoints import write
from qjax.errors import CalibrationError, CheckpointError

SCHEME = "w4a16:group_size=16,symmetric=false"


class Interrupt(BaseException):
    """As a user's, which no code of ours should catch."""


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm(name="norm")(x)
        return x + nn.Dense(16, name="down")(nn.silu(nn.Dense(32, name="gate")(h)) * nn.Dense(32, name="up")(h)), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(8, name="last")(stack(name="blocks")(x, None)[0])


@pytest.fixture(scope="module")
def model():
    x = jax.random.normal(jax.random.key(0), (2, 64, 16)) @ jax.random.normal(jax.random.key(1), (16, 16))
    return Model(), Model().init(jax.random.key(2), x[0])["params"], list(x)


@pytest.fixture
def after(monkeypatch):
    """`after(n)`: the next calls quantize n layers and are interrupted; they return how many they began."""

    def interrupt(count):
        seen, real = [], module.quantize_layer

        def counted(layer, *rest):
            seen.append(layer.where)
            if len(seen) > count:
                raise Interrupt
            return real(layer, *rest)

        monkeypatch.setattr(module, "quantize_layer", counted)
        return seen

    yield interrupt
    monkeypatch.undo()


def same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("recipe", "done"),
    [
        ("gptq", 6),
        pytest.param("gptq:order=static,passes=1,outputs=float", 4, marks=pytest.mark.slow),
        pytest.param("awq", 2, marks=pytest.mark.slow),
        ("hqq", 0),
    ],
)
def test_an_interrupted_run_goes_on_and_makes_the_same_weights(model, after, monkeypatch, tmp_path, recipe, done):
    linen, params, batches = model

    def run(**options):
        return qjax.calibrate(linen, batches, recipe, SCHEME, params=params, **options)

    alone = run()
    began = after(done)
    with pytest.raises(Interrupt):
        run(resume=tmp_path / "state")
    monkeypatch.undo()
    again = after(100)
    resumed = run(resume=tmp_path / "state")
    same(resumed, alone)
    # What was begun is made anew, and gate and up are one stage.
    assert not {*again} & {*began[: max(done - 1, 0)]}
    assert len({*began, *again}) == 7


def test_a_write_that_is_interrupted_leaves_no_stage(model, monkeypatch, tmp_path):
    linen, params, batches = model

    def run(**options):
        return qjax.calibrate(linen, batches, "gptq", SCHEME, params=params, **options)

    written, real = [], write._write_tensors

    def half(stream, *rest):
        written.append(stream)
        if len(written) == 3:
            stream.write(b"half")
            raise Interrupt
        real(stream, *rest)

    monkeypatch.setattr(write, "_write_tensors", half)
    with pytest.raises(Interrupt):
        run(resume=tmp_path)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000", "00001"]
    same(run(resume=tmp_path), run())


def test_a_finished_journal_needs_no_layer_to_be_quantized(model, after, tmp_path):
    linen, params, batches = model
    first = qjax.calibrate(linen, batches, "gptq", SCHEME, params=params, resume=tmp_path)
    after(0)
    same(qjax.calibrate(linen, batches, "gptq", SCHEME, params=params, resume=tmp_path), first)


def test_factors_that_an_earlier_layer_took_up_are_in_the_journal(model, after, tmp_path):
    linen, params, batches = model
    first = qjax.calibrate(linen, batches, "awq", SCHEME, params=params, resume=tmp_path)
    assert first["blocks"]["down"]["kernel"].input_scale is None
    after(0)
    same(qjax.calibrate(linen, batches, "awq", SCHEME, params=params, resume=tmp_path), first)


@pytest.mark.slow
def test_an_nnx_model_is_left_alone_by_what_was_interrupted(after, monkeypatch, tmp_path):
    ids = [jax.random.randint(jax.random.key(i), (2, 16), 0, 32) for i in range(2)]
    llama = small_llama(hidden=32)
    before = jax.tree.leaves(llama(ids[0]))
    after(4)
    with pytest.raises(Interrupt):
        qjax.calibrate(llama, ids, "awq", "w4a16:group_size=16", resume=tmp_path)
    same(jax.tree.leaves(llama(ids[0])), before)
    monkeypatch.undo()
    alone = qjax.calibrate(small_llama(hidden=32), ids, "awq", "w4a16:group_size=16")
    resumed = qjax.calibrate(llama, ids, "awq", "w4a16:group_size=16", resume=tmp_path)
    same(jax.tree.leaves(resumed(ids[0])), jax.tree.leaves(alone(ids[0])))
    np.testing.assert_array_equal(resumed.layers[0].input_layernorm.weight, alone.layers[0].input_layernorm.weight)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(recipe="gptq:clip=false"), "recipe"),
        (dict(scheme="w3a16:group_size=16"), "layers"),
        (dict(scale=1.0001), "params"),
        (dict(shift=1), "batches"),
        (dict(partial_groups=True), "partial_groups"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_of_another_calibration_is_refused(model, tmp_path, change, named):
    linen, params, batches = model

    def run(recipe="gptq", scheme=SCHEME, scale=1.0, shift=0, **options):
        changed = jax.tree.map(lambda a: a * jnp.float32(scale), params)
        rolled = [jnp.roll(x, shift, axis=0) for x in batches]
        return qjax.calibrate(linen, rolled, recipe, scheme, params=changed, resume=tmp_path, **options)

    run()
    with pytest.raises(CalibrationError, match=f"00000: is of another calibration, with other .*{named}"):
        run(**change)


def test_a_stage_that_was_damaged_is_an_error(model, tmp_path):
    linen, params, batches = model
    qjax.calibrate(linen, batches, "gptq", SCHEME, params=params, resume=tmp_path)
    file = tmp_path / "00001" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="00001"):
        qjax.calibrate(linen, batches, "gptq", SCHEME, params=params, resume=tmp_path)


def test_weights_that_are_cut_over_a_mesh_are_resumed_too(after, monkeypatch, tmp_path):
    model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(16)])
    x = jax.random.normal(jax.random.key(0), (64, 16))
    params = model.init(jax.random.key(1), x)["params"]
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    columns = NamedSharding(mesh, P(None, "model"))
    params = jax.tree.map(lambda a: jax.device_put(a, columns) if a.ndim == 2 else a, params)

    def run(**options):
        return qjax.calibrate(model, [x], "gptq:order=static", SCHEME, params=params, **options)

    alone = run()
    after(1)
    with pytest.raises(Interrupt):
        run(resume=tmp_path)
    monkeypatch.undo()
    same(run(resume=tmp_path), alone)

"""A step of one token by kernels whose products end in what comes next, in NumPy, against the layers' own methods."""

from collections.abc import Iterator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_llama import small_llama

import qjax
from pallas_kernels.mosaic import layer_steps
from qjax.models import Llama, decode_layers, generate, merge
from qjax.models.decode_layers import MOST_ROWS, plain_because

pytestmark = pytest.mark.slow

PROMPTS = [[1, 2, 3], [4]]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """As if on an H200, for these kernels; collects how many products each call has."""
    calls: list[int] = []

    def run(*operands: object, **static: float) -> tuple[jax.Array, jax.Array | None]:
        calls.append(len(operands[2]))
        return layer_steps.rest_of_layer(*operands, **(static | {"sms": 3}), interpret=True)

    module = SimpleNamespace(rest_of_layer=run, Stored=layer_steps.Stored)
    h200 = qjax.devices.find_device("h200")
    monkeypatch.setattr(decode_layers, "load_if_present", lambda row: module)
    monkeypatch.setattr(decode_layers, "devices", SimpleNamespace(current=lambda: h200))
    yield calls


def made(scheme: str = "w4a16:group_size=16", *, merged: bool = True, layers: int = 2, **options: object) -> Llama:
    config = small_llama(hidden=32, layers=layers, **options).config
    model = qjax.nnx.quantize(Llama(config, dtype="bfloat16", rngs=nnx.Rngs(0)), scheme)
    return merge(model) if merged else model


def logits(model: Llama) -> np.ndarray:
    """Of the second step after two prompts of three tokens."""
    cache = model.empty_cache(2, 16)
    _, cache = model(jnp.arange(6).reshape(2, 3), cache)
    _, cache = model(jnp.array([[7], [8]]), cache)
    return np.asarray(model(jnp.array([[9], [10]]), cache)[0], np.float64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scheme": "w4a16:group_size=16,symmetric=false", "qkv_bias": True},
        {"scheme": "nvfp4", "qk_norm": True, "layers": 1},
    ],
    ids=str,
)
def test_a_step_is_that_of_the_layers(options: dict, interpreted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(**options)
    found = logits(model)
    layers = len(model.layers)
    assert interpreted == ([4] * (layers - 1) + [3]) * 2
    monkeypatch.setattr(decode_layers, "plain_because", lambda *_: "the layers' own methods are wanted")
    plain = logits(model)
    assert len(interpreted) == 2 * layers
    # Both round at every step, the layers' methods more often.
    assert np.linalg.norm(found - plain) < 0.02 * np.linalg.norm(plain)


def test_text_is_written_under_jit(interpreted: list[int]) -> None:
    tokens = generate(made(), PROMPTS, max_new_tokens=5)
    assert [len(row) for row in tokens] == [5, 5]
    assert interpreted


def test_why_the_layers_run(interpreted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def why(model: Llama, shape: tuple[int, int] = (1, 1), cached: bool = True) -> str:
        return plain_because(model, shape, cached) or ""

    assert why(made()) == ""
    assert f"here are {MOST_ROWS + 1} x 1" in why(made(), (MOST_ROWS + 1, 1))
    assert "here are 1 x 2" in why(made(), (1, 2))
    assert "to a cache" in why(made(), cached=False)
    assert "another gate" in why(made(hidden_act="gelu"))
    assert "parts are not merged" in why(made(merged=False))
    assert "o_proj: of bytes it takes K and groups by 64, not 32" in why(made("w8a16"))
    assert "faster up to 8 rows; here are 9" in why(made("w8a16"), (9, 1))
    assert "its x is int8" in why(made("w4a8_int8:group_size=16"))
    model = made()
    model.layers[1].mlp.down_proj.backend = "xla"
    assert "layers.1.mlp.down_proj: it has a backend (xla)" in why(model)
    with qjax.use(backend="triton"):
        assert why(made()) == "triton was asked for"
    monkeypatch.setattr(decode_layers, "load_if_present", lambda row: None)
    assert "is absent" in why(made())


def test_other_devices_have_none() -> None:
    assert "this is" in (plain_because(made(), (1, 1), True) or "")

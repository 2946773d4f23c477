"""One token a row through the layers of a Llama, by kernels whose products end in what comes next: norms, gates and
residuals have none of their own. Where there are none, `DecoderLayer` does the same; `plain_because` says when.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax

from qjax import devices
from qjax.devices import Device
from qjax.dispatch import backends
from qjax.dispatch.backends import Selection
from qjax.dispatch.choose import facts, load_if_present, refusal
from qjax.dispatch.problem import Problem
from qjax.dispatch.routes import BYTES, GPU, ROUTES, Route
from qjax.kernel_call import problem_of
from qjax.models.kv_cache import LayerCache
from qjax.models.merge import MergedLinear
from qjax.nnx import QLinear

if TYPE_CHECKING:
    from qjax.models.llama import DecoderLayer, Llama

KERNEL = Route(
    "mosaic.layer_steps", "mosaic", "pallas_kernels.mosaic.layer_steps", platforms=GPU, cc_min=90, cc_max=90
)  # fmt: skip
# Sixteen rows, eight layers of Llama 2 7B and the head, H200: int4 865 us for 886, int8 1047 for 985, FP8 1059 for 984.
MOST_ROWS, MOST_ROWS_OF_BYTES = 16, 8
_PRODUCT = next(route for route in ROUTES if route.name == "mosaic.matmul_few")


def plain_because(model: "Llama", shape: tuple[int, ...], cached: bool) -> str | None:
    """Why the layers' own methods run, or None where the kernels do.

    Args:
      shape: of the token ids, `[B, S]`.
      cached: whether there is a cache.
    """
    rows, length = shape
    if length != 1 or not cached or rows > MOST_ROWS:
        return f"the kernels take one token of up to {MOST_ROWS} rows to a cache; here are {rows} x {length}"
    device, asked = devices.current(), backends.override.value
    if asked is not None and (backends.selection(asked) or Selection(None)) != Selection(None):
        return f"{asked} was asked for"
    if device.platform not in GPU or device.cc != KERNEL.cc_min:
        return f"the kernels are for NVIDIA GPUs of compute capability {KERNEL.cc_min / 10}; this is {device}"
    if load_if_present(KERNEL) is None:
        return f"{KERNEL.module} is absent or does not import"
    if model.config.hidden_act != "silu" or model.config.sandwich_norms or model.config.norm_offset:
        return "its layers have other norms or another gate than Llama's"
    for index, layer in enumerate(model.layers):
        for name, linear in _linears(layer):
            why = _unfit(linear, rows, model.dtype, device, biased=linear is layer.self_attn.qkv_proj)
            if why is not None:
                return f"layers.{index}.{name}: {why}"
    return None


def _linears(layer: "DecoderLayer") -> Iterator[tuple[str, Any]]:
    """The products of a layer in their order from o on."""
    attention, mlp = layer.self_attn, layer.mlp
    yield "self_attn.o_proj", attention.o_proj
    yield "mlp.gate_up_proj", mlp.gate_up_proj
    yield "mlp.down_proj", mlp.down_proj
    yield "self_attn.qkv_proj", attention.qkv_proj


def _unfit(linear: Any, rows: int, dtype: Any, device: Device, *, biased: bool) -> str | None:
    """Why a product cannot be one of the kernels'; `biased` where they know a bias."""
    if isinstance(linear, MergedLinear):
        if linear.on_mesh:
            return "it is cut over devices"
        linear = linear.linear
    if not isinstance(linear, QLinear):
        return "it is not quantized, or its parts are not merged"
    if linear.backend is not None or linear.dtype not in (None, dtype):
        return f"it has a backend ({linear.backend}) or a dtype ({linear.dtype}) of its own"
    if linear.bias is not None and not biased:
        return "it has a bias"
    problem = _problem(linear, rows, dtype)
    if problem.batch != 1 or not problem.features <= {"zero_point", "global_scale"}:
        return f"it is stacked, or has {', '.join(sorted(problem.features))}"
    if problem.x_format is not None:
        return f"its x is {problem.x_format}"
    if facts(problem, device)["weight"] in BYTES and rows > MOST_ROWS_OF_BYTES:
        return f"with codes of 8 bits the kernels are faster up to {MOST_ROWS_OF_BYTES} rows; here are {rows}"
    if problem.k % 8:
        return f"its K is {problem.k}, and kernels hand rows of whole 16 bytes to one another"
    return refusal(_PRODUCT, problem, device)


def _problem(linear: QLinear, rows: int, dtype: Any) -> Problem:
    return problem_of(linear.kernel.get_value(), m=rows, x_dtype=dtype, bias=linear.bias is not None)


def decode_layers(
    model: "Llama",
    x: jax.Array,
    turns: list[tuple[jax.Array, jax.Array]],
    positions: jax.Array,
    caches: Sequence[LayerCache | None],
) -> tuple[jax.Array, list[LayerCache | None]]:
    """All layers, where `plain_because` has no objection.

    Args:
      x: `[B, 1, hidden]`.
      turns: cos and sin of each layer.
      positions: int32 `[B, 1]`.
      caches: of each layer.

    Returns:
      `[B, 1, hidden]` and the caches after.
    """
    module, device = load_if_present(KERNEL), devices.current()
    assert module is not None, "the caller has asked plain_because"
    layers: list[Any] = list(model.layers)
    after: list[LayerCache | None] = []
    parts = layers[0].self_attn.projected(layers[0].input_layernorm(x))
    for index, (layer, (cos, sin), cache) in enumerate(zip(layers, turns, caches, strict=True)):
        attended, cache = layer.self_attn.attended(*parts, cos, sin, positions, cache)
        after.append(cache)
        following = layers[index + 1] if index + 1 < len(layers) else None
        linears = [linear for _, linear in _linears(layer)][:-1]
        norms = [layer.post_attention_layernorm]
        if following is not None:
            linears.append(following.self_attn.qkv_proj)
            norms.append(following.input_layernorm)
        x_row, row = module.rest_of_layer(
            attended[:, 0],
            x[:, 0],
            [_stored(linear, x.shape[0], x.dtype, device, module) for linear in linears],
            [norm.weight[...] for norm in norms],
            epsilon=layer.post_attention_layernorm.epsilon,
            sms=device.sms,
        )
        x = x_row[:, None]
        if following is not None:
            parts = following.self_attn.qkv_proj.apart(row[:, None])
    return x, after


def _stored(linear: Any, rows: int, dtype: Any, device: Device, module: Any) -> Any:
    """A product's arrays, as the kernels take them."""
    linear = linear.linear if isinstance(linear, MergedLinear) else linear
    w, known = linear.kernel.get_value(), facts(_problem(linear, rows, dtype), device)
    bias = None if linear.bias is None else linear.bias[...]
    return module.Stored(known["weight"], known["group"], w.packed, w.scale, w.zero_point, w.global_scale, bias)

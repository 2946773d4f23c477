"""Llama and kin (Mistral, Qwen2, Qwen3, Gemma 2 and 3) in nnx: token ids -> logits, with or without a KV cache.

Module paths are Hugging Face's tensor names without the leading `model.`:
`layers.0.self_attn.q_proj`, `layers.0.mlp.down_proj`, `embed_tokens`, `norm`, `lm_head`. Linears
and the embedding are only ever called, so that any module with the same calls may take their place.
Statistics, softmax, rotary angles and logits are float32; everything between is in `dtype`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce, wraps
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from qjax.errors import QJaxError
from qjax.models import decode_layers, initial
from qjax.models.decode_attention import decode_attention, plain_because
from qjax.models.kv_cache import KVCache, LayerCache
from qjax.models.llama_config import ACTIVATIONS, LlamaConfig
from qjax.models.merge import MergedLinear
from qjax.models.rope import angles, rotate

_PARTS = 32  # of a row's sum of squares: with 16 XLA leaves some of the sums on their own


def automatic_axes[R](method: Callable[..., R]) -> Callable[..., R]:
    """Lets a method of Llama run on an Explicit mesh, by treating its axes as Auto ones inside.

    What comes out is cut along the batch as the first argument is, and replicated otherwise.
    """

    @wraps(method)
    def run(model: "Llama", first: jax.Array, *others: Any, **named: Any) -> Any:
        mesh = jax.typeof(model.norm.weight.get_value()).sharding.mesh
        if AxisType.Explicit not in mesh.axis_types:
            return method(model, first, *others, **named)
        definition, state = nnx.split(model)

        def inner(state: nnx.State, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            return method(nnx.merge(definition, state), *args, **named)

        batch = PartitionSpec(*jax.typeof(first).sharding.spec[:1])
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.sharding.auto_axes(inner, out_sharding=batch)(state, (first, *others), named)

    return run


def mean_of_squares(x: jax.Array) -> jax.Array:
    """float32 `[..., features]` -> `[..., 1]`.

    Of one row XLA's GPU compiler would make a kernel of this sum alone. In parts it goes into the kernel that makes x,
    and the parts are joined, one by one and not by another sum, in the kernel that divides by it.
    """
    features = x.shape[-1]
    if x.size > features or features % _PARTS:
        return jnp.mean(x * x, axis=-1, keepdims=True)
    parts = jnp.sum((x * x).reshape(*x.shape[:-1], _PARTS, -1), axis=-1)
    return reduce(jnp.add, jnp.split(parts, _PARTS, axis=-1)) / features


class RMSNorm(nnx.Module):
    """x * (offset + weight) / sqrt(mean(x^2) + epsilon) over the last axis, in float32."""

    def __init__(
        self, features: int, *, epsilon: float, offset: float = 0.0, param_dtype: DTypeLike, shape_alone: bool = False
    ) -> None:
        self.weight = initial.constant(features, 1 - offset, param_dtype, shape_alone=shape_alone)
        self.epsilon = epsilon
        self.offset = offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., features]` -> the same, in x's dtype."""
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(mean_of_squares(wide) + self.epsilon)
        weight = self.weight[...].astype(jnp.float32) + self.offset
        return (wide * inverse * weight).astype(x.dtype)


def norm_of(config: LlamaConfig, features: int, param_dtype: DTypeLike, rngs: nnx.Rngs | None) -> RMSNorm:
    """A norm as the config has them."""
    options: dict[str, Any] = dict(epsilon=config.rms_norm_eps, offset=config.norm_offset, param_dtype=param_dtype)
    return RMSNorm(features, **options, shape_alone=rngs is None)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(
        self,
        config: LlamaConfig,
        layer: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ) -> None:
        def linear(n_in: int, n_out: int, bias: bool) -> nnx.Linear:
            return initial.linear(n_in, n_out, use_bias=bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.head_dim = config.head_dim
        self.window = config.sliding_windows[layer] if config.sliding_windows else None
        q_features = config.num_attention_heads * config.head_dim
        kv_features = config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, q_features, config.qkv_bias)
        self.k_proj = linear(config.hidden_size, kv_features, config.qkv_bias)
        self.v_proj = linear(config.hidden_size, kv_features, config.qkv_bias)
        self.qkv_proj: MergedLinear | None = None
        self.o_proj = linear(q_features, config.hidden_size, config.o_bias)
        self.q_norm = norm_of(config, config.head_dim, param_dtype, rngs) if config.qk_norm else None
        self.k_norm = norm_of(config, config.head_dim, param_dtype, rngs) if config.qk_norm else None
        self.scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        self.softcap = config.attention_softcap

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        positions: jax.Array,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """`x` `[B, S, hidden]` at `positions` `[B, S]` -> `[B, S, hidden]` and the cache after."""
        attended, cache = self.attended(*self.projected(x), cos, sin, positions, cache)
        return self.o_proj(attended), cache

    def projected(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values `[B, S, heads * head_dim]`."""
        if self.qkv_proj is None:
            return self.q_proj(x), self.k_proj(x), self.v_proj(x)
        queries, keys, values = self.qkv_proj(x)
        return queries, keys, values

    def attended(
        self,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        positions: jax.Array,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """What the queries attend to, `[B, S, heads * head_dim]`, and the cache after."""

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], -1, self.head_dim)

        if self.q_norm is not None and self.k_norm is not None:
            queries = self.q_norm(heads(queries)).reshape(queries.shape)
            keys = self.k_norm(heads(keys)).reshape(keys.shape)
        length, heads_of_queries = queries.shape[1], queries.shape[-1] // self.head_dim
        if cache is not None and plain_because(length, heads_of_queries, queries.dtype, cache) is None:
            return decode_attention(
                queries, keys, values, cos, sin, positions, cache,
                scale=self.scale, softcap=self.softcap, window=self.window,
            )  # fmt: skip
        queries, keys, values = map(heads, (queries, keys, values))
        queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
        key_positions = positions
        if cache is not None:
            cache = cache.store(keys, values, positions)
            keys, values = cache.read(queries.dtype)
            key_positions = jnp.arange(keys.shape[2])[None, :]
        mask = causal_mask(positions, key_positions, self.window)
        return attend(queries, keys, values, mask, scale=self.scale, softcap=self.softcap), cache


def causal_mask(query_positions: jax.Array, key_positions: jax.Array, window: int | None) -> jax.Array:
    """Which keys a query sees, bool `[B, S, T]`: those up to itself, the last `window` of them."""
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    mask = (key >= 0) & (key <= query)
    return mask if window is None else mask & (key > query - window)


def soft_capped(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap); x itself without one."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """softmax(cap(scale * q k^T)) v with float32 scores; `scale` is 1 / sqrt(D) where it is not given.

    `queries` `[B, S, H, D]`, `keys` and `values` `[B, H_kv, T, D]`, `mask` bool `[B, S, T]` ->
    `[B, S, H * D]`. Query heads `i * H/H_kv` to `(i + 1) * H/H_kv - 1` share key-value head i.
    """
    batch, length, _, head_dim = queries.shape
    grouped = queries.reshape(batch, length, keys.shape[1], -1, head_dim)
    scores = jnp.einsum("bskgd,bktd->bkgst", grouped, keys, preferred_element_type=jnp.float32)
    # Not -inf: a padded query sees no key at all, and its row must not turn into NaN.
    scores = soft_capped(scores * (head_dim**-0.5 if scale is None else scale), softcap)
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("bkgst,bktd->bskgd", weights, values).reshape(batch, length, -1)


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ) -> None:
        def linear(n_in: int, n_out: int) -> nnx.Linear:
            bias = config.mlp_bias
            return initial.linear(n_in, n_out, use_bias=bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.hidden_act = config.hidden_act
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.gate_up_proj: MergedLinear | None = None
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., hidden]` -> `[..., hidden]`."""
        merged = self.gate_up_proj
        gate, up = (self.gate_proj(x), self.up_proj(x)) if merged is None else merged(x)
        return self.down_proj(ACTIVATIONS[self.hidden_act](gate) * up)


class DecoderLayer(nnx.Module):
    """Attention, then MLP, each on a normalized copy of the residual stream; in Gemma what they give is normalized too.

    The norm that Llama calls `post_attention_layernorm` comes before the MLP, Gemma's of that name after attention.
    """

    def __init__(
        self,
        config: LlamaConfig,
        layer: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs | None,
    ) -> None:
        def norm() -> RMSNorm:
            return norm_of(config, config.hidden_size, param_dtype, rngs)

        self.input_layernorm = norm()
        self.self_attn = Attention(config, layer, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm() if config.sandwich_norms else None
        self.post_feedforward_layernorm = norm() if config.sandwich_norms else None
        self.mlp = MLP(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        cos: jax.Array,
        sin: jax.Array,
        positions: jax.Array,
        cache: LayerCache | None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """`[B, S, hidden]` -> the same, and the layer's cache after."""
        attended, cache = self.self_attn(self.input_layernorm(x), cos, sin, positions, cache)
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x)), cache
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), cache


class Llama(nnx.Module):
    """A decoder-only language model. `load_llama` fills it from a checkpoint.

    Attributes:
      config: its shape.
      dtype: of activations and of the KV cache. In float32, products are full float32 (no TF32).
      notes: what its checkpoint asks for and is done otherwise; `qjax.explain` shows them.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None,
    ) -> None:
        """Draws the weights; without `rngs` they are `jax.ShapeDtypeStruct`s, which somebody fills."""
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.notes: tuple[str, ...] = ()
        self.embed_tokens = initial.embed(
            config.vocab_size, config.hidden_size, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.layers = nnx.List(
            DecoderLayer(config, layer, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = norm_of(config, config.hidden_size, param_dtype, rngs)
        head = partial(initial.linear, use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else head(config.hidden_size, config.vocab_size)

    def __call__(
        self,
        input_ids: jax.Array,
        cache: KVCache | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, KVCache]:
        """Logits of every next token.

        Args:
          input_ids: int32 `[B, S]`.
          cache: what came before; without one, nothing did.
          positions: int32 `[B, S]`; by default each row goes on where its cache ends. Negative ones
            mark padding: neither cached nor attended to, and their logits mean nothing.

        Returns:
          float32 `[B, S, vocab_size]`; with a cache `(logits, cache after)`.
        """
        hidden, cache = self.hidden_states(input_ids, cache, positions)
        logits = self.logits(hidden)
        return logits if cache is None else (logits, cache)

    @automatic_axes
    def hidden_states(
        self,
        input_ids: jax.Array,
        cache: KVCache | None = None,
        positions: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """All but the head: `[B, S, hidden]` after the last norm, and the cache after."""
        if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
            raise QJaxError(f"input_ids: expected integers [B, S], got {input_ids.dtype} {list(input_ids.shape)}")
        if positions is None:
            start = 0 if cache is None else cache.lengths[:, None]
            positions = jnp.broadcast_to(start + jnp.arange(input_ids.shape[1]), input_ids.shape)
        layer_caches = (None,) * len(self.layers) if cache is None else cache.layers
        turns = angles(self.config.rope, positions)
        local = turns if self.config.local_rope is None else angles(self.config.local_rope, positions)
        after: list[Any] = []
        with self._precision():
            x = self.embed_tokens(input_ids)
            if self.config.embedding_scale != 1:
                x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
            of_layers = [turns if layer.self_attn.window is None else local for layer in self.layers]
            if decode_layers.plain_because(self, input_ids.shape, cache is not None) is None:
                x, after = decode_layers.decode_layers(self, x, of_layers, positions, layer_caches)
            else:
                for layer, (cos, sin), layer_cache in zip(self.layers, of_layers, layer_caches, strict=True):
                    x, layer_cache = layer(x, cos, sin, positions, layer_cache)
                    after.append(layer_cache)
        if cache is not None:
            lengths = jnp.maximum(cache.lengths, jnp.max(positions, axis=1) + 1)
            cache = KVCache(tuple(after), lengths)
        return self.norm(x), cache

    @automatic_axes
    def logits(self, hidden: jax.Array) -> jax.Array:
        """The head: `[..., hidden]` -> float32 `[..., vocab_size]`."""
        head = self._tied_head if self.lm_head is None else self.lm_head
        with self._precision():
            return soft_capped(head(hidden).astype(jnp.float32), self.config.logit_softcap)

    def _tied_head(self, hidden: jax.Array) -> jax.Array:
        """The table of tokens as the head; `Embed.attend` transposes it, which takes XLA six times as long on a CPU."""
        embed = self.embed_tokens
        if type(embed) is not nnx.Embed:
            return embed.attend(hidden)
        hidden, table = embed.promote_dtype((hidden, embed.embedding[...]), dtype=embed.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table)

    def empty_cache(self, batch: int, capacity: int, dtype: DTypeLike | None = None) -> KVCache:
        """A cache for `batch` rows of up to `capacity` tokens; `dtype` is the model's, or one of `kv_cache.CODED`."""
        return KVCache.zeros(
            layers=self.config.num_hidden_layers,
            batch=batch,
            capacity=capacity,
            kv_heads=self.config.num_key_value_heads,
            head_dim=self.config.head_dim,
            dtype=self.dtype if dtype is None else dtype,
        )

    def _precision(self) -> AbstractContextManager[None]:
        """A GPU would multiply float32 in TF32 unless told otherwise."""
        return jax.default_matmul_precision("highest") if self.dtype == jnp.float32 else nullcontext()

"""A Llama's shape, from a Hugging Face config.json: frozen, complete, every default applied.

Enters the parsed JSON of a llama, mistral, qwen2, qwen3 (dense), gemma2 or gemma3 (text) checkpoint;
leaves a `LlamaConfig`. The families differ in biases, norms, sliding windows and soft caps: rows of a
table here, plain fields there. Defaults are those of transformers' configuration classes.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from qjax.errors import CheckpointError
from qjax.models.rope import INVERSE_FREQUENCIES, Rope
from qjax.models.tensor_names import text_config

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
DTYPES = ("float32", "float16", "bfloat16")

# What transformers' configuration class fills in where the file has no such key.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"bos_token_id": 1, "eos_token_id": 2, "sliding_window": 4096},
    "qwen2": {"sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "gemma2": {
        "bos_token_id": 2,
        "eos_token_id": 1,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "bos_token_id": 2,
        "eos_token_id": 1,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    },
}
GEMMAS = ("gemma2", "gemma3_text")


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama, Mistral, Qwen2, Qwen3 or Gemma. Hashable; names follow config.json.

    Attributes:
      qkv_bias, o_bias, mlp_bias: which projections have a bias.
      qk_norm: RMSNorm over each query's and key's head (Qwen3, Gemma 3).
      sliding_windows: for each layer how many positions back a query sees, itself included; None
        is all of them, as is an empty tuple for every layer.
      local_rope: of layers with a window, where it is another than `rope` (Gemma 3).
      norm_offset: added to the weights of norms (1 in Gemma).
      sandwich_norms: also normalize what attention and MLP give (Gemma).
      embedding_scale: multiplies the embedding of a token, not the head that is tied to it.
      query_scale: multiplies scores; None is 1 / sqrt(head_dim).
      attention_softcap, logit_softcap: c of `c * tanh(x / c)` over scores and logits; None leaves them.
      eos_token_ids: tokens that end a text; may be empty.
      dtype: the checkpoint's own dtype, "float32", "float16" or "bfloat16".
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: Rope
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_windows: tuple[int | None, ...] = ()
    local_rope: Rope | None = None
    norm_offset: float = 0.0
    sandwich_norms: bool = False
    embedding_scale: float = 1.0
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"

    @property
    def max_positions(self) -> int:
        """Positions the model can serve: `max_position_embeddings`, times what its rope stretches.

        Configs of "llama3" and "longrope" models state the stretched length, those of "linear" and
        "dynamic" ones the original; "yarn" configs do either.
        """
        stretched = {
            "linear": self.max_position_embeddings * self.rope.factor,
            "dynamic": self.max_position_embeddings * self.rope.factor,
            "yarn": self.rope.original_positions * self.rope.factor,
        }
        return max(self.max_position_embeddings, int(stretched.get(self.rope.kind, 0)))

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any] | None = None,
        *,
        where: str = "config.json",
    ) -> "LlamaConfig":
        """Read a Hugging Face config, of a model that also sees its text part; `where` names it in errors.

        `generation_config` (generation_config.json) has the last word on the tokens that end a
        text, as in transformers.

        Raises:
          CheckpointError: a key is missing or has a value that no such model can have.
          NotImplementedError: another model type, activation or rope scaling.
        """
        config = text_config(config)
        keys = _Keys(config, where)
        model_type = keys.choice("model_type", tuple(FAMILIES))
        keys = _Keys(FAMILIES[model_type] | config, where)
        heads = keys.count("num_attention_heads")
        hidden_size = keys.count("hidden_size")
        layers = keys.count("num_hidden_layers")
        head_dim = keys.count("head_dim", hidden_size // heads)
        kv_heads = keys.count("num_key_value_heads", heads)
        if heads % kv_heads or head_dim % 2:
            raise CheckpointError(
                f"{where}: num_attention_heads={heads}, num_key_value_heads={kv_heads}, "
                f"head_dim={head_dim}: expected key-value heads that divide the heads, and an even "
                "head_dim"
            )
        gemma = model_type in GEMMAS
        attention_bias = model_type not in ("qwen2", "mistral") and keys.flag("attention_bias")
        rope, local_rope = _ropes(keys, head_dim, model_type)
        return cls(
            model_type=model_type,
            vocab_size=keys.count("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=keys.count("intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=keys.count("max_position_embeddings"),
            rope=rope,
            rms_norm_eps=keys.number("rms_norm_eps", 1e-6),
            hidden_act=keys.choice("hidden_activation" if gemma else "hidden_act", ACTIVATIONS, "silu"),
            qkv_bias=model_type == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=model_type == "llama" and keys.flag("mlp_bias"),
            qk_norm=model_type in ("qwen3", "gemma3_text"),
            tie_word_embeddings=keys.flag("tie_word_embeddings"),
            sliding_windows=_sliding_windows(keys, model_type, layers),
            local_rope=local_rope,
            **(_gemma_fields(keys, hidden_size) if gemma else {}),
            bos_token_id=keys.count("bos_token_id", least=0) if "bos_token_id" in keys.config else None,
            eos_token_ids=_eos_token_ids(keys, generation_config),
            dtype=keys.choice("dtype", DTYPES, keys.get("torch_dtype", "float32")),
        )


class _Keys:
    """Typed access to a config. A null counts as missing; every error names file and key."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = {key: value for key, value in config.items() if value is not None}
        self.where = where

    def get(self, key: str, default: Any = None) -> Any:
        return self.config.get(key, default)

    def error(self, key: str, expected: str) -> CheckpointError:
        if key not in self.config:
            return CheckpointError(f"{self.where}: key {key!r} is missing; expected {expected}")
        return CheckpointError(f"{self.where}: {key}={self.config[key]!r}; expected {expected}")

    def count(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < least:
            raise self.error(key, f"an integer, at least {least}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self.error(key, "a positive number")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if key in self.config else None

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        value = self.get(key)
        legal = isinstance(value, list) and all(type(item) in (int, float) for item in value)
        if not legal or len(value) != length:
            raise self.error(key, f"a list of {length} numbers")
        return tuple(map(float, value))

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def choice(self, key: str, allowed: Iterable[str], default: str | None = None) -> str:
        value = self.get(key, default)
        names = ", ".join(allowed)
        if not isinstance(value, str):
            raise self.error(key, f"one of {names}")
        if value not in allowed:
            raise NotImplementedError(f"{self.where}: {key}={value!r} is not supported; supported: {names}")
        return value


def _gemma_fields(keys: _Keys, hidden_size: int) -> dict[str, Any]:
    return {
        "norm_offset": 1.0,
        "sandwich_norms": True,
        "embedding_scale": hidden_size**0.5,
        "query_scale": keys.number("query_pre_attn_scalar") ** -0.5,
        "attention_softcap": keys.optional_number("attn_logit_softcapping"),
        "logit_softcap": keys.optional_number("final_logit_softcapping"),
    }


def _ropes(keys: _Keys, head_dim: int, model_type: str) -> tuple[Rope, Rope | None]:
    """Of layers that see all, and (Gemma 3) of those with a window; older configs have a base for these."""
    if model_type != "gemma3_text":
        return _rope(keys, head_dim), None
    table = keys.get("rope_parameters", {})
    if isinstance(table, Mapping) and "full_attention" in table:
        kinds = (table.get("full_attention"), table.get("sliding_attention", {}))
        full, local = (_rope(_Keys(keys.config | {"rope_parameters": kind}, keys.where), head_dim) for kind in kinds)
        return full, local
    own = {key: value for key, value in keys.config.items() if key not in ("rope_parameters", "rope_scaling")}
    own["rope_theta"] = keys.number("rope_local_base_freq")
    return _rope(keys, head_dim), _rope(_Keys(own, keys.where), head_dim)


def _rope(keys: _Keys, head_dim: int) -> Rope:
    """Older configs have `rope_theta` and `rope_scaling`, newer ones both in `rope_parameters`."""
    name = "rope_parameters" if "rope_parameters" in keys.config else "rope_scaling"
    table = keys.get(name, {})
    if not isinstance(table, Mapping):
        raise keys.error(name, "an object or null")
    positions = keys.count("max_position_embeddings")
    merged: dict[str, Any] = {"original_max_position_embeddings": positions, "max_position_embeddings": positions}
    merged |= {key: keys.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    merged |= {key: value for key, value in table.items() if value is not None}
    if "original_max_position_embeddings" in keys.config:  # Phi-3 style: the outer one has priority
        merged["original_max_position_embeddings"] = keys.get("original_max_position_embeddings")
    merged.setdefault("rope_type", merged.get("type", "default"))
    rope = _Keys(merged, f"{keys.where}: {name}")
    kind = rope.choice("rope_type", INVERSE_FREQUENCIES)
    if rope.number("partial_rotary_factor", 1.0) != 1:
        raise NotImplementedError(
            f"{rope.where}: partial_rotary_factor={rope.get('partial_rotary_factor')} is not "
            "supported: whole heads turn in these families"
        )
    return Rope(
        kind=kind,
        theta=rope.number("rope_theta", 10000.0),
        dim=head_dim,
        max_positions=positions,
        **_SCALINGS[kind](rope, head_dim),
    )


def _factor_fields(rope: _Keys, dim: int) -> dict[str, Any]:
    return {"factor": rope.number("factor")}


def _yarn_fields(rope: _Keys, dim: int) -> dict[str, Any]:
    original, factor = _stretch(rope)
    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")

    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    attention_factor = magnitude(1.0)
    if mscale and mscale_all_dim:
        attention_factor = magnitude(rope.number("mscale")) / magnitude(rope.number("mscale_all_dim"))
    return {
        "original_positions": original,
        "factor": factor,
        "attention_factor": rope.number("attention_factor", attention_factor),
        "beta_fast": rope.number("beta_fast", 32.0),
        "beta_slow": rope.number("beta_slow", 1.0),
        "truncate": rope.flag("truncate", True),
    }


def _llama3_fields(rope: _Keys, dim: int) -> dict[str, Any]:
    return {
        "original_positions": rope.count("original_max_position_embeddings"),
        "factor": rope.number("factor"),
        "low_freq_factor": rope.number("low_freq_factor"),
        "high_freq_factor": rope.number("high_freq_factor"),
    }


def _longrope_fields(rope: _Keys, dim: int) -> dict[str, Any]:
    original, factor = _stretch(rope)
    growth = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return {
        "original_positions": original,
        "factor": factor,
        "attention_factor": rope.number("attention_factor", growth),
        "short_factor": rope.numbers("short_factor", dim // 2),
        "long_factor": rope.numbers("long_factor", dim // 2),
    }


def _stretch(rope: _Keys) -> tuple[int, float]:
    """Positions before stretching, and by how much; the ratio of the two lengths if not stated."""
    original = rope.count("original_max_position_embeddings")
    return original, rope.number("factor", rope.count("max_position_embeddings") / original)


_SCALINGS: dict[str, Callable[[_Keys, int], dict[str, Any]]] = {
    "default": lambda rope, dim: {},
    "linear": _factor_fields,
    "dynamic": _factor_fields,
    "yarn": _yarn_fields,
    "llama3": _llama3_fields,
    "longrope": _longrope_fields,
}


def _sliding_windows(keys: _Keys, model_type: str, layers: int) -> tuple[int | None, ...]:
    """Mistral's window is every layer's, Qwen's and Gemma's is those layers' that `layer_types` names."""
    window = keys.count("sliding_window") if "sliding_window" in keys.config else None
    if model_type == "mistral":
        return (window,) * layers
    gemma = model_type in GEMMAS
    if window is None or not (gemma or keys.flag("use_sliding_window")):
        return (None,) * layers
    if gemma:  # every so many-th layer sees all
        pattern = keys.count("sliding_window_pattern")
        sees_all = [(layer + 1) % pattern == 0 for layer in range(layers)]
    else:
        first = keys.count("max_window_layers", least=0)
        sees_all = [layer < first for layer in range(layers)]
    types = keys.get("layer_types", ["full_attention" if all_of_it else "sliding_attention" for all_of_it in sees_all])
    known = {"full_attention": None, "sliding_attention": window}
    legal = isinstance(types, list) and len(types) >= layers and all(isinstance(kind, str) for kind in types)
    if not legal or not set(types) <= set(known):
        raise keys.error("layer_types", f"{layers} of {', '.join(known)}")
    return tuple(known[kind] for kind in types[:layers])


def _eos_token_ids(keys: _Keys, generation_config: Mapping[str, Any] | None) -> tuple[int, ...]:
    source = _Keys(generation_config or {}, f"{keys.where} (generation_config.json)")
    if "eos_token_id" not in source.config:
        source = keys
    value = source.get("eos_token_id", [])
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise source.error("eos_token_id", "a token id or a list of them")
    return tuple(ids)

"""Weights in the formats of other tools, written anew from random codes by each format's definition.

A function makes the tensors of one module, the settings of their folder, and the weight `[N, K]` in float32 that a
reader should find. Codes are laid down bit by bit: nothing here is shared with the readers.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qjax.checkpoints.write import write_folder

MODULE = "m"

HIDDEN, INNER = 128, 192  # 192 / 4 = 48: no whole group, no whole block of 128
LINEARS = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, INNER),
}


class Foreign(NamedTuple):
    """A module's tensors by the rest of their names, the folder's settings, and the weight."""

    tensors: dict[str, np.ndarray]
    settings: dict[str, Any]
    weight: np.ndarray


def write(folder: Path, made: Foreign) -> Path:
    """The folder of one module called `MODULE`."""
    tensors = {f"{MODULE}.{name}": array for name, array in made.tensors.items()}
    write_folder(folder, tensors=tensors, config={"quantization_config": made.settings})
    return folder


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """`[R, L]` -> int32 `[R, ceil(L * bits / 32)]`: codes end to end, least significant bit first."""
    ones = (codes[:, :, None].astype(np.uint8) >> np.arange(bits, dtype=np.uint8)) & 1
    flat = ones.reshape(len(codes), -1)
    flat = np.pad(flat, [(0, 0), (0, -flat.shape[1] % 32)])
    return np.packbits(flat, axis=1, bitorder="little").view("<i4")


def padded(codes: np.ndarray, bits: int) -> np.ndarray:
    """`[R, L]` -> int32: `32 // bits` whole codes a word."""
    each = 32 // bits
    filled = np.pad(codes, [(0, 0), (0, -codes.shape[1] % each)])
    words = [stream(filled[:, i : i + each], bits)[:, :1] for i in range(0, filled.shape[1], each)]
    return np.concatenate(words, axis=1)


def expand(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    """`[N, G]` -> `[N, K]`, float32."""
    return values.astype(np.float32)[:, index]


def scales_and_codes(rng: np.random.Generator, n: int, k: int, groups: int, bits: int) -> Any:
    """Random codes `[N, K]`, zero points and float16 scales `[N, G]`."""
    codes = rng.integers(0, 2**bits, (n, k))
    zeros = rng.integers(1, 2**bits, (n, groups))  # version 1 of GPTQ cannot say 0 in whole words alone
    return codes, zeros, rng.uniform(0.01, 1, (n, groups)).astype(np.float16)


def gptq(
    rng: np.random.Generator, *, bits: int, n: int, k: int, group: int, version: str = "gptq", index: Any = "order"
) -> Foreign:
    """`index` is "order" (k // g), "none" (no g_idx), "unset" (zeros), "random" (act-order) or "uneven"."""
    size = k if group == -1 else group
    groups = -(-k // size)
    codes, zeros, scale = scales_and_codes(rng, n, k, groups, bits)
    g_idx = np.arange(k) // size
    if index == "random":
        g_idx = rng.permutation(g_idx)
    elif index == "uneven":
        g_idx = rng.integers(0, groups, k)
    stored = zeros - 1 if version == "gptq" else zeros
    tensors = {
        "qweight": np.ascontiguousarray(stream(codes.T.T, bits).T),
        "qzeros": stream(stored.T, bits),
        "scales": np.ascontiguousarray(scale.T),
    }
    if index != "none":
        tensors["g_idx"] = np.zeros(k, np.int32) if index == "unset" else g_idx.astype(np.int32)
    settings = dict(quant_method="gptq", bits=bits, group_size=group, sym=False, checkpoint_format=version)
    return Foreign(tensors, settings, (codes - expand(zeros, g_idx)) * expand(scale, g_idx))


def awq(rng: np.random.Generator, *, n: int, k: int, group: int, version: str = "gemm") -> Foreign:
    """GEMM and GEMV packings."""
    size = k if group == -1 else group
    groups = -(-k // size)
    codes, zeros, scale = scales_and_codes(rng, n, k, groups, 4)
    index = np.arange(k) // size
    if version == "gemm":
        order = [8 * c + j for c in range(n // 8) for j in (0, 2, 4, 6, 1, 3, 5, 7)]
        tensors = {
            "qweight": stream(codes.T[:, order], 4),
            "qzeros": stream(zeros.T[:, order], 4),
            "scales": np.ascontiguousarray(scale.T),
        }
    else:
        extra = -groups % 16  # a multiple of two words, as for groups of 64
        tensors = {
            "qweight": stream(codes, 4),
            "qzeros": stream(np.pad(zeros, [(0, 0), (0, extra)]), 4),
            "scales": np.pad(scale, [(0, 0), (0, extra)]),
        }
    settings = dict(quant_method="awq", bits=4, group_size=group, zero_point=True, version=version.upper())
    return Foreign(tensors, settings, (codes - expand(zeros, index)) * expand(scale, index))


def ct_settings(form: str, version: str = "0.19.0", **weights: Any) -> dict[str, Any]:
    """A quantization_config with one group."""
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "version": version,
        "config_groups": {"group_0": group},
    }


def ct_packed(
    rng: np.random.Generator, *, bits: int, n: int, k: int, group: int = -1, symmetric: bool = True,
    packing: str = "dense", index: str = "order",
) -> Foreign:  # fmt: skip
    """pack-quantized; `index` "random" is actorder "group"."""
    size = k if group == -1 else group
    groups = -(-k // size)
    codes, zeros, _ = scales_and_codes(rng, n, k, groups, bits)
    zeros = np.full_like(zeros, 2 ** (bits - 1)) if symmetric else zeros
    scale = rng.uniform(0.01, 1, (n, groups)).astype(ml_dtypes.bfloat16)
    g_idx = np.arange(k) // size
    pack = stream if packing == "dense" else padded
    tensors = {"weight_packed": pack(codes, bits), "weight_scale": scale, "weight_shape": np.array([n, k])}
    if not symmetric:
        tensors["weight_zero_point"] = np.ascontiguousarray(pack(zeros.T, bits).T)
    if index == "random":
        g_idx = rng.permutation(g_idx)
        tensors["weight_g_idx"] = g_idx.astype(np.int32)
    strategy = dict(strategy="channel") if group == -1 else dict(strategy="group", group_size=group)
    version = "0.19.0" if packing == "dense" else "0.12.2"
    settings = ct_settings("pack-quantized", version, num_bits=bits, symmetric=symmetric, **strategy)
    return Foreign(tensors, settings, (codes - expand(zeros, g_idx)) * expand(scale, g_idx))


def ct_int(
    rng: np.random.Generator, *, bits: int, n: int, k: int, form: str, strategy: str, symmetric: bool
) -> Foreign:
    """int-quantized and naive-quantized, groups of 16 where the strategy has groups."""
    groups = k // 16 if strategy == "group" else 1
    half = 2 ** (bits - 1)
    codes = rng.integers(-half, half, (n, k)).astype(np.int8)
    rows = 1 if strategy == "tensor" else n
    scale = rng.uniform(0.01, 1, (rows, groups)).astype(ml_dtypes.bfloat16)
    zeros = (
        np.zeros((rows, groups), np.int8) if symmetric else rng.integers(-half, half, (rows, groups)).astype(np.int8)
    )
    index = np.arange(k) * groups // k
    tensors = {"weight": codes, "weight_scale": scale.reshape(-1) if strategy == "tensor" else scale}
    if not symmetric:
        tensors["weight_zero_point"] = zeros.reshape(tensors["weight_scale"].shape)
    more = dict(group_size=16) if strategy == "group" else {}
    settings = ct_settings(form, num_bits=bits, strategy=strategy, symmetric=symmetric, **more)
    wide = codes.astype(np.float32)
    return Foreign(tensors, settings, (wide - expand(zeros, index)) * expand(scale, index))


def float8(rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """Random e4m3 codes."""
    return rng.normal(size=(n, k)).astype(ml_dtypes.float8_e4m3fn)


def ct_float(rng: np.random.Generator, *, n: int, k: int, strategy: str, form: str = "float-quantized") -> Foreign:
    """float-quantized; blocks of 128 x 128, also partial ones."""
    shape = {"tensor": (), "channel": (n, 1), "block": (-(-n // 128), -(-k // 128))}[strategy]
    codes, scale = float8(rng, n, k), rng.uniform(0.01, 1, shape).astype(ml_dtypes.bfloat16)
    spread = np.broadcast_to(scale.astype(np.float32), (n, k)) if strategy != "block" else spread_blocks(scale, n, k)
    more = dict(block_structure="128x128") if strategy == "block" else {}
    settings = ct_settings(form, type="float", num_bits=8, strategy=strategy, **more)
    return Foreign({"weight": codes, "weight_scale": scale}, settings, codes.astype(np.float32) * spread)


def spread_blocks(scale: np.ndarray, n: int, k: int) -> np.ndarray:
    """Scales of blocks of 128 x 128 -> `[N, K]`."""
    return scale.astype(np.float32)[np.arange(n)[:, None] // 128, np.arange(k) // 128]


def fp8(rng: np.random.Generator, *, n: int, k: int, scale_dtype: str = "float32", block: bool = True) -> Foreign:
    """Hugging Face's fine-grained FP8."""
    scale = 2.0 ** rng.integers(-6, 6, (-(-n // 128), -(-k // 128)) if block else ())
    codes, stored = float8(rng, n, k), np.asarray(scale).astype(np.dtype(getattr(ml_dtypes, scale_dtype, scale_dtype)))
    settings = dict(quant_method="fp8", weight_block_size=[128, 128] if block else None)
    spread = spread_blocks(scale, n, k) if block else np.float32(scale)
    return Foreign({"weight": codes, "weight_scale_inv": stored}, settings, codes.astype(np.float32) * spread)


def bnb(
    rng: np.random.Generator, *, n: int, k: int, block: int = 64, kind: str = "nf4", nested: bool = False,
    storage: str = "uint8",
) -> Foreign:  # fmt: skip
    """4 bits; tables of the caller's kind are random, to be taken from the file."""
    table = np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
    codes = rng.integers(0, 16, -(-n * k // 2) * 2)
    blocks = -(-n * k // block)
    state: dict[str, Any] = dict(quant_type=kind, blocksize=block, dtype="float32", shape=[n, k])
    packed = (codes[::2] << 4 | codes[1::2]).astype(np.uint8)
    tensors = {"weight": packed.view(getattr(ml_dtypes, storage, storage))[:, None], "weight.quant_map": table}
    if nested:
        state |= dict(nested_blocksize=256, nested_dtype="float32", nested_offset=0.5)
        values = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        fine = rng.integers(0, 256, blocks).astype(np.uint8)
        coarse = (2.0 ** rng.integers(-6, 1, -(-blocks // 256))).astype(np.float32)
        tensors |= {"weight.absmax": fine, "weight.nested_absmax": coarse, "weight.nested_quant_map": values}
        absmax = values[fine] * coarse[np.arange(blocks) // 256] + np.float32(0.5)
    else:
        absmax = rng.uniform(0.01, 1, blocks).astype(np.float32)
        tensors["weight.absmax"] = absmax
    raw = np.frombuffer(json.dumps(state).encode(), np.uint8)
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = raw
    flat = table[codes[: n * k]] * absmax[np.arange(n * k) // block]
    return Foreign(tensors, dict(quant_method="bitsandbytes", load_in_4bit=True), flat.reshape(n, k))


def hqq(rng: np.random.Generator, *, bits: int, n: int, k: int, group: int, axis: int) -> Foreign:
    """Groups of either axis; zero points with a fraction."""
    rows, columns = (n * k // group, group) if axis == 1 else (group, n * k // group)
    codes = rng.integers(0, 2**bits, (rows, columns))
    each, width, dtype = {1: (8, 1, "u1"), 2: (4, 2, "u1"), 3: (10, 3, "i4"), 4: (2, 4, "u1")}.get(bits, (1, 8, "u1"))
    slab = -(-rows // each)
    filled = np.pad(codes, [(0, slab * each - rows), (0, 0)]).reshape(each, slab, columns)
    packed = sum(part << (width * (each - 1 - i)) for i, part in enumerate(filled))
    shape = (rows, 1) if axis == 1 else (1, columns)
    scale = rng.uniform(0.01, 1, shape).astype(np.float16)
    zero = rng.uniform(1, 2**bits, shape).astype(np.float16)  # less 128, still exact in float32
    tensors = {
        "W_q": np.asarray(packed).astype(dtype),
        "scale": scale,
        "zero": zero,
        "shape": np.array([n, k]),
        **{name: np.array(value, np.int32) for name, value in dict(nbits=bits, group_size=group, axis=axis).items()},
    }
    weight = ((codes.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)).reshape(n, k)
    return Foreign(tensors, dict(quant_method="hqq"), weight)


def llama(folder: Path, make: Any, options: dict[str, Any], **settings: Any) -> Path:
    """A Llama of one layer whose Linears are in a format of another tool."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    config: dict[str, Any] = {}
    for name, (n, k) in LINEARS.items():
        made = make(rng, n=n, k=k, **options)
        tensors |= {f"model.layers.0.{name}.{rest}": array for rest, array in made.tensors.items()}
        config["quantization_config"] = made.settings | settings
    for name in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        tensors[f"model.{name}.weight"] = np.full(HIDDEN, 0.1, np.float16)
    tensors["model.embed_tokens.weight"] = rng.normal(size=(32, HIDDEN)).astype(np.float16)
    config |= dict(model_type="llama", vocab_size=32, hidden_size=HIDDEN, intermediate_size=INNER)
    config |= dict(num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64, tie_word_embeddings=True)
    write_folder(folder, tensors=tensors, config=config)
    return folder

"""GGUF files of Llama models (llama.cpp): one file with settings and tensors, opened as a folder would be.

    Q8_0   34 bytes for 32 codes: float16 d, int8 q[32]                          w = d * q
    Q4_0   18 bytes for 32 codes: float16 d, q[16]: low nibbles first, then high   w = d * (q - 8)
    Q4_K   144 bytes for 256: float16 d, float16 dmin, 12 bytes with 8 scales and 8 minima of 6 bits, q[128]: runs of 32
           bytes, low nibbles one sub-block, high ones the next                  w = d * scale * q - dmin * min

Blocks lie along K. Q4_K's minimum becomes a real-valued zero point, min / scale, rounded to float32; other types are
dequantized by the package `gguf`. Rows of q and k are stored for interleaved rotary embeddings; here they are put back.
Sources: ggml-org/llama.cpp `gguf-py`, `ggml-common.h`; huggingface/transformers `modeling_gguf_pytorch_utils.py`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qjax.checkpoints.codes import Bytes
from qjax.checkpoints.files import CheckpointFiles, Entry, file_size
from qjax.checkpoints.grouped import Groups, int_weight
from qjax.checkpoints.source import ModuleTensors, Source
from qjax.errors import CheckpointError
from qjax.qtensor import QTensor

SUFFIX = ".gguf"
GROUP = 32

# Names in the file -> names in a Hugging Face folder.
TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}

# Key of config.json -> key of the file, after "llama.".
SETTINGS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
FREQUENCIES = "rope_freqs.weight"  # what rotary frequencies are divided by (Llama 3.1 and later)
PLAIN = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class GgufFiles(CheckpointFiles):
    """A GGUF file under the names of a folder.

    Attributes:
      heads: tensors whose rows are put back, and the number of heads in them.
      decoders: tensors that are dequantized when asked for.
      types: type of each tensor that is read as codes; the tensor itself is bytes, `[N, bytes of a row]`.
    """

    heads: Mapping[str, int] = field(default_factory=dict)
    decoders: Mapping[str, Callable[[], np.ndarray]] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.decoders[name]() if name in self.decoders else super().__getitem__(name)
        if name not in self.heads:
            return array
        pairs = array.reshape(self.heads[name], -1, 2, array.shape[-1])  # as rotated: neighbours; ours: halves
        return pairs.swapaxes(1, 2).reshape(array.shape)


def open_file(path: Path) -> tuple[GgufFiles, Source]:
    """A GGUF file of a Llama, and what reads its weights.

    Raises:
      CheckpointError: it is no such file, or lacks a setting or a tensor's data.
      NotImplementedError: a model of another family, or a scaling of its rotary embeddings.
    """
    import gguf  # type: ignore[import-not-found,unused-ignore]

    size = file_size(path)
    try:
        reader = gguf.GGUFReader(path)
        values = {name: entry.contents() for name, entry in reader.fields.items() if not name.startswith("tokenizer.")}
        eos = reader.get_field("tokenizer.ggml.eos_token_id")
        stop = None if eos is None else int(eos.contents())
    except Exception as error:  # the package raises whatever it trips over
        raise CheckpointError(f"{path}: not a GGUF file: {error}") from error
    family = values.get("general.architecture")
    if family != "llama":
        raise NotImplementedError(f"{path}: general.architecture={family!r} is not supported; supported: llama")
    config = {key: values[f"llama.{name}"] for key, name in SETTINGS.items() if f"llama.{name}" in values}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    scaling = values.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise NotImplementedError(
            f"{path}: llama.rope.scaling.type={scaling!r} is not supported; supported: none, and {FREQUENCIES}"
        )
    divisors = stored.pop(FREQUENCIES, None)
    config |= {"model_type": "llama", "eos_token_id": stop, "torch_dtype": "float16"}
    if divisors is not None:
        each = [float(divisor) for divisor in divisors.data]
        if not all(0 < divisor < math.inf for divisor in each):
            raise CheckpointError(f"{path}: tensor {FREQUENCIES!r} holds a value that is no positive number")
        config["rope_scaling"] = {"rope_type": "longrope", "short_factor": each, "long_factor": each}
    config["tie_word_embeddings"] = "output.weight" not in stored
    if "token_embd.weight" in stored:
        config["vocab_size"] = int(stored["token_embd.weight"].shape[1])
    files = _files(path, size, config, stored)
    return files, Source(lambda prefix: _read(files, prefix), tuple(name for name in files.types))


def _files(path: Path, size: int, config: dict[str, Any], stored: Mapping[str, Any]) -> GgufFiles:
    entries: dict[str, Entry] = {}
    heads: dict[str, int] = {}
    decoders: dict[str, Callable[[], np.ndarray]] = {}
    types: dict[str, str] = {}
    for name, tensor in stored.items():
        ours, kind = _our_name(name), tensor.tensor_type.name
        shape = tuple(int(length) for length in tensor.shape[::-1])
        start, stop = int(tensor.data_offset), int(tensor.data_offset + tensor.n_bytes)
        if stop > size:
            raise CheckpointError(f"{path}: tensor {name!r} ends at byte {stop}, the file has {size}")
        dtype = PLAIN.get(kind, np.dtype(np.float32))
        if kind in DECODERS:
            dtype, types[ours] = np.dtype(np.uint8), kind
            shape = (*shape[:-1], int(tensor.n_bytes) // shape[0])
        elif kind not in PLAIN:
            decoders[ours] = partial(_dequantized, tensor, shape)
        entries[ours] = Entry(path, dtype, shape, start, stop)
        count = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(ours.split(".")[-2])
        if count is not None:
            heads[ours] = int(config.get(count, config.get("num_attention_heads", 1)))
            if heads[ours] < 1 or shape[0] % (2 * heads[ours]):
                raise CheckpointError(f"{path}: tensor {name!r} of shape {list(shape)} has no {heads[ours]} even heads")
    return GgufFiles(path, config, entries, heads, decoders, types)


def _our_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; an unknown name stays."""
    *parts, rest = name.split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in LAYER:
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{rest}"
    return f"{TENSORS.get('.'.join(parts), '.'.join(parts))}.{rest}"


def _dequantized(tensor: Any, shape: tuple[int, ...]) -> np.ndarray:
    from gguf.quants import dequantize  # type: ignore[import-not-found,unused-ignore]

    values: np.ndarray = dequantize(tensor.data, tensor.tensor_type)
    return values.reshape(shape)


def _read(files: GgufFiles, prefix: str) -> tuple[QTensor, tuple[str, ...]] | None:
    kind = files.types.get(f"{prefix}.weight")
    if kind is None:
        return None
    tensors = ModuleTensors(files, prefix)
    rows = np.ascontiguousarray(tensors.take("weight", ("uint8",), (None, None)))
    scale, zero, codes = DECODERS[kind](rows)
    tensors.finite("weight", scale)
    bits = 8 if kind == "Q8_0" else 4
    w = int_weight(
        Bytes(codes),
        scale,
        zero,
        bits=bits,
        groups=Groups(GROUP),
    )
    return w, tuple(tensors.names)


type Parts = tuple[np.ndarray, np.ndarray | None, np.ndarray]


def _q8_0(rows: np.ndarray) -> Parts:
    blocks = rows.reshape(len(rows), -1, 34)
    codes = blocks[..., 2:].reshape(len(rows), -1) ^ np.uint8(128)  # unsigned
    return _half(blocks[..., :2]), None, codes


def _q4_0(rows: np.ndarray) -> Parts:
    blocks = rows.reshape(len(rows), -1, 18)
    nibbles = blocks[..., 2:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
    return _half(blocks[..., :2]), None, codes.reshape(len(rows), -1)


def _q4_k(rows: np.ndarray) -> Parts:
    """A sub-block without a scale is all minimum: codes 0, zero point 1, and the minimum as its scale."""
    blocks = rows.reshape(len(rows), -1, 144)
    d, smallest = _half(blocks[..., :2]), _half(blocks[..., 2:4])
    low, high, mixed = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
    scales = np.concatenate([low & 63, (mixed & 15) | (low >> 6 << 4)], axis=-1)
    minima = np.concatenate([high & 63, (mixed >> 4) | (high >> 6 << 4)], axis=-1)
    runs = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 1, GROUP)
    codes = np.concatenate([runs & 15, runs >> 4], axis=-2).reshape(*blocks.shape[:2], 8, GROUP)
    scale = d.astype(np.float32)[..., None] * scales
    minimum = smallest.astype(np.float32)[..., None] * minima
    flat = scale == 0
    zero = np.where(flat, 1, minimum / np.where(flat, 1, scale))
    codes = np.where(flat[..., None], 0, codes)
    shape = (len(rows), -1)
    return np.where(flat, minimum, scale).reshape(shape), zero.reshape(shape), codes.astype(np.uint8).reshape(shape)


def _half(pairs: np.ndarray) -> np.ndarray:
    """Bytes `[..., 2]` -> float16 `[...]`."""
    return np.ascontiguousarray(pairs).view("<f2")[..., 0]


DECODERS: dict[str, Callable[[np.ndarray], Parts]] = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_K": _q4_k}

"""Writes GPTQ, version 1 or 2: the inverse of `qjax.checkpoints.gptq`, for AutoGPTQ, GPTQModel and vLLM."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from qjax.checkpoints.codes import WORD, pack_stream
from qjax.checkpoints.gptq import BITS
from qjax.checkpoints.integers import Integers, integers
from qjax.errors import CheckpointError
from qjax.qtensor import QTensor

HEAD = "lm_head"

type Version = Literal["gptq", "gptq_v2"]


def to_arrays(w: QTensor, module: str, *, version: Version = "gptq") -> dict[str, np.ndarray]:
    """The tensors of one module; codes, scales and zero points keep their values.

    Args:
      w: the weight.
      module: its module's name.
      version: "gptq", the first, stores zero points less one; "gptq_v2" as they are.

    Raises:
      CheckpointError: a weight that GPTQ has no place for.
    """
    parts = integers(w, module)
    bits, (n, k) = parts.bits, parts.codes.shape
    if bits not in BITS:
        raise CheckpointError(f"{module}: {bits} bits; GPTQ has {', '.join(map(str, BITS))}")
    if n * bits % WORD or k * bits % WORD:
        raise CheckpointError(f"{module}: N={n}, K={k} of {bits}-bit codes do not fill words of {WORD} bits")
    size = parts.group_size or k
    g_idx = (np.arange(k) // size).astype(np.int32) if parts.g_idx is None else parts.g_idx
    zeros = _minus_one(parts) if version == "gptq" else pack_stream(parts.zero_point.T, bits)
    return {
        f"{module}.qweight": np.ascontiguousarray(pack_stream(parts.codes, bits).T).view(np.int32),
        f"{module}.qzeros": zeros.view(np.int32),
        f"{module}.scales": np.ascontiguousarray(_half(parts.scale).T),
        f"{module}.g_idx": g_idx,
    }


def _minus_one(parts: Integers) -> np.ndarray:
    """Words `[G, N*b/32]` of zero points less one: of whole words, as the tools do it, or of 3-bit fields."""
    zero = parts.zero_point.T
    if WORD % parts.bits:
        return pack_stream((zero.astype(np.int16) - 1) % 2**parts.bits, parts.bits)
    return pack_stream(zero, parts.bits) - np.uint32((2**WORD - 1) // (2**parts.bits - 1))


def _half(scale: np.ndarray) -> np.ndarray:
    """Scales in float16, what the tools compute in, where that changes none of them."""
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    return half if np.array_equal(half.astype(np.float32), scale.astype(np.float32)) else scale


def config(weights: Mapping[str, QTensor], dense: Iterable[str], *, version: Version = "gptq") -> dict[str, Any]:
    """The `quantization_config`: settings of most modules, and overrides of the others.

    Args:
      weights: module's name -> its weight.
      dense: names of the Linears that are not quantized.
      version: as of `to_arrays`.
    """
    settings = {module: _settings(w) for module, w in weights.items()}
    usual = Counter(tuple(own.items()) for own in settings.values()).most_common(1)[0][0]
    dynamic: dict[str, Any] = {f"-:^{re.escape(module)}$": {} for module in dense if module != HEAD}
    for module, own in settings.items():
        if own != dict(usual):
            dynamic[f"+:^{re.escape(module)}$"] = own
    found = {"quant_method": "gptq", "checkpoint_format": version, **dict(usual), "lm_head": HEAD in weights}
    return found | ({"dynamic": dynamic} if dynamic else {}) | {"pack_dtype": "int32"}


def _settings(w: QTensor) -> dict[str, Any]:
    return {
        "bits": w.scheme.bits,
        "group_size": w.scheme.block[1] or -1,
        "sym": w.zero_point is None,
        "desc_act": w.input_perm is not None,
    }

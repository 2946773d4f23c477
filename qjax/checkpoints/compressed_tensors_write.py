"""Writes compressed-tensors, pack-quantized: the inverse of its reader, for vLLM and transformers."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qjax.checkpoints.codes import pack_stream
from qjax.checkpoints.integers import integers
from qjax.qtensor import QTensor

FORMAT = "pack-quantized"
HEAD = "lm_head"
VERSION = "0.19.0"  # odd widths are packed densely since 0.18


def to_arrays(w: QTensor, module: str) -> dict[str, np.ndarray]:
    """The tensors of one module; codes, scales and zero points keep their values.

    Raises:
      CheckpointError: a weight that the format has no place for.
    """
    parts = integers(w, module)
    tensors = {
        "weight_packed": pack_stream(parts.codes, parts.bits).view(np.int32),
        "weight_scale": parts.scale,
        "weight_shape": np.array(parts.codes.shape, np.int64),
    }
    if not parts.symmetric:
        fields = pack_stream(np.ascontiguousarray(parts.zero_point.T), parts.bits)
        tensors["weight_zero_point"] = np.ascontiguousarray(fields.T).view(np.int32)
    if parts.g_idx is not None:
        tensors["weight_g_idx"] = parts.g_idx
    return {f"{module}.{name}": array for name, array in tensors.items()}


def config(weights: Mapping[str, QTensor], dense: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config`: a group for each kind of weight.

    Args:
      weights: module's name -> its weight.
      dense: names of the Linears that are not quantized.
    """
    kinds: dict[tuple[Any, ...], list[str]] = {}
    for module, w in weights.items():
        kind = (w.scheme.bits, w.scheme.block[1], w.zero_point is None, w.input_perm is not None)
        kinds.setdefault(kind, []).append(module)
    groups = {}
    for i, ((bits, size, symmetric, act_order), modules) in enumerate(kinds.items()):
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(kinds) == 1 and "model.embed_tokens" not in modules else modules,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if size is None else "group",
                "group_size": size,
                "dynamic": False,
                "actorder": "group" if act_order else None,
            },
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "version": VERSION,
        "config_groups": groups,
        # A head that is tied to the embedding is a Linear to other tools, and would be looked for in packed form.
        "ignore": sorted({*dense, HEAD} - weights.keys()),
    }

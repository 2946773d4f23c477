"""Writes compressed-tensors: the inverse of its reader, for vLLM and transformers.

    pack-quantized    integers, x left alone
    int-quantized     integers with x in int8: .weight int8 [N, K], .weight_scale [N, G] or, of a whole tensor, [1],
                      .weight_zero_point int8 like the scales
    float-quantized   e4m3, with x in e4m3 or left alone: .weight float8_e4m3fn [N, K], .weight_scale [1], [N, 1] or
                      one a block

A static scale of x is .input_scale, float32 [1].
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qjax.checkpoints.codes import pack_stream
from qjax.checkpoints.compressed_tensors import ACTIVATION_BLOCK, ACTIVATIONS, MIXED
from qjax.checkpoints.integers import Integers, integers, refuse
from qjax.dequantize import codes
from qjax.qtensor import QTensor
from qjax.schemes import Activation, Scheme

PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
HEAD = "lm_head"
VERSION = "0.19.0"  # odd widths are packed densely since 0.18

WRITTEN = "integer weights in groups of K and e4m3 weights"


def to_arrays(w: QTensor, module: str) -> dict[str, np.ndarray]:
    """The tensors of one module; codes, scales and zero points keep their values.

    Raises:
      CheckpointError: a weight, or a way to quantize x, that the formats have no place for.
    """
    unknown = w.scheme.format.kind != "int" and w.scheme.weight != "e4m3"
    refused = {f"{w.scheme.weight} weights": unknown, **_refused_activation(w)}
    refuse(w, module, refused, WRITTEN)
    if w.scheme.weight == "e4m3":
        tensors = _floats(w, module)
    else:
        parts = integers(dataclasses.replace(w, scheme=dataclasses.replace(w.scheme, activation=None)), module)
        tensors = _packed(parts) if _format(w.scheme) == PACKED else _bytes(parts, w.scheme)
        if parts.g_idx is not None:
            tensors["weight_g_idx"] = parts.g_idx
    if w.scheme.is_static:
        tensors["input_scale"] = np.asarray(w.act_scale, np.float32).reshape(1)
    return {f"{module}.{name}": array for name, array in tensors.items()}


def _refused_activation(w: QTensor) -> dict[str, bool]:
    x = w.scheme.activation
    if x is None:
        return {}
    return {
        "columns of x that stay as they are (the scheme without outliers= has none)": x.outliers is not None,
        "no static scale of x (act_scale= of qjax.calibrate finds one)": w.scheme.is_static and w.act_scale is None,
    }


def _packed(parts: Integers) -> dict[str, np.ndarray]:
    tensors = {
        "weight_packed": pack_stream(parts.codes, parts.bits).view(np.int32),
        "weight_scale": parts.scale,
        "weight_shape": np.array(parts.codes.shape, np.int64),
    }
    if not parts.symmetric:
        fields = pack_stream(np.ascontiguousarray(parts.zero_point.T), parts.bits)
        tensors["weight_zero_point"] = np.ascontiguousarray(fields.T).view(np.int32)
    return tensors


def _bytes(parts: Integers, scheme: Scheme) -> dict[str, np.ndarray]:
    middle = np.uint8(2 ** (parts.bits - 1))
    tensors = {"weight": (parts.codes - middle).view(np.int8), "weight_scale": parts.scale}  # modulo 256
    if not parts.symmetric:
        tensors["weight_zero_point"] = (parts.zero_point - middle).view(np.int8)
    if _strategy(scheme) == "tensor":
        tensors |= {name: array[0] for name, array in tensors.items() if name != "weight"}
    return tensors


def _floats(w: QTensor, module: str) -> dict[str, np.ndarray]:
    rows, columns = w.scheme.block
    refused = {
        f"blocks of 1 x {columns}": rows == 1 and columns is not None,
        "blocks of inputs in another order": w.input_perm is not None and columns is not None,
    }
    refuse(w, module, refused, "e4m3 weights with a scale a tensor, row or block of rows")
    stored, scale = np.asarray(codes(w)), np.asarray(w.scale)
    if w.input_perm is not None:
        stored = stored[:, np.argsort(np.asarray(w.input_perm))]
    if scale.dtype.name == "float8_e8m0fnu":  # powers of two, which the format has as floats
        scale = scale.astype(np.float32)
    return {"weight": stored, "weight_scale": scale.reshape(1) if _strategy(w.scheme) == "tensor" else scale}


def _format(scheme: Scheme) -> str:
    if scheme.format.kind != "int":
        return FLOAT
    return PACKED if scheme.activation is None else INT


def _strategy(scheme: Scheme) -> str:
    """What a scale covers, in the format's words. Packed integers have no scale of a tensor: it is repeated."""
    rows, columns = scheme.block
    if columns is None:
        return "tensor" if rows is None and _format(scheme) != PACKED else "channel"
    return "group" if rows == 1 else "block"


def config(weights: Mapping[str, QTensor], dense: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config`: a group for each kind of weight.

    Args:
      weights: module's name -> its weight.
      dense: names of the Linears that are not quantized.
    """
    kinds: list[tuple[dict[str, Any], list[str]]] = []
    for module, w in weights.items():
        kind = _group(w)
        modules = next((modules for known, modules in kinds if known == kind), None)
        if modules is None:
            kinds.append((kind, modules := []))
        modules.append(module)
    groups = {}
    for i, (kind, modules) in enumerate(kinds):
        targets = ["Linear"] if len(kinds) == 1 and "model.embed_tokens" not in modules else modules
        groups[f"group_{i}"] = {"targets": targets, **kind}
    formats = {kind["format"] for kind, _ in kinds}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "version": VERSION,
        "config_groups": groups,
        # A head that is tied to the embedding is a Linear to other tools, and would be looked for in packed form.
        "ignore": sorted({*dense, HEAD} - weights.keys()),
    }


def _group(w: QTensor) -> dict[str, Any]:
    """One of `config_groups`, its targets left out."""
    scheme, strategy = w.scheme, _strategy(w.scheme)
    act_order = w.input_perm is not None and strategy == "group"
    weights = {
        "num_bits": scheme.bits,
        "type": scheme.format.kind,
        "symmetric": w.zero_point is None,
        "strategy": strategy,
        "group_size": scheme.block[1] if strategy == "group" else None,
        "block_structure": list(scheme.block) if strategy == "block" else None,
        "dynamic": False,
        "actorder": "group" if act_order else None,
    }
    return {
        "weights": weights,
        "input_activations": None if scheme.activation is None else _input_activations(scheme.activation),
        "output_activations": None,
        "format": _format(scheme),
    }


def _input_activations(x: Activation) -> dict[str, Any]:
    kind, strategy, dynamic = next(key for key, known in ACTIVATIONS.items() if known == x)
    return {
        "num_bits": 8,
        "type": kind,
        "symmetric": True,
        "strategy": strategy,
        "group_size": ACTIVATION_BLOCK if strategy == "group" else None,
        "block_structure": None,
        "dynamic": dynamic,
        "actorder": None,
    }

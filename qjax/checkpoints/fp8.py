"""Fine-grained FP8 folders (`quant_method: fp8`, DeepSeek style): e4m3 weights with a scale for each block.

    .weight             float8_e4m3fn [N, K]
    .weight_scale_inv   float32 or e8m0 [ceil(N/rows), ceil(K/columns)]; it multiplies, despite its name; AutoFP8,
                        which has one scale a tensor, calls it .weight_scale
    .activation_scale   float32 [1], where `activation_scheme` is static; also called .input_scale

A `weight_block_size` of null is one scale a tensor. A block at the edge may be smaller.
Source: huggingface/transformers `integrations/finegrained_fp8.py`, `utils/quantization_config.py`.
"""

import dataclasses

import numpy as np

from qjax.checkpoints.activations import as_stored
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.packed import host_tensor
from qjax.checkpoints.source import SCALES, ModuleTensors, Settings, Source
from qjax.errors import CheckpointError
from qjax.qtensor import QTensor
from qjax.schemes import FP8, Activation

SCALES_OF_WEIGHTS = ("weight_scale_inv", "weight_scale")  # transformers and DeepSeek; AutoFP8
STATIC_SCALES = ("activation_scale", "input_scale")


def reader(files: CheckpointFiles, settings: Settings) -> Source:
    """Reads the weights of a folder with FP8 blocks.

    Raises:
      CheckpointError: settings that no such folder has; from the reader itself, a tensor that is missing or disagrees
        with them.
    """
    block = _block(settings)
    mode = settings.one_of("activation_scheme", ("dynamic", "static"), "dynamic")

    def read(prefix: str) -> tuple[QTensor, tuple[str, ...]] | None:
        tensors = ModuleTensors(files, prefix)
        scale = next((name for name in SCALES_OF_WEIGHTS if name in tensors), None)
        if scale is None:
            if "weight" in tensors and files.dtype(f"{prefix}.weight").name == "float8_e4m3fn":
                where = tensors.where(SCALES_OF_WEIGHTS[0])
                raise CheckpointError(f"{where}: missing; {prefix}.weight is float8_e4m3fn")
            return None
        return _with_activations(_weight(tensors, scale, block), tensors, block, mode), tuple(tensors.names)

    return Source(read, SCALES_OF_WEIGHTS)


def _block(settings: Settings) -> tuple[int, int] | None:
    block = settings.get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        raise settings.error("weight_block_size", "two positive integers, or null for one scale a tensor")
    return block[0], block[1]


def _weight(tensors: ModuleTensors, scale_name: str, block: tuple[int, int] | None) -> QTensor:
    codes = tensors.take("weight", ("float8_e4m3fn",), (None, None))
    n, k = codes.shape
    dtypes = (*SCALES, "float8_e8m0fnu")
    if block is None:
        scale, scheme = tensors.take_one(scale_name, dtypes).reshape(1, 1), FP8(granularity="tensor")
    else:
        note = f"for [{n}, {k}] in blocks of {block[0]} x {block[1]}"
        scale = tensors.take(scale_name, dtypes, (-(-n // block[0]), -(-k // block[1])), note=note)
        scheme = dataclasses.replace(FP8(granularity="block"), block=block)
    scheme = dataclasses.replace(scheme, scale_dtype=scale.dtype.name)
    return host_tensor(codes, scale, scheme=scheme, k=k)


def _with_activations(w: QTensor, tensors: ModuleTensors, block: tuple[int, int] | None, mode: str) -> QTensor:
    if mode == "dynamic":
        found = as_stored(w, Activation("e4m3", "token" if block is None else "block"))
    else:
        name = next((name for name in STATIC_SCALES if name in tensors), STATIC_SCALES[0])
        static = tensors.take_one(name, SCALES).reshape(())
        found = as_stored(w, Activation("e4m3", "tensor", "static"), static.astype(np.float32))
    assert found is not None, "FP8 weights have a scheme for each"
    return found

"""gpt-oss folders (`quant_method: mxfp4`): the experts of each layer in MXFP4, all else plain.

    <experts>.gate_up_proj_blocks   uint8 [E, 2 I, H/32, 16]    byte j of a block: element 2j low, 2j + 1 high
    <experts>.gate_up_proj_scales   uint8 [E, 2 I, H/32]        e8m0
    <experts>.down_proj_blocks, .down_proj_scales               [E, H, I/32, 16], [E, H, I/32]

    w = e2m1[code] * 2^(scale - 127)

Even rows of `gate_up_proj` are gates, odd ones what they gate. The first release has `<layer>.mlp.mlp1_weight.blocks`
and `.scales`. A weight here is a stack over experts, `[E, K, N]`.
Sources: openai/gpt-oss `torch/weights.py`; huggingface/transformers `integrations/mxfp4.py`; OCP MX 1.0, section 5.3.
"""

import ml_dtypes

from qjax.checkpoints.codes import Stream, as_words
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.packed import Packed, host_tensor
from qjax.checkpoints.source import ModuleTensors, Settings, Source
from qjax.errors import CheckpointError
from qjax.qtensor import QTensor
from qjax.schemes import MXFP4

BLOCK = 32
SEPARATORS = ("_", ".")  # between a weight's name and `blocks`: Hugging Face's files, the first release


def reader(files: CheckpointFiles, settings: Settings) -> Source:
    """Reads the weights of a gpt-oss folder.

    Raises:
      CheckpointError: from the reader: scales that are missing, or shapes that disagree.
    """

    def read(prefix: str) -> tuple[QTensor, tuple[str, ...]] | None:
        for separator in SEPARATORS:
            tensors = ModuleTensors(files, prefix, separator)
            if "blocks" in tensors:
                return _weight(tensors), tuple(tensors.names)
        return None

    return Source(read, tuple(f"{separator}blocks" for separator in SEPARATORS))


def _weight(tensors: ModuleTensors) -> QTensor:
    blocks = tensors.take("blocks", ("uint8",))
    if blocks.ndim < 3 or 0 in blocks.shape or blocks.shape[-1] != BLOCK // 2:
        where = tensors.where("blocks")
        raise CheckpointError(f"{where}: shape {list(blocks.shape)}; expected [..., N, K / {BLOCK}, {BLOCK // 2}]")
    *stack, n, count, _ = blocks.shape
    k = count * BLOCK
    scale = tensors.take("scales", ("uint8",), (*stack, n, count), note="as the blocks").view(ml_dtypes.float8_e8m0fnu)
    tensors.finite("scales", scale)
    packed = Packed(Stream(as_words(blocks.reshape(-1, k // 2)), 4, k), 4)
    made = packed[(slice(None),) * 3].reshape(*stack, n, *packed.shape[1:])
    return host_tensor(made, scale, scheme=MXFP4(), k=k)

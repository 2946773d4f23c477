"""AWQ folders (AutoAWQ): 4 bits with zero points, in the packings GEMM and GEMV.

    GEMM   .qweight int32 [K, N/8], .qzeros int32 [G, N/8]: column 8c + j is nibble NIBBLES[j] of word c
           .scales  float [G, N]
    GEMV   .qweight int32 [N, K/8], .qzeros int32 [N, Z]: plain order, along K and along the groups
           .scales  float [N, 8 Z]: columns from G on are padding

    w[k, n] = (code[k, n] - zero_point[k // g, n]) * scale[k // g, n]

AWQ folds factors into norms and other Linears, so that every tensor is the file's own. The list
`modules_to_not_convert` is not consulted: writers match it in more than one way, and what is quantized has `.qweight`.
Sources: casper-hansen/AutoAWQ `awq/modules/linear/{gemm,gemv}.py`, `awq/utils/packing_utils.py`.
"""

import numpy as np

from qjax.checkpoints.codes import NibblesAcross, Stream, every
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.grouped import Groups, group_count, int_weight
from qjax.checkpoints.packed import to_zero_point
from qjax.checkpoints.source import SCALES, ModuleTensors, Settings, Source
from qjax.errors import CheckpointError
from qjax.qtensor import QTensor

BITS = 4
PER_WORD = 8
NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
INTEGERS = ("int32", "uint32")

GROUP_SIZE = 128  # of a config that has none, as transformers' `AwqConfig`

# Keys that say the layout: AutoAWQ's, then GPTQModel's. Those of exllama and IPEX are GEMM's in the file.
VERSIONS = ("version", "checkpoint_format", "format")
LAYOUTS = {"gemm": "gemm", "exllama": "gemm", "exllamav2": "gemm", "ipex": "gemm", "gemv": "gemv"}


def reader(files: CheckpointFiles, settings: Settings) -> Source:
    """Reads the weights of an AWQ folder.

    Raises:
      CheckpointError: settings that no such folder has, or of a layout that is not read here; from the reader itself, a
        tensor that is missing or disagrees with them.
    """
    settings = Settings(
        {"bits": settings.get("w_bit"), "group_size": settings.get("q_group_size")} | settings.values, settings.where
    )
    settings.one_of("bits", (BITS,))
    size = settings.group_size(GROUP_SIZE)
    key = next((key for key in VERSIONS if key in settings), VERSIONS[0])
    version = settings.get(key, "gemm")
    if not isinstance(version, str) or version.lower() not in LAYOUTS:
        raise settings.error(key, f"one of {', '.join(LAYOUTS)}: other layouts are not read")
    weight = {"gemm": _gemm, "gemv": _gemv}[LAYOUTS[version.lower()]]

    def read(prefix: str) -> tuple[QTensor, tuple[str, ...]] | None:
        tensors = ModuleTensors(files, prefix)
        if "qweight" not in tensors:
            return None
        return weight(tensors, size), tuple(tensors.names)

    return Source(read, ("qweight",))


def _gemm(tensors: ModuleTensors, size: int | None) -> QTensor:
    qweight = tensors.take("qweight", INTEGERS, (None, None))
    k, n = qweight.shape[0], qweight.shape[1] * PER_WORD
    count = group_count(k, size)
    note = f"for K={k}, N={n} in groups of {size or k}"
    zeros = tensors.take("qzeros", INTEGERS, (count, n // PER_WORD), note=note)
    scales = tensors.take("scales", SCALES, (count, n), note=note)
    return int_weight(
        NibblesAcross(qweight.view(np.uint32), NIBBLES),
        scales.T,
        to_zero_point(every(NibblesAcross(zeros.view(np.uint32), NIBBLES)).T, BITS),
        bits=BITS,
        groups=Groups(size),
    )


def _gemv(tensors: ModuleTensors, size: int | None) -> QTensor:
    qweight = tensors.take("qweight", INTEGERS, (None, None))
    n, k = qweight.shape[0], qweight.shape[1] * PER_WORD
    count = group_count(k, size)
    note = f"for K={k}, N={n} in groups of {size or k}"
    if "qzeros" in tensors and len(shape := tensors.shape("qzeros")) == 2 and shape[1] * PER_WORD < count:
        raise CheckpointError(f"{tensors.where('qzeros')}: shape {list(shape)} holds fewer than {count} groups, {note}")
    zeros = tensors.take("qzeros", INTEGERS, (n, None), note=note)
    scales = tensors.take("scales", SCALES, (n, zeros.shape[1] * PER_WORD), note=note)
    return int_weight(
        Stream(qweight.view(np.uint32), BITS, k),
        scales[:, :count],
        to_zero_point(every(Stream(zeros.view(np.uint32), BITS, count)).T, BITS),
        bits=BITS,
        groups=Groups(size),
    )

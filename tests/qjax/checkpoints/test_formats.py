"""Every format, written anew by its definition, is read back to the bit; shapes and options that few files have too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.checkpoints.detect import source
from qjax.checkpoints.files import CheckpointFiles
from qjax.checkpoints.load import checked, on_device
from qjax.qtensor import QTensor

CASES: dict[str, tuple[Callable[..., foreign.Foreign], dict[str, Any]]] = {
    **{
        f"gptq {bits} bits {version}": (foreign.gptq, dict(bits=bits, n=64, k=160, group=32, version=version))
        for bits in (2, 3, 4, 8)
        for version in ("gptq", "gptq_v2")
    },
    **{
        f"gptq g_idx {index}, {bits} bits": (foreign.gptq, dict(bits=bits, n=32, k=128, group=32, index=index))
        for index in ("none", "unset", "random", "uneven")
        for bits in (3, 4, 8)
    },
    "gptq one group": (foreign.gptq, dict(bits=4, n=32, k=96, group=-1)),
    "gptq short last group": (foreign.gptq, dict(bits=4, n=32, k=96, group=64)),
    "gptq short last group, act-order": (foreign.gptq, dict(bits=4, n=32, k=96, group=64, index="random")),
    **{
        f"awq {version} g{group}": (foreign.awq, dict(n=24, k=128, group=group, version=version))
        for version in ("gemm", "gemv")
        for group in (32, 64, -1)
    },
    **{
        f"packed {bits} bits {packing} {'symmetric' if symmetric else 'asymmetric'}": (
            foreign.ct_packed,
            dict(bits=bits, n=21, k=100, group=20, packing=packing, symmetric=symmetric),
        )
        for bits in range(2, 9)
        for packing in ("dense", "padded")
        for symmetric in (True, False)
    },
    "packed, a scale a row": (foreign.ct_packed, dict(bits=4, n=8, k=72)),
    "packed, act-order": (foreign.ct_packed, dict(bits=4, n=9, k=96, group=32, index="random", symmetric=False)),
    "packed 7 bits, act-order": (foreign.ct_packed, dict(bits=7, n=9, k=96, group=32, index="random", symmetric=False)),
    "packed, as many words either way": (foreign.ct_packed, dict(bits=3, n=5, k=10, packing="padded", symmetric=False)),
    **{
        f"{form} {bits} bits {strategy} {symmetric}": (
            foreign.ct_int,
            dict(bits=bits, n=12, k=64, form=form, strategy=strategy, symmetric=symmetric),
        )
        for form, bits in (("int-quantized", 8), ("naive-quantized", 3), ("naive-quantized", 7))
        for strategy in ("tensor", "channel", "group")
        for symmetric in (True, False)
    },
    **{
        f"{form} float {strategy}": (foreign.ct_float, dict(n=200, k=300, strategy=strategy, form=form))
        for strategy in ("tensor", "channel", "block")
        for form in ("float-quantized", "naive-quantized")
    },
    "fp8 partial blocks": (foreign.fp8, dict(n=200, k=300)),
    "fp8 e8m0": (foreign.fp8, dict(n=256, k=128, scale_dtype="float8_e8m0fnu")),
    "fp8 bfloat16 scales": (foreign.fp8, dict(n=256, k=128, scale_dtype="bfloat16")),
    "fp8 a scale a tensor": (foreign.fp8, dict(n=20, k=30, block=False)),
    "bnb": (foreign.bnb, dict(n=16, k=128)),
    "bnb fp4, block 128": (foreign.bnb, dict(n=16, k=256, kind="fp4", block=128)),
    "bnb blocks across rows": (foreign.bnb, dict(n=6, k=96)),
    "bnb odd rows": (foreign.bnb, dict(n=5, k=33)),
    "bnb bytes as bfloat16": (foreign.bnb, dict(n=16, k=64, storage="bfloat16")),
    "bnb bytes as float32": (foreign.bnb, dict(n=16, k=64, storage="float32")),
    "bnb double, whole rows": (foreign.bnb, dict(n=300, k=128, nested=True)),
    "bnb double, part of a row": (foreign.bnb, dict(n=3, k=64 * 512, nested=True)),
    "bnb double, across rows": (foreign.bnb, dict(n=70, k=64 * 12, nested=True)),
    "bnb double, blocks across rows": (foreign.bnb, dict(n=70, k=96, nested=True)),
    **{
        f"hqq {bits} bits axis {axis}": (foreign.hqq, dict(bits=bits, n=24, k=64, group=32, axis=axis))
        for bits in (1, 2, 3, 4, 5, 6, 8)
        for axis in (0, 1)
    },
    "hqq groups across rows": (foreign.hqq, dict(bits=4, n=8, k=24, group=64, axis=1)),
    "hqq groups of whole columns": (foreign.hqq, dict(bits=4, n=32, k=24, group=64, axis=0)),
}


def read(folder: Path) -> QTensor:
    opened = source(CheckpointFiles.open(folder))
    assert opened is not None
    found = opened.read(foreign.MODULE)
    assert found is not None
    return on_device(checked(found[0], foreign.MODULE))


@pytest.mark.parametrize(("make", "options"), CASES.values(), ids=CASES)
def test_codes_scales_and_zero_points_keep_their_values(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    made = make(np.random.default_rng(0), **options)
    w = read(foreign.write(tmp_path / "folder", made))
    assert (w.out_features, w.in_features) == made.weight.shape
    np.testing.assert_array_equal(np.asarray(w.dequantize(jnp.float32)).T, made.weight)

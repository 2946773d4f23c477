"""What the kernel of decode's attention is held to on a GPU: float64, the cache but for one slot a row, the same bits.

Rows are of every length that can be told apart, up to a full cache; shares and blocks are those that the kernel picks.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention import coded, exact, operands, steps_off

from qjax import devices
from qjax.dispatch.choose import load_if_present
from qjax.models.decode_attention import KERNEL


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """A layer's attention: heads, key-value heads, of how much, slots, dtype of the token, of a coded cache."""

    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    dtype: str = "bfloat16"
    kind: str | None = None
    rows: int = 5
    window: int | None = None
    softcap: float | None = None

    def __str__(self) -> str:
        shape = f"{self.rows}x{self.heads}/{self.kv_heads}x{self.head_dim}x{self.capacity}"
        extras = [f"{name}-{value}" for name in ("window", "softcap") if (value := getattr(self, name)) is not None]
        return "-".join(["decode_attention", shape, self.dtype, self.kind or "dense", *extras])

    @property
    def positions(self) -> list[int]:
        """The last slot, the first, and some between."""
        last = self.capacity - 1
        return [last - last * i // max(1, self.rows - 1) for i in range(self.rows)]


CASES = (
    AttentionCase(32, 32, 128, 1024, rows=1),
    AttentionCase(32, 8, 128, 1024, rows=1),
    AttentionCase(32, 32, 128, 576, rows=16),
    AttentionCase(32, 8, 128, 600, "float16", rows=64),
    AttentionCase(9, 3, 80, 640, "float16"),
    AttentionCase(16, 8, 256, 1024, window=300, softcap=50.0),
    AttentionCase(64, 2, 128, 512),
    AttentionCase(32, 8, 128, 512, "float32"),
    AttentionCase(4, 2, 16, 16),
    *(
        AttentionCase(heads, kv_heads, 128, 576, dtype, kind, rows)
        for kind in ("int8", "float8_e4m3fn")
        for heads, kv_heads, dtype, rows in (
            (32, 32, "bfloat16", 1),
            (32, 8, "bfloat16", 16),
            (8, 8, "float16", 5),
            (32, 32, "bfloat16", 24),
            (32, 8, "bfloat16", 48),
            (24, 12, "float16", 20),
        )
    ),  # fmt: skip
    AttentionCase(8, 8, 80, 640, "float16", "int8", rows=30, window=300, softcap=50.0),
    AttentionCase(8, 8, 256, 640, kind="int8", rows=30),
    AttentionCase(32, 32, 128, 640, "float32", rows=6),
    AttentionCase(8, 8, 64, 300, "float16", rows=40),
)


def claimed(case: AttentionCase) -> bool:
    """Whether the kernel does it on the device at hand."""
    module, device = load_if_present(KERNEL), devices.current()
    cache = case.rows, case.kv_heads, case.capacity, case.head_dim
    facts: dict[str, Any] = dict(smem=device.shared.smem_block, cc=device.cc, heads=case.heads, cache=cache)
    if module is None or device.platform != "gpu":
        return False
    return module.unsupported(dtype=case.dtype, cache_dtype=case.kind or case.dtype, **facts) is None


def check_attention(case: AttentionCase, **options: Any) -> list[str]:
    """Runs a case twice: what is wrong with it. `options` go to the kernel."""
    device = devices.current()
    *token, keys, values = operands(
        case.heads, case.kv_heads, case.head_dim, case.capacity, case.dtype, case.positions, seed=case.heads
    )
    given, known = (keys, values), [keys, values]
    if case.kind is not None:
        (keys, key_scale), (values, value_scale) = (coded(a, case.kind) for a in given)
        given = keys, values, key_scale, value_scale
        known = [a.astype(jnp.float32) * scale[..., None] for a, scale in ((keys, key_scale), (values, value_scale))]
    module = load_if_present(KERNEL)
    assert module is not None, "claimed"
    static = dict(scale=case.head_dim**-0.5, window=case.window, softcap=case.softcap)
    chosen = static | dict(sms=device.sms, smem=device.shared.smem_block) | options
    run = jax.jit(functools.partial(module.decode_attention, **chosen))
    (out, *after), again = (jax.tree.map(np.asarray, run(*token, *given)) for _ in range(2))
    expected, *whole = exact(*token, *known, **static)
    if case.kind is not None:
        own = [a.astype(np.float64) * scale[..., None] for a, scale in zip(after[:2], after[2:], strict=True)]
        expected, *_ = exact(*token, *known, **static, own=own)
    wrong = []
    off = np.abs(out.astype(np.float64) - expected).max()
    allowed = (32 if case.dtype == "float32" else 8) * float(jnp.finfo(case.dtype).eps)  # scores of 16 lose 4 bits
    if not off <= allowed:
        wrong.append(f"a result is {off:.3g} off, {allowed:.3g} are allowed")
    if case.kind is None:
        wrong += _stored(after, whole, case)
    else:
        steps = max(map(steps_off, after[:2], after[2:], whole))
        if not steps < 0.51:
            wrong.append(f"a code of the cache is {steps:.3f} steps off")
    if any((a.view(np.uint8) != b.view(np.uint8)).any() for a, b in zip((out, *after), again, strict=True)):
        wrong.append("a second run has other bits")
    return wrong


def _stored(after: list[np.ndarray], whole: list[np.ndarray], case: AttentionCase) -> list[str]:
    """What is wrong with a cache that holds no codes."""
    eps = float(jnp.finfo(case.dtype).eps)
    off = [np.abs(a.astype(np.float64) - b).max() for a, b in zip(after, whole, strict=True)]
    return [f"the cache is {max(off):.3g} off"] if not max(off) <= 4 * eps else []

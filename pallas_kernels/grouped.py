"""Products that the kernels of packed words have in common: x in 16 bits, scales by rows and by groups of K."""

from typing import Any

_BLOCK = 128  # columns of the packed order


def why_not(
    k: int, n: int, *, group: int, block_n: int, x_dtype: str, x_format: str | None, scale_dtype: str, **_: Any
) -> str | None:
    """Why a product is none of them, by the facts that `unsupported` is told, or None."""
    if x_format is not None or x_dtype not in ("bfloat16", "float16"):
        return f"it takes x in bfloat16 or float16, not in {x_format or x_dtype}"
    if block_n not in (1, n) or (block_n == n != 1 and group < k):
        return f"its scales belong to one row or to all, not to {block_n} rows"
    if group < k and group not in (16, 32, 64) and group % _BLOCK:
        return f"groups of {group}: it knows 16, 32, 64 and multiples of {_BLOCK}"
    if x_dtype == "float16" and scale_dtype == "float8_e8m0fnu":
        return "e8m0 scales exceed the range of float16"
    return None

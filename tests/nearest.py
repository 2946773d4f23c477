"""Quantization to nearest by its formulas in NumPy, and weights to try it on: what the tests of `quantize_array` share.

Every division is rounded once, so that codes and scales can be compared exactly, ties included.
"""

import ml_dtypes
import numpy as np

SHAPE = (256, 6)  # of most weights: a shape is compiled once for each scheme
F32 = np.float32
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
NF4 = np.array(
    [-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0, 0.0795803,
     0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1]
)  # fmt: skip
FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3]) / 12
FP4 = np.concatenate([FP4, 0 - FP4])
FLOAT8 = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}

# What an array is cut into. Everything here is `[N, K]`, in float32 unless it says otherwise.


def over_blocks(reduce, w, block):
    """`reduce` of each block, one by one: `[R, C]`; short ones at the edges count what they have."""
    n, k = w.shape
    bn, bk = block[0] or n, block[1] or k
    return np.array([[reduce(w[i : i + bn, j : j + bk]) for j in range(0, k, bk)] for i in range(0, n, bn)], w.dtype)


def spread(values, w, block):
    """`[R, C]` -> `[N, K]`: to each weight its block's value."""
    rows = np.arange(w.shape[0]) // (block[0] or w.shape[0])
    columns = np.arange(w.shape[1]) // (block[1] or w.shape[1])
    return values[rows][:, columns]


def nearest_entry(table, ratio, prefer):
    """Codes of the entries nearest to float32 ratios, in float64; `prefer` ranks those equally near."""
    table = table.astype(F32).astype(np.float64)
    ranked = np.array(sorted(range(len(table)), key=lambda c: (prefer(table[c], c), c)))
    distance = np.abs(ratio.astype(np.float64)[..., None] - table[ranked])
    return ranked[np.argmin(distance, axis=-1)]  # of equals the first, which is the preferred one


def e2m1(ratio):
    return nearest_entry(E2M1, np.clip(ratio, -6, 6), lambda _, code: code % 2)


def float8(form, ratio):
    dtype = FLOAT8[form]
    top = F32(ml_dtypes.finfo(dtype).max)
    return np.clip(ratio, -top, top).astype(dtype)


# The formulas: `[N, K]` -> codes as they are stored, and the scales that the codes were made with.


def sym(w, bits, block, scale_dtype):
    top = F32(2 ** (bits - 1) - 1)
    s = over_blocks(np.max, np.abs(w), block) / top
    s = np.where(s == 0, F32(1), s).astype(scale_dtype)
    q = np.clip(np.rint(w / spread(s.astype(F32), w, block)), -top - 1, top)
    return (q + (0 if bits == 8 else 2 ** (bits - 1))).astype(int), s


def asym(w, bits, block, scale_dtype):
    top = F32(2**bits - 1)
    low = over_blocks(np.min, np.minimum(w, 0), block)
    high = over_blocks(np.max, np.maximum(w, 0), block)
    s = (high - low) / top
    s = np.where(s == 0, F32(1), s).astype(scale_dtype)
    z = np.clip(np.rint(-low / s.astype(F32)), 0, top)
    q = np.clip(np.rint(w / spread(s.astype(F32), w, block)) + spread(z, w, block), 0, top)
    shift = 128 if bits == 8 else 0
    return (q - shift).astype(int), s, (z - shift).astype(int)


def fp8(w, form, block):
    s = over_blocks(np.max, np.abs(w), block) / F32(ml_dtypes.finfo(FLOAT8[form]).max)
    s = np.where(s == 0, F32(1), s)
    return float8(form, w / spread(s, w, block)), s


def table(w, name, block):
    a = over_blocks(np.max, np.abs(w), block)
    a = np.where(a == 0, F32(1), a)
    ratio = w / spread(a, w, block)
    if name == "nf4":
        return nearest_entry(NF4, ratio, lambda value, _: value), a
    return nearest_entry(FP4, ratio, lambda value, _: -abs(value)), a


def mx(w, form, block):
    emax = {"e2m1": 2, "e4m3": 8, "e5m2": 15}[form]
    amax = over_blocks(np.max, np.abs(w), block)
    exponent = np.floor(np.log2(np.where(amax == 0, 1, amax).astype(np.float64))) - emax
    s = np.where(amax == 0, 2.0**-127, 2.0**exponent)
    ratio = (w / spread(s, w, block)).astype(F32)  # exact: s is a power of two
    return (e2m1(ratio) if form == "e2m1" else float8(form, ratio)), s


def nvfp4(w):
    g = np.max(np.abs(w)) / F32(448 * 6) or F32(1)
    sb = float8("e4m3", over_blocks(np.max, np.abs(w), (1, 16)) / F32(6) / g)
    step = spread(sb.astype(F32), w, (1, 16)) * g
    ratio = np.divide(w, step, out=np.zeros_like(w), where=step != 0)
    return e2m1(ratio), sb, g


# Weights to try them on.


def kernel(k, n, seed=0, dtype=np.float32):
    """`[K, N]` of the spread of trained weights, bfloat16 values (ratios fall on ties often), some exact zeros."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((k, n)) * 10.0 ** rng.uniform(-2, 0, (1, n)) * 0.05
    w[rng.uniform(size=w.shape) < 0.02] = 0
    return w.astype(ml_dtypes.bfloat16).astype(dtype)

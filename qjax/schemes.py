"""Scheme: how a weight is quantized, and how x is on its way in. The named constructors are the API.

Every constructor's docstring states its formula. `W` is `[K, N]` as Flax stores it, stored `[N, K]`; a group runs along
K; `round` is half to even; `amax`, `lo`, `hi` are taken over the block. On the command line and in files a scheme is
its constructor's key in `SCHEMES` with its options: `w4a16:group_size=64,symmetric=false`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from qjax.errors import SchemeError
from qjax.scheme import Activation as Activation
from qjax.scheme import Delayed as Delayed
from qjax.scheme import Scheme as Scheme
from qjax.spec import read_spec, write_spec

Granularity = Literal["tensor", "channel", "block"]
GroupSize = int | Literal["channel", "tensor"]
Float8 = Literal["e4m3", "e5m2"]


def _changed(name: str, options: dict[str, Any], always: tuple[str, ...] = ()) -> str:
    return write_spec(name, SCHEMES, options, always)


def _int_block(name: str, group_size: GroupSize) -> tuple[int | None, int | None]:
    if group_size in (-1, "channel"):
        return (1, None)
    if group_size == "tensor":
        return (None, None)
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
        raise SchemeError(
            f"{name}: group_size={group_size!r}; allowed: a positive integer, -1 (per channel), 'channel', 'tensor'"
        )
    return (1, group_size)


def _choice(name: str, option: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise SchemeError(f"{name}: {option}={value!r}; allowed: {', '.join(map(repr, allowed))}")


def _int_scheme(
    name: str,
    bits: int,
    group_size: GroupSize,
    symmetric: bool,
    scale_dtype: str | None,
    activation: Activation | None,
) -> Scheme:
    block = _int_block(name, group_size)
    _choice(name, "symmetric", symmetric, (True, False))
    _choice(name, "scale_dtype", scale_dtype, (None, "float16", "bfloat16", "float32"))
    given: dict[str, Any] = dict(group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype)
    if group_size in (-1, "channel"):
        given["group_size"] = -1
    if activation is not None:
        given |= dict(activation=activation.granularity, mode=activation.mode)
        given |= {} if activation.outliers is None else dict(outliers=activation.outliers)
    return Scheme(
        _changed(name, given, always=("group_size",) if block[1] else ()),
        f"int{bits}",
        block,
        scale_dtype or ("float16" if block[1] else "float32"),
        symmetric,
        activation=activation,
    )


def W8A16(group_size: GroupSize = -1, symmetric: bool = True, scale_dtype: str | None = None) -> Scheme:
    """Integer weights of 8 bits, x left alone.

    Symmetric: `s = max|w| / 127` (1 if 0), `code = clip(round(w / s), -128, 127)`, `w' = code * s`.
    Asymmetric: as `W4A16`, with 255 for 15, and codes and zero points stored minus 128.

    Args:
      group_size: elements of K that share a scale; -1 (or "channel") one scale an output channel; "tensor" one in all.
      symmetric: False adds a zero point to each group.
      scale_dtype: default float16 for groups (w is divided by the rounded scale; float32 where a scale would be
        subnormal or infinite) and float32 per channel and per tensor.

    Raises:
      SchemeError: for an option outside these. A group that does not divide K is found when a weight is quantized.
    """
    return _int_scheme("w8a16", 8, group_size, symmetric, scale_dtype, None)


def W6A16(group_size: GroupSize = 128, symmetric: bool = True, scale_dtype: str | None = None) -> Scheme:
    """Integer weights of 6 bits, x left alone; formulas and arguments of `W4A16` with 31 for 7 and 63 for 15."""
    return _int_scheme("w6a16", 6, group_size, symmetric, scale_dtype, None)


def W5A16(group_size: GroupSize = 128, symmetric: bool = True, scale_dtype: str | None = None) -> Scheme:
    """Integer weights of 5 bits, x left alone; formulas and arguments of `W4A16` with 15 for 7 and 31 for 15."""
    return _int_scheme("w5a16", 5, group_size, symmetric, scale_dtype, None)


def W4A16(group_size: GroupSize = 128, symmetric: bool = True, scale_dtype: str | None = None) -> Scheme:
    """Integer weights of 4 bits, x left alone.

    Symmetric: `s = max|w| / 7` (1 if 0), `q = clip(round(w / s), -8, 7)`, `w' = q * s`; the code stored is `q + 8`.
    Asymmetric: `lo = min(w, 0)`, `hi = max(w, 0)`, `s = (hi - lo) / 15` (1 if 0), `z = clip(round(-lo / s), 0, 15)`,
    `code = clip(round(w / s) + z, 0, 15)`, `w' = (code - z) * s`.
    Source: Jacob et al., Quantization and Training of Neural Networks (2018), section 2.1, on groups of K.

    Args and errors as `W8A16`.
    """
    return _int_scheme("w4a16", 4, group_size, symmetric, scale_dtype, None)


def W3A16(group_size: GroupSize = 128, symmetric: bool = False, scale_dtype: str | None = None) -> Scheme:
    """Integer weights of 3 bits, x left alone; formulas and arguments of `W4A16` with 3 for 7 and 7 for 15.

    Asymmetric by default, which halves the KL divergence that rounding to nearest costs (docs/schemes.md).
    """
    return _int_scheme("w3a16", 3, group_size, symmetric, scale_dtype, None)


def W2A16(group_size: GroupSize = 64, symmetric: bool = False, scale_dtype: str | None = None) -> Scheme:
    """Integer weights of 2 bits, x left alone; formulas and arguments of `W4A16` with 1 for 7 and 3 for 15."""
    return _int_scheme("w2a16", 2, group_size, symmetric, scale_dtype, None)


def _int8_activation(name: str, activation: str, mode: str) -> Activation:
    _choice(name, "activation", activation, ("token", "tensor"))
    _choice(name, "mode", mode, ("dynamic", "static"))
    return Activation("int8", "tensor" if mode == "static" else activation, mode)  # type: ignore[arg-type]


def W8A8Int8(
    group_size: GroupSize = -1,
    symmetric: bool = True,
    scale_dtype: str | None = None,
    activation: Literal["token", "tensor"] = "token",
    mode: Literal["dynamic", "static"] = "dynamic",
    outliers: float | None = None,
) -> Scheme:
    """Integer weights of 8 bits as `W8A16`, and x in int8.

    `s_x = max|x| / 127` over a token (or the tensor), 1 if 0; `x' = clip(round(x / s_x), -128, 127) * s_x`.
    With `outliers`, columns of x in which some `|x|` reaches it stay as they are: `y = x'[:, rest] w[rest, :] +
    x[:, O] w[O, :]`, the scale being that of the rest.
    Source: Dettmers et al., LLM.int8 (2022), sections 3.1 (vector-wise quantization) and 3.2 (the decomposition).

    Args:
      activation: one scale a "token" or for the whole "tensor".
      mode: "static" takes the scale from the QTensor's `act_scale`, per tensor.
      outliers: a positive threshold, 6 in the paper; at most a 64th of the columns leave, the largest. Dynamic only.
      group_size, symmetric, scale_dtype: as `W8A16`.
    """
    x = _int8_activation("w8a8_int8", activation, mode)
    if outliers is not None:
        if isinstance(outliers, bool) or not isinstance(outliers, int | float) or not outliers > 0:
            raise SchemeError(f"w8a8_int8: outliers={outliers!r}; allowed: a positive number, or None")
        _choice("w8a8_int8", "mode", mode, ("dynamic",))
        x = dataclasses.replace(x, outliers=float(outliers))
    return _int_scheme("w8a8_int8", 8, group_size, symmetric, scale_dtype, x)


def W4A8Int8(
    group_size: GroupSize = 128,
    symmetric: bool = True,
    scale_dtype: str | None = None,
    activation: Literal["token", "tensor"] = "token",
    mode: Literal["dynamic", "static"] = "dynamic",
) -> Scheme:
    """Integer weights of 4 bits as `W4A16`, and x in int8 as `W8A8Int8`."""
    x = _int8_activation("w4a8_int8", activation, mode)
    return _int_scheme("w4a8_int8", 4, group_size, symmetric, scale_dtype, x)


_FP8_BLOCKS: dict[str, tuple[int | None, int | None]] = {
    "tensor": (None, None),
    "channel": (1, None),
    "block": (128, 128),
}


def FP8(format: Float8 = "e4m3", granularity: Granularity = "channel") -> Scheme:
    """FP8 weights, x left alone.

    `s = max|w| / fmax` over the unit (1 if 0), `code = fp8(clip(w / s, -fmax, fmax))` to nearest, half to even,
    `w' = code * s`; fmax is 448 (e4m3) or 57344 (e5m2). Source: OFP8 1.0; Micikevicius et al., FP8 Formats (2022).

    Args:
      format: "e4m3" (finite, no infinities) or "e5m2".
      granularity: one float32 scale for the "tensor", each output "channel", or each 128 x 128 "block".
    """
    _choice("fp8", "format", format, ("e4m3", "e5m2"))
    _choice("fp8", "granularity", granularity, tuple(_FP8_BLOCKS))
    return Scheme(
        _changed("fp8", dict(format=format, granularity=granularity)),
        format,
        _FP8_BLOCKS[granularity],
    )


def W8A8FP8(
    format: Float8 = "e4m3",
    granularity: Granularity = "channel",
    activation: Literal["token", "tensor", "block"] = "token",
    mode: Literal["dynamic", "static", "delayed"] = "dynamic",
    history: int = 1024,
    margin: int = 0,
    amax: Literal["max", "most_recent"] = "max",
) -> Scheme:
    """FP8 weights as `FP8`, and x in e4m3.

    `s_x = max|x| / 448` over a token, the tensor, or 128 elements of K of a token (1 if 0);
    `x' = e4m3(clip(x / s_x, -448, 448)) * s_x`.

    Args:
      activation: one scale a "token", for the "tensor", or for each "block" of 128 along K.
      mode: "static" takes the scale from the QTensor's `act_scale`, per tensor; "delayed" from what the layer met in
        its last calls (`qjax.delayed`).
      history, margin, amax: of "delayed", as `Delayed`; the defaults are Transformer Engine's.
      format, granularity: as `FP8`.
    """
    scheme = FP8(format, granularity)
    _choice("w8a8_fp8", "activation", activation, ("token", "tensor", "block"))
    _choice("w8a8_fp8", "mode", mode, ("dynamic", "static", "delayed"))
    delayed = Delayed(history, margin, amax)
    if mode != "delayed" and delayed != Delayed():
        raise SchemeError(f"w8a8_fp8: {delayed} is for mode=delayed; got mode={mode}")
    _choice("w8a8_fp8", "amax", amax, ("max", "most_recent"))
    for option, value, least in (("history", history, 1), ("margin", margin, 0)):
        if type(value) is not int or value < least:
            raise SchemeError(f"w8a8_fp8: {option}={value!r}; allowed: an integer from {least}")
    x = Activation("e4m3", activation)
    if mode != "dynamic":
        x = Activation("e4m3", "tensor", "static", delayed=delayed if mode == "delayed" else None)
    given = dict(format=format, granularity=granularity, activation=x.granularity, mode=mode)
    spec = _changed("w8a8_fp8", given | dataclasses.asdict(delayed))
    return dataclasses.replace(scheme, spec=spec, activation=x)


def _codebook_scheme(name: str, block_size: int, double_quant: bool) -> Scheme:
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise SchemeError(f"{name}: block_size={block_size!r}; allowed: a positive integer")
    _choice(name, "double_quant", double_quant, (True, False))
    spec = _changed(name, dict(block_size=block_size, double_quant=double_quant))
    return Scheme(spec, name, (1, block_size), nested=256 if double_quant else None)


def NF4(block_size: int = 64, double_quant: bool = False) -> Scheme:
    """NormalFloat of 4 bits: `a = max|w|` over the block, `code` of the NF4 value nearest to `w / a`,
    `w' = nf4[code] * a`.

    With `double_quant`, scales are stored in 8 bits: `o` their mean over the tensor, `r = a - o` in blocks of up to 256
    (`256 // G` rows of G scales), `a2 = max|r|`, `c` the nearest value of bitsandbytes' signed dynamic map to `r / a2`,
    `a' = map[c] * a2 + o`; codes are made with the exact `a`.
    Source: Dettmers et al., QLoRA (2023), sections 3 and E.
    """
    return _codebook_scheme("nf4", block_size, double_quant)


def FP4(block_size: int = 64, double_quant: bool = False) -> Scheme:
    """bitsandbytes' FP4: as `NF4` with the values 0, 0.0052, 1/6, 1/4, 1/3, 1/2, 2/3, 1 and their negatives."""
    return _codebook_scheme("fp4", block_size, double_quant)


def HIGGS(group_size: int = 128, hadamard_size: int = 128, bits: int = 4, p: int = 1) -> Scheme:
    """HIGGS: K is rotated by Hadamard matrices, which makes weights Gaussian, and rounded to the grid of
    `n = 2^(p * bits)` points in p dimensions that errs least on a Gaussian.

    `W_r = W' blockdiag(H / sqrt(h))`, `s = sqrt(mean(w^2))` over a group of it (1 if 0), float16, `code` of the point
    nearest to `w / s`, p neighbours along K at a time, `w' = grid[code] * s`; products rotate x as well.
    Source: Malinovskii et al., Pushing the Limits of Large Language Model Quantization via the Linearity Theorem
    (2024), section 4; for p = 1 the grid is that of Max, Quantizing for Minimum Distortion (1960).

    Args:
      group_size: elements of rotated K that share a scale; even for p = 2.
      hadamard_size: h, a power of two that divides K; 2 at least for p = 2.
      bits: 2, 3 or 4 of an element.
      p: elements that a point has, 1 or 2. Two err by 8, 14 and 18 % less at 2, 3 and 4 bits; fused kernels on GPUs
        there are for one, of 4 bits.
    """
    _choice("higgs", "bits", bits, (2, 3, 4))
    _choice("higgs", "p", p, (1, 2))
    for option, value in (("group_size", group_size), ("hadamard_size", hadamard_size)):
        if type(value) is not int or value < 1 or value % p or (option == "hadamard_size" and value & (value - 1)):
            allowed = "a power of two" if option == "hadamard_size" else "a positive integer"
            raise SchemeError(f"higgs: {option}={value!r}; allowed: {allowed}" + (f", of whole {p}" if p > 1 else ""))
    given = dict(group_size=group_size, hadamard_size=hadamard_size, bits=bits, p=p)
    weight = f"higgs{bits}" + (f"_p{p}" if p > 1 else "")
    spec = _changed("higgs", given, always=("group_size",))
    return Scheme(spec, weight, (1, group_size), "float16", hadamard=hadamard_size)


def MXFP4() -> Scheme:
    """MXFP4: blocks of 32 along K, `e = floor(log2(max|w|)) - 2`, scale `2^e` in e8m0 (2^-127 in a block of zeros),
    `code = e2m1(w / 2^e)` to nearest, half to even, saturating at 6. Source: OCP MX 1.0, sections 5.3 and 6.3."""
    return Scheme("mxfp4", "e2m1", (1, 32), "float8_e8m0fnu")


def MXFP8(format: Float8 = "e4m3") -> Scheme:
    """MXFP8: as `MXFP4` with e4m3 (emax 8, saturating at 448) or e5m2 (emax 15, 57344). Source: OCP MX 1.0."""
    _choice("mxfp8", "format", format, ("e4m3", "e5m2"))
    return Scheme(_changed("mxfp8", dict(format=format)), format, (1, 32), "float8_e8m0fnu")


def NVFP4() -> Scheme:
    """NVFP4: `g = max|W| / (448 * 6)` over the tensor (1 if 0), float32; per block of 16 along K
    `sb = e4m3(max|w| / 6 / g)`, `code = e2m1(w / (sb * g))` to nearest, half to even, saturating at 6 (0 where sb is
    0), `w' = e2m1[code] * sb * g`. Source: NVIDIA, Pretraining LLMs with NVFP4 (2025), appendix B."""
    return Scheme("nvfp4", "e2m1", (1, 16), "float8_e4m3fn", global_scale=True)


SCHEMES: dict[str, Callable[..., Scheme]] = {
    "w8a16": W8A16,
    "w6a16": W6A16,
    "w5a16": W5A16,
    "w4a16": W4A16,
    "w3a16": W3A16,
    "w2a16": W2A16,
    "w8a8_int8": W8A8Int8,
    "w4a8_int8": W4A8Int8,
    "fp8": FP8,
    "w8a8_fp8": W8A8FP8,
    "nf4": NF4,
    "fp4": FP4,
    "higgs": HIGGS,
    "mxfp4": MXFP4,
    "mxfp8": MXFP8,
    "nvfp4": NVFP4,
}


def parse_scheme(text: str) -> Scheme:
    """The scheme that a command line names: `w4a16`, `w4a16:group_size=64,symmetric=false`.

    Raises:
      SchemeError: for an unknown name or option, naming the known ones.
    """
    return read_spec(text, SCHEMES, "scheme", SchemeError)


def as_scheme(scheme: Scheme | str) -> Scheme:
    """A scheme from itself or its command-line string."""
    if isinstance(scheme, Scheme):
        return scheme
    if isinstance(scheme, str):
        return parse_scheme(scheme)
    hint = "; call it" if callable(scheme) else ""
    raise SchemeError(f"a scheme is a qjax.Scheme or its string; got {scheme!r}{hint}")

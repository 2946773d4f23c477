"""Straight-line PTX on pairs of 16-bit floats, run in NumPy: what `pallas_kernels.pairs` writes, word by word."""

import re

import jax.numpy as jnp
import numpy as np

_TYPES = {"f16x2": np.float16, "bf16x2": jnp.bfloat16}


def _halves(word: np.ndarray, dtype: type) -> np.ndarray:
    """uint32 `[...]` -> float64 `[..., 2]`, the low half first."""
    return np.ascontiguousarray(word, np.uint32)[..., None].view(np.uint16).view(dtype).astype(np.float64)


def _word(halves: np.ndarray, dtype: type) -> np.ndarray:
    """Rounded once: float64 holds a product and its sum with a third, or what decides how that rounds."""
    return np.ascontiguousarray(halves.astype(dtype)).view(np.uint32)[..., 0]


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    found = np.zeros(np.broadcast_shapes(a.shape, selector.shape), np.uint32)
    for byte in range(4):
        which = ((selector >> np.uint32(4 * byte)) & np.uint32(7)).astype(np.uint64)
        assert not ((selector >> np.uint32(4 * byte)) & np.uint32(8)).any(), "sign replication"
        found |= ((both >> (which * np.uint64(8))) & np.uint64(255)).astype(np.uint32) << np.uint32(8 * byte)
    return found


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    found = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), np.uint32)
    for case in range(8):
        if table >> case & 1:
            bits = [v if case >> (2 - i) & 1 else ~v for i, v in enumerate((a, b, c))]
            found |= bits[0] & bits[1] & bits[2]
    return found


def run(text: str, *given: np.ndarray) -> np.ndarray:
    """What `$0` is after `text`, `$1`, `$2`, ... being given: uint32, elementwise.

    Raises:
      NotImplementedError: an instruction that this does not know.
    """
    values: dict[str, np.ndarray] = {f"${i + 1}": np.asarray(v, np.uint32) for i, v in enumerate(given)}

    def operand(name: str) -> np.ndarray:
        return values[name] if name in values else np.asarray(int(name, 0) & 0xFFFFFFFF, np.uint32)

    for line in filter(None, (part.strip() for part in text.strip().strip("{}").split(";"))):
        if line.startswith(".reg"):
            continue
        name, rest = line.split(None, 1)
        to, *names = re.split(r",\s*", rest.strip())
        a = [operand(one) for one in names]
        kind = name.rpartition(".")[2]
        match name.split(".")[0], kind:
            case "mov", _:
                found = a[0]
            case "shr", _:
                found = a[0] >> a[1]
            case "shl", _:
                found = a[0] << a[1]
            case "and", _:
                found = a[0] & a[1]
            case "xor", _:
                found = a[0] ^ a[1]
            case "mul", "u32":
                found = (a[0].astype(np.uint64) * a[1]).astype(np.uint32)
            case "lop3", _:
                found = _lop3(*a[:3], int(a[3]))
            case "prmt", _:
                found = _prmt(*a)
            case ("add" | "mul" | "fma") as what, ("f16x2" | "bf16x2"):
                dtype = _TYPES[kind]
                x = [_halves(one, dtype) for one in a]
                found = _word(x[0] + x[1] if what == "add" else x[0] * x[1] + (x[2] if what == "fma" else 0), dtype)
            case _:
                raise NotImplementedError(line)
        values[to] = found
    return values["$0"]


def both(values: np.ndarray, dtype: str) -> np.ndarray:
    """Words with a value twice."""
    one = np.ascontiguousarray(np.asarray(values, np.float64).astype(np.dtype(dtype))).view(np.uint16)
    return one.astype(np.uint32) * np.uint32(0x10001)


def pair_of(word: np.ndarray, dtype: str) -> np.ndarray:
    """Words -> the two values of each, float64, the low half first."""
    return _halves(word, np.dtype(dtype).type)

"""What is measured: schemes, sizes and backends as a command line names them -> cases, in the order of the work."""

import dataclasses
import re
from collections.abc import Iterable, Iterator

from qjax.dispatch.backends import NAMES
from qjax.errors import BackendError, QJaxError
from qjax.schemes import Scheme, parse_scheme

# N x K. Projections of Llama-2-7B (q, k and v merged; o; gate and up merged; down) and of 70B (q, k and v; o).
SHAPES = "12288x4096,4096x4096,22016x4096,4096x11008,10240x8192,8192x8192"
ROWS = "1,4,8,16,32,64,128,256,2048"
SCHEMES = "w4a16,w8a16,nf4,mxfp4,nvfp4,fp8,w3a16,w2a16,w8a8_int8,w8a8_fp8"
BACKENDS = "auto,mosaic,triton,cublaslt,xla"


@dataclasses.dataclass(frozen=True)
class Case:
    """One product to measure: `m` rows of x by an `[n, k]` weight of `scheme`, on `backend`."""

    scheme: Scheme
    backend: str
    m: int
    n: int
    k: int

    @property
    def key(self) -> tuple[str, str, str, int, int, int]:
        """What its record is found by."""
        return "gemm", str(self.scheme), self.backend, self.m, self.n, self.k


def cases_of(
    schemes: Iterable[Scheme], backends: Iterable[str], rows: Iterable[int], shapes: Iterable[tuple[int, int]]
) -> list[Case]:
    """Every combination, shape by shape and then by rows: what shares weights is together."""
    schemes, backends, rows = list(schemes), list(backends), list(rows)
    return [Case(s, b, m, n, k) for n, k in shapes for m in rows for s in schemes for b in backends]


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """`22016x4096,4096x4096` -> `[(N, K), ...]`."""
    found = []
    for part in _parts(text):
        size = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part)
        if size is None:
            raise QJaxError(f"shape {part!r} is not NxK, such as 22016x4096")
        found.append((int(size[1]), int(size[2])))
    return found


def parse_rows(text: str) -> list[int]:
    """`1,16,64` -> numbers of rows of x."""
    wrong = [part for part in _parts(text) if not re.fullmatch(r"[1-9]\d*", part)]
    if wrong:
        raise QJaxError(f"number of rows {wrong[0]!r} is not a positive integer")
    return [int(part) for part in _parts(text)]


def parse_schemes(text: str) -> list[Scheme]:
    """`w4a16:group_size=64,symmetric=false,nf4` -> two schemes: what has a `=` and no `:` goes on with the last."""
    found: list[str] = []
    for part in _parts(text):
        if found and "=" in part and ":" not in part:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return [parse_scheme(part) for part in found]


def parse_backends(text: str) -> list[str]:
    """`auto,xla` -> names that `qjax.use(backend=...)` takes."""
    found = list(_parts(text))
    unknown = [name for name in found if name not in NAMES]
    if unknown:
        raise BackendError(f"unknown backend {unknown[0]!r}; known: auto, {', '.join(n for n in NAMES if n != 'auto')}")
    return found


def _parts(text: str) -> Iterator[str]:
    parts = [part.strip() for part in text.split(",")]
    if not any(parts):
        raise QJaxError(f"{text!r} is an empty list")
    return filter(None, parts)

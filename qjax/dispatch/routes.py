"""Which kernel exists for which formats and devices, as a table: one row, one kernel.

A row states eligibility: all that can be read off formats, device and m. What needs arithmetic
(divisibility, shared memory) is the kernel's own `unsupported`. Among the eligible, time decides;
the order of rows breaks ties. Modules are named by strings: a row whose folder is gone is inert.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Route:
    """One kernel and where it may run. A field that is None restricts nothing.

    Attributes:
      name: `backend.kernel`, as `explain` prints it and tuning tables key it.
      backend: a row of `qjax.dispatch.backends.BACKENDS`.
      module: has `unsupported`, `configs` and `matmul`.
      formats: weight formats that it reads (`qjax.formats`).
      x_formats: formats to which it quantizes x; None in the set stands for x left as it is.
      features: members of `qjax.dispatch.problem.FEATURES` that it understands.
      platforms: as `jax.Device.platform`.
      cc_min, cc_max: compute capabilities, both included.
      m_min, m_max: rows of x, both included.
    """

    name: str
    backend: str
    module: str
    formats: frozenset[str] | None = None
    x_formats: frozenset[str | None] | None = None
    features: frozenset[str] | None = None
    platforms: frozenset[str] | None = None
    cc_min: int = 0
    cc_max: int | None = None
    m_min: int = 0
    m_max: int | None = None


# fmt: off
ROUTES: tuple[Route, ...] = (
    Route("xla.dequantize", "xla", "qjax.reference"),
)
# fmt: on

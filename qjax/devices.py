"""What each device can do, as data: the capability table, and the device a trace is for.

A row says which formats the tensor cores take, dense peak rates, bandwidth and sizes, with its
source. Code asks for a capability (`device.cc == 90`, `device.takes("e4m3")`): a name only
selects the row. A GPU without a row gets one made from its compute capability, marked `estimated`.
"""

import dataclasses
import functools
import re
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import QJaxError

_KIB, _MIB, _GIB = 2**10, 2**20, 2**30

Rates = tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What all GPUs of one compute capability share.

    Attributes:
      formats: what the tensor cores multiply.
      sparse: whether they take 2:4 structured sparsity.
      smem_sm: bytes of shared memory of one multiprocessor.
      smem_block: the most bytes that one block can opt in to.
    """

    formats: frozenset[str]
    sparse: bool
    smem_sm: int
    smem_block: int


@dataclasses.dataclass(frozen=True)
class Device:
    """One row of the capability table. Hashable; sizes in bytes.

    Attributes:
      name: the row's name.
      platform: as `jax.Device.platform`: "gpu", "cpu".
      cc: compute capability, 90 for 9.0; 0 where there is none.
      shared: formats, sparsity and shared memory of its architecture.
      rates: format -> dense peak operations a second, a multiply and an add being two; "float32" is
        the ordinary cores'.
      bandwidth: peak bytes a second of device memory.
      memory: of the device.
      sms: streaming multiprocessors.
      l2: of the whole device.
      source: the documents that the row was taken from.
      estimated: whether numbers are assumed or scaled from another row's.
    """

    name: str
    platform: str
    cc: int
    shared: Architecture
    rates: Rates
    bandwidth: float
    memory: int
    sms: int
    l2: int
    source: str
    estimated: bool = False

    @property
    def formats(self) -> frozenset[str]:
        """What the tensor cores multiply, by the names of `qjax.formats` and of dtypes."""
        return self.shared.formats

    def takes(self, format: str) -> bool:
        """Whether the tensor cores multiply this format."""
        return format in self.shared.formats

    def rate(self, format: str) -> float:
        """Dense peak operations a second in `format`; float32's where it has none of its own."""
        rates = dict(self.rates)
        return rates.get(format, rates["float32"])

    def __str__(self) -> str:
        capability = f"compute capability {self.cc // 10}.{self.cc % 10}, " if self.cc else ""
        note = ", estimated" if self.estimated else ""
        return f"{self.name} ({capability}{self.bandwidth / 1e9:.0f} GB/s{note})"


_VOLTA = frozenset({"float16"})
_TURING = _VOLTA | {"int8", "int4"}
_AMPERE = _TURING | {"bfloat16", "tf32"}
_ADA = _AMPERE | {"e4m3", "e5m2"}
# wgmma has no .s4. mma.sync.s4 still assembles from Hopper on, without tensor cores behind it: a
# tenth of the int8 rate where it was measured (RTX 5090).
_HOPPER = _ADA - {"int4"}
_BLACKWELL = _HOPPER | {"e3m2", "e2m3", "e2m1"}

# Formats: PTX ISA 9.0, sections on mma, wgmma.mma_async and tcgen05.mma. Shared memory: CUDA C++
# Programming Guide 13.0, "Technical Specifications per Compute Capability".
ARCHITECTURES: dict[int, Architecture] = {
    0: Architecture(frozenset(), False, 48 * _KIB, 48 * _KIB),  # nothing is known
    70: Architecture(_VOLTA, False, 96 * _KIB, 96 * _KIB),
    75: Architecture(_TURING, False, 64 * _KIB, 64 * _KIB),
    80: Architecture(_AMPERE, True, 164 * _KIB, 163 * _KIB),
    86: Architecture(_AMPERE, True, 100 * _KIB, 99 * _KIB),
    87: Architecture(_AMPERE, True, 164 * _KIB, 163 * _KIB),
    89: Architecture(_ADA, True, 100 * _KIB, 99 * _KIB),
    90: Architecture(_HOPPER, True, 228 * _KIB, 227 * _KIB),
    100: Architecture(_BLACKWELL, True, 228 * _KIB, 227 * _KIB),
    103: Architecture(_BLACKWELL, True, 228 * _KIB, 227 * _KIB),
    120: Architecture(_BLACKWELL, True, 100 * _KIB, 99 * _KIB),
}


def _tera(**rates: float) -> Rates:
    return tuple((name, rate * 1e12) for name, rate in rates.items())


# Dense. Documents print tensor rates with 2:4 sparsity, at first beside the dense ones, then alone:
# those are halved here.
_V100_SXM = _tera(float32=15.7, float16=125)
_V100_PCIE = _tera(float32=14, float16=112)
_T4 = _tera(float32=8.1, float16=65, int8=130, int4=260)
_A100 = _tera(float32=19.5, float16=312, bfloat16=312, tf32=156, int8=624, int4=1248)
# GeForce: floats accumulated in float32, at half the rate of a float16 accumulator.
_RTX_4090 = _tera(
    float32=82.6, float16=165.2, bfloat16=165.2, tf32=82.6,
    e4m3=330.3, e5m2=330.3, int8=660.6, int4=1321.2,
)  # fmt: skip
_L4 = _tera(
    float32=30.3, float16=121, bfloat16=121, tf32=60,
    e4m3=242.5, e5m2=242.5, int8=242.5, int4=485,
)  # fmt: skip
_H100_PCIE = _tera(float32=51.2, float16=756, bfloat16=756, tf32=378, e4m3=1513, e5m2=1513, int8=1513)
_HOPPER_SXM = _tera(float32=66.9, float16=989.4, bfloat16=989.4, tf32=494.7, e4m3=1978.9, e5m2=1978.9, int8=1978.9)
_B200 = _tera(
    float32=75, float16=2250, bfloat16=2250, tf32=1100,
    e4m3=4500, e5m2=4500, int8=4500, e3m2=4500, e2m3=4500, e2m1=9000,
)  # fmt: skip
_RTX_5090 = _tera(
    float32=104.8, float16=209.5, bfloat16=209.5, tf32=104.8,
    e4m3=419, e5m2=419, int8=838, e3m2=419, e2m3=419, e2m1=1676,
)  # fmt: skip
_CPU = _tera(float32=0.1, bfloat16=0.01)

_V100_SOURCE = "NVIDIA V100 datasheet; whitepaper WP-08608-001, table 1"
_T4_SOURCE = "NVIDIA T4 product brief PB-09256-001; Turing whitepaper WP-09183-001, appendix A"
_A100_SOURCE = "NVIDIA A100 datasheet; A100 whitepaper V1.0, table 'A100 GPU specs'"
_ADA_SOURCE = "NVIDIA Ada GPU Architecture whitepaper V2.01, appendix A, GeForce RTX 4090"
_L4_SOURCE = "NVIDIA L4 datasheet; int4 is twice int8, as in the Ada whitepaper's tables"
_H100_SOURCE = "NVIDIA H100 datasheet; H100 whitepaper V1.04, table 'H100 GPU specs'"
_H200_SOURCE = "NVIDIA H200 datasheet, H200 SXM"
_B200_SOURCE = "NVIDIA Blackwell datasheet, HGX B200; bandwidth, SMs, L2: what the driver reports"
_RTX_BLACKWELL_SOURCE = "NVIDIA RTX Blackwell whitepaper V1.1, appendix A, GeForce RTX 5090"
_ASSUMED = "assumed: the order of magnitude of two x86-64 cores, no chip in particular"


def _gpu(
    name: str,
    cc: int,
    rates: Rates,
    gb_per_s: float,
    memory_gib: int,
    sms: int,
    l2_mib: float,
    source: str,
) -> Device:
    return Device(
        name, "gpu", cc, ARCHITECTURES[cc], rates, gb_per_s * 1e9,
        memory_gib * _GIB, sms, int(l2_mib * _MIB), source,
    )  # fmt: skip


# fmt: off
TABLE: tuple[Device, ...] = (
    #    name              cc   rates        GB/s  GiB  SMs  L2 MiB  source
    _gpu("V100-SXM2-16GB", 70,  _V100_SXM,    900,  16,  80,     6, _V100_SOURCE),
    _gpu("V100-SXM2-32GB", 70,  _V100_SXM,    900,  32,  80,     6, _V100_SOURCE),
    _gpu("V100-PCIE-16GB", 70,  _V100_PCIE,   900,  16,  80,     6, _V100_SOURCE),
    _gpu("V100-PCIE-32GB", 70,  _V100_PCIE,   900,  32,  80,     6, _V100_SOURCE),
    _gpu("T4",             75,  _T4,          320,  16,  40,     4, _T4_SOURCE),
    _gpu("A100-SXM4-40GB", 80,  _A100,       1555,  40, 108,    40, _A100_SOURCE),
    _gpu("A100-SXM4-80GB", 80,  _A100,       2039,  80, 108,    40, _A100_SOURCE),
    _gpu("A100-PCIE-40GB", 80,  _A100,       1555,  40, 108,    40, _A100_SOURCE),
    _gpu("A100-80GB-PCIe", 80,  _A100,       1935,  80, 108,    40, _A100_SOURCE),
    _gpu("L4",             89,  _L4,          300,  24,  58,    48, _L4_SOURCE),
    _gpu("RTX 4090",       89,  _RTX_4090,   1008,  24, 128,    72, _ADA_SOURCE),
    _gpu("H100-PCIe",      90,  _H100_PCIE,  2039,  80, 114,    50, _H100_SOURCE),
    _gpu("H100-SXM",       90,  _HOPPER_SXM, 3352,  80, 132,    50, _H100_SOURCE),
    _gpu("H200",           90,  _HOPPER_SXM, 4800, 141, 132,    50, _H200_SOURCE),
    _gpu("B200",           100, _B200,       7672, 180, 148, 126.5, _B200_SOURCE),
    _gpu("RTX 5090",       120, _RTX_5090,   1792,  32, 170,    96, _RTX_BLACKWELL_SOURCE),
    Device("CPU", "cpu", 0, Architecture(frozenset(), False, 0, 0), _CPU, 20e9,
           16 * _GIB, 1, 32 * _MIB, _ASSUMED, estimated=True),
)
# fmt: on

# Other names of a row: what people say, and what the driver says where it is not the row's name.
ALIASES: dict[str, str] = {
    "V100": "V100-SXM2-16GB",
    "A100": "A100-SXM4-80GB",
    "H100": "H100-SXM",
    "H100 80GB HBM3": "H100-SXM",
}


def _key(name: str) -> str:
    """`NVIDIA GeForce RTX 4090`, `rtx-4090` and `RTX 4090` are one name."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    return " ".join(word for word in words if word not in ("nvidia", "tesla", "geforce", ""))


_ROWS = {_key(row.name): row for row in TABLE}
_ROWS |= {_key(alias): _ROWS[_key(name)] for alias, name in ALIASES.items()}


def find_device(name_or_kind: str) -> Device:
    """The row of that name or `jax.Device.device_kind`, in any case: `h200`, `NVIDIA H200`.

    Raises QJaxError naming the rows where there is none.
    """
    row = _ROWS.get(_key(name_or_kind))
    if row is None:
        names = ", ".join(row.name for row in TABLE)
        raise QJaxError(f"unknown device {name_or_kind!r}; the table has {names}")
    return row


def estimate_device(kind: str, platform: str, *, cc: int = 0, sms: int = 0, memory: int = 0) -> Device:
    """A row for a device that the table lacks, `estimated=True`.

    Formats and shared memory are those of the newest architecture up to `cc`; rates and bandwidth
    are the nearest row's, scaled by the number of SMs. Without a compute capability (`cc=0`: not an
    NVIDIA GPU, or one that we know by name alone) no format is claimed for tensor cores.
    """
    gpus = [row for row in TABLE if row.platform == "gpu"]
    nearest = max((row for row in gpus if row.cc <= max(cc, 70)), key=lambda row: row.cc)
    shared = ARCHITECTURES[max(known for known in ARCHITECTURES if known <= cc)]
    share = sms / nearest.sms if sms else 1.0
    return Device(
        name=kind,
        platform=platform,
        cc=cc,
        shared=shared,
        rates=tuple(
            (format, rate * share) for format, rate in nearest.rates if format in shared.formats or format == "float32"
        ),
        bandwidth=nearest.bandwidth * share,
        memory=memory or nearest.memory,
        sms=sms or nearest.sms,
        l2=int(nearest.l2 * share),
        source=f"no row of its own: {nearest.name}'s rates and bandwidth, x{share:.2f} by SMs",
        estimated=True,
    )


@functools.lru_cache(maxsize=64)
def from_jax(device: jax.Device) -> Device:
    """The row of a device that JAX sees; one estimated from what it reports where there is none."""
    row = _ROWS.get(_key(device.device_kind))
    if row is not None:
        return row
    # "9.0" from CUDA, "gfx942" from ROCm, no attribute elsewhere.
    capability = re.fullmatch(r"(\d+)\.(\d)", str(getattr(device, "compute_capability", "")))
    return estimate_device(
        device.device_kind,
        device.platform,
        cc=int("".join(capability.groups())) if capability else 0,
        sms=getattr(device, "core_count", 0),
        memory=(device.memory_stats() or {}).get("bytes_limit", 0),
    )


# Part of jit's cache key: what was traced for one device is traced again for another.
_override = jax.make_user_context(default_value=None)


def override(device: Device) -> AbstractContextManager[None]:
    """Within it, in this thread, `current()` is `device`."""
    return _override(device)


def current() -> Device:
    """The device the trace is for.

    That of `qjax.use(device=...)`, else of the mesh in context, else `jax.default_device`, else the
    default backend's first.
    """
    if _override.value is not None:
        return _override.value
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return _from_mesh(described)
    default = jax.config.jax_default_device  # a jax.Device, a platform's name or None
    if isinstance(default, jax.Device):
        return from_jax(default)
    return from_jax(jax.local_devices(backend=default)[0])


def _from_mesh(described: jax.sharding.AbstractDevice) -> Device:
    """The row of a mesh's devices: a mesh tells their kind, but not their compute capability."""
    for device in jax.local_devices():
        if device.device_kind == described.device_kind:
            return from_jax(device)
    row = _ROWS.get(_key(described.device_kind))
    return row or estimate_device(described.device_kind, described.platform or "gpu", sms=described.num_cores or 0)


def compute_dtype(device: Device) -> np.dtype:
    """The dtype to multiply in: bfloat16 or float16 where tensor cores take it, else float32."""
    taken = (name for name in ("bfloat16", "float16") if device.takes(name))
    return jnp.dtype(next(taken, "float32"))

"""What is compiled for which GPU: every kernel, at every class of shape that it claims, with the config that it picks.

`every()` is all of it, `subset` a part in which every kernel still meets every scheme, device, M and variant that it
claims; `tuned()` are the configs of the tables in `qjax/tuning`. A new row of `qjax/dispatch/routes.py` is here too.
"""

import dataclasses
import json
from collections.abc import Hashable, Iterator

from cases import SCHEMES
from products import Product, can_run, covering, gpu_routes, variants_of

from qjax.devices import find_device
from qjax.dispatch.tuning import SHIPPED

DEVICES = ("A100-SXM4-80GB", "L4", "RTX 4090", "H100-SXM", "H200", "B200")

# One row, one tile, several tiles, tiles that do not fill; plain sizes, odd ones, one output with a short last group.
ROWS = (1, 16, 64, 257)
SIZES = ((4096, 4096), (4304, 333), (2880, 1))
VARIANTS: tuple[dict, ...] = ({"x_dtype": "float16"}, {"epilogue": True}, {"stack": 2}, {"real_zero": True})


def _products() -> Iterator[Product]:
    for scheme in SCHEMES:
        for m in ROWS:
            yield from (Product(scheme, m, *size) for size in SIZES)
            yield Product(scheme, m, *SIZES[1], transposed=True)
        for m in ROWS[:2]:
            yield from variants_of(scheme, m, *SIZES[1], VARIANTS)


@dataclasses.dataclass(frozen=True)
class Case:
    """A product by one kernel on one device, in the given config, () being what the kernel picks."""

    device: str
    route: str
    product: Product
    config: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.device}-{self.route}-{self.product}".replace(" ", "-")

    def facets(self) -> Iterator[tuple[Hashable, ...]]:
        """What a part of a kernel's cases has to contain once. Less of XLA's own forms: XLA makes those kernels."""
        p = self.product
        yield from (("scheme", p.scheme), ("format", p.weight.scheme.weight, p.transposed), ("variant", p.variant))
        yield from (("shape", p.m, p.n), ("device", self.device), ("config", self.config))
        if not self.route.startswith("xla."):
            yield from (("transposed", p.scheme, p.transposed), ("many rows", p.scheme, p.m > 16))
            yield "rows", self.device, p.m


def every() -> list[Case]:
    """Every product on every kernel that claims it, on every device; XLA's own forms and one output on one in turn."""
    devices = [find_device(name) for name in DEVICES]
    found = []
    for route in gpu_routes():
        for i, product in enumerate(_products()):
            in_turn = route.name.startswith("xla.") or product.n == 1
            chosen = [devices[i % len(devices)]] if in_turn else devices
            found += [Case(d.name, route.name, product) for d in chosen if can_run(route, product, d)]
    return found


def subset(cases: list[Case]) -> list[Case]:
    """A part of cases with every facet of each kernel's."""
    return covering(cases, lambda case: ((case.route, *facet) for facet in case.facets()))


def tuned() -> list[Case]:
    """The configs in the tables that ship, each with one of the shapes that it was measured at."""
    found = {}
    for file in sorted(SHIPPED.glob("*.json")):
        table = json.loads(file.read_text())
        for e in table["entries"]:
            config = tuple(sorted(e["config"].items()))
            product = Product(e["scheme"], e["m"], e["k"], e["n"])
            found[table["device"], e["kernel"], e["scheme"], e["m"], config] = Case(
                table["device"], e["kernel"], product, config
            )
    return list(found.values())


# Schemes whose scales belong to groups, so that no step is left after the sum.
IN_ONE_STEP = (
    "w4a16",
    "w4a16:group_size=32",
    "nf4",
    "w6a16:group_size=64",
    "w8a16:group_size=128",
    "fp8:granularity=block",
)


def one_step() -> list[Case]:
    """Products of one row with a weight of many, which XLA makes one kernel of: words and x in, y out."""
    bare = (("copy_x", 0), ("rows", 1), ("shares", 1))  # neither x prepared nor sums to add
    products = [Product(scheme, 1, 4096, 12288) for scheme in IN_ONE_STEP]
    return [
        Case(name, route.name, product, bare if product.weight.is_packed else ())
        for route in gpu_routes()
        if route.name == "xla.multiply_reduce"
        for product in products
        for name in DEVICES
    ]

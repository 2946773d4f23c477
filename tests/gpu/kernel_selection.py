"""Which products are run on a GPU: every kernel with every scheme, number of rows and size that it claims, but not each
with each. `sanitized` is a smaller selection, of small products, for tools that slow kernels down a hundredfold."""

import itertools
import random
from collections.abc import Hashable, Iterator

from cases import SCHEMES
from gpu.kernel_checks import Case, claimed
from products import Product, covering, variants_of

from qjax.dispatch.routes import ROUTES, Route

ROWS = (1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 257)
# (K, N). K of real models over 8 devices and whole, one odd, one shorter than a block; N odd, one, a multiple of 8 as
# cuBLASLt asks for, and a whole layer's.
SIZES = ((7392, 520), (10944, 257), (4304, 328), (2880, 1), (1001, 77), (100, 40), (4096, 4096))
SMALL = ((1, 392, 65), (17, 392, 65), (33, 200, 130), (66, 200, 130), (5, 400, 136), (66, 400, 136))
_POOL = 3000  # products to select from
VARIANTS: tuple[dict, ...] = (
    {}, {}, {"x_dtype": "float16"}, {"epilogue": True}, {"transposed": True}, {"stack": 2}, {"real_zero": True},
)  # fmt: skip


def _products() -> Iterator[Product]:
    for scheme, m, (k, n) in itertools.product(SCHEMES, ROWS, SIZES):
        yield from (p for p in variants_of(scheme, m, k, n, VARIANTS) if not (p.stack and n > 1000))


def _facets(pair: tuple[Route, Product]) -> Iterator[Hashable]:
    route, p = pair
    yield from ((route.name, p.scheme), (route.name, p.m), (route.name, p.k), (route.name, p.variant))
    if route.backend != "xla":  # XLA makes those kernels
        yield from ((route.name, p.weight.scheme.weight, p.m > 16, p.variant), (route.name, p.k, p.m > 16))


def selected(routes: tuple[Route, ...], seed: int) -> list[Case]:
    """The cases of a run; another seed takes other ones."""
    pool = random.Random(seed).sample(list(_products()), _POOL)
    pairs = ((route, p) for p in pool for route in routes if claimed(route, p))
    return [Case(route, p, seed + i) for i, (route, p) in enumerate(covering(pairs, _facets, seed))]


def with_graph(cases: list[Case]) -> set[Case]:
    """Those that run from a CUDA graph too."""

    def facets(case: Case) -> Iterator[Hashable]:
        p = case.product
        yield from ((case.route.name, p.weight.scheme.weight), (case.route.name, p.m > 16, p.transposed, p.stack))

    return set(covering(cases, facets))


def sanitized(routes: tuple[Route, ...], seed: int) -> list[Case]:
    """One small case for each kernel and format, and for each granularity of x's codes where it meets those."""
    products = [Product(s, *shape, transposed=t) for s, shape, t in itertools.product(SCHEMES, SMALL, (False, True))]
    pairs = ((route, p) for p in products for route in routes if claimed(route, p))

    def facets(pair: tuple[Route, Product]) -> Iterator[Hashable]:
        route, problem = pair[0], pair[1].problem
        codes = route.x_formats is not None and problem.x_format in route.x_formats
        yield route.name, problem.scheme.weight, problem.x_granularity if codes else None

    taken = covering(pairs, facets, seed)
    return [Case(route, p, seed) for route, p in taken]


def rehearsed(seed: int) -> list[Case]:
    """Small products by the reference: the checks' own logic, on any machine."""
    (reference,) = (route for route in ROUTES if route.is_reference)
    products = [*variants_of("w4a16:group_size=32,symmetric=false", 9, 200, 37, VARIANTS[1:])]
    products += [Product(scheme, 3, 128, 33) for scheme in ("nf4", "w8a8_int8", "w8a8_fp8:mode=static", "nvfp4")]
    return [Case(reference, product, seed) for product in products]

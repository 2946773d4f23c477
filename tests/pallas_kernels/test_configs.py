"""Every kernel can be called in each configuration that it lists: traced as for a GPU, not run."""

import jax
import pytest
from products import Product, can_run, gpu_routes, operand_shapes, program

import qjax
from qjax.devices import find_device
from qjax.dispatch.choose import facts, load
from qjax.dispatch.routes import Route

H200 = find_device("H200")
SCHEMES = (
    "w4a16:group_size=64",
    "nvfp4",
    "w8a16:symmetric=false",
    "w8a8_int8",
    "w8a8_fp8:granularity=block,activation=block",
)
PRODUCTS = [Product(s, m, 4096, 22016, transposed=t) for s in SCHEMES for m in (1, 64, 2048) for t in (False, True)]
TRACED = 3  # configurations of a product: the first, the last, one in between
CASES = [(route, product) for route in gpu_routes() for product in PRODUCTS if can_run(route, product, H200)]


@pytest.mark.parametrize(("route", "product"), CASES, ids=str)
def test_a_listed_configuration_can_be_traced(route: Route, product: Product):
    with qjax.use(device=H200):
        p = product.problem
        listed = load(route).configs(p.m, p.k, p.n, **facts(p, H200))
        for config in listed[:: max(1, len(listed) // TRACED)] or [{}]:
            y, _ = jax.eval_shape(program(route, product, config), operand_shapes(product))
            assert y.shape == (p.m, p.k if p.transposed else p.n)

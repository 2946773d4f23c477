"""Kernels inside a caller's shard_map, which asks over which mesh axes each result varies. They are traced, not run."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from products import Product, can_run, gpu_routes, operand_shapes, program

import qjax
from qjax.devices import find_device
from qjax.dispatch.routes import Route

H200 = find_device("H200")
SCHEMES = ("w4a16", "nf4", "w8a16", "fp8", "w8a8_int8", "w8a8_fp8:granularity=block,activation=block")
CASES = [
    (route, product)
    for route in gpu_routes()
    if route.backend == "triton"
    for product in (Product(s, m, 256, 128, transposed=t) for s in SCHEMES for m in (2, 128) for t in (False, True))
    if can_run(route, product, H200)
]


@pytest.mark.parametrize(("route", "product"), CASES, ids=str)
def test_a_result_varies_as_its_operands_do(route: Route, product: Product):
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
    shapes, specs = operand_shapes(product), jax.tree.map(lambda _: P(), operand_shapes(product))
    both = jax.ShapeDtypeStruct((2 * product.m, shapes.x.shape[1]), jnp.bfloat16)
    run = program(route, product)
    with qjax.use(device=H200):
        cut = jax.shard_map(
            lambda x, o: run(type(o)(x, o.w, o.bias, o.residual))[0], mesh=mesh, in_specs=(P("rows"), specs),
            out_specs=P("rows"),
        )  # fmt: skip
        y = jax.eval_shape(cut, both, shapes)
    assert y.shape[0] == 2 * product.m

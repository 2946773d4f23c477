"""Products over 8 devices: equal to one device's, on Auto and Explicit meshes, and what moves between devices."""

import dataclasses
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.errors import ShardingError
from qjax.flax_kernel import KernelUse, quantize_kernel

K, N, M = 1024, 512, 16
KERNEL = jax.random.normal(jax.random.key(0), (K, N)) * 0.02
X = jax.random.normal(jax.random.key(1), (M, K))
COLLECTIVE = re.compile(
    r"= \(?(\w+)\[([\d,]*)\][^=]* (all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\("
)

# name -> spec of the kernel [K, N], spec of x, mesh axes over 2 x 4 devices
LAYOUTS = {
    "columns": (P(None, "t"), P("d", None)),
    "rows": (P("t", None), P("d", None)),
    "rows, x cut": (P("t", None), P("d", "t")),
    "fsdp n": (P(None, "d"), P("d", None)),
    "fsdp k": (P("d", None), P("d", None)),
    "both": (P("d", "t"), P("d", None)),
    "data": (P(None, None), P(("d", "t"), None)),
}
SCHEMES = (
    "w4a16",
    "w4a16:symmetric=false",
    "w8a8_int8",
    "nf4:double_quant=true",
    "nvfp4",
    "w8a8_fp8:granularity=block,activation=block",
)
KINDS = (AxisType.Auto, AxisType.Explicit)


def in_turn(schemes: Sequence[str], layouts: Sequence[str]) -> list[tuple[str, str, AxisType]]:
    """Each scheme with each layout, and both kinds of axes with each of either, in turn."""
    return [(s, l, KINDS[(i + j) % 2]) for i, s in enumerate(schemes) for j, l in enumerate(layouts)]  # noqa: E741


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("d", "t"), axis_types=(kind,) * 2)


def collectives(f: object, *args: object) -> list[tuple[str, str, int]]:
    """`(kind, dtype, elements)` of each collective in the compiled program."""
    text = f.lower(*args).compile().as_text()  # type: ignore[attr-defined]
    found = COLLECTIVE.findall(text)
    return [(kind, dtype, int(np.prod([int(d) for d in dims.split(",") if d]))) for dtype, dims, kind in found]


@pytest.mark.parametrize(("scheme", "layout", "kind"), in_turn(SCHEMES, list(LAYOUTS)))
def test_product_and_gradient_equal_one_device(scheme: str, layout: str, kind: AxisType):
    mesh, (kernel, rows) = mesh_of(kind), LAYOUTS[layout]
    w = qjax.quantize_array(KERNEL, scheme)
    placed, x = qjax.sharding.shard(w, mesh, kernel), jax.device_put(X, NamedSharding(mesh, rows))
    bias = jax.device_put(jnp.ones(N), NamedSharding(mesh, P(kernel[1])))

    def loss(x: jax.Array, bias: jax.Array, w: qjax.QTensor) -> jax.Array:
        return qjax.matmul(x, w, bias, activation="gelu").sum()

    product = jax.jit(qjax.matmul)
    np.testing.assert_allclose(product(x, placed), qjax.matmul(X, w), rtol=1e-4, atol=1e-4)
    got = jax.jit(jax.grad(loss, (0, 1)))(x, bias, placed)
    want = jax.grad(loss, (0, 1))(X, jnp.ones(N), w)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    moved = collectives(product, x, placed)
    assert all(size < K * N // 8 or dtype not in ("f32", "bf16") for _, dtype, size in moved), moved
    if layout in ("columns", "rows", "rows, x cut", "data"):
        assert not [m for m in moved if m[0] != "all-reduce"], moved


@pytest.mark.parametrize("layout", ["columns", "rows", "both"])
def test_axes_that_are_auto_only_inside_of_a_function_give_the_same_product(layout: str):
    mesh, (kernel, rows) = mesh_of(AxisType.Explicit), LAYOUTS[layout]
    w = qjax.quantize_array(KERNEL, "w4a16")
    placed, x = qjax.sharding.shard(w, mesh, kernel), jax.device_put(X, NamedSharding(mesh, rows))
    with jax.set_mesh(mesh):
        inside = jax.sharding.auto_axes(qjax.matmul, out_sharding=P())
        np.testing.assert_allclose(jax.jit(inside)(x, placed), qjax.matmul(X, w), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_fsdp_moves_codes_where_they_weigh_less_than_x(kind: AxisType):
    mesh = mesh_of(kind)
    w = qjax.sharding.shard(qjax.quantize_array(KERNEL, "w4a16"), mesh, P(None, "d"))
    many = jax.device_put(jnp.ones((4096, K)), NamedSharding(mesh, P("d", None)))
    moved = collectives(jax.jit(qjax.matmul), many, w)
    assert {"u32", "f16"} <= {dtype for _, dtype, _ in moved}, moved
    # Neither x nor a dequantized weight. (On an Auto mesh XLA may want the result cut elsewhere, and move that.)
    assert not {size for _, dtype, size in moved if dtype == "f32"} & {4096 * K, K * N}, moved


@pytest.mark.parametrize(
    ("scheme", "layout", "kind"),
    in_turn(
        ["w4a16:symmetric=false", "nf4:double_quant=true", "nvfp4", "fp8:granularity=block"],
        ["columns", "rows", "fsdp k", "both"],
    ),
)
def test_a_kernel_is_dequantized_where_its_codes_lie(scheme: str, layout: str, kind: AxisType):
    mesh, (spec, _) = mesh_of(kind), LAYOUTS[layout]
    w = qjax.quantize_array(KERNEL, scheme)
    placed = qjax.sharding.shard(w, mesh, spec)
    for run in (qjax.QTensor.dequantize, jax.jit(qjax.QTensor.dequantize)):
        kernel = run(placed)
        np.testing.assert_allclose(kernel, w.dequantize(), rtol=1e-6)
        assert kernel.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2), kernel.sharding


def test_on_an_explicit_mesh_a_kernel_of_many_axes_is_dequantized_in_its_own_order():
    mesh = mesh_of(AxisType.Explicit)
    kernel = jax.random.normal(jax.random.key(2), (3, 8, 16, 256))  # layers, heads, features of a head, K
    w = quantize_kernel(kernel, "w4a16:group_size=32", KernelUse((3,), stacked=(0,)), k_pieces=4)
    got = qjax.sharding.shard(w, mesh, P(None, "d", None, "t")).dequantize()
    np.testing.assert_array_equal(got, w.dequantize())
    assert got.sharding.spec == P(None, "d", None, "t")


def test_on_an_explicit_mesh_an_axis_of_k_that_does_not_divide_is_whole():
    mesh = mesh_of(AxisType.Explicit)
    kernel = jax.random.normal(jax.random.key(2), (2, 128, 64))  # K is two axes, and four devices have a quarter each
    w = quantize_kernel(kernel, "w4a16:group_size=32", KernelUse((0, 1)), k_pieces=4)
    got = qjax.sharding.shard(w, mesh, P("t", None, "d")).dequantize()
    np.testing.assert_array_equal(got, w.dequantize())
    assert got.sharding.spec == P(None, None, "d")


def test_specs_are_those_of_the_kernel_turned():
    mesh, w = mesh_of(AxisType.Auto), qjax.quantize_array(KERNEL, "w4a16:symmetric=false")
    specs = qjax.sharding.specs(w, P("t", "d"), mesh)
    assert (specs.packed, specs.scale, specs.zero_point) == (P("d", "t", None), P("d", "t"), P("d", "t"))
    channel = qjax.sharding.specs(qjax.quantize_array(KERNEL, "w8a16"), P("t", "d"), mesh)
    assert (channel.packed, channel.scale) == (P("d", "t"), P("d", None))


@pytest.mark.parametrize(
    ("k", "scheme", "message"),
    [
        (
            1408,
            "w4a16",
            r"a/b: K=1408 over mesh axes \('d', 't'\) of 8 devices: a shard of 176 cuts scale groups of 128",
        ),
        (1376, "w4a16:group_size=-1", "cuts padded pieces of 1376; quantize with k_pieces=8"),
        (1152, "w4a16:group_size=16", "cuts blocks of 128 codes; quantize with k_pieces=8"),
    ],
)
def test_a_cut_through_a_group_names_axis_shard_and_group(k: int, scheme: str, message: str):
    w = qjax.quantize_array(jnp.ones((k, 64)), scheme)
    with pytest.raises(ShardingError, match=message):
        qjax.sharding.shard(w, mesh_of(AxisType.Auto), P(("d", "t"), None), where="a/b")


def test_on_an_explicit_mesh_a_cut_group_is_found_at_trace():
    mesh = mesh_of(AxisType.Explicit)
    w = qjax.quantize_array(jnp.ones((1024, 64)), "w4a16:group_size=512")
    packed = jax.device_put(w.packed, NamedSharding(mesh, P(None, "t", None)))
    scale = jax.device_put(w.scale, NamedSharding(mesh, P(None, None)))
    cut = qjax.QTensor(packed, scale, scheme=w.scheme, k_piece=w.k_piece)
    with pytest.raises(ShardingError, match="cuts scale groups of 512"):
        jax.jit(qjax.matmul)(jax.device_put(X, NamedSharding(mesh, P(None, None))), cut)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_outside_of_jit_a_cut_group_names_the_weight(kind: AxisType):
    mesh = mesh_of(kind)
    w = qjax.quantize_array(jnp.ones((1024, 64)), "w4a16:group_size=512")
    places = NamedSharding(mesh, P(None, "t", None)), NamedSharding(mesh, P(None, None))
    by_hand = dict(packed=jax.device_put(w.packed, places[0]), scale=jax.device_put(w.scale, places[1]))
    message = r"^a weight of shape \(1024, 64\): K=1024 over mesh axes \('t',\) of 4 devices: a shard of 256 cuts scale"
    with pytest.raises(ShardingError, match=message):
        qjax.matmul(jax.device_put(X, places[1]), dataclasses.replace(w, **by_hand))
    if kind == AxisType.Auto:  # x anywhere
        with pytest.raises(ShardingError, match=message):
            qjax.matmul(X, dataclasses.replace(w, **by_hand))


def test_pieces_let_an_awkward_k_be_cut():
    k = 11008
    w = qjax.quantize_array(jax.random.normal(jax.random.key(0), (k, 64)), "w4a16:group_size=32", k_pieces=8)
    placed = qjax.sharding.shard(w, mesh_of(AxisType.Auto), P(("d", "t"), None))
    x = jax.random.normal(jax.random.key(1), (2, k))
    np.testing.assert_allclose(jax.jit(qjax.matmul)(x, placed), x @ w.dequantize(), rtol=1e-3, atol=1e-2)

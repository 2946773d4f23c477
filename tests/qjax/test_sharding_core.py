"""How a product is cut over a mesh, decided by `qjax.partition` alone, and what the compiled programs then move.

`test_sharding.py` has the layouts of a model; here are those that a model meets less often, and the gradients.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.errors import ShardingError
from qjax.partition import all_specs, check_cut, plan_product, product_axes, shardy_rule, weight_axes
from qjax.qtensor import QTensor

K, N, M = 1024, 512, 16
KINDS = (AxisType.Auto, AxisType.Explicit)
BYTES = {"f32": 4, "bf16": 2, "f16": 2, "u32": 4, "s32": 4, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1}
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


@functools.cache
def kernel() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (K, N)) * 0.02


@functools.cache
def weight(scheme: str) -> QTensor:
    return qjax.quantize_array(kernel(), scheme)


@functools.cache
def x_of(m: int = M) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (m, K))


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("d", "t"), axis_types=(kind,) * 2)


def put(a: jax.Array, mesh: jax.sharding.Mesh, *spec: object) -> jax.Array:
    return jax.device_put(a, NamedSharding(mesh, P(*spec)))


def moved(f: object, *args: object) -> list[tuple[str, str, int]]:
    """`(collective, dtype, elements)` of every array that a collective of the compiled program moves."""
    text = f.lower(*args).compile().as_text()  # type: ignore[attr-defined]
    return [
        (name, dtype, int(np.prod([int(d) for d in dims.split(",") if d])))
        for shapes, name in COLLECTIVE.findall(text)
        for dtype, dims in SHAPE.findall(shapes)
    ]


def bytes_moved(moves: list[tuple[str, str, int]], *but: str) -> int:
    return sum(BYTES[dtype] * size for name, dtype, size in moves if name not in but)


def close(got: jax.Array, want: jax.Array, bound: float = 1e-5) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= bound * np.linalg.norm(want)


def loss(x: jax.Array, w: QTensor) -> jax.Array:
    return (qjax.matmul(x, w) ** 2).sum()


class PlanTest(parameterized.TestCase):
    """`plan_product` on shapes alone."""

    def plan(self, scheme: str, x_spec: P, kernel_spec: P, m: int = M, **call):
        w = weight(scheme)
        axes = product_axes(w, stack=0, rows=1, transposed=False, x_scale=False, bias=False, residual=False, **call)
        leaves = [jax.ShapeDtypeStruct((m, K), jnp.float32), *jax.tree.leaves(w)]
        placed = jax.tree.leaves(all_specs(w, (), kernel_spec[1], kernel_spec[0]), is_leaf=lambda s: isinstance(s, P))
        return plan_product(axes, leaves, [x_spec, *placed], w, {"d": 2, "t": 4})

    def test_columns_cut_the_result_and_sum_nothing(self):
        plan = self.plan("w4a16", P("d", None), P(None, "t"))
        assert plan.operands == (P("d", None), P("t", None, None), P("t", None))
        assert (plan.result, plan.sum_over) == (P("d", "t"), ())

    def test_rows_cut_x_and_sum(self):
        plan = self.plan("w4a16", P("d", None), P("t", None))
        assert plan.operands == (P("d", "t"), P(None, "t", None), P(None, "t"))
        assert (plan.result, plan.sum_over) == (P("d", None), ("t",))

    def test_axes_of_size_one_are_not_cut(self):
        plan = self.plan("w8a16", P(None, None), P("t", "d"))
        assert plan.operands == (P(None, "t"), P("d", "t"), P("d", None))
        tensor = self.plan("w8a16:group_size=tensor", P(None, None), P("t", "d"))
        assert tensor.operands[2] == P(None, None)

    def test_every_field_follows_the_codes(self):
        plan = self.plan("nf4:double_quant=true", P(None, None), P("t", "d"))
        # packed, scale.packed, scale.scale, scale.offset
        assert plan.operands[1:4] == (P("d", "t", None), P("d", "t"), P("d", None))
        assert plan.operands[4] == P()
        assert self.plan("nvfp4", P(None, None), P("t", "d")).operands[3] == P()

    @parameterized.parameters(("w4a16", 1), ("w4a16", 64), ("w8a16", 64), ("w4a16", 8192), ("w8a16", 8192))
    def test_on_a_shared_axis_whichever_weighs_less_gives_way(self, scheme, m):
        plan = self.plan(scheme, P("d", None), P(None, "d"), m)
        x_moves = m * K * 4 <= weight(scheme).nbytes
        assert plan.operands[0] == (P(None, None) if x_moves else P("d", None))
        assert plan.operands[1][0] == ("d" if x_moves else None)
        assert plan.result == (P(None, "d") if x_moves else P("d", None))

    def test_rows_of_x_keep_what_the_weight_does_not_take(self):
        plan = self.plan("w4a16", P(("d", "t"), None), P(None, "t"))
        assert (plan.operands[0], plan.result) == (P("d", None), P("d", "t"))

    def test_a_cut_through_words_is_refused(self):
        w = weight("w4a16")
        axes = product_axes(w, stack=0, rows=1, transposed=False, x_scale=False, bias=False, residual=False)
        leaves = [jax.ShapeDtypeStruct((M, K), jnp.float32), *jax.tree.leaves(w)]
        with pytest.raises(ShardingError, match=r"\('t',\) cut the words of a packed block"):
            plan_product(axes, leaves, [P(), P(None, None, "t"), P()], w, {"t": 4})

    def test_each_array_has_a_name_for_each_axis(self):
        for scheme in ("w4a16:symmetric=false", "nf4:double_quant=true", "nvfp4", "fp8:granularity=block"):
            w = weight(scheme)
            ranks = [a.ndim for a in jax.tree.leaves(w)]
            assert [len(names) for names in weight_axes(w, ())] == ranks
            assert [len(names) for names in weight_axes(w, ("b0",))] == [r + 1 for r in ranks]

    def test_a_full_qtensor_names_its_leaves_in_order(self):
        w = dataclasses.replace(
            weight("w4a16:symmetric=false"),
            global_scale=jnp.ones(N),
            codebook=jnp.ones(16),
            offset=jnp.float32(0),
            input_perm=jnp.arange(K),
            input_scale=jnp.ones(K),
            act_scale=jnp.float32(1),
        )
        specs = all_specs(w, (), "t", "d")
        assert (specs.packed, specs.scale, specs.zero_point) == (P("t", "d", None), P("t", "d"), P("t", "d"))
        assert (specs.global_scale, specs.codebook, specs.offset) == (P("t"), P(None), P())
        assert (specs.input_perm, specs.input_scale, specs.act_scale) == (P("d"), P("d"), P())

    def test_the_rule_of_the_partitioner_gives_broadcast_axes_their_own_factor(self):
        w = weight("w8a16")
        axes = product_axes(w, stack=0, rows=1, transposed=False, x_scale=False, bias=False, residual=False)
        rule = str(shardy_rule(axes, [(M, K), *(a.shape for a in jax.tree.leaves(w))]))
        assert "reduction_factors=('k',)" in rule.replace('"', "'")
        assert rule.count("u0") == 1  # the scale's axis of size 1


class CutTest(parameterized.TestCase):
    @parameterized.parameters(
        ("w4a16", (512, 64), {"n": 1, "k": 8}, r"K=512 over mesh axes \('t',\) of 8 devices: a shard of 64 cuts scale groups of 128; group sizes that fit: 16, 32, 64, or one scale a channel"),
        ("fp8:granularity=block", (512, 512), {"n": 8, "k": 1}, r"N=512 over mesh axes \('t',\) of 8 devices: a shard of 64 cuts scale groups of 128"),
        ("w4a16", (1024, 60), {"n": 8, "k": 1}, r"N=60 over mesh axes \('t',\) of 8 devices: not equal parts"),
        ("w4a16:group_size=16", (1152, 8), {"n": 1, "k": 8}, r"a shard of 144 cuts blocks of 128 codes; quantize with k_pieces=8"),
        ("w4a16:group_size=-1", (1376, 8), {"n": 1, "k": 8}, r"a shard of 172 cuts padded pieces of 1376; quantize with k_pieces=8"),
        ("mxfp8", (128, 8), {"n": 1, "k": 8}, r"a shard of 16 cuts scale groups of 32; group sizes that fit: 16"),
    )  # fmt: skip
    def test_what_a_shard_would_cut_is_named(self, scheme, shape, parts, message):
        w = qjax.quantize_array(jnp.ones(shape), scheme)
        with pytest.raises(ShardingError, match=f"up: {message}"):
            check_cut(w, parts, {"n": ("t",), "k": ("t",)}, "up")

    def test_a_nested_scale_s_blocks_of_rows_are_not_cut_either(self):
        # 8 scales a row: blocks of 256 are 32 rows, which 512 rows over 32 devices would cut.
        w = qjax.quantize_array(jnp.ones((512, 512)), "nf4:double_quant=true")
        check_cut(w, {"n": 16, "k": 1}, {"n": ("t",), "k": ()})
        with pytest.raises(ShardingError, match=r"up.scale: N=512 .* a shard of 16 cuts scale groups of 32"):
            check_cut(w, {"n": 32, "k": 1}, {"n": ("t",), "k": ()}, "up")

    @parameterized.parameters("w4a16", "nf4:double_quant=true", "nvfp4", "w8a16", "fp8:granularity=block")
    def test_a_cut_between_groups_is_legal(self, scheme):
        check_cut(weight(scheme), {"n": 4, "k": 8}, {"n": ("d",), "k": ("t",)})

    def test_under_the_partitioner_a_cut_group_fails_with_its_name_and_is_no_wrong_answer(self):
        mesh = mesh_of(AxisType.Auto)
        w = qjax.quantize_array(kernel(), "w4a16:group_size=512")
        cut = dataclasses.replace(w, packed=put(w.packed, mesh, None, "t", None), scale=put(w.scale, mesh))
        with pytest.raises(Exception, match="a shard of 256 cuts scale groups of 512"):
            jax.jit(qjax.matmul)(put(x_of(), mesh), cut)


class ProgramTest(parameterized.TestCase):
    @parameterized.product(kind=KINDS, scheme=("w4a16", "nf4:double_quant=true"), spec=(P(None, "t"), P("t", None)))
    def test_a_gradient_of_tensor_parallel_products_gathers_no_weight(self, kind, scheme, spec):
        mesh = mesh_of(kind)
        w, x = qjax.sharding.shard(weight(scheme), mesh, spec), put(x_of(), mesh, "d", None)
        gradient = jax.jit(jax.grad(loss))
        close(gradient(x, w), jax.grad(loss)(x_of(), weight(scheme)))
        # x, y and their cotangents are [M, K] and [M, N]: no field of the weight is as small as a quarter of them.
        assert all(size <= M * K and dtype == "f32" for _, dtype, size in moved(gradient, x, w))

    @parameterized.product(kind=KINDS, scheme=("w4a16", "nvfp4"), spec=(P(None, "d"), P("d", None)), m=(16, 4096))
    def test_fsdp_never_moves_a_dequantized_weight_nor_more_than_its_codes(self, kind, scheme, spec, m):
        mesh = mesh_of(kind)
        w, x = qjax.sharding.shard(weight(scheme), mesh, spec), put(x_of(m), mesh, "d", None)
        for f in (jax.jit(qjax.matmul), jax.jit(jax.grad(loss))):
            moves = moved(f, x, w)
            products = 1 if f is not jax.jit and len(moves) < 1 else 3  # forward, and twice in its gradient
            if m == 4096:
                assert all(dtype != "f32" or size <= 1 for _, dtype, size in moves), moves
                assert bytes_moved(moves) <= products * weight(scheme).nbytes
            else:  # x and y move, which are small
                assert all(dtype == "f32" and size <= m * K for _, dtype, size in moves), moves

    @parameterized.parameters(*KINDS)
    def test_data_parallel_products_and_gradients_move_nothing(self, kind):
        mesh = mesh_of(kind)
        w, x = qjax.sharding.shard(weight("w4a16"), mesh, P()), put(x_of(), mesh, ("d", "t"), None)
        assert moved(jax.jit(qjax.matmul), x, w) == []
        assert moved(jax.jit(jax.grad(loss)), x, w) == []

    @parameterized.parameters(*KINDS)
    def test_a_sum_over_shards_is_in_float32_and_the_epilogue_follows_it(self, kind):
        mesh = mesh_of(kind)
        w = qjax.sharding.shard(weight("w4a16"), mesh, P("t", None))
        x, bias = x_of().astype(jnp.bfloat16), jnp.full((N,), 0.5, jnp.bfloat16)
        residual = jax.random.normal(jax.random.key(2), (M, N), jnp.bfloat16)

        def f(x, w, bias, residual):
            return qjax.matmul(x, w, bias, activation="gelu", residual=residual)

        args = put(x, mesh, "d", None), w, put(bias, mesh), put(residual, mesh, "d", None)
        want = f(x, weight("w4a16"), bias, residual)
        # One rounding to bfloat16 of sums in another order: equal but for a few ties.
        assert np.mean(np.asarray(jax.jit(f)(*args)) == np.asarray(want)) > 0.99
        assert moved(jax.jit(f), *args) == [("all-reduce", "f32", M // 2 * N)]

    @parameterized.product(kind=KINDS, spec=(P("t", None, None), P("t", None, "d"), P(None, "t", "d")))
    def test_experts_are_cut_along_their_stack_too(self, kind, spec):
        mesh = mesh_of(kind)
        kernels = jnp.stack([kernel() * (i + 1) for i in range(4)])
        w, x = qjax.quantize_array(kernels, "w4a16"), x_of(4 * M).reshape(4, M, K)
        placed = qjax.sharding.shard(w, mesh, spec)
        f = jax.jit(qjax.matmul)
        x_there = put(x, mesh, spec[0], None, None)
        close(f(x_there, placed), qjax.matmul(x, w))
        close(jax.jit(jax.grad(loss))(x_there, placed), jax.grad(loss)(x, w))
        if spec[1] is None:
            assert moved(f, x_there, placed) == []

    @parameterized.product(kind=KINDS, scheme=("w8a8_int8:activation=tensor", "w8a8_fp8:activation=block", "w8a8_int8"))
    def test_quantized_x_is_that_of_one_device_however_it_is_cut(self, kind, scheme):
        mesh = mesh_of(kind)
        x = x_of().at[3, 5].set(40.0)  # one value that the others' devices have to know of
        for spec, rows in ((P("t", None), ("d", "t")), (P(None, "t"), (("d",), None)), (P(), (("d", "t"), None))):
            placed = qjax.sharding.shard(weight(scheme), mesh, spec)
            close(jax.jit(qjax.matmul)(put(x, mesh, *rows), placed), qjax.matmul(x, weight(scheme)), 1e-6)

    @parameterized.product(kind=KINDS, spec=(P("t", None), P(None, "t"), P("d", "t")))
    def test_an_order_of_x_and_its_scale_come_before_the_cut(self, kind, spec):
        mesh = mesh_of(kind)
        rng = np.random.default_rng(0)
        w = dataclasses.replace(
            weight("w4a16:group_size=64"),
            input_perm=jnp.asarray(rng.permutation(K), jnp.int32),
            input_scale=jnp.asarray(rng.uniform(0.5, 2, K), jnp.float32),
        )
        placed, x = qjax.sharding.shard(w, mesh, spec), put(x_of(), mesh, "d", None)
        close(jax.jit(qjax.matmul)(x, placed), qjax.matmul(x_of(), w), 1e-6)
        close(jax.jit(jax.grad(loss))(x, placed), jax.grad(loss)(x_of(), w))

    @parameterized.product(kind=KINDS, spec=(P("t", None), P(None, "t")))
    def test_a_batch_of_x_or_of_weights_is_cut_alike(self, kind, spec):
        mesh = mesh_of(kind)
        w, x = weight("w4a16"), x_of(64).reshape(4, M, K)
        f = jax.jit(jax.vmap(qjax.matmul, (0, None)))
        x_there = put(x, mesh, None, "d", None)
        close(f(x_there, qjax.sharding.shard(w, mesh, spec)), qjax.matmul(x, w))
        stack = qjax.quantize_array(jnp.stack([kernel(), -kernel()]), "w4a16")
        both = jax.jit(jax.vmap(qjax.matmul))
        close(both(x_there[:2], qjax.sharding.shard(stack, mesh, P(None, *spec))), qjax.matmul(x[:2], stack))

    @parameterized.parameters(*KINDS)
    def test_an_eager_call_works_where_a_jitted_one_does(self, kind):
        mesh = mesh_of(kind)
        for spec in (P("t", None), P(None, "t")):
            placed = qjax.sharding.shard(weight("w4a16"), mesh, spec)
            close(qjax.matmul(put(x_of(), mesh, "d", None), placed), qjax.matmul(x_of(), weight("w4a16")))

    @parameterized.parameters(*KINDS)
    def test_a_scan_over_layers_cut_over_devices(self, kind):
        mesh = mesh_of(kind)
        square = jax.random.normal(jax.random.key(3), (3, K, K)) * 0.03
        w = qjax.quantize_array(square, "w4a16")

        def run(x, w):
            return jax.lax.scan(lambda c, layer: (qjax.matmul(c, layer), None), x, w)[0]

        placed = qjax.sharding.shard(w, mesh, P(None, "t", None))
        x = put(x_of(), mesh, "d", None)
        close(jax.jit(run)(x, placed), run(x_of(), w))
        moves = moved(jax.jit(run), x, placed)
        assert {name for name, _, _ in moves} == {"all-reduce"} and all(d == "f32" for _, d, _ in moves)


def test_forward_mode_is_refused_and_not_wrong():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: qjax.matmul(x, weight("w4a16")), (x_of(),), (x_of(),))

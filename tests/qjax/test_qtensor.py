"""QTensor as a pytree: its shapes and bytes, what JAX does to it, what `validate_qtensor` and `concat_rows` refuse."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from cases import SCHEMES
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qjax.errors import QTensorError
from qjax.qtensor import QTensor, concat_rows, is_qtensor, k_pieces, scale_shape, validate_qtensor
from qjax.quantize import quantize_array
from qjax.schemes import parse_scheme

K, N = 256, 24

# Bytes of a [256, 24] weight by hand: codes + scales (+ zero points, + the rest).
BYTES = {
    "w8a16": 6144 + 24 * 4,
    "w8a16:group_size=tensor": 6144 + 4,
    "w8a16:group_size=64,symmetric=false": 6144 + 24 * 4 * 2 + 24 * 4,
    "w6a16:group_size=64": 4608 + 24 * 4 * 2,
    "w5a16:symmetric=false": 3840 + 24 * 2 * 2 + 24 * 2,
    "w4a16": 3072 + 24 * 2 * 2,
    "w4a16:group_size=16,symmetric=false": 3072 + 24 * 16 * 2 + 24 * 16,
    "w4a16:group_size=-1": 3072 + 24 * 4,
    "w4a16:group_size=64,scale_dtype=bfloat16": 3072 + 24 * 4 * 2,
    "w3a16:group_size=32": 2304 + 24 * 8 * 2 + 24 * 8,
    "w3a16:symmetric=true": 2304 + 24 * 2 * 2,
    "w2a16": 1536 + 24 * 4 * 2 + 24 * 4,
    "fp8": 6144 + 24 * 4,
    "fp8:granularity=tensor": 6144 + 4,
    "fp8:granularity=block": 6144 + 2 * 4,
    "nf4": 3072 + 24 * 4 * 4,
    "nf4:double_quant=true": 3072 + 24 * 4 + 4 + 4,  # a byte a scale, one block of 64 rows, the offset
    "mxfp4": 3072 + 24 * 8,
    "mxfp8": 6144 + 24 * 8,
    "nvfp4": 3072 + 24 * 16 + 4,
}


def weight(scheme: str = "w4a16", *shape: int, seed: int = 0, **options) -> QTensor:
    rng = np.random.default_rng(seed)
    return quantize_array((rng.standard_normal(shape or (K, N)) * 0.05).astype(np.float32), scheme, **options)


def dense(w: QTensor) -> np.ndarray:
    return np.asarray(w.dequantize())


class BytesTest(parameterized.TestCase):
    @parameterized.parameters(*BYTES)
    def test_bytes_are_those_counted_by_hand(self, scheme):
        w = weight(scheme)
        assert w.nbytes == BYTES[scheme] == sum(np.asarray(a).nbytes for a in jax.tree.leaves(w))
        assert w.bits_per_weight == 8 * BYTES[scheme] / (K * N)

    def test_padding_counts(self):
        # 7392 = 57.75 blocks of 128: 58 are held.
        assert weight("w4a16:group_size=32", 7392, 8).nbytes == 8 * (58 * 64 + 231 * 2)
        assert weight("w8a16", 100, 8).nbytes == 8 * (100 + 4)

    def test_stacked_weights_weigh_as_many_alone(self):
        assert weight("nvfp4", 3, 2, K, N).nbytes == 6 * BYTES["nvfp4"]


class ShapeTest(parameterized.TestCase):
    @parameterized.product(scheme=SCHEMES, stack=((), (3,)))
    def test_the_shape_is_the_kernel_s(self, scheme, stack):
        w = jax.eval_shape(lambda: weight(scheme, *stack, K, N))
        assert validate_qtensor(w).shape == (*stack, K, N)
        assert (w.ndim, w.size) == (2 + len(stack), math.prod(stack) * K * N)
        assert (w.in_features, w.out_features, w.stack_shape) == (K, N, stack)

    @parameterized.parameters((100, (100, 128)), (7392, (7392, 7424)), (256, (128, 128)))
    def test_only_what_is_padded_remembers_its_piece(self, k, piece):
        w = weight("w4a16:group_size=-1", k, 4)
        assert w.k_piece == piece and w.in_features == k
        assert k_pieces(k, 8, 1) == (1, 1)

    def test_k_is_cut_into_equal_pieces_or_not_at_all(self):
        assert k_pieces(11008, 4, 8) == (1376, 1408)
        assert k_pieces(1024, 4, 8) == (128, 128)
        for pieces in (0, -1, 3):
            with pytest.raises(QTensorError, match=f"K=1024 cannot be cut into k_pieces={pieces}"):
                k_pieces(1024, 4, pieces)

    @parameterized.parameters(
        ((1, 128), (24, 2)), ((1, None), (24, 1)), ((None, None), (1, 1)), ((128, 128), (1, 2)), ((1, 100), (24, 3)),
    )  # fmt: skip
    def test_scales_are_one_a_block_short_ones_too(self, block, shape):
        assert scale_shape(dataclasses.replace(parse_scheme("fp8"), block=block), N, K) == shape

    def test_a_kernel_of_many_axes_keeps_them(self):
        w = dataclasses.replace(weight(), in_shape=(8, 32), out_shape=(4, 6))
        flat = dense(weight())
        assert validate_qtensor(w).shape == (8, 32, 4, 6)
        np.testing.assert_array_equal(dense(w), flat.reshape(8, 32, 4, 6))
        moved = dataclasses.replace(w, axes=(2, 0, 1, 3))
        assert moved.shape == (4, 8, 32, 6)
        np.testing.assert_array_equal(dense(moved), flat.reshape(8, 32, 4, 6).transpose(2, 0, 1, 3))
        stacked = dataclasses.replace(weight("w4a16", 3, K, N), out_shape=(4, 6), axes=(1, 0, 2))
        assert stacked.shape == dense(stacked).shape == (3, 4, K, 6)


class JaxTest(parameterized.TestCase):
    @parameterized.parameters(*SCHEMES)
    def test_jit_takes_and_returns_it(self, scheme):
        w = weight(scheme)
        same = jax.jit(lambda w: w)(w)
        chex.assert_trees_all_equal(same, w)
        assert (same.scheme, same.dtype, same.k_piece) == (w.scheme, w.dtype, w.k_piece)

    @parameterized.parameters(
        "w4a16:symmetric=false", "nf4:double_quant=true", "nvfp4", "fp8:granularity=block", "w8a16"
    )
    def test_scan_and_vmap_slice_it_like_an_array(self, scheme):
        w = weight(scheme, 3, K, N)
        seen = []

        def step(carry, layer):
            seen.append(layer.shape)
            return carry, layer.dequantize()

        _, ys = jax.lax.scan(step, 0, w)
        # Compiled, `scale * code + offset` may be one fused operation.
        np.testing.assert_allclose(np.asarray(ys), dense(w), rtol=1e-6)
        np.testing.assert_allclose(np.asarray(jax.vmap(QTensor.dequantize)(w)), dense(w), rtol=1e-6)
        assert set(seen) == {(K, N)}
        assert jax.tree.map(lambda a: a[1:], w).shape == (2, K, N)

    def test_shard_map_sees_the_shape_of_its_shard(self):
        mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        w, seen = weight("w4a16:group_size=32", 512, N), []

        def local(w):
            seen.append(validate_qtensor(w).shape)
            return w.dequantize()

        specs = QTensor(P("b", "a", None), P("b", "a"), scheme=w.scheme, k_piece=w.k_piece)
        y = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=P("a", "b"))(w)
        assert set(seen) == {(256, 12)}
        np.testing.assert_array_equal(np.asarray(y), dense(w))

    def test_tree_map_rebuilds_it_around_anything(self):
        w = weight("nvfp4")
        doubled = jax.tree.map(lambda a: a, w)
        assert isinstance(doubled, QTensor) and is_qtensor(doubled)
        for placeholder in (None, 3, "x", object(), P("t")):
            around = jax.tree.map(lambda _, p=placeholder: p, w)
            assert isinstance(around, QTensor) and around.packed is placeholder
        assert len(jax.tree.leaves(w)) == 3 and jax.tree.leaves(w, is_leaf=is_qtensor) == [w]

    def test_leaves_are_named_by_their_fields(self):
        paths = [
            jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(weight("nf4:double_quant=true"))
        ]
        assert paths == [".packed", ".scale.packed", ".scale.scale", ".scale.offset"]

    def test_eval_shape_gives_shapes_and_bytes_without_values(self):
        w = jax.eval_shape(lambda: weight("w4a16:symmetric=false"))
        assert isinstance(w.packed, jax.ShapeDtypeStruct)
        assert (w.shape, w.nbytes) == ((K, N), 3072 + 96 + 48)
        assert "shape=(256, 24)" in repr(w)

    def test_schemes_are_static_so_another_one_is_another_program(self):
        traced = []

        @jax.jit
        def f(w):
            traced.append(w.scheme.spec)
            return w.dequantize()

        f(weight(seed=0))
        f(weight(seed=1))
        f(weight("nf4"))
        assert traced == ["w4a16:group_size=128", "nf4"]

    def test_a_donated_weight_is_gone(self):
        w = jax.device_put(weight())
        want = dense(w)
        moved = jax.jit(lambda w: jax.tree.map(lambda a: a, w), donate_argnums=0)(w)
        assert w.packed.is_deleted() and w.scale.is_deleted()
        np.testing.assert_array_equal(dense(moved), want)

    def test_device_put_places_every_array(self):
        w, device = weight("nf4:double_quant=true"), jax.devices()[3]
        moved = jax.device_put(w, device)
        assert all(a.devices() == {device} for a in jax.tree.leaves(moved))
        np.testing.assert_array_equal(dense(moved), dense(w))
        mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
        spread = jax.device_put(w, NamedSharding(mesh, P()))
        assert all(a.sharding.is_fully_replicated for a in jax.tree.leaves(spread))

    def test_it_compares_by_identity_and_is_hashable(self):
        a, b = weight(), weight()
        assert a == a and a != b and len({a, b, a}) == 2

    def test_its_repr_says_what_it_weighs_or_what_it_holds(self):
        w = weight()
        want = "QTensor(w4a16:group_size=128, shape=(256, 24), dtype=float32, 3,168 bytes, 4.125 bits/weight)"
        assert repr(w) == want
        assert repr(jax.tree.map(lambda _: P("t"), w)).startswith("QTensor(w4a16:group_size=128, packed=P")
        for placeholder in (None, object(), 1):
            assert "w4a16" in repr(jax.tree.map(lambda _, p=placeholder: p, w))

    def test_it_has_no_place_for_new_fields(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            weight().packed = None


f32, i32 = jnp.float32, jnp.int32

# What is wrong -> (scheme, fields that are changed, what the error says).
WRONG = {
    "packed dtype": ("w4a16", dict(packed=jnp.zeros((N, 2, 16), i32)), "packed has dtype int32; allowed: uint32"),
    "packed words": ("w4a16", dict(packed=jnp.zeros((N, 2, 12), jnp.uint32)), r"asks for \[..., N, K/128, 16\]"),
    "packed rank": ("w4a16", dict(packed=jnp.zeros((2, 16), jnp.uint32)), r"packed has shape \(2, 16\)"),
    "codes dtype": ("w8a16", dict(packed=jnp.zeros((N, K), jnp.uint8)), "packed has dtype uint8; allowed: int8"),
    "codes rank": ("fp8", dict(packed=jnp.zeros((K,), jnp.float8_e4m3fn)), r"asks for \[..., N, K\]"),
    "piece": ("w4a16", dict(k_piece=(100, 256)), r"k_piece=\(100, 256\) does not fit packed of 256"),
    "piece of nothing": ("w4a16", dict(k_piece=(0, 0)), r"k_piece=\(0, 0\) does not fit"),
    "piece too long": ("w4a16", dict(k_piece=(300, 384)), "does not fit packed of 256 codes"),
    "scale shape": ("w4a16", dict(scale=jnp.ones((N, 3))), r"scale has shape \(24, 3\); .* ask for \(24, 2\)"),
    "scale rank": ("w8a16", dict(scale=jnp.ones((N,))), r"scale has shape \(24,\); .* ask for \(24, 1\)"),
    "scale dtype": ("w4a16", dict(scale=jnp.ones((N, 2), i32)), "scale has dtype int32; allowed: float16"),
    "zero shape": ("w4a16", dict(zero_point=jnp.zeros((N, 1), jnp.int8)), r"zero_point has shape \(24, 1\)"),
    "zero dtype": ("w4a16", dict(zero_point=jnp.zeros((N, 2), i32)), "zero_point has dtype int32; allowed: int8"),
    "global shape": ("nvfp4", dict(global_scale=jnp.ones((2,))), r"global_scale has shape \(2,\)"),
    "global dtype": ("nvfp4", dict(global_scale=jnp.ones((), jnp.float16)), "global_scale has dtype float16"),
    "global row dtype": ("nvfp4", dict(global_scale=jnp.ones((N,), jnp.float16)), "global_scale has dtype float16"),
    "codebook shape": ("nf4", dict(codebook=jnp.ones((8,))), r"codebook has shape \(8,\); .* ask for \(16,\)"),
    "codebook dtype": ("nf4", dict(codebook=jnp.ones((16,), i32)), "codebook has dtype int32; allowed: float32"),
    "offset shape": ("nf4", dict(offset=jnp.ones((1,))), r"offset has shape \(1,\); .* ask for \(\)"),
    "perm shape": ("w4a16", dict(input_perm=jnp.zeros((K + 1,), i32)), r"input_perm has shape \(257,\)"),
    "perm dtype": ("w4a16", dict(input_perm=jnp.zeros((K,), f32)), "input_perm has dtype float32; allowed: int32"),
    "input scale": ("w4a16", dict(input_scale=jnp.zeros((N,))), r"input_scale has shape \(24,\); .* \(256,\)"),
    "act scale": ("w8a8_int8:mode=static", dict(act_scale=jnp.ones((N,))), r"act_scale has shape \(24,\)"),
    "in shape": ("w4a16", dict(in_shape=(16, 15)), r"in_shape=\(16, 15\), .* do not multiply to K=256, N=24"),
    "out shape": ("w4a16", dict(out_shape=(4, 5)), r"out_shape=\(4, 5\) do not multiply"),
    "axes": ("w4a16", dict(axes=(0, 0)), r"axes=\(0, 0\) is no order of the 2 axes"),
    "too few axes": ("w4a16", dict(axes=(0, 1), out_shape=(4, 6)), r"axes=\(0, 1\) is no order of the 3 axes"),
}


class ValidateTest(parameterized.TestCase):
    @parameterized.parameters(*WRONG)
    def test_what_disagrees_is_named_with_what_would_agree(self, name):
        scheme, change, message = WRONG[name]
        with pytest.raises(QTensorError, match=f"(?s)^layers.0.up.*{message}"):
            validate_qtensor(dataclasses.replace(weight(scheme), **change), "layers.0.up")

    def test_a_nested_scale_is_looked_into(self):
        w = weight("nf4:double_quant=true")
        short = dataclasses.replace(w.scale, scale=jnp.ones((2, 1)))
        with pytest.raises(QTensorError, match=r"up.scale: scale has shape \(2, 1\)"):
            validate_qtensor(dataclasses.replace(w, scale=short), "up")
        turned = dataclasses.replace(w.scale, packed=w.scale.packed.T)
        with pytest.raises(QTensorError, match=r"up: scale has shape|up.scale: scale"):
            validate_qtensor(dataclasses.replace(w, scale=turned), "up")

    def test_the_stack_belongs_to_every_field(self):
        w = weight("nvfp4", 3, K, N)
        with pytest.raises(QTensorError, match=r"global_scale has shape \(\); .* ask for \(3,\)"):
            validate_qtensor(dataclasses.replace(w, global_scale=jnp.float32(1)))

    @parameterized.parameters(*SCHEMES)
    def test_what_quantize_makes_is_valid(self, scheme):
        w = weight(scheme)
        assert validate_qtensor(w) is w


class ConcatTest(parameterized.TestCase):
    @parameterized.parameters(
        "w4a16", "w4a16:group_size=32,symmetric=false", "w3a16:group_size=-1", "w8a16", "w8a16:group_size=tensor",
        "w8a16:group_size=tensor,symmetric=false", "fp8:granularity=tensor", "nf4", "mxfp4", "mxfp8", "nvfp4",
    )  # fmt: skip
    def test_rows_keep_their_values(self, scheme):
        parts = [weight(scheme, K, n, seed=n) for n in (8, 24, 3)]
        whole = validate_qtensor(concat_rows(parts))
        assert whole.shape == (K, 35)
        np.testing.assert_array_equal(dense(whole), np.concatenate([dense(p) for p in parts], axis=1))

    @parameterized.parameters("w4a16", "fp8:granularity=tensor", "nvfp4")
    def test_stacks_are_joined_layer_by_layer(self, scheme):
        parts = [weight(scheme, 2, K, n, seed=n) for n in (8, 16)]
        whole = validate_qtensor(concat_rows(parts))
        np.testing.assert_array_equal(dense(whole), np.concatenate([dense(p) for p in parts], axis=2))

    def test_what_was_joined_can_be_joined_again(self):
        parts = [weight("nvfp4", K, n, seed=n) for n in (8, 16)]
        twice = concat_rows([concat_rows(parts), concat_rows(parts)])
        assert twice.global_scale.shape == (48,)
        np.testing.assert_array_equal(dense(twice), np.concatenate([dense(p) for p in parts * 2], axis=1))

    def test_blocks_of_rows_stay_whole(self):
        parts = [weight("fp8:granularity=block", K, n, seed=n) for n in (256, 40)]
        whole = validate_qtensor(concat_rows(parts))
        np.testing.assert_array_equal(dense(whole), np.concatenate([dense(p) for p in parts], axis=1))
        with pytest.raises(QTensorError, match=r"parts of N=\[40, 256\] cut blocks of 128 rows"):
            concat_rows(parts[::-1])

    @parameterized.parameters("w4a16:symmetric=false", "w8a16:group_size=64,symmetric=false")
    def test_a_missing_zero_point_is_filled_in(self, scheme):
        a, b = weight(scheme, K, 8), weight(scheme, K, 16, seed=1)
        b = dataclasses.replace(b, zero_point=None)
        for parts in ((a, b), (b, a)):
            whole = validate_qtensor(concat_rows(parts))
            np.testing.assert_array_equal(dense(whole), np.concatenate([dense(p) for p in parts], axis=1))

    def test_a_real_valued_zero_point_stays_real(self):
        a, b = weight("w4a16:symmetric=false", K, 8), weight("w4a16:symmetric=false", K, 16, seed=1)
        a = dataclasses.replace(a, zero_point=a.zero_point.astype(jnp.float32) + 0.25)
        whole = validate_qtensor(concat_rows([a, b]))
        np.testing.assert_array_equal(dense(whole), np.concatenate([dense(a), dense(b)], axis=1))

    def test_a_shared_order_of_x_stays(self):
        perm = jnp.asarray(np.random.default_rng(0).permutation(K), jnp.int32)
        parts = [dataclasses.replace(weight("w4a16", K, n, seed=n), input_perm=perm) for n in (8, 16)]
        whole = concat_rows(parts)
        assert whole.input_perm is perm
        np.testing.assert_array_equal(dense(whole), np.concatenate([dense(p) for p in parts], axis=1))

    @parameterized.parameters(
        ("scheme", "w4a16", "nf4"), ("scheme", "w4a16", "w4a16:group_size=64"), ("scheme", "w8a16", "w8a8_int8"),
    )  # fmt: skip
    def test_parts_of_different_schemes_stay_apart(self, field, a, b):
        with pytest.raises(QTensorError, match=f"part 1 differs in {field}"):
            concat_rows([weight(a), weight(b)])

    @parameterized.parameters(
        ("k_piece", ("w4a16:group_size=16", 256, N), ("w4a16:group_size=16", 272, N)),
        ("in_features", ("w8a16", 256, N), ("w8a16", 512, N)),
        ("stack_shape", ("w8a16", 256, N), ("w8a16", 2, 256, N)),
    )
    def test_parts_that_cannot_share_an_array_are_told_apart(self, field, a, b):
        with pytest.raises(QTensorError, match=f"part 1 differs in {field}"):
            concat_rows([weight(*a), weight(*b)])

    def test_parts_of_different_dtypes_stay_apart(self):
        with pytest.raises(QTensorError, match="part 1 differs in dtype"):
            concat_rows([weight(), weight(dtype="bfloat16")])

    @parameterized.parameters("input_perm", "input_scale", "act_scale", "codebook", "offset")
    def test_parts_that_need_another_x_or_table_stay_apart(self, field):
        value = {
            "input_perm": jnp.arange(K, dtype=i32)[::-1],
            "input_scale": jnp.full((K,), 2.0),
            "act_scale": jnp.float32(2),
            "codebook": jnp.linspace(-1, 1, 16),
            "offset": jnp.float32(0.5),
        }[field]
        a = weight("nf4")
        with pytest.raises(QTensorError, match=f"part 1 differs from part 0 in {field}"):
            concat_rows([a, dataclasses.replace(a, **{field: value})])
        with pytest.raises(QTensorError, match=f"part 1 differs from part 0 in {field}"):
            concat_rows([dataclasses.replace(a, **{field: value}), a])

    def test_a_part_without_its_global_scale_is_not_taken_for_one_with(self):
        a = weight("nvfp4")
        bare = dataclasses.replace(a, global_scale=None)
        for parts in ((a, bare), (bare, a)):
            with pytest.raises(QTensorError, match="global_scale"):
                concat_rows(parts)

    def test_double_quantized_scales_cannot_be_joined(self):
        w = weight("nf4:double_quant=true")
        with pytest.raises(QTensorError, match="double-quantized scales cannot be merged"):
            concat_rows([w, w])

    def test_nothing_cannot_be_joined(self):
        with pytest.raises(QTensorError):
            concat_rows([])

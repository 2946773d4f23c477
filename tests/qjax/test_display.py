"""What a QTensor shows in a notebook: right numbers, well-formed markup, and no error for placeholders."""

import dataclasses
import re
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import treescope
from absl.testing import parameterized
from flax import nnx

import qjax
from qjax.dequantize import codes
from qjax.display import ROWS, to_html

K, N = 256, 48


def kernel(k: int = K, n: int = N) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (k, n))


def text_of(html: str) -> str:
    return " ".join(ElementTree.fromstring(html).itertext())


def bars_of(html: str) -> dict[str, float]:
    """Title of each bar -> its share in percent."""
    titles = [title.text or "" for title in ElementTree.fromstring(html).iter("title")]
    pairs = (title.removesuffix(" %").rsplit(": ", 1) for title in titles)
    return {what: float(share) for what, share in pairs}


class HtmlTest(parameterized.TestCase):
    @parameterized.parameters(
        "w4a16", "w4a16:symmetric=false", "w2a16", "w3a16", "w8a16", "w8a16:symmetric=false", "fp8", "fp8:format=e5m2",
        "nf4", "nf4:double_quant=true", "fp4", "mxfp4", "mxfp8", "nvfp4", "w8a8_int8",
    )  # fmt: skip
    def test_it_is_well_formed_and_says_what_the_tensor_weighs(self, scheme: str) -> None:
        w = qjax.quantize_array(kernel(), scheme)
        text = text_of(w._repr_html_())
        for wanted in (str(w.scheme), f"({K}, {N}) float32", f"{w.nbytes:,}", f"{4 * K * N / w.nbytes:.2f}x"):
            self.assertIn(wanted, text)
        self.assertIn(f"{8 * w.nbytes / (K * N):.3f} bits/weight", text)

    def test_every_array_is_listed_nested_ones_too(self) -> None:
        text = text_of(to_html(qjax.quantize_array(kernel(), "nf4:double_quant=true")))
        listed = re.findall(r"(\S+) +(\w+) \[([\d, ]*)\], ([\d,]+) bytes", text)
        self.assertEqual([name for name, *_ in listed], ["packed", "scale.packed", "scale.scale", "scale.offset"])
        self.assertEqual(listed[0][1:], ("uint32", "48, 2, 16", "6,144"))

    @parameterized.parameters("w4a16", "w4a16:symmetric=false", "w2a16", "w6a16")
    def test_the_bars_are_the_shares_of_the_codes(self, scheme: str) -> None:
        w = qjax.quantize_array(kernel(), scheme)
        counts = np.bincount(np.asarray(codes(w)).ravel(), minlength=2**w.scheme.bits)
        zero = 0 if w.zero_point is not None else 2 ** (w.scheme.bits - 1)
        wanted = {f"{code - zero:g}": 100 * c / (K * N) for code, c in enumerate(counts)}
        bars = bars_of(to_html(w))
        self.assertEqual(bars.keys(), wanted.keys())
        np.testing.assert_allclose(list(bars.values()), list(wanted.values()), atol=0.006)  # two digits are printed

    def test_codebook_codes_stand_in_the_order_of_their_values(self) -> None:
        bars = [float(what) for what in bars_of(to_html(qjax.quantize_array(kernel(), "nf4")))]
        self.assertEqual(bars, sorted(bars))
        self.assertEqual([bars[0], bars[-1], len(bars)], [-1, 1, 16])

    @parameterized.parameters("w8a16", "fp8")
    def test_codes_of_8_bits_are_counted_whatever_their_dtype(self, scheme: str) -> None:
        bars = bars_of(to_html(qjax.quantize_array(kernel(), scheme)))
        self.assertLessEqual(len(bars), 64)
        self.assertAlmostEqual(sum(bars.values()), 100, delta=0.01 * len(bars))

    def test_padding_is_not_counted(self) -> None:
        w = qjax.quantize_array(jnp.ones((100, 4)), "w4a16:group_size=-1")  # 28 codes a row are padding
        self.assertEqual(bars_of(to_html(w))["7"], 100)

    def test_a_large_tensor_is_sampled_over_all_of_its_layers(self) -> None:
        layers = jnp.stack([jnp.full((32, 300), sign) for sign in (-1.0, 1.0)])
        html = to_html(qjax.quantize_array(layers, "w4a16:group_size=32"))
        self.assertIn(f"in {ROWS} of 600 rows", text_of(html))
        bars = bars_of(html)
        self.assertEqual([bars["-7"], bars["7"]], [50, 50])

    def test_numpy_arrays_show_what_jax_arrays_do(self) -> None:
        w = qjax.quantize_array(kernel(), "nvfp4")
        self.assertEqual(to_html(jax.tree.map(np.asarray, w)), to_html(w))

    def test_what_holds_no_values_shows_its_repr(self) -> None:
        w = qjax.quantize_array(kernel(), "w4a16")
        for empty in (
            jax.eval_shape(lambda: w),
            jax.tree.map(lambda _: None, w),
            jax.tree.map(lambda _: object(), w),
            qjax.sharding.specs(w, jax.P(None, "model")),
            dataclasses.replace(w, packed=w.packed[:0], scale=w.scale[:0]),
        ):
            self.assertEqual(text_of(to_html(empty)), repr(empty))

    def test_a_tensor_under_a_trace_or_donated_shows_its_repr(self) -> None:
        seen = []
        w = qjax.quantize_array(kernel(), "w4a16")
        jax.jit(lambda w: seen.append(to_html(w)))(w)
        self.assertEqual(text_of(seen[0]), repr(w))
        w.packed.delete()
        self.assertEqual(text_of(to_html(w)), repr(w))


class TreescopeTest(parameterized.TestCase):
    def params(self) -> dict[str, object]:
        w = qjax.quantize_array(kernel(), "nf4:double_quant=true")
        return {"dense": {"kernel": w, "bias": jnp.zeros(N)}, "param": nnx.Param(w)}

    def test_a_tree_of_params_renders_with_fields_and_a_summary(self) -> None:
        params = self.params()
        text = treescope.render_to_text(params)
        w = params["dense"]["kernel"]
        summary = f"# {w.scheme}, ({K}, {N}) float32, {w.nbytes:,} bytes, {w.bits_per_weight:.3f} bits/weight"
        self.assertEqual(text.count(summary), 2)
        self.assertIn("kernel': QTensor(packed=<jax.Array uint32(48, 2, 16)", text)
        self.assertNotIn("zero_point", text)
        html = treescope.render_to_html(params, compressed=False)
        self.assertIn(summary.removeprefix("# "), html)

    def test_placeholders_render_without_a_summary(self) -> None:
        w = qjax.quantize_array(kernel(), "w4a16")
        for leaf in (None, object(), jax.P("model")):
            text = treescope.render_to_text(jax.tree.map(lambda _, leaf=leaf: leaf, w), ignore_exceptions=False)
            self.assertIn("QTensor(", text)
            self.assertNotIn("bits/weight", text)

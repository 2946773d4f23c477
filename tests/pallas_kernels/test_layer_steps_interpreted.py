"""A decoder layer's products and what they end in, lane by lane in NumPy, against float64."""

import pytest
from decoder_layer import ALLOWED, EPSILON, Layer, exact, off, operands

from pallas_kernels.mosaic.layer_steps import rest_of_layer

pytestmark = pytest.mark.slow

LAYERS = (
    Layer("w4a16", 1, 512, 1024, 256, 768),
    Layer("w4a16:group_size=32,symmetric=false", 3, 200, 328, 136, 96),
    Layer("w4a16:group_size=-1", 16, 256, 384, 256, 320, "float16"),
    Layer("nvfp4", 9, 256, 384, 256, 512),
    Layer("nf4", 2, 320, 136, 64, 80),
    Layer("w8a16", 2, 256, 384, 256, 320),
    Layer("fp8", 9, 512, 128, 64, 96),
)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_each_result_is_rounded_once(layer: Layer) -> None:
    o = operands(layer)
    static = dict(epsilon=EPSILON, sms=3, interpret=True)
    hidden, row = rest_of_layer(o.attended, o.residual, o.stored, o.norms, **static)
    alone, nothing = rest_of_layer(o.attended, o.residual, o.stored[:3], o.norms[:1], **static)
    allowed = ALLOWED.get(layer.scheme, 1.0)
    expected = exact(o)
    assert off(hidden, expected[0]) < allowed
    assert row is not None
    assert off(row, expected[1]) < allowed
    assert nothing is None
    assert (alone == hidden).all()

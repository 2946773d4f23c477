"""The HTML page: whole, offline, escaped, with a plot for everything that there is."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from qjax.quality import Comparison, LayerComparison, page

PLOTS = ["distribution of KL, and KL by position", "SQNR of each layer", "map of SQNR", "map of outliers"]


def layer(path, noise=0.1, table=False):
    signal = np.linspace(0, 3, 40)
    x = None if table else np.linspace(1, 2, 300)
    return LayerComparison(path, None, "int<4>", signal, noise * signal, np.full(40, noise), x, x)


def comparison(*layers, kl=0.01):
    shape = (2, 70)
    return Comparison(np.ones(shape), np.ones(shape), np.full(shape, kl), np.ones(shape, bool), layers)


class Reader(HTMLParser):
    """What a page is made of; tags that are not closed fail."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.text = [], {}, [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.links += [given[name] for name in ("src", "href") if name in given]
        if tag == "img":
            self.images[given["alt"]] = given["src"]
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += f"{data} "


@pytest.mark.parametrize(
    ("found", "plots"),
    [
        (comparison(layer("layers/0/up"), layer("layers/1/up")), PLOTS),
        (comparison(layer("mix", noise=0.0), kl=0.0), PLOTS),
        (comparison(layer("embed", table=True)), PLOTS[:3]),
        (comparison(), PLOTS[:1]),
    ],
    ids=["several layers", "exact", "a table", "no layer"],
)
def test_a_page_holds_its_plots_and_reaches_for_nothing(found, plots):
    read = Reader(page(found, title="<model>", facts={"bytes & more": "1 < 2"}))
    assert "<model>" in read.text and "1 < 2" in read.text and "bytes & more" in read.text
    assert list(read.images) == plots
    assert all(link.startswith("data:image/png;base64,") for link in read.links)
    assert all(base64.b64decode(src.partition(",")[2]).startswith(b"\x89PNG") for src in read.images.values())
    assert not re.search(r"https?://|url\(|@import", page(found))


def test_rows_of_layers_name_schemes_and_say_exact_for_infinity():
    read = Reader(page(comparison(layer("a", noise=0.0), layer("b"))))
    assert re.search(r"a  ?float  ?int<4>  ?exact  ?exact", read.text)
    assert re.search(r"b  ?float  ?int<4>  ?10.0", read.text)

"""How a QTensor shows itself in a notebook: a table with a histogram of its codes, and a node of treescope's tree.

Enters a QTensor of any leaves; where they are no arrays at hand (tracers, shapes, specs), its `repr` has to do.
"""

import dataclasses
import html
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from qjax.dequantize import codes, point_index
from qjax.qtensor import QTensor

ROWS = 256  # output features that the histogram looks at
BARS = 64
WIDTH, HEIGHT = 320, 64  # of the histogram, in pixels


def to_html(w: QTensor) -> str:
    """One `<div>`: scheme, shape, bytes, every array, and a histogram of the codes; its `repr` without arrays.

    The histogram orders codes by what they stand for before scaling, or by themselves where the tensor has zero points
    or a codebook of its own. It looks at `ROWS` rows, evenly spaced over the tensor.
    """
    if w.packed is None or not all(_is_at_hand(a) for _, a in _arrays(w)) or not w.size:
        return f"<pre>{html.escape(repr(w))}</pre>"
    wide = w.size * w.dtype.itemsize
    weight = f"{w.nbytes:,}; {w.dtype.name} {wide:,}, {wide / w.nbytes:.2f}x; {w.bits_per_weight:.3f} bits/weight"
    rows = [
        ("QTensor", f"<b>{html.escape(str(w.scheme))}</b>"),
        ("shape", f"{w.shape} {w.dtype.name}"),
        ("bytes", weight),
        *((name, f"{a.dtype} {list(a.shape)}, {a.nbytes:,} bytes") for name, a in _arrays(w)),
    ]
    cell = 'style="text-align: left; padding: 0 1em 0 0"'
    table = "".join(f"<tr><td {cell}>{name}</td><td {cell}>{text}</td></tr>" for name, text in rows)
    return f'<div style="font-family: monospace"><table>{table}</table>{_histogram(w)}</div>'


def to_treescope(w: QTensor, path: str | None, subtree_renderer: Any) -> Any:
    """A node of treescope's tree: the fields that are set, with a summary behind the first line where there is one."""
    from treescope import rendering_parts, repr_lib

    fields = {f.name: getattr(w, f.name) for f in dataclasses.fields(w)}
    node = repr_lib.render_object_constructor(
        object_type=type(w),
        attributes={name: value for name, value in fields.items() if value is not None},
        path=path,
        subtree_renderer=subtree_renderer,
    )
    if w.packed is None or not all(hasattr(a, "shape") and hasattr(a, "dtype") for _, a in _arrays(w)):
        return node
    summary = f"  # {w.scheme}, {w.shape} {w.dtype.name}, {w.nbytes:,} bytes, {w.bits_per_weight:.3f} bits/weight"
    comment = rendering_parts.comment_color(rendering_parts.text(summary))
    return rendering_parts.siblings_with_annotations(node, extra_annotations=[comment])


def _is_at_hand(a: Any) -> bool:
    """Whether this process can read the values of `a`."""
    if isinstance(a, jax.Array) and not isinstance(a, jax.core.Tracer):
        return a.is_fully_addressable and not a.is_deleted()
    return isinstance(a, np.ndarray)


def _arrays(w: QTensor, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The arrays of a QTensor by name, those of a nested scale as `scale.packed`."""
    for field in dataclasses.fields(w):
        value = getattr(w, field.name)
        if isinstance(value, QTensor):
            yield from _arrays(value, f"{prefix}{field.name}.")
        elif value is not None and not field.metadata.get("static"):
            yield f"{prefix}{field.name}", value


def _usage(w: QTensor) -> tuple[np.ndarray, np.ndarray, int]:
    """What codes stand for before scaling, ascending; the share of each; and in how many rows they were counted."""
    lead = (*w.stack_shape, w.out_features)
    total = int(np.prod(lead))
    sample = np.unique(np.linspace(0, total - 1, min(ROWS, total)).astype(int))
    some = dataclasses.replace(w, packed=w.packed[np.unravel_index(sample, lead)])
    form = w.scheme.format
    if form.dims > 1:  # what weights stand for are coordinates of points, each as often as its point
        index = np.asarray(point_index(codes(some), form)).ravel()
        used = np.bincount(index, minlength=2 ** (form.dims * form.bits)).repeat(form.dims)
        values = np.array(form.codebook, np.float32)
        order = np.argsort(values, kind="stable")
        return values[order], used[order] / used.sum(), len(sample)
    patterns = np.arange(2**form.bits, dtype=np.uint8)
    used = np.bincount(np.asarray(codes(some)).view(np.uint8).ravel(), minlength=len(patterns))
    values = (patterns if form.bits < 8 else patterns.view(form.dtype)).astype(np.float32)
    if w.zero_point is None:
        values -= form.zero
    if form.codebook is not None and w.codebook is None:
        values = np.array(form.codebook, np.float32)
    order = np.argsort(values, kind="stable")
    order = order[np.isfinite(values[order])]
    return values[order], used[order] / used.sum(), len(sample)


def _histogram(w: QTensor) -> str:
    """An inline SVG: a bar for each code, or for several neighbours, and a caption."""
    values, used, rows = _usage(w)
    groups = np.array_split(np.arange(len(values)), min(BARS, len(values)))
    shares = [float(used[g].sum()) for g in groups]
    width, top = WIDTH / len(groups), max(shares)
    bars = []
    for i, (group, share) in enumerate(zip(groups, shares, strict=True)):
        low, high, height = values[group[0]], values[group[-1]], HEIGHT * share / top
        what = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        bars.append(
            f'<rect x="{i * width:.2f}" y="{HEIGHT - height:.2f}" width="{0.85 * width:.2f}" height="{height:.2f}">'
            f"<title>{what}: {100 * share:.2f} %</title></rect>"
        )
    total = int(np.prod((*w.stack_shape, w.out_features)))
    of = "" if rows == total else f", in {rows:,} of {total:,} rows"
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" fill="currentColor" opacity="0.7">{"".join(bars)}</svg>'
        f"<div>use of {w.scheme.weight} codes, from {values[0]:g} to {values[-1]:g}{of}</div>"
    )

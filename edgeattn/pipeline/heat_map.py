"""A picture of what polynomials lose in each head of a model."""

from __future__ import annotations

import importlib.util
import io
import math

from edgeattn.planner.polynomial_heads import PolynomialHeads

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
# Errors beyond these have the colours of the ends.
_LEAST, _MOST = 0.005, 1.0


def heat_map(heads: PolynomialHeads) -> bytes:
    """A PNG of the output's relative error by layer and head, those that take polynomials marked.

    Args:
        heads: whose polynomials of the highest degree that was allowed are shown: fitted ones, or
            Taylor's of an odd degree.
    """
    from matplotlib import colors
    from matplotlib.figure import Figure

    degree = heads.degree
    count = max((len(layer.heads) for layer in heads.layers), default=0) or 1
    errors = [[math.nan] * count for _ in heads.layers]
    marks = []
    for index, layer in enumerate(heads.layers):
        for head, about in enumerate(layer.heads):
            found = about.error(degree, fitted=degree % 2 == 0)
            errors[index][head] = math.nan if found is None else max(found, _LEAST)
            if about.chosen is not None:
                marks.append((head, index))
    figure = Figure(figsize=(2.5 + 0.3 * count, 1.5 + 0.22 * len(errors)), layout="constrained")
    axes = figure.add_subplot()
    norm = colors.LogNorm(_LEAST, _MOST)
    image = axes.imshow(errors, norm=norm, cmap="RdYlGn_r", aspect="auto")
    if marks:
        x, y = zip(*marks, strict=True)
        axes.scatter(x, y, s=12, color="black")
    axes.set_xlabel("query head")
    axes.set_ylabel("layer")
    axes.set_title(f"{heads.model}\n{len(marks)} heads within {heads.tolerance:.0%}", fontsize=9)
    bar = figure.colorbar(image, ax=axes, extend="max")
    bar.set_label(f"error, degree {degree}")
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=150, metadata={"Software": None})
    return written.getvalue()

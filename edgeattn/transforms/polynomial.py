"""Polynomial attention: which heads of a model take it, with which coefficients.

Coefficients are fitted on some windows of a text, and judged on others. Memory is a layer, the
residual streams of all windows, and the score matrix of a few hundred rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from edgeattn.attention import HIGHEST_DEGREE, FftRopeRequest
from edgeattn.bundle.whole_file import write_text
from edgeattn.calibration.far_sums import (
    FarField,
    WindowSums,
    mean_key,
    score_bounds,
    window_sums,
)
from edgeattn.calibration.positive_fit import (
    RowErrors,
    fit_positive,
    is_positive,
    taylor,
)
from edgeattn.calibration.walk import LayerWalk
from edgeattn.calibration.work import WorkFolder
from edgeattn.errors import LoweringError, UsageError
from edgeattn.models.model import Model, load_layer
from edgeattn.models.stream import embed_windows, window_inputs
from edgeattn.ops.fft_rope_attention import EXACT, FACTORISED
from edgeattn.planner.polynomial import features
from edgeattn.planner.polynomial_heads import Candidate, Head, Layer, PolynomialHeads
from edgeattn.quant.threads import for_each

# How much farther than in the fitted windows a score may lie before its row is exact.
_BOUND_MARGIN = 1.25
# The operator wants a positive polynomial up to 1.01 times the bound; fitted ones have more.
_LEAST_MARGIN, _POSITIVE_MARGIN = 1.01, 1.02
# A root with a smaller imaginary part is a real one.
_REAL = 1e-9
# A polynomial that serves fewer rows than this is none.
_MOST_FALLBACKS = 0.05
# Less than the sum of squares of any output that is not zero.
_NOTHING = 1e-30
# A degree with more features than degree 2 of 128 coordinates is told, never chosen.
_MOST_FEATURES = 8385
# One row in so many is measured: neighbours are much alike.
ROW_STEP = 4


@torch.inference_mode()
def calibrate_polynomials(
    model: Model,
    windows: Tensor,
    request: FftRopeRequest,
    work: WorkFolder,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Layer]:
    """Measures every head, and chooses for each the cheapest polynomial within the tolerance.

    Args:
        model: in floating point, with softmax attention.
        windows: token ids `[N, L]`; coefficients are fitted on every other one from the first on,
            errors measured on the others.
        request: first keys, window, degree and tolerance.
        work: where finished layers wait, those of an earlier run among them.
        progress: called with (layers done, all layers).

    Raises:
        LoweringError: the model caps its scores, or has other than softmax attention already.
        UsageError: there is one window alone, or an unfinished layer does not read.
    """
    _check(model, windows)
    far, found = FarField(request.sink, request.window), []
    hidden = embed_windows(model, windows)
    shared = window_inputs(model.shape, windows.shape[1])
    for index in range(model.shape.num_layers):
        layer = load_layer(model, index, weight_dtype=torch.float32)
        kind = model.shape.layer_kind(index)
        walk = LayerWalk(layer, hidden, shared[kind], model.shape)
        file = work.path / f"layer-{index:04d}.json"
        if file.exists():
            measured = _read(file)
        elif kind.window is not None:
            measured = Layer(skipped="it sees a sliding window alone", key_mean=(), heads=())
        else:
            q, k, v = (torch.cat(parts) for parts in zip(*walk.heads(), strict=True))
            measured = measure_layer(q, k, v, far, request)
            work.begin()
            write_text(file, measured.model_dump_json())
        found.append(measured)
        walk.run()
        if progress:
            progress(index + 1, model.shape.num_layers)
    return found


def _check(model: Model, windows: Tensor) -> None:
    if model.shape.attention_softcap is not None:
        raise LoweringError(
            expected="a model without a cap on its attention's scores",
            came=f"family {model.shape.family} has one, which the operator does not know",
            todo="choose another model",
        )
    if model.shape.has_variants:
        raise LoweringError(
            expected="a model with softmax attention",
            came="some of its layers have another one already",
            todo="calibrate the original model",
        )
    if len(windows) < 2:
        raise UsageError(
            expected="at least 2 windows, one to fit and one to judge by",
            came=f"there is {len(windows)}",
            todo="pass --windows 2 or more",
        )


def _read(file: Path) -> Layer:
    try:
        return Layer.model_validate_json(file.read_bytes())
    except ValueError as error:
        raise UsageError(
            expected=f"finished layers in {file.parent}",
            came=f"{file.name} does not read",
            todo="delete the folder and start again",
        ) from error


def measure_layer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far: FarField,
    request: FftRopeRequest,
    *,
    every: int = ROW_STEP,
) -> Layer:
    """Measures the heads of a layer and chooses among their polynomials.

    Args:
        q: of all windows, `[N, H, L, D]` fp32, after RoPE.
        k: `[N, Hkv, L, D]`, after RoPE.
        v: `[N, Hkv, L, D]`.
        far: which keys are far.
        request: degree and tolerance.
        every: rows from one that is measured to the next.
    """
    mean = mean_key(list(k[::2]), far)
    sums = []
    for queries, keys, values in zip(q, k, v, strict=True):
        bounds = score_bounds(queries, keys, mean, far)
        sums.append(
            window_sums(queries, keys, values, far, bounds, degree=HIGHEST_DEGREE, every=every)
        )
    heads: dict[int, Head] = {}

    def measure(head: int) -> None:
        heads[head] = _measure_head(sums, head)

    for_each(measure, range(q.shape[1]))
    return Layer(
        skipped=None,
        key_mean=tuple(tuple(row) for row in mean.tolist()),
        heads=tuple(_choose([heads[n] for n in range(q.shape[1])], request, q.shape[-1])),
    )


def _measure_head(sums: Sequence[WindowSums], head: int) -> Head:
    fitted, held_out = sums[::2], sums[1::2]
    bound = _BOUND_MARGIN * max(float(s.bound[head].max()) for s in fitted)
    rows, errors = row_errors(fitted, head), [row_errors([s], head) for s in held_out]
    reached = torch.cat([s.bound[head] for s in held_out])
    candidates = []
    for degree in range(HIGHEST_DEGREE + 1):
        tried = [(False, taylor(degree).float().double())]
        if degree % 2 == 0:
            tried.append((True, fit_positive(rows.up_to(degree), _POSITIVE_MARGIN * bound)))
        for is_fitted, coefficients in tried:
            limit = _usable_up_to(coefficients, bound)
            squares = [e.up_to(degree).square(coefficients) for e in errors]
            candidates.append(
                Candidate(
                    degree=degree,
                    fitted=is_fitted,
                    coefficients=tuple(coefficients.tolist()),
                    score_bound=float(np.float32(limit)),
                    error=max(squares) ** 0.5,
                    fallback=float((reached > limit).double().mean()),
                )
            )
    return Head(**_statistics(sums, head), candidates=tuple(candidates), chosen=None)


def row_errors(sums: Sequence[WindowSums], head: int) -> RowErrors:
    """What a head's error depends on in some windows, each of the same importance."""
    energies = [s.energy[head] for s in sums]
    # A head that gives nothing errs by nothing.
    importance = [1 / (len(sums) * e.sum().clamp(min=_NOTHING)).expand(len(e)) for e in energies]
    gram, weight = (torch.cat([getattr(s, n)[head] for s in sums]) for n in ("gram", "weight"))
    return RowErrors(gram, weight, torch.cat(importance))


def _statistics(sums: Sequence[WindowSums], head: int) -> dict[str, float]:
    def rows(name: str) -> Tensor:
        return torch.cat([getattr(s, name)[head] for s in sums])

    return {
        "spread": float(rows("spread").mean()),
        "lowest": float(rows("lowest").min()),
        "highest": float(rows("highest").max()),
        "sink_mass": float(rows("sink_mass").mean()),
        "near_mass": float(rows("near_mass").mean()),
    }


def _usable_up_to(coefficients: Tensor, bound: float) -> float:
    """The bound, or less where the polynomial has a root before it."""
    if is_positive(coefficients, _POSITIVE_MARGIN * bound):
        return bound
    roots = np.polynomial.Polynomial(coefficients.numpy()).roots()
    real = np.abs(np.real(roots[np.abs(np.imag(roots)) < _REAL]))
    return min(bound, float(real.min()) / _POSITIVE_MARGIN)


def _choose(heads: Sequence[Head], request: FftRopeRequest, width: int) -> list[Head]:
    """The same heads with their polynomials.

    The node of a layer has one degree: the highest that a head needs. What it costs is paid by
    all, so that each takes the highest degree up to that which serves it.
    """
    within = [_within(head, request, width) for head in heads]
    needed = max((min(degrees) for degrees in within if degrees), default=0)
    chosen = []
    for head, degrees in zip(heads, within, strict=True):
        best = max((degree for degree in degrees if degree <= needed), default=None)
        index = None if best is None else degrees[best]
        chosen.append(head.model_copy(update={"chosen": index}))
    return chosen


def _within(head: Head, request: FftRopeRequest, width: int) -> dict[int, int]:
    """Degrees that serve a head, and the candidate of each."""
    return {
        candidate.degree: index
        for index, candidate in enumerate(head.candidates)
        if candidate.degree <= request.degree
        and features(width, candidate.degree) <= _MOST_FEATURES
        and candidate.fitted == (candidate.degree % 2 == 0)
        and candidate.error <= request.tolerance
        and candidate.fallback <= _MOST_FALLBACKS
    }


def with_polynomials(model: Model, calibrated: PolynomialHeads) -> Model:
    """The model whose chosen heads take polynomials.

    Args:
        model: the one that was calibrated, or a quantised form of it.
        calibrated: fits the model (`check_fits`).

    Raises:
        UsageError: a number is none in fp32, or a polynomial is not positive.
    """
    shape = model.shape
    kinds, tables = [], dict(model.tables)
    for index, layer in enumerate(calibrated.layers):
        attention = calibrated.attention(index)
        kinds.append(replace(shape.layer_kind(index), attention=attention))
        if attention is not None:
            tables[index] = _tables(layer, attention.degree)
            _check_tables(tables[index], index)
    return replace(model, shape=replace(shape, layer_cycle=tuple(kinds)), tables=tables)


def _tables(layer: Layer, degree: int) -> dict[str, Tensor]:
    """What the operator reads; zeros stand behind the coefficients of a lower degree."""
    count = len(layer.heads)
    coefficients, bounds = torch.zeros(count, degree + 1), torch.zeros(count, dtype=torch.float64)
    backend = torch.full((count,), EXACT, dtype=torch.int32)
    for head, about in enumerate(layer.heads):
        if (chosen := about.polynomial) is not None:
            coefficients[head, : chosen.degree + 1] = torch.tensor(chosen.coefficients)
            bounds[head], backend[head] = chosen.score_bound, FACTORISED
    mean = torch.tensor(layer.key_mean)
    return {
        "coefficients": coefficients,
        "key_mean": mean.repeat_interleave(count // len(mean), 0),
        "score_bound": bounds.float(),
        "backend": backend,
    }


def _check_tables(tables: Mapping[str, Tensor], layer: int) -> None:
    """Refuses what the operator would, for kernels do not look."""
    chosen = zip(tables["coefficients"], tables["score_bound"].tolist(), strict=True)
    sound = all(table.isfinite().all() for table in tables.values()) and all(
        is_positive(series, _LEAST_MARGIN * bound)
        for (series, bound), backend in zip(chosen, tables["backend"].tolist(), strict=True)
        if backend != EXACT
    )
    if not sound:
        raise UsageError(
            expected=f"positive polynomials in layer {layer} of the calibrated heads",
            came="one is not, or a number is too large",
            todo="calibrate the model again",
        )

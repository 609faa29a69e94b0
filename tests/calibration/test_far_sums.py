"""The sums that decide on polynomial attention, against the operator's own definition."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor

from edgeattn.calibration.far_sums import (
    FIRST_ROW,
    FarField,
    mean_key,
    score_bounds,
    window_sums,
)
from edgeattn.calibration.positive_fit import taylor
from edgeattn.ops.fft_rope_attention import reference
from edgeattn.transforms.polynomial import row_errors

H, HKV, L, D = 4, 2, 300, 8
FAR = [
    FarField(4, 16),
    FarField(0, 0),
    FarField(0, 1),
    FarField(3, 250),
]


def heads(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(H, L, D), torch.randn(HKV, L, D), torch.randn(HKV, L, D)
    return q * scale, k + 0.3, v


def operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mean: Tensor,
    far: FarField,
    coefficients: Tensor,
    bound: Tensor,
    backend: int,
) -> tuple[Tensor, Tensor]:
    """`reference` on one window, `[H, L, D]` and the fall-backs `[H]`."""
    y, fallbacks = reference(
        *(x.unsqueeze(0) for x in (q, k, v)),
        coefficients.float().expand(H, -1),
        mean.repeat_interleave(H // HKV, 0),
        torch.zeros(1, 1),
        bound,
        torch.full((H,), backend, dtype=torch.int32),
        torch.tensor([L], dtype=torch.int32),
        degree=coefficients.shape[-1] - 1,
        sink=far.sink,
        window=far.window,
    )
    return y[0], fallbacks


@pytest.mark.parametrize("far", FAR, ids=str)
@pytest.mark.parametrize("degree", [0, 2, 4])
def test_error_is_the_operators(far: FarField, degree: int) -> None:
    q, k, v = heads()
    mean = mean_key([k], far)
    bounds = score_bounds(q, k, mean, far)
    sums = window_sums(q, k, v, far, bounds, degree=degree)
    top = 1.001 * bounds.amax(-1)
    exact, _ = operator(q, k, v, mean, far, taylor(degree), top, 0)
    found, fallbacks = operator(q, k, v, mean, far, taylor(degree), top, 1)
    assert fallbacks.tolist() == [0] * H
    change = (found - exact)[:, far.first_row :].double()
    wanted = change.square().sum((1, 2)) / exact[:, far.first_row :].double().square().sum((1, 2))
    for head in range(H):
        error = row_errors([sums], head).square(taylor(degree))
        assert error == pytest.approx(float(wanted[head]), rel=1e-4, abs=1e-9)


def test_bounds_are_the_operators() -> None:
    q, k, v = heads()
    far = FarField(4, 16)
    mean = mean_key([k], far)
    bounds = score_bounds(q, k, mean, far)
    for share in (0.3, 0.6, 0.9):
        limit = bounds.quantile(share, dim=-1)
        _, fallbacks = operator(q, k, v, mean, far, taylor(2), limit, 1)
        assert fallbacks.tolist() == (bounds > limit.unsqueeze(-1)).sum(-1).tolist()


def test_statistics() -> None:
    q, k, v = heads(3.0)
    far = FarField(2, 30)
    sums = window_sums(q, k, v, far, score_bounds(q, k, mean_key([k], far), far), degree=1)
    for head in range(H):
        scores = q[head].double() @ k[head // 2].double().T / D**0.5
        for row in (FIRST_ROW, 200, L - 1):
            at = row - FIRST_ROW
            seen = scores[row, : row + 1]
            weights = seen.softmax(0)
            middle = seen[2 : row - 29]
            centred = middle - middle.mean()
            wanted = {
                "spread": seen.std(correction=0),
                "lowest": centred.min(),
                "highest": centred.max(),
                "sink_mass": weights[:2].sum(),
                "near_mass": weights[row - 29 :].sum(),
            }
            for name, value in wanted.items():
                found = float(getattr(sums, name)[head, at])
                assert found == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
            assert sums.bound[head, row] >= centred.abs().max()


def test_every_other_row_is_a_part_of_all() -> None:
    q, k, v = heads()
    far = FarField(4, 16)
    bounds = score_bounds(q, k, mean_key([k], far), far)
    everything = window_sums(q, k, v, far, bounds, degree=2)
    some = window_sums(q, k, v, far, bounds, degree=2, every=3)
    torch.testing.assert_close(some.gram, everything.gram[:, ::3], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(some.spread, everything.spread[:, ::3])


def test_scores_far_apart_stay_finite() -> None:
    q, k, v = heads(60.0)
    far = FarField(1, 8)
    sums = window_sums(q, k, v, far, score_bounds(q, k, mean_key([k], far), far), degree=4)
    assert all(x.isfinite().all() for x in (sums.gram, sums.weight, sums.energy))
    assert (sums.weight[..., :2].sum(-1) > 0).all()


def test_mean_key_leaves_out_the_first() -> None:
    keys = [torch.randn(HKV, L, D), torch.randn(HKV, L, D)]
    mean = mean_key(keys, FarField(7, 0))
    torch.testing.assert_close(mean, torch.cat([k[:, 7:] for k in keys], 1).mean(1))

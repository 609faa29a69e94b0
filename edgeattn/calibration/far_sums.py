"""What the error of polynomial attention depends on, measured on the score matrix once per window.

With the names of `edgeattn.ops.fft_rope_attention`, a row's output is linear in the coefficients
above and below the line:

    y_i(c) = (Σ_near w_ij v_j + Σ_r c_r A_ir) / (Σ_near w_ij + Σ_r c_r a_ir),
    A_ir = Σ_far exp(c_i) x_ij^r v_j,   a_ir = Σ_far exp(c_i) x_ij^r.

So the error against the exact output y*_i is, with z = (1, c), B_i0 = Σ_near w_ij (v_j − y*_i) and
B_ir = A_ir − a_ir y*_i, a ratio of numbers that are known before the coefficients are:

    |y_i(c) − y*_i|² = z·G_i z / (z·n_i)²,   G_i = B_i B_iᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeattn.ops.fft_rope_attention import squared_length

# Rows of the score matrix that are in memory at once.
_ROWS = 256
# Weights below e to this power are nothing in fp32, and slow where they are subnormal.
_LEAST_EXPONENT = -40.0
# Earlier rows have few far keys and are no measure of what a long context loses.
FIRST_ROW = 128


@dataclass(frozen=True)
class FarField:
    """Which keys a row weighs by a polynomial: all but the first and the last.

    Attributes:
        sink: first keys that are exact.
        window: keys at smaller offsets are exact, too.
    """

    sink: int
    window: int

    @property
    def first_row(self) -> int:
        """The first that is measured: earlier ones have few far keys, or none."""
        return max(FIRST_ROW, self.sink + self.window)

    def mask(self, rows: range) -> Tensor:
        """Where keys are far, `[rows, rows.stop]` bool, for keys up to the last row."""
        keys = torch.arange(rows.stop)
        offset = torch.tensor(rows).unsqueeze(1) - keys
        return (keys >= self.sink) & (offset >= self.window)


@dataclass(frozen=True)
class WindowSums:
    """The sums of a layer's heads over one window of L tokens, R rows of them from the first on.

    Attributes:
        gram: G of each row, `[H, R, g + 2, g + 2]` fp64.
        weight: n of each row, `[H, R, g + 2]` fp64: the near weights' sum, then a.
        energy: |y*|², `[H, R]` fp64.
        bound: up to which x is known to lie, of all rows, `[H, L]` fp32.
        spread: standard deviation of each row's scores, `[H, R]`.
        lowest: least x of each row, 0 without far keys, `[H, R]`.
        highest: greatest x likewise.
        sink_mass: softmax weight of the first keys, `[H, R]`.
        near_mass: of the other near keys.
    """

    gram: Tensor
    weight: Tensor
    energy: Tensor
    bound: Tensor
    spread: Tensor
    lowest: Tensor
    highest: Tensor
    sink_mass: Tensor
    near_mass: Tensor


def mean_key(keys: Sequence[Tensor], far: FarField) -> Tensor:
    """Mean of the keys that can be far, `[Hkv, D]` fp32.

    Args:
        keys: of each window, `[Hkv, L, D]`, after RoPE.
        far: for the first keys, which are not counted.
    """
    return torch.stack([k[:, far.sink :].double().mean(1) for k in keys]).mean(0).float()


def score_bounds(q: Tensor, k: Tensor, key_mean: Tensor, far: FarField) -> Tensor:
    """The operator's bound of |x_ij| in each row, 0 without far keys, `[H, L]`.

    Args:
        q: `[H, L, D]`, after RoPE.
        k: `[Hkv, L, D]`, after RoPE.
        key_mean: `[Hkv, D]`.
        far: which keys are far.
    """
    group, width = len(q) // len(k), q.shape[-1]
    lengths = squared_length(k - key_mean.unsqueeze(1)).squeeze(-1)  # [Hkv, L]
    lengths[:, : far.sink] = 0
    longest = lengths.cummax(-1).values
    seen = torch.zeros_like(longest)
    lag = min(far.window, lengths.shape[1])
    seen[:, lag:] = longest[:, : lengths.shape[1] - lag]
    squares = squared_length(q).squeeze(-1) * seen.repeat_interleave(group, 0)
    return squares.sqrt() * (2 / math.sqrt(width))


def window_sums(
    q: Tensor, k: Tensor, v: Tensor, far: FarField, bound: Tensor, *, degree: int, every: int = 1
) -> WindowSums:
    """The sums of one window.

    Args:
        q: `[H, L, D]` fp32, after RoPE.
        k: `[Hkv, L, D]` fp32, after RoPE.
        v: `[Hkv, L, D]` fp32.
        far: which keys are far.
        bound: `[H, L]`, of `score_bounds`.
        degree: g, of the polynomials to be judged.
        every: rows from one that is measured to the next.
    """
    length, step = q.shape[1], _ROWS * every
    starts = range(far.first_row, length, step)
    places = [range(start, min(start + step, length), every) for start in starts]
    blocks = [_block(q, k, v, far, rows, degree) for rows in places]
    columns = zip(*blocks, strict=True)
    gram, weight, *rest = (torch.cat(column, dim=1) for column in columns)
    return WindowSums(gram, weight, rest[0], bound, *rest[1:])


def _block(
    q: Tensor, k: Tensor, v: Tensor, far: FarField, rows: range, degree: int
) -> tuple[Tensor, ...]:
    """The fields of `WindowSums`, without bound, for some rows."""
    heads, width = len(q), q.shape[-1]
    # Query heads that share keys are rows of one product, [Hkv, group · rows, …].
    queries = q[:, rows.start : rows.stop : rows.step].reshape(len(k), -1, width)
    keys, values = k[:, : rows.stop], v[:, : rows.stop]
    scores = (queries @ keys.mT / math.sqrt(width)).reshape(heads, len(rows), -1)
    is_far = far.mask(rows)
    seen = torch.tensor(rows).unsqueeze(1) >= torch.arange(rows.stop)
    is_near = seen & ~is_far

    def summed(weights: Tensor) -> Tensor:
        """Σ_j w_ij (v_j, 1), `[H, rows, D + 1]`."""
        products = weights.reshape(len(k), -1, rows.stop) @ values
        return torch.cat(
            [products.reshape(heads, len(rows), width), weights.sum(-1, keepdim=True)], -1
        )

    exact = torch.where(seen, scores, -math.inf)
    exact = _exp(exact - exact.amax(-1, keepdim=True)) * seen
    exact = exact / exact.sum(-1, keepdim=True)
    y = summed(exact)[..., :width]
    count = is_far.sum(-1, keepdim=True).clamp(min=1)
    x = scores - (scores * is_far).sum(-1, keepdim=True) / count
    # As the operator: weights relative to the greatest near one, or to the centre's.
    peak = torch.where(is_near, x, 0.0).amax(-1, keepdim=True).clamp(min=0)
    sums = [summed(torch.where(is_near, _exp(x - peak), 0.0))]
    power = is_far * _exp(-peak)
    far_x = x * is_far
    for _ in range(degree + 1):
        sums.append(summed(power))
        power = power * far_x
    terms = torch.stack(sums, dim=2).double()  # [H, rows, g + 2, D + 1]
    weight = terms[..., width]
    offset = terms[..., :width] - weight.unsqueeze(-1) * y.double().unsqueeze(2)
    masses = torch.stack([exact[..., : far.sink].sum(-1), (exact * is_near).sum(-1)])
    return (
        offset @ offset.mT,
        weight,
        y.double().square().sum(-1),
        _spread(scores, seen),
        far_x.amin(-1),
        far_x.amax(-1),
        masses[0],
        masses[1] - masses[0],
    )


def _exp(x: Tensor) -> Tensor:
    return x.clamp(min=_LEAST_EXPONENT).exp()


def _spread(scores: Tensor, seen: Tensor) -> Tensor:
    count = seen.sum(-1)
    mean = (scores * seen).sum(-1) / count
    variance = ((scores - mean.unsqueeze(-1)).square() * seen).sum(-1) / count
    return variance.sqrt()

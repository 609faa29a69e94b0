"""Which KV heads are alike: orthogonal maps that bring them together, and groups of near ones.

A model computes the same function when values `v` of a KV head become `B v`, if the output
projections of its query heads take `B` back, for any orthogonal `B`. Its keys may become `A k`
together with the queries for an `A` that commutes with RoPE: one rotation for each frequency's pair
of elements, and any orthogonal map of the elements without rotary positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Of a matrix `[D, D]` the allowed map that has the largest inner product with it.
Nearest = Callable[[Tensor], Tensor]

_SWEEPS = 10
# Of distances around 1; less is rounding, which could go on for ever.
_LEAST_GAIN = 1e-9


def no_map(cross: Tensor) -> Tensor:
    """The identity, for heads that no map is allowed for."""
    return torch.eye(len(cross), dtype=cross.dtype)


def nearest_orthogonal(cross: Tensor) -> Tensor:
    """The orthogonal matrix of the largest inner product with `cross` `[D, D]` (Procrustes)."""
    u, _, vh = torch.linalg.svd(cross)
    found: Tensor = u @ vh
    return found


def nearest_rotary(rotated: int) -> Nearest:
    """The same among the maps that commute with RoPE.

    Args:
        rotated: leading elements of a head with rotary positions, even; 0 for none. Elements i and
            i + rotated / 2 are a pair.
    """

    def nearest(cross: Tensor) -> Tensor:
        first = torch.arange(rotated // 2)
        second = first + rotated // 2
        angle = torch.atan2(
            cross[second, first] - cross[first, second],
            cross[first, first] + cross[second, second],
        )
        found = torch.zeros_like(cross)
        found[first, first] = found[second, second] = angle.cos()
        found[second, first] = angle.sin()
        found[first, second] = -angle.sin()
        found[rotated:, rotated:] = nearest_orthogonal(cross[rotated:, rotated:])
        return found

    return nearest


def align(moments: Tensor, nearest: Nearest) -> Tensor:
    """Maps under which the heads of a group are as close to each other as they can be.

    Generalised Procrustes analysis: each head in turn is mapped to the sum of the others.

    Args:
        moments: `[n, n, D, D]`, of heads i and j the sum of `x_i x_jᵀ` over the tokens.
        nearest: which maps are allowed.

    Returns:
        `[n, D, D]`; the first is the identity.
    """
    maps = torch.eye(moments.shape[-1], dtype=moments.dtype).repeat(len(moments), 1, 1)
    for sweep in range(_SWEEPS if len(moments) > 2 else 1):
        for j in range(1, len(moments)):
            others = [i for i in range(len(moments)) if i < j or (sweep and i != j)]
            maps[j] = nearest((maps[others] @ moments[others, j]).sum(0))
    return maps


def lost_by_pooling(moments: Tensor, maps: Tensor) -> float:
    """Share of the energy of aligned heads that their mean does not have; arguments as `align`."""
    aligned = maps.unsqueeze(1) @ moments @ maps.transpose(1, 2)
    traces = aligned.diagonal(dim1=2, dim2=3).sum(2)
    energy = float(traces.trace())
    return max(0.0, 1 - float(traces.mean()) * len(traces) / energy) if energy else 0.0


def distances(moments: Tensor, nearest: Nearest) -> Tensor:
    """Squared distances `[n, n]` of all pairs of heads, each aligned to the other.

    In units of the mean energy of a head; arguments as for `align`.
    """
    count = len(moments)
    energy = torch.stack([moments[i, i].trace() for i in range(count)])
    found = torch.zeros(count, count, dtype=moments.dtype)
    for i in range(count):
        for j in range(i + 1, count):
            alike = (nearest(moments[i, j]) * moments[i, j]).sum()
            found[i, j] = found[j, i] = (energy[i] + energy[j] - 2 * alike).clamp_min(0)
    return found / energy.mean().clamp_min(torch.finfo(moments.dtype).tiny)


def balanced_groups(cost: Tensor, groups: int) -> list[list[int]]:
    """Splits heads into groups of one size with a small sum of costs within groups.

    From groups of neighbours, two heads change places as long as that helps.

    Args:
        cost: `[n, n]`, symmetric.
        groups: divides n.

    Returns:
        The heads of each group in their order; the groups by their first head.
    """
    count = len(cost)
    group = torch.arange(count) // (count // groups)
    while (pair := _best_swap(cost, group)) is not None:
        i, j = pair
        group[i], group[j] = group[j].clone(), group[i].clone()
    return sorted([i for i in range(count) if group[i] == g] for g in range(groups))


def _best_swap(cost: Tensor, group: Tensor) -> tuple[int, int] | None:
    """The two heads whose exchange saves most; None where none does."""
    member = torch.nn.functional.one_hot(group).to(cost.dtype)
    cost = cost - cost.diag().diag()
    to_group = cost @ member  # [n, groups]
    own = to_group.gather(1, group.unsqueeze(1))
    other = to_group[:, group]  # of head i to the group of head j
    change = other + other.T - own - own.T - 2 * cost
    change[group.unsqueeze(1) == group] = 0
    best = int(change.argmin())
    if not float(change.flatten()[best]) < -_LEAST_GAIN:  # nor for NaN
        return None
    return divmod(best, len(cost))


def moments_of(heads: Tensor) -> Tensor:
    """`[n, n, D, D]` fp64 of heads `[tokens, n, D]`, as `align` takes them."""
    flat = heads.flatten(1).double()
    size = heads.shape[1:]
    return torch.unflatten(torch.unflatten(flat.T @ flat, 1, size), 0, size).transpose(1, 2)

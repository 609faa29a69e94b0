"""GPTQ (arXiv 2210.17323): rounding whose errors are made up for by the columns still to come.

A linear layer with weight rows w loses `(w - q) H (w - q)^T` per row when w becomes q, where H is
the mean of x^T x over its inputs x. With `H = M M^T`, M upper triangular, that is the sum over the
columns j of the squares of

    r_j = e_j M_jj + sum over i < j of e_i M_ij,    e = w - q.

Columns are rounded in order, each after it moved to where its r_j would be zero: to `w_j + (sum
over i < j of e_i M_ij) / M_jj`. Rounding it by d then costs `(d M_jj)^2` and nothing else. The
paper gets the same numbers by spreading each error with the Cholesky factor `U = M^-1` of the
inverse Hessian (arXiv 2507.18553 proves it in terms of lattices); here nothing is inverted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from edgeattn.errors import CheckpointError, LoweringError, RuntimeInputError
from edgeattn.quant.affine import QuantizedTensor, choose_scale
from edgeattn.quant.observer import not_finite
from edgeattn.quant.scheme import Clip, WeightFormat
from edgeattn.quant.threads import for_each

# Columns whose errors reach the later ones by one matrix product, where no group says how many.
_BLOCK = 128
# Rows of the weight quantised together by one thread, however many threads there are, so that they
# do not change the result. With fewer rows threads wait for each other's Python (measured: 768 rows
# on two threads are no faster than 1,536 on one), with more a block leaves the core's cache.
_ROWS = 2048
# Tokens multiplied in fp32; the products are summed in fp64.
_CHUNK_TOKENS = 2048
# Dampings tried, each ten times the one before.
_ATTEMPTS = 4
# Scales tried by the weighted search, as fractions of the one that maps the largest weight to the
# largest integer. They reach lower than those of the plain search: a large weight may belong to an
# input that hardly matters.
_COARSE_FRACTIONS = tuple(1.0 - 0.05 * i for i in range(17))
_FINE_STEPS = tuple(0.01 * i for i in range(-4, 5) if i)

# From `[n, group]` weights and the group's first column to `[n, 1]` scales.
_ScaleSearch = Callable[[Tensor, int], Tensor]


class Hessian:
    """The mean of x^T x over the inputs x of a linear layer, collected batch by batch.

    Products of a few thousand tokens are computed in fp32 and summed in fp64, so that nothing is
    lost however many there are. The factor 2 of the paper is left out: it changes nothing.

    Args:
        size: K, the inputs of the layer.
    """

    def __init__(self, size: int) -> None:
        self.tokens = 0
        self._sum = torch.zeros(size, size, dtype=torch.float64)

    @torch.inference_mode()
    def add(self, x: Tensor) -> None:
        """Counts in inputs `[..., K]` of any floating dtype.

        Raises:
            RuntimeInputError: NaN, infinity, or numbers whose squares overflow fp32; none of the
                chunk they are in is counted.
        """
        tokens = x.reshape(-1, x.shape[-1])
        for start in range(0, len(tokens), _CHUNK_TOKENS):
            chunk = tokens[start : start + _CHUNK_TOKENS].float()
            product = chunk.T @ chunk
            # A square that is not finite shows on the diagonal, and nothing on it cancels.
            bad = int(product.diagonal().isfinite().logical_not().sum())
            if bad:
                channels = f"{bad} of {chunk.shape[1]} channels"
                raise not_finite(f"{channels} hold NaN, infinity or numbers whose squares overflow")
            self._sum += product
            self.tokens += len(chunk)

    @property
    def matrix(self) -> Tensor:
        """`[K, K]` fp64: the sum divided by the number of tokens.

        Raises:
            RuntimeInputError: no input was added.
        """
        if not self.tokens:
            raise RuntimeInputError(
                expected="inputs of a linear layer, to calibrate",
                came="none were added",
                todo="run the model on a calibration text first",
            )
        return self._sum / self.tokens


def gptq(
    weight: Tensor,
    hessian: Tensor,
    format: WeightFormat,
    *,
    clip: Clip,
    scale_dtype: torch.dtype = torch.float32,
    damp: float = 0.01,
    act_order: bool = False,
    scale_search: Literal["plain", "weighted"] = "weighted",
) -> QuantizedTensor:
    """Quantises a weight matrix for the inputs that its layer sees.

    Rows do not influence each other: layers that read the same input may be stacked.

    The scale of a group is chosen when the group is reached, from weights that hold the errors of
    the groups before it; scales per channel, and all scales with `act_order`, are chosen up front.
    An input that was never anything but zero gets zero weights: it says nothing about them, and
    they would only coarsen the scales of others.

    Args:
        weight: `[outputs, K]`, floating point.
        hessian: `[K, K]`, from `Hessian.matrix`; a constant factor does not matter.
        format: bits and group size; the group divides K.
        clip: "max" or "mse", see `Scheme.clip`.
        scale_dtype: dtype the scales are stored in; integers are chosen for the stored scales.
        damp: share of the mean of the Hessian's diagonal that is added to the diagonal. Raised
            tenfold as long as the sum is not positive definite.
        act_order: columns by falling diagonal of the Hessian rather than by position.
        scale_search: what "mse" minimises: the "plain" error of the weights, or errors "weighted"
            by what the rounding of each column costs, M_jj^2. In 25 matrices of SmolLM2-135M the
            weighted search lost 18 % less with int4 in groups of 64, 33 % less per channel.

    Raises:
        LoweringError: the group does not divide K.
        CheckpointError: the weight is not finite.
        RuntimeInputError: the Hessian is not finite, of another size, or not positive semidefinite.
    """
    _check(weight, hessian, format)
    with torch.inference_mode():
        columns = _Columns(hessian, damp, act_order)
        importance = columns.importance if scale_search == "weighted" else None
        search = _scale_search(format, clip, scale_dtype, importance)
    # Made outside: a tensor born in inference mode could not be changed or trained later.
    outputs, inputs = weight.shape
    qdata = torch.empty(outputs, inputs, dtype=torch.int8)
    scale = torch.empty(outputs, inputs // (format.group_size or inputs), dtype=scale_dtype)

    def quantize_rows(start: int) -> None:
        rows = slice(start, start + _ROWS)
        qdata[rows], scale[rows] = columns.quantize(weight[rows], format, search)

    with torch.inference_mode():
        for_each(quantize_rows, range(0, outputs, _ROWS))
    return QuantizedTensor(qdata, scale, format)


class _Columns:
    """The columns of a weight matrix: their order, and how errors spread among them.

    Attributes:
        importance: `[K]` fp32, loss per squared rounding error of each column, M_jj^2; its mean 1.
    """

    def __init__(self, hessian: Tensor, damp: float, act_order: bool) -> None:
        diagonal = hessian.diagonal()
        self._act_order = act_order
        self._dead = diagonal == 0
        self._order = torch.arange(len(diagonal))
        if act_order:
            self._order = torch.argsort(diagonal, descending=True, stable=True)
        ordered = hessian.double()[self._order][:, self._order]
        # A lower factor of the matrix mirrored at both axes is, mirrored back, an upper one of it.
        factor = damped_cholesky(ordered.flip(0, 1), damp).flip(0, 1)
        loss = factor.diagonal().square()
        self.importance = torch.empty(len(loss))
        self.importance[self._order] = (loss / loss.mean()).float()
        # [K, K] fp32, row j: M_ij / M_jj for all i.
        self._feedback = (factor / factor.diagonal()).T.float().contiguous()

    def quantize(
        self, weight: Tensor, format: WeightFormat, search: _ScaleSearch
    ) -> tuple[Tensor, Tensor]:
        """Integers `[n, K]` and stored scales `[n, K / group]` of rows `[n, K]`."""
        weight = weight.float().masked_fill(self._dead, 0)
        inputs = weight.shape[1]
        group, block = format.group_size or inputs, format.group_size or _BLOCK
        up_front = self._act_order or format.group_size is None
        starts = range(0, inputs, group) if up_front else ()
        scales = [search(weight[:, i : i + group], i) for i in starts]
        # Transposed, so that a column is contiguous.
        original = weight.T.contiguous()[self._order]
        moved, integers = original.clone(), torch.empty(original.shape, dtype=torch.int8)
        for start in range(0, inputs, block):
            here, later = slice(start, start + block), slice(start + block, inputs)
            order, feedback = self._order[here], self._feedback[here, here]
            if not up_front:
                scales.append(search(_unrounded(original[here], moved[here], feedback).T, start))
            steps = [scales[column // group].flatten().float() for column in order.tolist()]
            rounded, errors = _round_columns(original[here], moved[here], steps, feedback, format)
            integers[order] = rounded
            moved[later].addmm_(self._feedback[later, here], errors)
        return integers.T, torch.cat(scales, dim=1)


def _unrounded(original: Tensor, moved: Tensor, feedback: Tensor) -> Tensor:
    """`[block, n]`, where a block's columns come to lie as long as none of them is rounded.

    Further than `moved`, see `_round_columns`: each follows those before it in the block, too.
    """
    shift: Tensor = torch.linalg.solve_triangular(
        feedback, moved - original, upper=False, unitriangular=True
    )
    return original + shift


def _round_columns(
    original: Tensor, moved: Tensor, steps: list[Tensor], feedback: Tensor, format: WeightFormat
) -> tuple[Tensor, Tensor]:
    """Rounds a block column by column, each after the errors of the earlier ones reached it.

    Args:
        original: `[block, n]`, transposed weights.
        moved: `[block, n]`, the same plus what the errors of earlier blocks add to each column.
        steps: per column its scales `[n]`.
        feedback: `[block, block]`, in row j M_ij / M_jj.
        format: gives the range of the integers.

    Returns:
        The integers `[block, n]` int8, and the errors against the original weights `[block, n]`.
    """
    integers, errors = torch.empty_like(moved), torch.empty_like(moved)
    for j, (step, rounded) in enumerate(zip(steps, integers.unbind(), strict=True)):
        column = torch.addmv(moved[j], errors[:j].T, feedback[j, :j])
        torch.div(column, step, out=rounded).round_().clamp_(format.low, format.high)
        torch.addcmul(original[j], rounded, step, value=-1, out=errors[j])
    return integers.to(torch.int8), errors


def damped_cholesky(hessian: Tensor, damp: float) -> Tensor:
    """Lower triangular L, fp64, with L L^T the damped Hessian, and 1 for inputs that are zero.

    Args:
        hessian: `[K, K]` fp64.
        damp: share of the diagonal's mean that is added to it, raised tenfold where that is needed.

    Raises:
        RuntimeInputError: the Hessian is far from positive semidefinite.
    """
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / dead.logical_not().sum().clamp_min(1)
    for attempt in range(_ATTEMPTS):
        damped = hessian.clone()
        damped.diagonal().add_(torch.where(dead, 1.0, damp * mean))
        lower: Tensor
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return lower
        if attempt < _ATTEMPTS - 1:
            damp = max(10 * damp, 0.01)
    raise RuntimeInputError(
        expected="a Hessian without negative eigenvalues",
        came=f"it is not positive definite even with {damp:g} of its mean diagonal added",
        todo="calibrate again with more tokens",
    )


def _scale_search(
    format: WeightFormat,
    clip: Clip,
    scale_dtype: torch.dtype,
    weights: Tensor | None,
) -> _ScaleSearch:
    """The function that chooses the scales of a group, by `[K]` weights of columns if given."""

    def search(groups: Tensor, start: int) -> Tensor:
        groups = groups.contiguous()
        if clip == "max" or weights is None:
            return choose_scale(groups, format, clip=clip, scale_dtype=scale_dtype)
        largest = groups.abs().amax(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
        part = weights[start : start + groups.shape[1]]
        fraction = _best_fraction(groups * (format.high / largest), part, format)
        scale = (largest * fraction / format.high).to(scale_dtype)
        return torch.where(scale > 0, scale, torch.finfo(scale_dtype).tiny)

    return search


def _best_fraction(normalised: Tensor, weights: Tensor, format: WeightFormat) -> Tensor:
    """Per row the scale of least weighted squared error, `[n, 1]`: a coarse grid, then a fine one.

    Args:
        normalised: `[n, group]`, the largest weight of each row being the largest integer.
        weights: `[group]`, positive.
        format: gives the range of the integers.
    """
    buffer, errors = torch.empty_like(normalised), torch.empty_like(normalised)
    best = torch.ones_like(normalised[:, :1])
    least = torch.full_like(best, torch.inf)
    for fraction in _COARSE_FRACTIONS:
        torch.mul(normalised, 1 / fraction, out=buffer)
        buffer.round_().clamp_(format.low, format.high)
        torch.add(normalised, buffer, alpha=-fraction, out=errors)
        loss = torch.mv(errors.square_(), weights).unsqueeze(1)
        best[loss < least] = fraction
        least = torch.minimum(least, loss)
    coarse = best
    for step in _FINE_STEPS:
        fractions = coarse + step
        torch.div(normalised, fractions, out=buffer)
        buffer.round_().clamp_(format.low, format.high)
        torch.addcmul(normalised, buffer, fractions, value=-1, out=errors)
        loss = torch.mv(errors.square_(), weights).unsqueeze(1)
        best = torch.where(loss < least, fractions, best)
        least = torch.minimum(least, loss)
    return best


def _check(weight: Tensor, hessian: Tensor, format: WeightFormat) -> None:
    inputs = weight.shape[1]
    if format.group_size and inputs % format.group_size:
        raise LoweringError(
            expected=f"a group that divides the {inputs} inputs of a linear layer",
            came=f"the group is {format.group_size}",
            todo="choose another group",
        )
    if not weight.isfinite().all():
        raise CheckpointError(
            expected="finite weights to quantise",
            came="a matrix holds NaN or infinity",
            todo="repair the checkpoint",
        )
    if hessian.shape != (inputs, inputs) or not hessian.isfinite().all():
        raise RuntimeInputError(
            expected=f"a finite Hessian of {inputs} x {inputs} for GPTQ",
            came=f"its shape is {list(hessian.shape)} or it holds NaN or infinity",
            todo="collect it from the inputs of this layer",
        )

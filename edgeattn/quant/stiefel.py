"""Learning rotations: gradient descent that stays on the orthogonal matrices.

After Li, Li, Todorovic, "Efficient Riemannian optimization on the Stiefel manifold via the Cayley
transform" (arXiv 2002.01113), for square matrices, as SpinQuant (arXiv 2405.16406) uses it. From a
gradient G at a rotation R comes a skew-symmetric W, and the way down is `R - a W R` for small steps
a; the Cayley transform of W bends this line onto the manifold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from edgeattn.errors import RuntimeInputError, UsageError

# How far from orthogonal a parameter may be at the start; the first step repairs it.
_START_ERROR = 1e-3


class CayleySGD(Optimizer):
    """Gradient descent over orthogonal matrices, `[n, n]` fp32 or fp64, row-major.

    Rather than `torch.nn.utils.parametrizations.orthogonal` under another optimiser: on an
    orthogonal Procrustes problem with n = 64 this one, with momentum 0.9, is at the optimum after
    300 steps; those were off by 3e-3 or more then and by 8e-4 after 1,000, at higher cost a step.

    A step is at most `1 / ||W||_1`, so that it turns no direction by more than 53 degrees,
    2 atan(1/2), whatever the learning rate.

    The momentum is a sum of W's, a skew-symmetric matrix. Such a matrix gives a tangent at every
    rotation, thus it needs no projection when the rotation has moved on.

    The state is one tensor `momentum` per parameter, like the parameter; none without momentum.

    Args:
        params: orthogonal matrices, or groups of them with options of their own.
        lr: the learning rate.
        momentum: share of the last direction that is kept, at least 0 and below 1.

    Raises:
        UsageError: `lr` or `momentum` out of range.
        RuntimeInputError: a parameter that is not orthogonal; in `step`, a gradient that is not
            finite, which leaves its parameter as it was.
    """

    def __init__(self, params: ParamsT, lr: float, momentum: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes more parameters, see the class."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not group["lr"] > 0 or not 0 <= group["momentum"] < 1:
            raise UsageError(
                expected="a positive learning rate and a momentum of at least 0 and below 1",
                came=f"they are {group['lr']} and {group['momentum']}",
                todo="choose others",
            )
        for parameter in group["params"]:
            _check_orthogonal(parameter)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Moves every parameter that has a gradient.

        Args:
            closure: computes the loss and the gradients anew, as for other optimisers.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group["lr"], group["momentum"])
        return loss

    def _move(self, parameter: Tensor, lr: float, momentum: float) -> None:
        assert parameter.grad is not None
        direction = skew_gradient(parameter, parameter.grad)
        if not direction.isfinite().all():
            raise RuntimeInputError(
                expected="finite gradients of the rotations",
                came="one holds NaN or infinity",
                todo="lower the learning rate, or check that the loss is finite",
            )
        if momentum:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            direction = state["momentum"].mul_(momentum).add_(direction)
        norm = float(torch.linalg.matrix_norm(direction, ord=1))
        parameter.copy_(cayley_step(parameter, direction, min(lr, 1 / norm) if norm else lr))


def skew_gradient(rotation: Tensor, gradient: Tensor) -> Tensor:
    """W = Ghat - Ghat^T with Ghat = G R^T - R R^T G R^T / 2, which is G R^T / 2 as R R^T = I.

    W R is the gradient's projection on the tangent space at R.

    Args:
        rotation: R, `[n, n]`, orthogonal.
        gradient: G, `[n, n]`, of a loss by the elements of R.
    """
    half = gradient @ rotation.T / 2
    return half - half.T


def cayley_step(rotation: Tensor, skew: Tensor, step: float) -> Tensor:
    """`(I + a/2 W)^-1 (I - a/2 W) R`, `[n, n]`, the Cayley transform along -W.

    By a solver rather than by the paper's five fixed-point steps: those take 10 n^3 operations,
    converge only for small steps, and what is left of their error is no longer orthogonal. The
    solver takes 8/3 n^3, as (I - A) = 2 I - (I + A). Its rounding errors would add up over the
    steps of a training; a Newton step towards the nearest orthogonal matrix, 4 n^3, squares them.

    Args:
        rotation: R, `[n, n]`, orthogonal.
        skew: W, `[n, n]`, skew-symmetric.
        step: a.
    """
    identity = torch.eye(len(rotation), dtype=rotation.dtype, device=rotation.device)
    moved: Tensor = 2 * torch.linalg.solve(identity + skew * (step / 2), rotation) - rotation
    return moved + (identity - moved @ moved.T) @ moved / 2


def orthogonality_error(matrix: Tensor) -> float:
    """The largest element of `|R R^T - I|` of a matrix `[n, n]`, computed in fp64."""
    matrix = matrix.detach().double()
    identity = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
    return float((matrix @ matrix.T - identity).abs().max())


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal matrix `[n, n]` fp64 nearest to a matrix `[n, n]`: its polar factor.

    Raises:
        RuntimeInputError: the matrix is singular or not finite; then there is no single one.
    """
    matrix = matrix.detach().double()
    if matrix.isfinite().all():
        left, sizes, right = torch.linalg.svd(matrix)
        if sizes[-1] > sizes[0] * torch.finfo(torch.float64).eps:
            nearest: Tensor = left @ right
            return nearest
    raise RuntimeInputError(
        expected="a matrix near a rotation",
        came="it is singular, or holds NaN or infinity",
        todo="learn the rotation again, at a lower learning rate",
    )


def _check_orthogonal(parameter: Tensor) -> None:
    square = parameter.ndim == 2 and parameter.shape[0] == parameter.shape[1]
    floating = parameter.dtype in (torch.float32, torch.float64)
    if not square or not floating or not orthogonality_error(parameter) <= _START_ERROR:
        raise RuntimeInputError(
            expected="orthogonal matrices in fp32 or fp64 to optimise",
            came=f"one of shape {list(parameter.shape)} in {parameter.dtype} is not",
            todo="start from an orthogonal matrix, for example nearest_orthogonal of this one",
        )

"""Learns the rotations R1 and R2 of a model on a text, so that what is lost by rounding is least.

SpinQuant (arXiv 2405.16406): gradient descent on orthogonal matrices, from random Hadamard ones,
while the weights stay as they are. Stopped work goes on where it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeattn.calibration.windows import split_windows
from edgeattn.calibration.work import write_tensors
from edgeattn.errors import RuntimeInputError, UsageError
from edgeattn.models.model import Model
from edgeattn.quant.scheme import Objective, Scheme
from edgeattn.quant.stiefel import CayleySGD, nearest_orthogonal, skew_gradient
from edgeattn.transforms.rotatable import RotatableModel
from edgeattn.transforms.rotate import Rotations
from edgeattn.transforms.rotations_file import HEADS, RESIDUAL, read_tensors, stacked

Progress = Callable[[int, int], None]

# Tokens of a step: two windows of 512. With fewer, most of a step would be products of weights with
# R1, which cost the same for any number of tokens.
_TOKENS = 1024
# A gradient below this is none.
_FLAT = 1e-12
_BEGIN_ANEW = "delete the file, and the same command learns from the beginning"


@dataclass(frozen=True)
class LearnReport:
    """What learning did.

    Attributes:
        objective: what was made small, "cross-entropy" or "kl".
        steps: of the descent.
        losses: the objective of every step, in nats per token, on the windows of that step.
        loss_before: on windows that no step saw, with the rotations it started from.
        loss_after: on the same windows, with the rotations that were returned.
        learned: whether those are the learned ones; False where the start was no worse.
        orthogonality_error: largest |R Rᵀ - I| of what was returned.
        seconds_per_step: on this machine.
    """

    objective: Objective
    steps: int
    losses: tuple[float, ...]
    loss_before: float
    loss_after: float
    learned: bool
    orthogonality_error: float
    seconds_per_step: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)


@contextmanager
def _refusing_a_full_gpu() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeInputError(
            expected="memory of the GPU for the whole model in fp32, to learn rotations",
            came="there is too little",
            todo="set CUDA_VISIBLE_DEVICES= to learn on the CPU; the steps done so far are kept",
        ) from error


@_refusing_a_full_gpu()
def learn_rotations(
    model: Model,
    scheme: Scheme,
    windows: Tensor,
    start: Rotations,
    *,
    steps: int,
    objective: Objective,
    state_file: Path,
    made_from: Mapping[str, Any],
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Rotations, LearnReport]:
    """The rotations with which the fake-quantised model does best on a text.

    Args:
        model: neither rotated nor quantised.
        scheme: how the rotated model will be quantised.
        windows: token ids `[N, L]`; some are held out to judge the result.
        start: R1 and R2 to start from; R4 stays as it is.
        steps: of the descent.
        objective: what is made small; see `Objective` for which gives what.
        state_file: written after every step, read by the next call, never removed here.
        made_from: JSON-ready values that say what the result depends on.
        progress: called with (steps done, all steps).
        device: where to compute.

    Returns:
        The learned rotations in fp64, or `start` where they do no better.

    Raises:
        UsageError: one window only, or a state file of another recipe, or a damaged one.
        RuntimeInputError: a gradient that is not finite, or a GPU with too little memory.
        BundleError: the disk refuses the state file.
    """
    train, held = split_windows(windows)
    made_from = {**made_from, "steps": steps, "objective": objective}
    descent = _Descent.restore(state_file, made_from, device) or _Descent.begin(start, device)
    network = RotatableModel(model, scheme, down=start.down, device=device)
    if descent.loss_before is None:
        descent.loss_before = _judge(network, start, held, objective)
    batches = _batches(train, steps)
    for done in range(len(descent.losses), steps):
        descent.step(network, train[batches[done]], objective, share=1 - done / steps)
        descent.save(state_file, made_from)
        if progress:
            progress(done + 1, steps)
    found = descent.rotations(start)
    loss_after = _judge(network, found, held, objective)
    learned = loss_after < descent.loss_before
    best = found if learned else start
    return best, LearnReport(
        objective=objective,
        steps=steps,
        losses=tuple(descent.losses),
        loss_before=descent.loss_before,
        loss_after=loss_after if learned else descent.loss_before,
        learned=learned,
        orthogonality_error=best.orthogonality_error(),
        seconds_per_step=descent.seconds / steps,
    )


def _batches(windows: Tensor, steps: int) -> Tensor:
    """Rows of `windows` that each step sees, `[steps, n]`: the text again and again, shuffled."""
    count, length = windows.shape
    batch = min(count, max(1, _TOKENS // length))
    generator = torch.Generator().manual_seed(0)
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-steps * batch // count))]
    return torch.cat(rounds)[: steps * batch].view(steps, batch)


@torch.no_grad()
def _judge(
    network: RotatableModel, rotations: Rotations, windows: Tensor, objective: Objective
) -> float:
    assert rotations.residual is not None
    return float(network.loss(rotations.residual, rotations.heads, windows, objective))


class _Descent:
    """The descent, and all that a stopped one needs to go on.

    The optimiser remembers nothing without momentum, with which it found nothing better on a model
    of 260 thousand parameters; the learning rate follows from the step and its gradient.

    Args:
        residual: R1, on the device.
        heads: R2 of each block, likewise.
    """

    def __init__(self, residual: Tensor, heads: Sequence[Tensor]) -> None:
        # fp64 keeps them orthogonal; the network rounds them to fp32 on their way in.
        self._residual, *self._heads = (
            matrix.detach().clone().double().requires_grad_() for matrix in (residual, *heads)
        )
        self._optimizer = CayleySGD([self._residual, *self._heads], lr=1.0)
        self.losses: list[float] = []
        self.loss_before: float | None = None
        self.seconds = 0.0

    @classmethod
    def begin(cls, start: Rotations, device: str | torch.device) -> _Descent:
        """From the first step."""
        tensors = stacked(start)
        return cls(tensors[RESIDUAL].to(device), list(tensors[HEADS].to(device)))

    @classmethod
    def restore(
        cls, file: Path, made_from: Mapping[str, Any], device: str | torch.device
    ) -> _Descent | None:
        """From where a stopped run was, None without one.

        Raises:
            UsageError: the run was of another recipe, or the file is damaged.
        """
        if not file.exists():
            return None
        tensors, metadata = read_tensors(file, todo=_BEGIN_ANEW)
        if metadata.get("made_from") != json.dumps(made_from, sort_keys=True):
            raise UsageError(
                expected=f"the unfinished learning in {file} to be of this command",
                came="it is a resumed run with another recipe, model or calibration text",
                todo="delete the file, or run the command it was started with again",
            )
        descent = cls(tensors[RESIDUAL].to(device), list(tensors[HEADS].to(device)))
        try:
            about = json.loads(metadata["about"])
            descent.losses, descent.seconds = about["losses"], about["seconds"]
            descent.loss_before = about["loss_before"]
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                expected=f"in {file} how far learning came",
                came="it does not say",
                todo=_BEGIN_ANEW,
            ) from error
        return descent

    def save(self, file: Path, made_from: Mapping[str, Any]) -> None:
        """Writes a state that is whole, whenever the work is stopped."""
        about = {
            "losses": self.losses,
            "loss_before": self.loss_before,
            "seconds": self.seconds,
        }
        metadata = {
            "about": json.dumps(about),
            "made_from": json.dumps(made_from, sort_keys=True),
        }
        present = Rotations(self._residual.detach(), tuple(h.detach() for h in self._heads))
        write_tensors(file, stacked(present), metadata)

    def step(
        self, network: RotatableModel, windows: Tensor, objective: Objective, *, share: float
    ) -> None:
        """One step downhill.

        Args:
            network: whose loss falls.
            windows: token ids `[N, L]`.
            objective: which loss.
            share: of the largest step of R1 that the optimiser takes. Gradients are 17 times as
                large for SmolLM2-135M as for a model of 260 thousand parameters, so that no rate
                fits both. For the small one shares of 1/2 and 1 at the first step did equally
                well in 20 and in 60 steps, and 1/5 and 1/20 worse. The much smaller gradients of
                R2 take the same rate; steps of R2 as large as those of R1 gained nothing.
        """
        started = time.perf_counter()
        self._optimizer.zero_grad()
        loss = network.loss(self._residual, self._heads, windows, objective)
        loss.backward()  # type: ignore[no-untyped-call]
        assert self._residual.grad is not None
        skew = skew_gradient(self._residual.detach(), self._residual.grad)
        steepness = float(torch.linalg.matrix_norm(skew, ord=1))
        for group in self._optimizer.param_groups:
            group["lr"] = share / max(steepness, _FLAT)
        self._optimizer.step()
        self.losses.append(float(loss.detach()))
        self.seconds += time.perf_counter() - started

    def rotations(self, start: Rotations) -> Rotations:
        """The present ones, orthogonal to rounding, with R4 of `start`, on the CPU."""
        residual, *heads = (
            nearest_orthogonal(matrix.cpu()) for matrix in (self._residual, *self._heads)
        )
        return Rotations(residual, tuple(heads), start.down)

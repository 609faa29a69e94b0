"""Gradient descent that can be stopped: AdamW on named parameters, with its state on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from edgeattn.calibration.work import read_state, save_state
from edgeattn.errors import RuntimeInputError
from edgeattn.models.model import ModelWeights
from edgeattn.quant.affine import QuantizedTensor
from edgeattn.quant.scheme import WeightFormat

# The highest learning rate, where the recipe names none.
LEARNING_RATE = 5e-4
# Steps with a rising rate, at most, and as a share.
_WARM_UP, _WARM_UP_SHARE = 20, 0.1
_BETAS, _CLIP = (0.9, 0.95), 1.0
# Writing the state takes as long as a step or more.
_SAVE_SECONDS = 120.0


@contextmanager
def refusing_a_full_gpu() -> Iterator[None]:
    """Turns what torch says of GPUs with too little memory into a sentence.

    Raises:
        RuntimeInputError: it is too little.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeInputError(
            expected="memory of the GPUs for two models in fp32 and the state of AdamW",
            came="there is too little",
            todo="set CUDA_VISIBLE_DEVICES= to train on the CPU; what was saved goes on there",
        ) from error


def step_rows(count: int, batch: int, steps: int) -> Tensor:
    """Which of `count` rows each step sees, `[steps, n]`: all again and again, shuffled.

    Args:
        count: of rows.
        batch: rows of a step, at most.
        steps: of the training.
    """
    batch = min(count, max(1, batch))
    generator = torch.Generator().manual_seed(0)
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-steps * batch // count))]
    return torch.cat(rounds)[: steps * batch].view(steps, batch)


def rate_share(step: int, steps: int) -> float:
    """The share of the highest learning rate at a step: a short rise, then a cosine to zero."""
    warm_up = max(1, min(_WARM_UP, int(_WARM_UP_SHARE * steps)))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


class Descent:
    """The parameters under training, their optimiser, and all that a stopped one needs to go on.

    Attributes:
        losses: of every step so far.
        seconds: of all steps so far.

    Args:
        file: of the state.
        made_from: what it must be of.
        steps: of the training.
        learning_rate: the highest.

    Raises:
        UsageError: the file is of something else, or damaged.
    """

    def __init__(
        self,
        file: Path,
        made_from: Mapping[str, object],
        *,
        steps: int,
        learning_rate: float,
    ) -> None:
        self._file, self._steps, self._rate = file, steps, learning_rate
        self._made_from = {**made_from, "steps": steps, "learning_rate": learning_rate}
        self._saved = time.monotonic()
        self._state, about = read_state(file, self._made_from) or (
            {},
            {"losses": [], "seconds": 0.0},
        )
        self.losses: list[float] = about["losses"]
        self.seconds: float = about["seconds"]

    @property
    def done(self) -> int:
        """Steps so far."""
        return len(self.losses)

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.done == self._steps

    def run(
        self,
        module: nn.Module,
        loss_of: Callable[[int], Tensor],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """All steps that are left; the state is written now and then, and behind the last one.

        Args:
            module: whose parameters that want gradients are trained.
            loss_of: computes the loss of a step, a scalar.
            progress: called with (steps done, all steps).

        Raises:
            RuntimeInputError: a loss is not finite.
            BundleError: the disk refuses the state file.
        """
        self._take(module)
        while not self.finished:
            self._step(loss_of)
            if self.finished or time.monotonic() - self._saved >= _SAVE_SECONDS:
                self._save()
            if progress:
                progress(self.done, self._steps)

    @torch.no_grad()
    def _take(self, module: nn.Module) -> None:
        """Takes the parameters that want gradients, and gives them the values of stopped work."""
        self._trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._optimizer = torch.optim.AdamW(self._trained.values(), betas=_BETAS, weight_decay=0.0)
        for name, value in self._trained.items() if self._state else ():
            value.copy_(self._state[f"weight/{name}"])
            self._optimizer.state[value] = {
                "step": torch.tensor(float(self.done)),
                "exp_avg": self._state[f"mean/{name}"].to(value),
                "exp_avg_sq": self._state[f"square/{name}"].to(value),
            }
        self._state = {}

    def _step(self, loss_of: Callable[[int], Tensor]) -> None:
        started = time.perf_counter()
        loss = loss_of(self.done)
        if not loss.isfinite():
            raise RuntimeInputError(
                expected="a finite divergence from the original model",
                came=f"it is {float(loss.detach())} at step {self.done + 1}",
                todo="give a lower --finetune-lr",
            )
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._trained.values(), _CLIP)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * rate_share(self.done, self._steps)
        self._optimizer.step()
        self.losses.append(float(loss.detach()))
        self.seconds += time.perf_counter() - started

    def _save(self) -> None:
        """Writes a state that is whole; of finished work nothing that only training needs."""
        tensors = {f"weight/{name}": value.detach() for name, value in self._trained.items()}
        for name, value in () if self.finished else self._trained.items():
            moments = self._optimizer.state[value]
            tensors[f"mean/{name}"] = moments["exp_avg"]
            tensors[f"square/{name}"] = moments["exp_avg_sq"]
        about = {"losses": self.losses, "seconds": self.seconds}
        on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
        save_state(self._file, on_cpu, about, self._made_from)
        self._saved = time.monotonic()


@dataclass(frozen=True)
class TrainedWeights:
    """The weights of a model whose blocks were trained.

    Attributes:
        source: of what was not.
        file: of the state of finished training.
    """

    source: ModelWeights
    file: Path

    def format(self, name: str) -> WeightFormat | None:
        """None: nothing is quantised."""
        return None

    def read(self, name: str) -> Tensor | QuantizedTensor:
        """The trained parameter, or the source's."""
        if not name.startswith("layers."):
            return self.source.read(name)
        with safe_open(self.file, "pt") as file:
            found: Tensor = file.get_tensor(f"weight/{name}")
        return found

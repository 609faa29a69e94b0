"""Recovery training: a model after a lossy transform learns on a text to predict as the original.

Distillation (arXiv 1503.02531): the Kullback-Leibler divergence of the next token's distribution
from the original model's is made small by AdamW. The blocks are trained; embedding, LM head and
final norm stay, which no transform here changes and whose gradients would be most of a small
model's memory. Stopped work goes on where it was.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from edgeattn.calibration.windows import split_windows
from edgeattn.calibration.work import read_state, save_state
from edgeattn.errors import RuntimeInputError
from edgeattn.models.decoder import Decoder
from edgeattn.models.model import Model, ModelWeights, load_decoder
from edgeattn.models.stream import perplexity
from edgeattn.quant.affine import QuantizedTensor
from edgeattn.quant.scheme import WeightFormat
from edgeattn.transforms.spread import spread

Progress = Callable[[int, int], None]

# Tokens of a step and of a window of the text.
STEP_TOKENS, WINDOW_LENGTH = 256, 256
LEARNING_RATE = 5e-4
# Steps with a rising rate, at most, and as a share.
_WARM_UP, _WARM_UP_SHARE = 20, 0.1
_BETAS, _CLIP = (0.9, 0.95), 1.0
# Writing the state takes as long as a step or more.
_SAVE_SECONDS = 120.0
_CPU = (torch.device("cpu"),)
_FP32: Any = {"weight_dtype": torch.float32, "compute_dtype": torch.float32}


@dataclass(frozen=True)
class RecoverReport:
    """What recovery training did.

    Attributes:
        steps: of AdamW.
        tokens: that were trained on, repetitions counted.
        learning_rate: the highest.
        losses: the divergence in nats per token at every step.
        perplexity_original: of the model before its transform, on windows held out.
        perplexity_before: of the transformed model, on the same windows.
        perplexity_after: of the model that was returned.
        learned: whether that is the trained one; False where the start was no worse.
        seconds_per_step: on this machine.
    """

    steps: int
    tokens: int
    learning_rate: float
    losses: tuple[float, ...]
    perplexity_original: float
    perplexity_before: float
    perplexity_after: float
    learned: bool
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
            expected="memory of the GPUs for two models in fp32 and the state of AdamW",
            came="there is too little",
            todo="set CUDA_VISIBLE_DEVICES= to train on the CPU; what was saved goes on there",
        ) from error


@_refusing_a_full_gpu()
def recover(
    original: Model,
    model: Model,
    windows: Tensor,
    *,
    steps: int,
    state_file: Path,
    made_from: Mapping[str, Any],
    learning_rate: float = LEARNING_RATE,
    progress: Progress | None = None,
    devices: Sequence[torch.device] = _CPU,
) -> tuple[Model, RecoverReport]:
    """Trains the blocks of a transformed model to give the original's predictions.

    Args:
        original: the model before the transform.
        model: after it, in floating point; the weights that come from training replace its own.
        windows: token ids `[N, L]`; some are held out to judge the result.
        steps: of the training.
        state_file: written every few minutes and at the end, read by the next call, never removed
            here; the returned model reads its weights from there.
        made_from: JSON-ready values that say what the result depends on.
        learning_rate: the highest, after a short rise; then it falls as a cosine does.
        progress: called with (steps done, all steps).
        devices: where to compute; both models are spread over several (`spread`).

    Returns:
        The trained model, or `model` where training did no good.

    Raises:
        UsageError: one window only, or a state file of another recipe, or a damaged one.
        RuntimeInputError: a loss that is not finite, or a GPU with too little memory.
        BundleError: the disk refuses the state file.
    """
    train, held = split_windows(windows)
    made_from = {**made_from, "steps": steps, "learning_rate": learning_rate}
    training = _Training(model, state_file, made_from, devices)
    batches = step_windows(train, steps)
    if training.done < steps:
        teacher = spread(load_decoder(original, **_FP32), devices)
        for step in range(training.done, steps):
            ids = train[batches[step]].to(devices[0])
            training.step(teacher, ids, learning_rate * rate_share(step, steps))
            training.save(finished=step + 1 == steps)
            if progress:
                progress(step + 1, steps)
        del teacher
    trained = replace(model, weights=_TrainedWeights(model.weights, state_file))
    perplexities = [perplexity(m, held) for m in (original, model, trained)]
    learned = perplexities[2] < perplexities[1]
    report = RecoverReport(
        steps=steps,
        tokens=batches.numel() * train.shape[1],
        learning_rate=learning_rate,
        losses=tuple(training.losses),
        perplexity_original=perplexities[0],
        perplexity_before=perplexities[1],
        perplexity_after=min(perplexities[1:]),
        learned=learned,
        seconds_per_step=training.seconds / steps,
    )
    return trained if learned else model, report


def step_windows(windows: Tensor, steps: int) -> Tensor:
    """Rows of `windows` that each step sees, `[steps, n]`: the text again and again, shuffled."""
    count, length = windows.shape
    batch = min(count, max(1, STEP_TOKENS // length))
    generator = torch.Generator().manual_seed(0)
    rounds = [torch.randperm(count, generator=generator) for _ in range(-(-steps * batch // count))]
    return torch.cat(rounds)[: steps * batch].view(steps, batch)


def rate_share(step: int, steps: int) -> float:
    """The share of the highest learning rate at a step: a short rise, then a cosine to zero."""
    warm_up = max(1, min(_WARM_UP, int(_WARM_UP_SHARE * steps)))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


class _Training:
    """The model under training, its optimiser, and all that a stopped one needs to go on.

    Args:
        model: to start from, where there is no state.
        file: of the state.
        made_from: what it must be of.
        devices: where to compute.
    """

    def __init__(
        self,
        model: Model,
        file: Path,
        made_from: Mapping[str, Any],
        devices: Sequence[torch.device],
    ) -> None:
        self._file, self._made_from = file, made_from
        self._saved = time.monotonic()
        state, about = read_state(file, made_from) or ({}, {"losses": [], "seconds": 0.0})
        self.losses: list[float] = about["losses"]
        self.seconds: float = about["seconds"]
        if state and not any(name.startswith("mean/") for name in state):
            return  # it is finished
        self._student = spread(load_decoder(model, **_FP32), devices)
        self._student.layers.requires_grad_()
        self._trained = {
            name: value for name, value in self._student.named_parameters() if value.requires_grad
        }
        self._optimizer = torch.optim.AdamW(self._trained.values(), betas=_BETAS, weight_decay=0.0)
        if state:
            self._restore(state)

    @property
    def done(self) -> int:
        """Steps so far."""
        return len(self.losses)

    def step(self, teacher: Decoder, ids: Tensor, rate: float) -> None:
        """One step downhill.

        Args:
            teacher: the original model.
            ids: token ids `[n, L]`.
            rate: learning rate.

        Raises:
            RuntimeInputError: the loss is not finite.
        """
        started = time.perf_counter()
        with torch.no_grad():
            wanted = _logits(teacher, ids).log_softmax(-1)
        found = _logits(self._student, ids).log_softmax(-1)
        loss = torch.nn.functional.kl_div(found, wanted, reduction="none", log_target=True)
        loss = loss.sum(-1).mean()
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
            group["lr"] = rate
        self._optimizer.step()
        self.losses.append(float(loss.detach()))
        self.seconds += time.perf_counter() - started

    def save(self, *, finished: bool) -> None:
        """Writes a state that is whole, if it is time to.

        Args:
            finished: write the weights, now, and nothing that only training needs.
        """
        if not finished and time.monotonic() - self._saved < _SAVE_SECONDS:
            return
        tensors = {f"weight/{name}": value.detach() for name, value in self._trained.items()}
        if not finished:
            for name, value in self._trained.items():
                moments = self._optimizer.state[value]
                tensors[f"mean/{name}"] = moments["exp_avg"]
                tensors[f"square/{name}"] = moments["exp_avg_sq"]
        about = {"losses": self.losses, "seconds": self.seconds}
        on_cpu = {name: tensor.cpu() for name, tensor in tensors.items()}
        save_state(self._file, on_cpu, about, self._made_from)
        self._saved = time.monotonic()

    @torch.no_grad()
    def _restore(self, state: Mapping[str, Tensor]) -> None:
        for name, value in self._trained.items():
            value.copy_(state[f"weight/{name}"])
            self._optimizer.state[value] = {
                "step": torch.tensor(float(self.done)),
                "exp_avg": state[f"mean/{name}"].to(value),
                "exp_avg_sq": state[f"square/{name}"].to(value),
            }


def _logits(decoder: Decoder, ids: Tensor) -> Tensor:
    """Of windows of `ids` `[n, L]` without padding, for all places but the last."""
    rows, length = ids.shape
    mask = torch.ones(rows, length, dtype=torch.int64, device=ids.device)
    places = torch.arange(length, device=ids.device).expand(rows, -1)
    output: Tensor = decoder(ids, mask, places, decoder.empty_cache(rows)).logits
    return output[:, :-1]


@dataclass(frozen=True)
class _TrainedWeights:
    source: ModelWeights
    file: Path

    def format(self, name: str) -> WeightFormat | None:
        return None

    def read(self, name: str) -> Tensor | QuantizedTensor:
        if not name.startswith("layers."):
            return self.source.read(name)
        with safe_open(self.file, "pt") as file:
            found: Tensor = file.get_tensor(f"weight/{name}")
        return found

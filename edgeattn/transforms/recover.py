"""Recovery training: a model after a lossy transform learns on a text to predict as the original.

Distillation (arXiv 1503.02531): the Kullback-Leibler divergence of the next token's distribution
from the original model's is made small by AdamW. The blocks are trained; embedding, LM head and
final norm stay, which no transform here changes and whose gradients would be most of a small
model's memory. Stopped work goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgeattn.calibration.windows import split_windows
from edgeattn.models.decoder import Decoder
from edgeattn.models.model import Model, load_decoder
from edgeattn.models.stream import Prediction
from edgeattn.transforms.descent import (
    LEARNING_RATE,
    Descent,
    TrainedWeights,
    refusing_a_full_gpu,
    step_rows,
)
from edgeattn.transforms.spread import spread

Progress = Callable[[int, int], None]

# Tokens of a step and of a window of the text.
STEP_TOKENS, WINDOW_LENGTH = 256, 256
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
        perplexity_before: of the transformed model, on the same windows; where heads are sparse,
            every token behind layer 0 has only those its router chooses.
        perplexity_after: of the trained model, whether it was returned or not.
        divergence_before: KL(original || transformed) in nats per token, on the same windows.
        divergence_after: of the trained model, likewise.
        seconds_per_step: on this machine.
    """

    steps: int
    tokens: int
    learning_rate: float
    losses: tuple[float, ...]
    perplexity_original: float
    perplexity_before: float
    perplexity_after: float
    divergence_before: float
    divergence_after: float
    seconds_per_step: float

    @property
    def learned(self) -> bool:
        """Whether the trained model was returned: it is nearer to the original on unseen text."""
        return self.divergence_after < self.divergence_before

    @property
    def verdict(self) -> str:
        """What became of the trained weights, and why, in one sentence."""
        done = "kept" if self.learned else "discarded"
        change = "fell" if self.learned else "did not fall"
        return (
            f"the trained weights were {done}, as on text held out the divergence from the "
            f"original {change}: {self.divergence_before:.4g} nats per token before, "
            f"{self.divergence_after:.4g} after"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "learned": self.learned, "verdict": self.verdict}


@refusing_a_full_gpu()
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
        model: after it, in floating point, with the attention variants it will have, whose tables
            stay; the weights that come from training replace its own.
        windows: token ids `[N, L]`; some are held out to judge the result.
        steps: of the training.
        state_file: written every few minutes and at the end, read by the next call, never removed
            here; the returned model reads its weights from there.
        made_from: JSON-ready values that say what the result depends on.
        learning_rate: the highest, after a short rise; then it falls as a cosine does.
        progress: called with (steps done, all steps).
        devices: where to compute; both models are spread over several (`spread`).

    Returns:
        The trained model, or `model` where training brought it no nearer to the original.

    Raises:
        UsageError: one window only, or a state file of another recipe, or a damaged one.
        RuntimeInputError: a loss that is not finite, or a GPU with too little memory.
        BundleError: the disk refuses the state file.
    """
    train, held = split_windows(windows)
    descent = Descent(state_file, made_from, steps=steps, learning_rate=learning_rate)
    batches = step_rows(len(train), STEP_TOKENS // train.shape[1], steps)
    if not descent.finished:
        _train(descent, original, model, [train[rows] for rows in batches], devices, progress)
    trained = replace(model, weights=TrainedWeights(model.weights, state_file))
    # A head-sparse layer loses something only as it decodes, which is how it is trained.
    wanted, before, after = (Prediction(m, held, training=True) for m in (original, model, trained))
    report = RecoverReport(
        steps=steps,
        tokens=batches.numel() * train.shape[1],
        learning_rate=learning_rate,
        losses=tuple(descent.losses),
        perplexity_original=wanted.perplexity(),
        perplexity_before=before.perplexity(),
        perplexity_after=after.perplexity(),
        divergence_before=before.divergence(wanted),
        divergence_after=after.divergence(wanted),
        seconds_per_step=descent.seconds / steps,
    )
    return trained if report.learned else model, report


def _train(
    descent: Descent,
    original: Model,
    model: Model,
    batches: Sequence[Tensor],
    devices: Sequence[torch.device],
    progress: Progress | None,
) -> None:
    teacher, student = (spread(load_decoder(m, **_FP32), devices) for m in (original, model))
    student.train().layers.requires_grad_()

    def loss(step: int) -> Tensor:
        return _divergence(teacher, student, batches[step].to(devices[0]))

    descent.run(student, loss, progress)


def _divergence(teacher: Decoder, student: Decoder, ids: Tensor) -> Tensor:
    """In nats per token of `ids` `[n, L]`."""
    with torch.no_grad():
        wanted = _logits(teacher, ids).log_softmax(-1)
    found = _logits(student, ids).log_softmax(-1)
    loss = torch.nn.functional.kl_div(found, wanted, reduction="none", log_target=True)
    return loss.sum(-1).mean()


def _logits(decoder: Decoder, ids: Tensor) -> Tensor:
    """Of windows of `ids` `[n, L]` without padding, for all places but the last."""
    rows, length = ids.shape
    mask = torch.ones(rows, length, dtype=torch.int64, device=ids.device)
    places = torch.arange(length, device=ids.device).expand(rows, -1)
    output: Tensor = decoder(ids, mask, places, decoder.empty_cache(rows)).logits
    return output[:, :-1]

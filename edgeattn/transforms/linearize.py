"""LION-isation: an encoder whose softmax attention becomes linear, distilled from the original.

Two halves of one training (`transforms.descent`), in which all blocks learn. In the first each
layer gives what the original's gives for the same input, one layer apart from the other; in the
second the whole encoder gives what the original gives: token states behind the last norm, and the
embedding or the classes that are made of them. Stopped work goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div

from edgeattn.attention import LionRequest
from edgeattn.calibration.windows import split_windows
from edgeattn.encoder_shape import DECAY, DECAY_GATE, EncoderShape, PatchInput, TokenInput
from edgeattn.models.encoder import Encoder, EncoderOutput
from edgeattn.models.encoder_model import EncoderModel, load_encoder
from edgeattn.models.model import ModelWeights, Progress
from edgeattn.quant.affine import QuantizedTensor
from edgeattn.quant.scheme import WeightFormat
from edgeattn.transforms.descent import (
    LEARNING_RATE,
    Descent,
    TrainedWeights,
    refusing_a_full_gpu,
    step_rows,
)

# Tokens of a step, of text or of image patches.
STEP_TOKENS = 512
# A window is also read as so many texts of equal length: encoders read short ones.
PARTS = (1, 2, 4, 8)
# Reaches of the heads' decays at the start, in tokens: 1 / (1 - decay).
_SHORTEST, _LONGEST = 8.0, 512.0
_FP32: Any = {"weight_dtype": torch.float32, "compute_dtype": torch.float32}
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Material:
    """What an encoder learns on.

    Attributes:
        rows: images `[N, C, height, width]`, or token ids `[N, L]` without special tokens; L is a
            multiple of the most of `PARTS`.
        before: special tokens in front of a text.
        behind: those that end it.
    """

    rows: Tensor
    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()

    def inputs(self, rows: Tensor, parts: int, read: TokenInput | PatchInput) -> Inputs:
        """Inputs of an encoder: some rows as they are, or as `parts` texts each."""
        if isinstance(read, PatchInput):
            return (rows,)
        texts = rows.reshape(len(rows) * parts, -1)
        before, behind = (
            texts.new_tensor(ids).expand(len(texts), -1) for ids in (self.before, self.behind)
        )
        ids = torch.cat((before, texts, behind), dim=1)
        return (ids, torch.ones_like(ids), torch.zeros_like(ids))[: len(read.names)]


@dataclass(frozen=True)
class Agreement:
    """How an encoder agrees with another on what neither has learned on.

    Attributes:
        layers: of each layer alone, for the input it has in the original: the error of what it
            adds to the residual stream, relative.
        error: of the whole encoder's output, relative.
        cosine: of its output vectors with the original's, on the mean.
        same_class: share of the rows with the same most likely class; None without classes.
    """

    layers: tuple[float, ...]
    error: float
    cosine: float
    same_class: float | None


@dataclass(frozen=True)
class LinearizeReport:
    """What LION-isation did.

    Attributes:
        steps: of AdamW; the first half layer by layer.
        learning_rate: the highest.
        losses: of every step; what they are of changes after the first half.
        before: how the encoder agrees with the original before training, on rows held out.
        after: and after it.
        seconds_per_step: on this machine.
    """

    steps: int
    learning_rate: float
    losses: tuple[float, ...]
    before: Agreement
    after: Agreement
    seconds_per_step: float


@refusing_a_full_gpu()
def linearize(
    original: EncoderModel,
    request: LionRequest,
    material: Material,
    *,
    steps: int,
    state_file: Path,
    made_from: Mapping[str, Any],
    learning_rate: float = LEARNING_RATE,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
) -> tuple[EncoderModel, LinearizeReport]:
    """Replaces the attention of every layer and trains the blocks to agree with the original.

    Args:
        original: with softmax attention, in floating point.
        request: the variant.
        material: some of its rows are held out to judge the result.
        steps: of the training.
        state_file: written every few minutes and at the end, read by the next call, never removed
            here; the returned model reads its weights from there.
        made_from: JSON-ready values that say what the result depends on.
        learning_rate: the highest, after a short rise; then it falls as a cosine does.
        progress: called with (steps done, all steps).
        device: where to compute.

    Raises:
        UsageError: one row only, or a state file of another recipe, or a damaged one.
        RuntimeInputError: a loss that is not finite, or a GPU with too little memory.
        BundleError: the disk refuses the state file.
    """
    rows, held = split_windows(material.rows)
    start = with_lion(original, request)
    descent = Descent(state_file, made_from, steps=steps, learning_rate=learning_rate)
    if not descent.finished:
        _train(descent, original, start, replace(material, rows=rows), steps, progress, device)
    trained = replace(start, weights=TrainedWeights(start.weights, state_file))
    judged = replace(material, rows=held)
    before, after = (
        agreement(original, model, judged, device=device) for model in (start, trained)
    )
    return trained, LinearizeReport(
        steps=steps,
        learning_rate=learning_rate,
        losses=tuple(descent.losses),
        before=before,
        after=after,
        seconds_per_step=descent.seconds / steps,
    )


def with_lion(original: EncoderModel, request: LionRequest) -> EncoderModel:
    """The encoder with LION in every layer, its projections those of softmax attention still.

    Decays of its heads reach from 8 to 512 tokens, evenly on a scale of powers; those of LION-S do
    so for every token before they have learned.
    """
    shape = original.shape.with_attention(request.layer)
    return replace(original, shape=shape, weights=_StartWeights(original.weights, shape))


def agreement(
    original: EncoderModel,
    model: EncoderModel,
    material: Material,
    *,
    device: str | torch.device = "cpu",
) -> Agreement:
    """How two encoders of one shape, but for their attention, agree on all rows.

    Args:
        original: what should be.
        model: what is.
        material: to run.
        device: where to compute.
    """
    read = original.shape.input
    teacher, student = (load_encoder(m, **_FP32).to(device) for m in (original, model))
    student.train()  # as the operator's reference goes row by row
    found, wanted, losses = list[Tensor](), list[Tensor](), list[Tensor]()
    for parts in PARTS if isinstance(read, TokenInput) else PARTS[:1]:
        for row in material.rows:
            inputs = material.inputs(row.unsqueeze(0).to(device), parts, read)
            with torch.inference_mode():
                expected = teacher(*inputs)
                losses.append(torch.stack(_layer_losses(student, expected, inputs)))
                wanted.append(expected.output.flatten(0, -2))
                found.append(student(*inputs).output.flatten(0, -2))
    a, b = torch.cat(wanted), torch.cat(found)
    same = (a.argmax(-1) == b.argmax(-1)).float().mean()
    return Agreement(
        layers=tuple(torch.stack(losses).mean(0).sqrt().tolist()),
        error=float((b - a).norm() / a.norm()),
        cosine=float(cosine_similarity(a, b, dim=-1).mean()),
        same_class=float(same) if original.shape.task == "classification" else None,
    )


def _train(
    descent: Descent,
    original: EncoderModel,
    start: EncoderModel,
    material: Material,
    steps: int,
    progress: Progress | None,
    device: str | torch.device,
) -> None:
    teacher, student = (load_encoder(m, **_FP32).to(device) for m in (original, start))
    student.train().layers.requires_grad_()
    read = start.shape.input
    length = material.rows.shape[1] if isinstance(read, TokenInput) else read.tokens
    batches = step_rows(len(material.rows), STEP_TOKENS // length, steps)

    def loss(step: int) -> Tensor:
        rows = material.rows[batches[step]].to(device)
        inputs = material.inputs(rows, PARTS[step % len(PARTS)], read)
        with torch.no_grad():
            expected = teacher(*inputs)
        if step < steps // 2:
            return torch.stack(_layer_losses(student, expected, inputs)).mean()
        return _whole_loss(student, expected, inputs)

    descent.run(student, loss, progress)


def _layer_losses(student: Encoder, expected: EncoderOutput, inputs: Inputs) -> list[Tensor]:
    """Squared error of what each layer adds to the stream it has in the original, relative."""
    shape, hidden = student.shape, expected.hidden
    mask = inputs[1] if isinstance(shape.input, TokenInput) else None
    shared = student.layer_inputs(hidden[0], mask)
    losses = []
    for index, layer in enumerate(student.blocks()):
        given, wanted = hidden[index], hidden[index + 1]
        found = layer(given, *shared[shape.layer_kind(index)])
        losses.append((found - wanted).square().sum() / (wanted - given).square().sum())
    return losses


def _whole_loss(student: Encoder, expected: EncoderOutput, inputs: Inputs) -> Tensor:
    """Squared error of the token states, relative, and what is lost of the output."""
    output, task = student(*inputs), student.shape.task
    wanted, found = (student.norm(states[-1]) for states in (expected.hidden, output.hidden))
    loss: Tensor = (found - wanted).square().sum() / wanted.square().sum()
    if task == "embedding":
        loss = loss + 1 - (output.output * expected.output).sum(-1).mean()
    elif task == "classification":
        is_like, shall_be = (y.output.log_softmax(-1) for y in (output, expected))
        loss = loss + kl_div(is_like, shall_be, reduction="batchmean", log_target=True)
    return loss


@dataclass(frozen=True)
class _StartWeights:
    """Weights of an encoder, and decays that nothing has learned yet."""

    source: ModelWeights
    shape: EncoderShape

    def format(self, name: str) -> WeightFormat | None:
        return self.source.format(name)

    def read(self, name: str) -> Tensor | QuantizedTensor:
        if name.endswith(DECAY):
            return _start(self.shape.num_heads)
        if name.endswith(f"{DECAY_GATE}.bias"):
            return -_start(self.shape.num_heads)
        if name.endswith(f"{DECAY_GATE}.weight"):
            return torch.zeros(self.shape.num_heads, self.shape.hidden_size)
        return self.source.read(name)


def _start(num_heads: int) -> Tensor:
    """The a of each head, where its decay is sigmoid(a)."""
    reach = torch.logspace(0, 1, num_heads, base=_LONGEST / _SHORTEST) * _SHORTEST
    return (reach - 1).log()

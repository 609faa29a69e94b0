"""A fake-quantised network whose rotations R1 and R2 are arguments: its loss has gradients by them.

The merging is that of `edgeattn.transforms.rotate`, in fp32 and differentiable. Each block is
computed again on the way back instead of being remembered, so that memory is the model, one block
and the residual stream before each block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from edgeattn.calibration.walk import STAGES
from edgeattn.models.decoder import DecoderLayer, embed, soften
from edgeattn.models.families import EMBEDDING, LM_HEAD
from edgeattn.models.layer_inputs import LayerInputs
from edgeattn.models.linear import Linear
from edgeattn.models.model import Model, load_layer, rounded
from edgeattn.models.stream import window_inputs
from edgeattn.quant.activation import INT8_HIGH, INT8_LOW, LinearInput
from edgeattn.quant.hadamard import HadamardFactors
from edgeattn.quant.scheme import Objective, Scheme, WeightFormat
from edgeattn.shape import ModelShape
from edgeattn.transforms.rotate import Rotations, rotate

_READ_RESIDUAL = (*STAGES[0], *STAGES[2])
_WRITE_RESIDUAL = (*STAGES[1], *STAGES[3])
# Scales tried where the scheme clips by least error, as in `quant.affine` but fewer: the search is
# a part of every step.
_FRACTIONS = (1.0, 0.9, 0.8, 0.7)


class RotatableModel:
    """The network of a model as a function of R1 and R2.

    The embedding, and the LM head unless the scheme gives it the format of the linear layers, stay
    in floating point: they become int8 with one scale per row, whose rounding is a sixteenth of
    int4's, while the products of their many rows with R1 would be a third of a small model's step.
    Vectors are rotated there instead.

    Args:
        model: neither rotated nor quantised.
        scheme: formats of the linear layers, and whether their inputs are rounded; None computes in
            floating point. What `keep` would leave at a higher precision is rounded like the rest,
            and a cache that `kv_bits` would make int8 is not rounded.
        down: R4.
        device: where to compute.
    """

    def __init__(
        self,
        model: Model,
        scheme: Scheme | None,
        *,
        down: HadamardFactors | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        folded = rotate(model, Rotations(down=down))
        self._shape, self._scheme, self._device = folded.shape, scheme, torch.device(device)
        self._embedding, self._head = (
            rounded(name, folded.weights.read(name), torch.float32).to(device)
            for name in (EMBEDDING, LM_HEAD)
        )
        # Of the blocks only the parameters are kept; these two compute with those of any block.
        self._exact, self._rounding = (self._load(folded, 0) for _ in range(2))
        if scheme is not None and scheme.activation_bits is not None:
            _round_inputs(self._rounding)
        self._blocks = [
            {name: value.data for name, value in self._load(folded, index).named_parameters()}
            for index in range(folded.shape.num_layers)
        ]

    def _load(self, folded: Model, index: int) -> DecoderLayer:
        return load_layer(folded, index, weight_dtype=torch.float32).to(self._device)

    def loss(
        self, residual: Tensor, heads: Sequence[Tensor], windows: Tensor, objective: Objective
    ) -> Tensor:
        """The mean over all predicted tokens in nats, a scalar.

        Args:
            residual: R1, `[d, d]`.
            heads: R2 of each block, `[Dh, Dh]`.
            windows: token ids `[N, L]`.
            objective: what is averaged.
        """
        ids, residual = windows.to(self._device), residual.to(self._head)
        normed, head = self._read_out(residual, self._final_hidden(residual, heads, ids))
        wanted = self._original(ids) if objective == "kl" else [None] * len(ids)
        # One window at a time: the logits of all would be the most memory there is.
        losses = [
            checkpoint(self._window_loss, head, *row, use_reentrant=False)
            for row in zip(normed, ids, wanted, strict=True)
        ]
        return torch.stack(losses).mean()

    def logits(self, residual: Tensor, heads: Sequence[Tensor], windows: Tensor) -> Tensor:
        """`[N, L, vocab]` fp32; arguments as for `loss`."""
        residual = residual.to(self._head)
        hidden = self._final_hidden(residual, heads, windows.to(self._device))
        return self._logits(*self._read_out(residual, hidden))

    def _final_hidden(self, residual: Tensor, heads: Sequence[Tensor], ids: Tensor) -> Tensor:
        """The rotated residual stream behind the last block, `[N, L, hidden]`."""
        hidden, shared = embed(self._embedding[ids], self._shape) @ residual, self._shared(ids)
        for inputs, block, head in zip(shared, self._blocks, heads, strict=True):
            hidden = checkpoint(
                self._run_rotated, block, hidden, inputs, residual, head, use_reentrant=False
            )
        return hidden

    @torch.no_grad()
    def _original(self, ids: Tensor) -> Tensor:
        """What the head of the network reads before that is rotated and quantised."""
        hidden = embed(self._embedding[ids], self._shape)
        for inputs, block in zip(self._shared(ids), self._blocks, strict=True):
            hidden = self._run(self._exact, block, hidden, inputs)
        return self._normed(hidden)

    def _shared(self, ids: Tensor) -> list[LayerInputs]:
        with self._device:
            kinds = window_inputs(self._shape, ids.shape[1])
        return [kinds[self._shape.layer_kind(index)] for index in range(self._shape.num_layers)]

    def _run_rotated(
        self,
        block: Mapping[str, Tensor],
        hidden: Tensor,
        inputs: LayerInputs,
        residual: Tensor,
        head: Tensor,
    ) -> Tensor:
        merged, head = {}, head.to(residual)
        for name, value in block.items():
            linear, _, kind = name.rpartition(".")
            if kind == "bias":
                value = merge_bias(linear, value, head, self._shape)
            elif linear.endswith("_proj"):
                value = merge_weight(linear, value, residual, head, self._shape)
                format = None if self._scheme is None else self._scheme.format_of(linear)
                value = self._rounded(value, format)
            merged[name] = value
        return self._run(self._rounding, merged, hidden, inputs)

    def _run(
        self,
        layer: DecoderLayer,
        parameters: Mapping[str, Tensor],
        hidden: Tensor,
        inputs: LayerInputs,
    ) -> Tensor:
        past = layer.self_attn.no_past(len(hidden), hidden.dtype)
        found: Tensor = functional_call(layer, dict(parameters), (hidden, inputs, past))[0]
        return found

    def _rounded(self, weight: Tensor, format: WeightFormat | None) -> Tensor:
        if self._scheme is None or format is None:
            return weight
        return fake_quantize(weight, format, search=self._scheme.clip == "mse")

    def _read_out(self, residual: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the head reads, `[N, L, hidden]`, and its matrix, `[vocab, hidden]`."""
        normed = self._normed(hidden)
        if self._scheme is not None and self._scheme.small_head:
            return normed, checkpoint(self._small_head, residual, use_reentrant=False)
        return normed @ residual.T, self._head

    def _small_head(self, residual: Tensor) -> Tensor:
        assert self._scheme is not None
        return self._rounded(self._head @ residual, self._scheme.head)

    def _normed(self, hidden: Tensor) -> Tensor:
        """The final norm; its gain is folded into the head, so it is the same in every basis."""
        return functional.rms_norm(hidden, hidden.shape[-1:], eps=self._shape.norm_eps)

    def _window_loss(
        self, head: Tensor, normed: Tensor, ids: Tensor, original: Tensor | None
    ) -> Tensor:
        logits = self._logits(normed[:-1], head)
        if original is None:
            return functional.cross_entropy(logits, ids[1:])
        with torch.no_grad():
            wanted = self._logits(original[:-1], self._head).log_softmax(-1)
        found = logits.log_softmax(-1)
        return functional.kl_div(found, wanted, log_target=True, reduction="batchmean")

    def _logits(self, normed: Tensor, head: Tensor) -> Tensor:
        return soften(normed @ head.T, self._shape)


def merge_weight(
    linear: str, weight: Tensor, residual: Tensor, head: Tensor, shape: ModelShape
) -> Tensor:
    """A folded weight `[outputs, inputs]` in the rotated basis, as `rotate` merges it.

    Args:
        linear: the layer's name within its block.
        weight: after R4, which stands on the other side of a down projection than R1.
        residual: R1, `[d, d]`.
        head: R2 of the block, `[Dh, Dh]`.
        shape: of the model.
    """
    if linear in _READ_RESIDUAL:
        weight = weight @ residual
    if linear == "self_attn.v_proj":
        heads = torch.unflatten(weight, 0, (shape.num_kv_heads, shape.head_dim))
        weight = (head.T @ heads).flatten(0, 1)
    if linear == "self_attn.o_proj":
        weight = (torch.unflatten(weight, 1, (shape.num_heads, shape.head_dim)) @ head).flatten(1)
    return residual.T @ weight if linear in _WRITE_RESIDUAL else weight


def merge_bias(linear: str, bias: Tensor, head: Tensor, shape: ModelShape) -> Tensor:
    """A bias `[outputs]` of q, k or v in the rotated basis; only values are rotated."""
    if linear != "self_attn.v_proj":
        return bias
    return (torch.unflatten(bias, 0, (shape.num_kv_heads, shape.head_dim)) @ head).flatten()


def fake_quantize(weight: Tensor, format: WeightFormat, *, search: bool) -> Tensor:
    """The weight rounded as `quantize_symmetric` does, with gradients.

    Rounding passes gradients straight through. So do the scales, as fractions of the largest
    weight: the chain rule then tells that a smaller largest weight means smaller steps, and that is
    what a rotation can change.

    Args:
        weight: `[outputs, inputs]`, floating point.
        format: bits and group size.
        search: choose each scale by least squared error; else by the largest weight.
    """
    groups = weight.reshape(-1, format.group_size or weight.shape[1])
    largest = groups.abs().amax(dim=1, keepdim=True)
    largest = largest.clamp_min(torch.finfo(weight.dtype).tiny)
    fraction = _best_fraction(groups.detach(), largest.detach(), format) if search else 1.0
    scale = largest * fraction / format.high
    rounded = round_through((groups / scale).clamp(format.low, format.high))
    return (rounded * scale).view(weight.shape)


def round_through(x: Tensor) -> Tensor:
    """The nearest integers, with the gradient of the identity."""
    return x + (x.round() - x).detach()


def _best_fraction(groups: Tensor, largest: Tensor, format: WeightFormat) -> Tensor:
    """Per row the fraction of `largest` of least squared error, `[n, 1]`."""
    normalised = groups * (format.high / largest)
    best, least = torch.ones_like(largest), torch.full_like(largest, torch.inf)
    for fraction in _FRACTIONS:
        rounded = (normalised / fraction).round_().clamp_(format.low, format.high)
        error = torch.linalg.vector_norm(rounded.mul_(fraction).sub_(normalised), dim=1)
        error = error.unsqueeze(1)
        best = torch.where(error < least, fraction, best)
        least = torch.minimum(least, error)
    return best


def _round_inputs(layer: DecoderLayer) -> None:
    for part in layer.modules():
        if isinstance(part, Linear):
            part.reads = _RoundedInput(part.reads.rotation)


@dataclass(frozen=True, eq=False)
class _RoundedInput(LinearInput):
    """Rounds to int8 by the largest element of this call, differentiable as the weights are.

    The exported network has one fixed scale per input, the largest on the whole text; measuring
    that anew for every rotation would be a pass over the text in each step.
    """

    def __call__(self, x: Tensor) -> Tensor:
        x = super().__call__(x)
        scale = x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny) / INT8_HIGH
        return round_through((x / scale).clamp(INT8_LOW, INT8_HIGH)) * scale

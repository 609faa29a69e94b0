"""A model run over windows of text one layer at a time: memory of one layer, whatever the depth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from edgeattn.models.attention import RMSNorm
from edgeattn.models.decoder import DecoderLayer, embed, soften
from edgeattn.models.families import EMBEDDING, FINAL_NORM, LM_HEAD
from edgeattn.models.layer_inputs import LayerInputs, layer_inputs
from edgeattn.models.model import Model, load_layer, rounded
from edgeattn.models.packed_keys import PackedKeys
from edgeattn.models.rotary import inverse_frequencies
from edgeattn.shape import LayerKind, ModelShape

# Windows that pass through a layer at once.
BATCH = 4
# exp of more nats overflows fp64.
_HIGHEST_LOSS = 700.0


def embed_windows(model: Model, windows: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The residual stream before layer 0, `[N, L, hidden]`, of token ids `[N, L]`."""
    table = rounded(EMBEDDING, model.weights.read(EMBEDDING), dtype)
    return embed(table[windows], model.shape)


def window_inputs(
    shape: ModelShape, length: int, *, dtype: torch.dtype = torch.float32
) -> dict[LayerKind, LayerInputs]:
    """What layers share for windows of `length` tokens without padding; broadcasts over rows."""
    ones = torch.ones(1, length, dtype=torch.int64)
    positions = torch.arange(length).unsqueeze(0)
    frequencies = [inverse_frequencies(rope) for rope in shape.ropes]
    return layer_inputs(shape, frequencies, ones, positions, dtype=dtype)


@torch.inference_mode()
def final_hidden(
    model: Model,
    windows: Tensor,
    *,
    training: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """The residual stream behind the last layer, `[N, L, hidden]` fp32.

    Args:
        model: any.
        windows: token ids `[N, L]`.
        training: compute attention as in training, see `attend_variant`.
        progress: called with (layers done, all layers).
    """
    hidden = embed_windows(model, windows)
    shared = window_inputs(model.shape, windows.shape[1])
    for index in range(model.shape.num_layers):
        layer = load_layer(model, index, weight_dtype=torch.float32).train(training)
        run_layer(layer, hidden, shared[model.shape.layer_kind(index)])
        if progress:
            progress(index + 1, model.shape.num_layers)
    return hidden


def run_layer(layer: DecoderLayer, hidden: Tensor, shared: LayerInputs) -> None:
    """Passes `hidden` `[N, L, hidden]` through one layer, in place."""
    for rows in batches(hidden):
        past, inputs = layer.mixer.no_past(len(rows), rows.dtype), shared
        if isinstance(shared.keys, PackedKeys):  # whose operators do not broadcast
            inputs = replace(shared, keys=shared.keys.expand(len(rows)))
        rows.copy_(layer(rows, inputs, past)[0])


class Head:
    """The final norm and the LM head.

    Args:
        model: any.

    Attributes:
        matrix: `[vocab, hidden]` fp32.
    """

    def __init__(self, model: Model) -> None:
        self._shape = model.shape
        self._norm = RMSNorm(model.shape.hidden_size, model.shape.norm_eps).requires_grad_(False)
        self._norm.weight.copy_(rounded(FINAL_NORM, model.weights.read(FINAL_NORM), torch.float32))
        name = EMBEDDING if model.shape.tied_embeddings else LM_HEAD
        self.matrix = rounded(name, model.weights.read(name), torch.float32)

    @torch.inference_mode()
    def normed(self, hidden: Tensor) -> Tensor:
        """What the matrix is multiplied with, `[..., hidden]`."""
        normed: Tensor = self._norm(hidden)
        return normed

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., hidden]` -> `[..., vocab]` fp32."""
        return soften(self.normed(hidden) @ self.matrix.T, self._shape)

    @torch.inference_mode()
    def losses(self, hidden: Tensor, windows: Tensor) -> Tensor:
        """Mean next-token cross-entropy of each window, `[N]`, in nats.

        Args:
            hidden: `[N, L, hidden]`, from `final_hidden`.
            windows: token ids `[N, L]`.
        """
        found = []
        for rows, ids in zip(hidden, windows, strict=True):
            logits = self.logits(rows[:-1])
            found.append(cross_entropy(logits, ids[1:]))
        return torch.stack(found)


class Prediction:
    """What a model says comes next in windows of text; kept before the LM head, which is wide.

    Args:
        model: any.
        windows: token ids `[N, L]`.
        training: compute attention as in training, see `attend_variant`.
    """

    def __init__(self, model: Model, windows: Tensor, *, training: bool = False) -> None:
        self._windows, self._head = windows, Head(model)
        self._hidden = final_hidden(model, windows, training=training)

    def perplexity(self) -> float:
        """Exp of the mean next-token loss; infinite where it is no number."""
        nats = float(self._head.losses(self._hidden, self._windows).mean())
        return math.exp(min(nats, _HIGHEST_LOSS)) if math.isfinite(nats) else math.inf

    @torch.inference_mode()
    def divergence(self, original: Prediction) -> float:
        """KL(original || this) in nats per token; infinite where it is no number.

        Args:
            original: of the same windows.
        """
        found = []
        for shall_be, rows in zip(original._hidden, self._hidden, strict=True):
            wanted = original._head.logits(shall_be[:-1]).log_softmax(-1)
            is_like = self._head.logits(rows[:-1]).log_softmax(-1)
            found.append(kl_div(is_like, wanted, reduction="batchmean", log_target=True))
        nats = float(torch.stack(found).mean())
        return nats if math.isfinite(nats) else math.inf


def perplexity(model: Model, windows: Tensor) -> float:
    """Exp of the mean next-token loss on token ids `[N, L]`; infinite where it is no number."""
    return Prediction(model, windows).perplexity()


def batches(hidden: Tensor) -> Iterator[Tensor]:
    """`hidden` `[N, L, …]` a few windows at a time, as views."""
    yield from torch.split(hidden, BATCH)

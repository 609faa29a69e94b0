"""What head sparsity costs: the loss of a model that decodes every token of a text with few heads.

All tokens of a window pass at once, each with the heads that are active for it, as if they had been
decoded one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from edgeattn.models.model import Model
    from edgeattn.transforms.sparsify import Routers

# From a layer's number, its normed input `[n, L, hidden]` and its heads' outputs `[n, L, H, D]` to
# the active heads `[n, L, H]` bool; None for all.
Choice = Callable[[int, "Tensor", "Tensor"], "Tensor | None"]


def decoding_perplexity(
    model: Model,
    windows: Tensor,
    choice: Choice | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Perplexity of the tokens of each window after its first.

    Args:
        model: dense.
        windows: token ids `[N, L]`.
        choice: which heads are active; None for all.
        progress: called with (layers done, all layers).
    """
    import torch

    from edgeattn.calibration.heads import run_heads
    from edgeattn.models.model import load_layer
    from edgeattn.models.stream import Head, embed_windows, window_inputs

    shape = model.shape
    with torch.inference_mode():
        hidden, shared = embed_windows(model, windows), window_inputs(shape, windows.shape[1])
        for index in range(shape.num_layers):
            layer = load_layer(model, index, weight_dtype=torch.float32)

            def select(normed: Tensor, heads: Tensor, index: int = index) -> Tensor | None:
                return choice(index, normed, heads) if choice else None

            run_heads(layer, hidden, shared[shape.layer_kind(index)], select)
            if progress:
                progress(index + 1, shape.num_layers)
        return math.exp(float(Head(model).losses(hidden, windows).double().mean()))


def by_routers(routers: Routers) -> Choice:
    """What routers choose."""
    return lambda layer, normed, heads: routers.active(layer, normed)


def by_oracle(slots: Mapping[int, int], units: int) -> Choice:
    """The heads, or KV groups, whose outputs are longest, which no router can know beforehand.

    Args:
        slots: that are active, by layer; the other layers are dense.
        units: of which they are: H, or Hkv for KV groups.
    """
    from edgeattn.models.attention_variants import active_heads

    def choose(layer: int, normed: Tensor, heads: Tensor) -> Tensor | None:
        if layer not in slots:
            return None
        return active_heads(heads.norm(dim=-1), units, slots[layer])

    return choose

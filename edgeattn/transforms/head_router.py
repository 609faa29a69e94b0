"""A head router: which heads a token needs, told from the layer's normed input by a linear layer.

Polar Sparsity (arXiv 2505.14884) trains it as a classifier of the heads whose outputs are longest.
Here it is fitted to the logarithm of these lengths, by least squares, unless asked otherwise: a
mistake between two heads of nearly the same length then costs little. On SmolLM2-135M with 7 of 9
heads perplexity is 26.06 where the classifier, whose recall is higher, gives 26.30.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from edgeattn.models.attention_variants import group_scores, router_logits, top_units

Method = Literal["regression", "classification"]

# Of the mean square of an input, which is 1.
_RIDGE = 1e-3
# No head is shorter, that its logarithm be finite.
_SHORTEST = 1e-6
# AdamW on inputs of unit variance; Polar Sparsity's rate of 1e-4 on inputs as they are takes some
# ten times as many epochs.
_RATE, _DECAY, _BATCH, _EPOCHS = 1e-2, 0.01, 512, 5
# Of a head that is always active, or never, the logit it starts from is of this share.
_RAREST = 1e-3


@dataclass(frozen=True, eq=False)
class HeadRouter:
    """One linear layer.

    Attributes:
        weight: `[hidden, H]` fp32.
        bias: `[H]` fp32.
    """

    weight: Tensor
    bias: Tensor

    def scores(self, normed: Tensor) -> Tensor:
        """`[..., hidden]` -> `[..., H]`: the higher, the more a head is needed."""
        return router_logits(normed, self.weight, self.bias)


def recall(scores: Tensor, norms: Tensor, units: int, slots: int) -> float:
    """Share of the units with the longest outputs that a router finds, mean over tokens.

    Args:
        scores: of the router, `[M, H]`.
        norms: of the heads' outputs, `[M, H]`.
        units: H, or Hkv for KV groups.
        slots: units that are active.
    """
    needed = top_units(group_scores(norms, units), slots)
    chosen = top_units(group_scores(scores, units), slots)
    return float((needed & chosen).sum() / needed.sum())


def train_router(
    normed: Tensor, norms: Tensor, *, units: int, slots: int, method: Method = "regression"
) -> HeadRouter:
    """A router for one layer; the same inputs give the same router.

    Args:
        normed: what the layer's q_proj reads, `[M, hidden]` fp32.
        norms: of the heads' outputs, `[M, H]` fp32.
        units: H, or Hkv for KV groups.
        slots: units that will be active; a regression does not depend on them.
        method: "regression" of log norms, or "classification" of the heads with the longest
            outputs, weighted as in Polar Sparsity.
    """
    mean = normed.mean(0)
    spread = normed.std(0, correction=0).clamp_min(torch.finfo(normed.dtype).eps)
    inputs = (normed - mean) / spread
    if method == "regression":
        weight, bias = _regression(inputs, norms.clamp_min(_SHORTEST).log())
    else:
        weight, bias = _classification(inputs, norms, slots * norms.shape[1] // units)
    weight = weight / spread.unsqueeze(1)
    return HeadRouter(weight, bias - mean @ weight)


def _regression(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares with a small ridge; the inputs are of mean 0 and variance 1."""
    bias = targets.mean(0)
    products = (inputs.T @ inputs).double() / len(inputs)
    products += _RIDGE * torch.eye(len(products), dtype=torch.float64)
    wanted = (inputs.T @ (targets - bias)).double() / len(inputs)
    return torch.linalg.solve(products, wanted).float(), bias


def _classification(inputs: Tensor, norms: Tensor, positives: int) -> tuple[Tensor, Tensor]:
    """AdamW on binary cross-entropy, weighted y (1 - w) + w with w the share of positives.

    Positive are the heads with the longest outputs, also where whole groups will be active.
    """
    labels = top_units(norms, positives).float()
    share = positives / norms.shape[1]
    weights = labels * (1 - share) + share
    bias = labels.mean(0).clamp(_RAREST, 1 - _RAREST).logit().requires_grad_()
    weight = torch.zeros(inputs.shape[1], norms.shape[1], requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=_RATE, weight_decay=_DECAY)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(inputs), generator=generator) for _ in range(_EPOCHS)]
    batches = [rows for order in orders for rows in torch.split(order, _BATCH)]
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for rows in batches:
        scores = inputs[rows] @ weight + bias
        loss = functional.binary_cross_entropy_with_logits(scores, labels[rows], weights[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        slower.step()
    return weight.detach(), bias.detach()

"""LION in torch: feature maps, decays, and the attention of a layer by edgeattn's operator.

Formulas are those of arXiv 2502.16249. Its models have rotary positions nowhere; here queries and
keys are rotated before the feature map, as the sum a row is divided by must be of positive terms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import relu, silu, softplus

from edgeattn.attention import FeatureMap, Lion
from edgeattn.ops.torch_ops import TORCH_OPS

# Default of the operator, for the form that is differentiable.
_EPSILON = 1e-6


def features(x: Tensor, feature_map: FeatureMap) -> Tensor:
    """Positive features of queries or keys, `[B, H, T, D]`, computed in fp32."""
    if feature_map == "elu":
        # elu(x) + 1; TensorRT-RTX 1.7.1 does not build an Elu here where lengths are fixed.
        positive: Tensor = relu(x.float()) + (-relu(-x.float())).exp()
        return positive.to(x.dtype)
    shifted: Tensor = silu(x.float()) + 0.5  # 0.22 at least, so that no length is 0
    unit: Tensor = shifted / torch.linalg.vector_norm(shifted, dim=-1, keepdim=True)
    return unit.to(x.dtype)


def no_log_decay(x: Tensor, num_heads: int) -> Tensor:
    """Of LION-LIT: zeros `[B, H, T]` for `x` `[B, T, hidden]`."""
    batch, length, _ = x.shape
    return torch.zeros(batch, num_heads, length, dtype=torch.float32, device=x.device)


def log_decay_of_heads(decay: Tensor, x: Tensor) -> Tensor:
    """Of LION-D: log sigmoid(a), fp32 `[B, H, T]`.

    Args:
        decay: a, `[H]`.
        x: `[B, T, hidden]`, for the size.
    """
    heads = -softplus(-decay.float())
    return heads.view(1, -1, 1).expand(x.shape[0], -1, x.shape[1])


def log_decay_of_tokens(gates: Tensor) -> Tensor:
    """Of LION-S: log(1 - sigmoid(u)), fp32 `[B, H, T]`, of the gates u `[B, T, H]`."""
    return -softplus(gates.float()).transpose(1, 2)


def attend_lion(
    attention: Lion,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    seen: Tensor | None,
    *,
    differentiable: bool,
) -> Tensor:
    """The attention of a LION layer, `[B, H, T, D]`.

    The operator is defined up to fp32; wider tensors are computed in fp32.

    Args:
        attention: of the layer.
        q: `[B, H, T, D]`.
        k: `[B, Hkv, T, D]`; Hkv divides H.
        v: `[B, Hkv, T, D]`.
        log_decay: fp32 `[B, H, T]`.
        seen: `[B, T]` bool, False at padding; None where there is none.
        differentiable: compute it as a product of matrices `[T, T]`, not by the operator.
    """
    dtype, shared = q.dtype, q.shape[1] // k.shape[1]
    if dtype == torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    q, k = features(q, attention.feature_map), features(k, attention.feature_map)
    if shared > 1:
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
    if differentiable:
        return _product(q, k, v, log_decay, seen).to(dtype)
    rows = q.new_ones(q.shape[0], q.shape[2], dtype=torch.bool) if seen is None else seen
    y: Tensor = TORCH_OPS["BidirectionalLinearAttention"](
        q, k, v, log_decay, (~rows).to(torch.int32)
    )
    return y.to(dtype)


def _product(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, seen: Tensor | None) -> Tensor:
    """What the operator computes, row by row of the mask M, where gradients are needed.

    Its differences of sums lose digits where decay is strong, which training does not mind.
    """
    if seen is not None:
        k = k * seen[:, None, :, None]
        log_decay = log_decay * seen[:, None, :]
    until = log_decay.cumsum(-1)
    before = until - log_decay
    places = torch.arange(q.shape[2], device=q.device)
    below = places.unsqueeze(1) > places
    lower = before.unsqueeze(-1) - before.unsqueeze(-2)  # g_j + … + g_{i-1}, for i > j
    upper = until.unsqueeze(-2) - until.unsqueeze(-1)  # g_{i+1} + … + g_j, for i <= j
    decays = torch.where(below, lower, upper).clamp(max=0).exp()
    weights = decays * (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    return weights @ v / (weights.sum(-1, keepdim=True) + _EPSILON)

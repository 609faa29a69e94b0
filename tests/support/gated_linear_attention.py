"""A GLA decoder as its paper has it, one token after the other: an independent oracle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu


def gla_logits(weights: Mapping[str, Tensor], config: Mapping[str, Any], ids: Tensor) -> Tensor:
    """`[B, T, vocab]` in fp64 of token ids `[B, T]`.

    Args:
        weights: by the names of flash-linear-attention's checkpoints.
        config: as there.
        ids: token ids.
    """
    w = {name: value.double() for name, value in weights.items()}
    x = w["model.embeddings.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        block = f"model.layers.{i}."
        own = {n.removeprefix(block): v for n, v in w.items() if n.startswith(block)}
        x = x + _attention(own, config, _norm(x, own["attn_norm.weight"], config))
        y = _norm(x, own["mlp_norm.weight"], config)
        gated = silu(y @ own["mlp.gate_proj.weight"].T) * (y @ own["mlp.up_proj.weight"].T)
        x = x + gated @ own["mlp.down_proj.weight"].T
    return _norm(x, w["model.norm.weight"], config) @ w["lm_head.weight"].T


def _attention(w: Mapping[str, Tensor], config: Mapping[str, Any], x: Tensor) -> Tensor:
    heads = config["num_heads"]
    q, k, v, gate = (x @ w[f"attn.{name}_proj.weight"].T for name in "qkvg")
    low = x @ w["attn.gk_proj.0.weight"].T
    decay = logsigmoid(low @ w["attn.gk_proj.1.weight"].T + w["attn.gk_proj.1.bias"]) / 16
    q, k, v, decay = (torch.unflatten(y, -1, (heads, -1)) for y in (q, k, v, decay))
    state = x.new_zeros(len(x), heads, k.shape[-1], v.shape[-1])
    rows = []
    for t in range(x.shape[1]):
        state = decay[:, t].exp()[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append((q[:, t, :, :, None] * state).sum(2) / math.sqrt(k.shape[-1]))
    y = _norm(torch.stack(rows, 1), w["attn.g_norm_swish_gate.weight"], config).flatten(2)
    return (y * silu(gate)) @ w["attn.o_proj.weight"].T


def _norm(x: Tensor, gain: Tensor, config: Mapping[str, Any]) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["norm_eps"]) * gain

"""The attention variants in torch: edgeattn's operators on a layer's heads, and their tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from edgeattn.attention import FftRope, HeadSparse, SoftmaxVariant
from edgeattn.models.packed_keys import PackedKeys, delayed, in_time
from edgeattn.ops.fft_rope_attention import SPEC as FFT_ROPE
from edgeattn.ops.torch_ops import TORCH_OPS
from edgeattn.shape import ModelShape

# Layer -> name -> tensor, see `table_sizes`.
LayerTables = Mapping[int, Mapping[str, Tensor]]
TABLES = "self_attn.tables"


def table_sizes(
    attention: SoftmaxVariant, shape: ModelShape
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and size of each table of a layer; they keep their dtype whatever the model's is.

    Args:
        attention: of the layer.
        shape: of the model.
    """
    heads = shape.num_heads
    if isinstance(attention, FftRope):
        return {
            "coefficients": (torch.float32, (heads, attention.degree + 1)),
            "key_mean": (torch.float32, (heads, shape.head_dim)),
            "score_bound": (torch.float32, (heads,)),
            "backend": (torch.int32, (heads,)),
        }
    return {
        # A column per head: the logits are x W + b.
        "router_weight": (torch.float32, (shape.hidden_size, heads)),
        "router_bias": (torch.float32, (heads,)),
    }


class Tables(nn.Module):
    """The tables of a layer as buffers that stay in their dtype where the layer is converted."""

    def __init__(self, attention: SoftmaxVariant, shape: ModelShape) -> None:
        super().__init__()
        for name, (dtype, size) in table_sizes(attention, shape).items():
            self.register_buffer(name, torch.zeros(size, dtype=dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tables:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    def fill(self, tables: Mapping[str, Tensor]) -> None:
        """Copies the values of all tables."""
        for name, buffer in self.named_buffers():
            buffer.copy_(tables[name])


def attend_variant(
    attention: SoftmaxVariant,
    tables: Tables,
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: PackedKeys,
    *,
    training: bool,
) -> Tensor:
    """The attention of a layer by its operator, `[B, H, T, D]`.

    The operators are defined up to fp32; wider tensors are computed in fp32. Where new tokens of a
    row are padded behind a past, its first one stands in their place too, which FftRopeAttention's
    count of fallbacks sees.

    Args:
        attention: of the layer.
        tables: of the layer.
        x: what queries were projected from, `[B, T, hidden]`.
        q: `[B, H, T, D]`.
        k: `[B, Hkv, S, D]`, packed.
        v: `[B, Hkv, S, D]`, packed.
        keys: of the step.
        training: compute it where gradients are needed, and every token as if it was decoded: head
            sparsity shows in no longer step.
    """
    dtype = q.dtype
    if dtype == torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    # Row i of T is at position count - T + i to HeadSparseAttention; to FftRopeAttention at i where
    # there are fewer keys than rows.
    if isinstance(attention, FftRope):
        delay = torch.minimum(keys.past, keys.padding)
        y = _fft_rope(attention, tables, delayed(q, delay), k, v, keys.count, training=training)
    elif training:
        return _decoded_one_by_one(attention, tables, x, q, k, v, keys.mask).to(dtype)
    else:
        delay = keys.padding
        y = _head_sparse(attention, tables, x, delayed(q, delay), k, v, keys.count)
    return in_time(y, delay).to(dtype)


def _fft_rope(
    attention: FftRope,
    tables: Tables,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: Tensor,
    *,
    training: bool,
) -> Tensor:
    no_bias = torch.zeros(1, 1, dtype=torch.float32, device=q.device)
    # Autograd sees through the definition, not through the operator, which computes the same.
    compute = FFT_ROPE.reference if training else TORCH_OPS["FftRopeAttention"]
    y: Tensor = compute(
        q,
        k,
        v,
        tables.coefficients,
        tables.key_mean,
        no_bias,
        tables.score_bound,
        tables.backend,
        count.clamp(min=1),
        degree=attention.degree,
        sink=attention.sink,
        window=attention.window,
    )[0]
    return y


def _head_sparse(
    attention: HeadSparse,
    tables: Tables,
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: Tensor,
) -> Tensor:
    logits = router_logits(x[:, -1], tables.router_weight, tables.router_bias)
    if attention.groups:
        logits = group_scores(logits, k.shape[1])
    # Of a step with several tokens the operator makes no choice.
    active = torch.topk(logits, attention.slots, dim=-1).indices.to(torch.int32)
    ones = torch.ones(k.shape[1], dtype=torch.float32, device=q.device)
    y: Tensor = TORCH_OPS["HeadSparseAttention"](
        q, k, v, ones, ones, active, count, groups=int(attention.groups)
    )[0]
    return y


def _decoded_one_by_one(
    attention: HeadSparse,
    tables: Tables,
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
) -> Tensor:
    """Softmax attention `[B, H, T, D]` with zeros where a token's router leaves a head out.

    The choice is not differentiable: the router is a constant to training.
    """
    units = k.shape[1] if attention.groups else q.shape[1]
    logits = router_logits(x, tables.router_weight, tables.router_bias)
    active = active_heads(logits, units, attention.slots).transpose(1, 2)  # [B, H, T]
    y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return y * active.unsqueeze(-1)


def router_logits(x: Tensor, weight: object, bias: object) -> Tensor:
    """What a router says of each head, in fp32.

    Args:
        x: `[..., hidden]`, the normed residual stream.
        weight: `[hidden, H]`.
        bias: `[H]`.

    Returns:
        `[..., H]`.
    """
    assert isinstance(weight, Tensor)
    assert isinstance(bias, Tensor)
    return x.float() @ weight + bias


def group_scores(logits: Tensor, groups: int) -> Tensor:
    """The largest of each KV group's logits, `[..., H]` -> `[..., groups]`."""
    return torch.unflatten(logits, -1, (groups, -1)).amax(-1)


def top_units(scores: Tensor, slots: int) -> Tensor:
    """Which units have the `slots` highest scores, `[..., units]` bool."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter_(-1, scores.topk(slots, dim=-1).indices, True)


def active_heads(scores: Tensor, units: int, slots: int) -> Tensor:
    """Which query heads are active, `[..., H]` bool: those of the best `slots` units.

    Args:
        scores: of query heads, `[..., H]`.
        units: H for heads as they are, Hkv for KV groups, which their best heads stand for.
        slots: units that are active.
    """
    chosen = top_units(group_scores(scores, units), slots)
    return chosen.repeat_interleave(scores.shape[-1] // units, dim=-1)

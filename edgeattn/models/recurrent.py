"""Linear attention with a state in plain torch: what takes the place of softmax attention.

The state is updated by edgeattn::RecurrentLinearAttention. New tokens that are padding leave it,
and the tokens a convolution remembers, as they are; padding may lie on their right only.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeattn.models.attention import RMSNorm
from edgeattn.models.layer_inputs import LayerInputs
from edgeattn.models.linear import Linear
from edgeattn.models.packed_keys import PackedKeys, take
from edgeattn.ops.torch_ops import TORCH_OPS
from edgeattn.recurrent import Recurrent
from edgeattn.shape import ModelShape

# Added to the squared norm of a query or key, as Gated DeltaNet's kernels do.
_NORM_EPS = 1e-6
# Of GLA's log-decays, which keeps them near 0 at first.
_DECAY_DIVISOR = 16


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet (arXiv:2412.06464) as Qwen3.5 has it.

    Queries, keys and values pass a causal convolution and SiLU, queries and keys are normalised.
    Of a token, g = −exp(decay_log) softplus(decay x + decay_bias) is the log-decay of a head and
    β = σ(rate x) its rate. What the state gives is normalised per head and gated by SiLU.

    Args:
        shape: of the model.
        kind: of the layer.
    """

    def __init__(self, shape: ModelShape, kind: Recurrent) -> None:
        super().__init__()
        hidden, heads = shape.hidden_size, kind.value_heads
        self.kind = kind
        self.qkv_proj = Linear(hidden, kind.channels)
        self.gate_proj = Linear(hidden, kind.value_size)
        self.rate = Linear(hidden, heads)
        self.decay = Linear(hidden, heads)
        self.decay_bias = nn.Parameter(torch.ones(heads))
        self.decay_log = nn.Parameter(torch.zeros(heads))
        self.conv_weight = nn.Parameter(torch.zeros(kind.channels, 1, kind.conv_width))
        self.norm = RMSNorm(kind.value_dim, shape.norm_eps)
        self.out_proj = Linear(kind.value_size, hidden)

    def forward(
        self, x: Tensor, shared: LayerInputs, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step.

        Args:
            x: `[B, T, hidden]`.
            shared: says which new tokens are padding.
            past: the convolution's last inputs `[B, channels, conv_width - 1]` and the state
                `[B, value_heads, key_dim, value_dim]`.

        Returns:
            The output `[B, T, hidden]` and what `past` has become.
        """
        conv_state, state = past
        count, valid = new_tokens(x, shared)
        mixed, conv_state = self._convolve(self.qkv_proj(x), conv_state, count)
        q, k, v = self._heads(mixed)
        rate = torch.sigmoid(self.rate(x).float()) * valid
        decay = nn.functional.softplus(self.decay(x).float() + self.decay_bias.float())
        log_decay = -torch.exp(self.decay_log.float()) * decay * valid
        y, state = recur(
            _normalised(q),
            _normalised(k),
            v,
            log_decay.transpose(1, 2).unsqueeze(3),
            state,
            rate=rate.transpose(1, 2),
        )
        y = self.norm(y.transpose(1, 2)).flatten(2)
        y = y * nn.functional.silu(self.gate_proj(x))
        output: Tensor = self.out_proj(y)
        return output, (conv_state, state)

    def no_past(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What `forward` takes before the first token."""
        kind, device = self.kind, self.out_proj.weight.device
        held = torch.zeros(rows, kind.channels, kind.conv_width - 1, dtype=dtype, device=device)
        return held, no_state(kind, rows, device)

    def _convolve(self, x: Tensor, held: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """SiLU of the causal convolution of each channel, and its last valid inputs.

        Spelled out: a sum of few terms, which every runtime has in every dtype.

        Args:
            x: `[B, T, channels]`.
            held: the inputs before, `[B, channels, conv_width - 1]`.
            count: valid ones of the new, `[B, 1]`.
        """
        length, width = x.shape[1], self.kind.conv_width
        joined = torch.cat((held.transpose(1, 2), x), dim=1)
        mixed = joined[:, :length] * self.conv_weight[:, 0, 0]
        for tap in range(1, width):
            mixed = mixed + joined[:, tap : tap + length] * self.conv_weight[:, 0, tap]
        places = count + torch.arange(width - 1, device=x.device)
        held = take(joined.unsqueeze(1), places).squeeze(1).transpose(1, 2)
        return nn.functional.silu(mixed), held

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys `[B, value_heads, T, key_dim]` and values, of `[B, T, channels]`."""
        kind = self.kind
        sizes = [kind.key_size, kind.key_size, kind.value_size]
        q, k, v = torch.split(mixed, sizes, dim=-1)
        q, k = (_by_head(x, kind.key_heads) for x in (q, k))
        shared = kind.value_heads // kind.key_heads
        return _repeated(q, shared), _repeated(k, shared), _by_head(v, kind.value_heads)


class GatedLinearAttention(nn.Module):
    """Gated linear attention (arXiv:2312.06635).

    Of a token, g = log σ(decay_up decay_down x) / 16 holds a log-decay for each key channel. What
    the state gives is normalised per head and gated by SiLU.

    Args:
        shape: of the model.
        kind: of the layer.
    """

    def __init__(self, shape: ModelShape, kind: Recurrent) -> None:
        super().__init__()
        hidden = shape.hidden_size
        self.kind = kind
        self.q_proj = Linear(hidden, kind.key_size)
        self.k_proj = Linear(hidden, kind.key_size)
        self.v_proj = Linear(hidden, kind.value_size)
        self.gate_proj = Linear(hidden, kind.value_size)
        self.decay_down = Linear(hidden, kind.gate_rank)
        self.decay_up = Linear(kind.gate_rank, kind.key_size, bias=True)
        self.norm = RMSNorm(kind.value_dim, shape.norm_eps)
        self.out_proj = Linear(kind.value_size, hidden)

    def forward(
        self, x: Tensor, shared: LayerInputs, past: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One step, see `GatedDeltaNet.forward`; `past` is the state alone."""
        heads = self.kind.key_heads
        _, valid = new_tokens(x, shared)
        decay = nn.functional.logsigmoid(self.decay_up(self.decay_down(x)).float())
        y, state = recur(
            _by_head(self.q_proj(x), heads),
            _by_head(self.k_proj(x) * valid.to(x.dtype), heads),
            _by_head(self.v_proj(x), heads),
            _by_head(decay * valid / _DECAY_DIVISOR, heads),
            past[0],
        )
        y = self.norm(y.transpose(1, 2)).flatten(2)
        output: Tensor = self.out_proj(y * nn.functional.silu(self.gate_proj(x)))
        return output, (state,)

    def no_past(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What `forward` takes before the first token."""
        return (no_state(self.kind, rows, self.out_proj.weight.device),)


RecurrentMixer = GatedDeltaNet | GatedLinearAttention


def recurrent_mixer(shape: ModelShape, kind: Recurrent) -> RecurrentMixer:
    """The linear attention of a layer."""
    if kind.rule == "gated":
        return GatedLinearAttention(shape, kind)
    return GatedDeltaNet(shape, kind)


def new_tokens(x: Tensor, shared: LayerInputs) -> tuple[Tensor, Tensor]:
    """How many new tokens of each row are no padding, `[B, 1]`, and which, `[B, T, 1]` of fp32."""
    assert isinstance(shared.keys, PackedKeys), "linear attention has a packed cache beside it"
    count = x.shape[1] - shared.keys.padding
    valid = torch.arange(x.shape[1], device=x.device) < count
    return count, valid.unsqueeze(2).float()


def no_state(kind: Recurrent, rows: int, device: torch.device) -> Tensor:
    """The state before the first token, `[B, value_heads, key_dim, value_dim]` fp32."""
    size = (rows, kind.value_heads, kind.key_dim, kind.value_dim)
    return torch.zeros(size, dtype=torch.float32, device=device)


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    state: Tensor,
    *,
    rate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator on a layer's heads: y `[B, H, T, Dv]` in the dtype of v, and the state.

    It is defined up to fp32; wider tensors are computed in fp32.

    Args:
        q: `[B, H, T, Dk]`.
        k: `[B, H, T, Dk]`.
        v: `[B, H, T, Dv]`.
        log_decay: `[B, H, T, 1 or Dk]`.
        state: `[B, H, Dk, Dv]` fp32.
        rate: `[B, H, T]` of the delta rule; None for the gated rule.
    """
    dtype = v.dtype
    if dtype == torch.float64:
        q, k, v = q.float(), k.float(), v.float()
    beta = torch.zeros_like(k[..., 0], dtype=torch.float32) if rate is None else rate
    # Given back unread: any tensor of that shape but a constant, which TensorRT cannot update in
    # place, and a part of the state, which it updates meanwhile.
    no_normaliser = k[:, :, 0].float()
    y, state, _ = TORCH_OPS["RecurrentLinearAttention"](
        q, k, v, log_decay, beta, state, no_normaliser, delta=int(rate is not None)
    )
    return y.to(dtype), state


def _by_head(x: Tensor, heads: int) -> Tensor:
    """`[B, T, H * D]` -> `[B, H, T, D]`."""
    return torch.unflatten(x, -1, (heads, -1)).transpose(1, 2)


def _normalised(x: Tensor) -> Tensor:
    """Rows of length 1, computed in fp32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + _NORM_EPS)).to(x.dtype)


def _repeated(x: Tensor, times: int) -> Tensor:
    """Each head of `[B, H, T, D]` so often in a row."""
    if times == 1:
        return x
    return x.unsqueeze(2).expand(-1, -1, times, -1, -1).flatten(1, 2)

"""`Recurrent`: the numbers that fix a linear-attention layer, known without weights or torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgeattn.errors import CheckpointError

# "gated": gated linear attention (arXiv:2312.06635), a decay per key channel. "gated-delta": Gated
# DeltaNet (arXiv:2412.06464), a decay per head and the delta rule.
Rule = Literal["gated", "gated-delta"]
# Of a layer's parameters in the decoder.
PREFIX = "linear_attn."


@dataclass(frozen=True)
class Recurrent:
    """A layer whose attention is edgeattn::RecurrentLinearAttention: a state instead of keys.

    Attributes:
        rule: how the state is updated.
        key_heads: heads of queries and keys; they divide value_heads.
        value_heads: heads of values; each has a state `[key_dim, value_dim]`.
        key_dim: width of a query or key head.
        value_dim: width of a value head.
        conv_width: tokens the causal convolution of queries, keys and values sees; 1 for none.
        gate_rank: inner width of the projection decays come from; 0 where it is one matrix.
    """

    rule: Rule
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int = 1
    gate_rank: int = 0

    def __post_init__(self) -> None:
        """Refuses numbers no layer can have.

        Raises:
            CheckpointError: a count is not positive, or heads do not divide.
        """
        for field in ("key_heads", "value_heads", "key_dim", "value_dim", "conv_width"):
            if (value := getattr(self, field)) < 1:
                raise _bad(f"a positive {field} of linear attention", f"it is {value}")
        if self.value_heads % self.key_heads:
            raise _bad(
                "a number of value heads that key heads divide",
                f"there are {self.value_heads} value and {self.key_heads} key heads",
            )

    @property
    def key_size(self) -> int:
        """Width of all query (or key) heads together."""
        return self.key_heads * self.key_dim

    @property
    def value_size(self) -> int:
        """Width of all value heads together."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Width of queries, keys and values side by side."""
        return 2 * self.key_size + self.value_size

    @property
    def states(self) -> tuple[str, ...]:
        """What a layer remembers, as names of graph inputs end.

        "conv_state", `[B, channels, conv_width - 1]` in the dtype of activations, where there is a
        convolution, and "recurrent_state", `[B, value_heads, key_dim, value_dim]` in fp32.
        """
        return ("conv_state", "recurrent_state") if self.conv_width > 1 else ("recurrent_state",)

    @property
    def state_numbers(self) -> int:
        """Numbers of the fp32 state of one row."""
        return self.value_heads * self.key_dim * self.value_dim

    def linears(self, hidden: int) -> dict[str, tuple[int, int]]:
        """The linear layers that a scheme quantises: name within the block -> (outputs, inputs).

        Those that decays and rates come from are narrow, and an error in a decay grows with every
        token: they stay in floating point (`parameters`).
        """
        keys, values = (self.key_size, hidden), (self.value_size, hidden)
        sizes = {"qkv_proj": (self.channels, hidden)}
        if self.rule == "gated":
            sizes = {"q_proj": keys, "k_proj": keys, "v_proj": values}
        sizes |= {"gate_proj": values, "out_proj": (hidden, self.value_size)}
        return {PREFIX + name: size for name, size in sizes.items()}

    def parameters(self, hidden: int) -> dict[str, tuple[int, ...]]:
        """Every other parameter: name within the block -> shape."""
        heads = self.value_heads
        sizes: dict[str, tuple[int, ...]]
        if self.rule == "gated":
            sizes = {
                "decay_down.weight": (self.gate_rank, hidden),
                "decay_up.weight": (self.key_size, self.gate_rank),
                "decay_up.bias": (self.key_size,),
            }
        else:
            sizes = {
                "conv_weight": (self.channels, 1, self.conv_width),
                "rate.weight": (heads, hidden),
                "decay.weight": (heads, hidden),
                "decay_bias": (heads,),
                "decay_log": (heads,),
            }
        sizes["norm.weight"] = (self.value_dim,)
        return {PREFIX + name: size for name, size in sizes.items()}


def _bad(expected: str, came: str) -> CheckpointError:
    return CheckpointError(expected=expected, came=came, todo="check the checkpoint's config.json")

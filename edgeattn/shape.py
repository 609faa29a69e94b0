"""`ModelShape`: the numbers that fix a decoder's architecture, known without weights or torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edgeattn.errors import CheckpointError


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    Attributes:
        kind: "none" or "llama3" (frequency-dependent, Llama 3.1 release notes).
        factor: stretch of the low frequencies.
        low_freq_factor: wavelengths above original_context / this are stretched fully.
        high_freq_factor: wavelengths below original_context / this are left alone.
        original_context: context in tokens the frequencies were trained at.
    """

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        """Refuses a stretch that no frequency can have.

        Raises:
            CheckpointError: a factor or the context is not positive, or the two bands are one.
        """
        for field in ("factor", "low_freq_factor", "high_freq_factor", "original_context"):
            value = getattr(self, field)
            if not 0 < value < math.inf:
                raise _bad(f"a positive {field} of the rope scaling", f"it is {value}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise _bad(
                f"a high_freq_factor above low_freq_factor ({self.low_freq_factor})",
                f"it is {self.high_freq_factor}",
            )


@dataclass(frozen=True)
class ModelShape:
    """Layers, heads and widths of a decoder-only transformer with RoPE, RMSNorm and a gated MLP.

    Attributes:
        family: name in `edgeattn.models.families`.
        num_layers: transformer blocks.
        hidden_size: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads.
        head_dim: width of one head (even; not always hidden_size / num_heads).
        intermediate_size: width of the gated MLP.
        vocab_size: rows of the embedding.
        max_context: positions the checkpoint was trained for, in tokens.
        norm_eps: RMSNorm epsilon.
        rope_theta: RoPE base.
        rope_scaling: see RopeScaling.
        qkv_bias: q, k and v projections carry a bias (Qwen2).
        qk_norm: RMSNorm per head on q and k before RoPE (Qwen3).
        tied_embeddings: the LM head is the embedding matrix.
    """

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling = RopeScaling()
    qkv_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers no decoder can have.

        Raises:
            CheckpointError: a count is not positive, heads do not divide, or head_dim is odd.
        """
        counts = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim")
        for field in (*counts, "intermediate_size", "vocab_size", "max_context"):
            if getattr(self, field) < 1:
                raise _bad(f"a positive {field}", f"it is {getattr(self, field)}")
        if self.num_heads % self.num_kv_heads:
            raise _bad(
                "a number of query heads that KV heads divide",
                f"there are {self.num_heads} query and {self.num_kv_heads} KV heads",
            )
        if self.head_dim % 2:
            raise _bad("an even head_dim, which RoPE needs", f"it is {self.head_dim}")
        for field in ("norm_eps", "rope_theta"):
            if not 0 < getattr(self, field) < math.inf:
                raise _bad(f"a positive {field}", f"it is {getattr(self, field)}")

    @property
    def q_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: name within the block -> (outputs, inputs)."""
        d, f = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (self.q_size, d),
            "self_attn.k_proj": (self.kv_size, d),
            "self_attn.v_proj": (self.kv_size, d),
            "self_attn.o_proj": (d, self.q_size),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, tied embeddings counted once."""
        block = sum(n * k for n, k in self.linears().values()) + 2 * self.hidden_size
        block += (self.q_size + 2 * self.kv_size) if self.qkv_bias else 0
        block += 2 * self.head_dim if self.qk_norm else 0
        tables = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * block + tables + self.hidden_size

    def to_dict(self) -> dict[str, Any]:
        """The shape as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelShape:
        """The inverse of `to_dict`."""
        return cls(**{**values, "rope_scaling": RopeScaling(**values["rope_scaling"])})


def _bad(expected: str, came: str) -> CheckpointError:
    return CheckpointError(
        expected=expected, came=came, todo="check the checkpoint's config.json or GGUF header"
    )

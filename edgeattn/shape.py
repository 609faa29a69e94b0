"""`ModelShape`: the numbers that fix a decoder's architecture, known without weights or torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgeattn.attention import FftRope, LayerAttention, layer_attention
from edgeattn.errors import CheckpointError
from edgeattn.recurrent import Recurrent

# Twice the deepest transformer published, DeepNet's 1,000 layers (arXiv:2203.00555).
MOST_LAYERS = 2_000


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context.

    Attributes:
        kind: "none"; "linear" (every frequency divided by `factor`); "llama3" (depending on the
            frequency, Llama 3.1 release notes); "longrope" (each frequency divided by its own
            number, LongRoPE, arXiv:2402.13753).
        factor: stretch of all, or of the low frequencies.
        low_freq_factor: wavelengths above original_context / this are stretched fully.
        high_freq_factor: wavelengths below original_context / this are left alone.
        original_context: context in tokens the frequencies were trained at.
        divisors: one per frequency, for longrope.
        magnitude: what cosine and sine are multiplied with, for longrope.
    """

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    divisors: tuple[float, ...] = ()
    magnitude: float = 1.0

    def __post_init__(self) -> None:
        """Refuses a stretch that no frequency can have.

        Raises:
            CheckpointError: a factor or the context is not positive, or the two bands are one.
        """
        numbers = ("factor", "low_freq_factor", "high_freq_factor", "original_context", "magnitude")
        for field in numbers:
            value = getattr(self, field)
            if not 0 < value < math.inf:
                raise _bad(f"a positive {field} of the rope scaling", f"it is {value}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise _bad(
                f"a high_freq_factor above low_freq_factor ({self.low_freq_factor})",
                f"it is {self.high_freq_factor}",
            )
        for value in self.divisors:
            if not 0 < value < math.inf:
                raise _bad("positive divisors of the rope frequencies", f"one is {value}")


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a layer.

    Attributes:
        dim: leading elements of a head that are rotated; even, at most head_dim.
        theta: base of the frequencies.
        scaling: see RopeScaling.
    """

    dim: int
    theta: float
    scaling: RopeScaling = RopeScaling()

    def __post_init__(self) -> None:
        """Refuses what is no rotation.

        Raises:
            CheckpointError: dim is odd or not positive, theta is not positive, or the divisors are
                not one per frequency.
        """
        if self.dim < 2 or self.dim % 2:
            raise _bad("an even, positive number of rotated elements", f"it is {self.dim}")
        if not 0 < self.theta < math.inf:
            raise _bad("a positive rope_theta", f"it is {self.theta}")
        if self.scaling.divisors and len(self.scaling.divisors) != self.dim // 2:
            raise _bad(
                f"{self.dim // 2} divisors, one per rope frequency",
                f"there are {len(self.scaling.divisors)}",
            )


@dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer.

    Attributes:
        rope: rotary positions; None for a layer without (NoPE).
        window: keys a query sees, itself included; None for all before it.
        attention: the variant that computes it; None for softmax.
    """

    rope: Rope | None
    window: int | None = None
    attention: LayerAttention | None = None

    def __post_init__(self) -> None:
        """Refuses an empty window.

        Raises:
            CheckpointError: the window is not positive.
        """
        if self.window is not None and self.window < 1:
            raise _bad("a positive sliding window", f"it is {self.window}")

    @property
    def states(self) -> tuple[str, ...]:
        """What a layer hands on from step to step, as names of graph inputs end."""
        if isinstance(self.attention, Recurrent):
            return self.attention.states
        return ("key", "value")


class Layers:
    """What decoders and encoders tell of their layers and heads alike: a base of their dataclasses.

    It names fields that those declare, each in its own order, and has none itself.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    layer_cycle: tuple[LayerKind, ...]

    def layer_kind(self, layer: int) -> LayerKind:
        """The kind of one layer."""
        return self.layer_cycle[layer % len(self.layer_cycle)]

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The distinct kinds of the layers there are, by first use."""
        return tuple(dict.fromkeys(self.layer_cycle[: self.num_layers]))

    @property
    def has_variants(self) -> bool:
        """Whether some layer's attention is no plain softmax."""
        return any(kind.attention is not None for kind in self.layer_kinds)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The distinct rotary positions of the layers, by first use."""
        return tuple(dict.fromkeys(k.rope for k in self.layer_kinds if k.rope is not None))

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_dim

    def _check_layers(self, bad: Callable[[str, str], CheckpointError]) -> None:
        """Refuses numbers that no layers can have.

        Args:
            bad: makes the error of what was expected and what came.

        Raises:
            CheckpointError: a count or norm_eps is not positive, there are more layers than
                MOST_LAYERS, heads do not divide, or the layers' kinds do not fit.
        """
        counts = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim")
        for field in (*counts, "intermediate_size"):
            if getattr(self, field) < 1:
                raise bad(f"a positive {field}", f"it is {getattr(self, field)}")
        check_depth(self.num_layers)
        if self.num_heads % self.num_kv_heads:
            raise bad(
                "a number of query heads that KV heads divide",
                f"there are {self.num_heads} query and {self.num_kv_heads} KV heads",
            )
        if not 0 < self.norm_eps < math.inf:
            raise bad("a positive norm_eps", f"it is {self.norm_eps}")
        if not self.layer_cycle:
            raise bad("at least one kind of layer", "there is none")
        for rope in self.ropes:
            if rope.dim > self.head_dim:
                raise bad(f"at most {self.head_dim} rotated elements", f"there are {rope.dim}")


@dataclass(frozen=True)
class ModelShape(Layers):
    """Layers, heads and widths of a decoder-only transformer with RMSNorm and a gated MLP.

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
        layer_cycle: the kinds of the layers, repeated from the first layer on.
        qkv_bias: q, k and v projections carry a bias (Qwen2).
        qk_norm: RMSNorm per head on q and k before RoPE (Qwen3).
        output_gate: what softmax attention gives is multiplied with a sigmoid; q_proj holds the
            rows of a head's query, then those of its gate (Qwen3.5).
        fused: q, k and v projections are one matrix, stacked by outputs, and so are gate and up.
        output_norms: RMSNorm on what attention and MLP give, too (Gemma 2).
        activation: of the gate, "silu" or "gelu-tanh".
        embedding_scale: what the embedding is multiplied with (Gemma).
        attention_softcap: scores s become c tanh(s / c) before the mask (Gemma 2).
        logits_softcap: the same for the logits.
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
    layer_cycle: tuple[LayerKind, ...]
    qkv_bias: bool = False
    qk_norm: bool = False
    output_gate: bool = False
    fused: bool = False
    output_norms: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    tied_embeddings: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers no decoder can have.

        Raises:
            CheckpointError: a count is not positive, there are more than MOST_LAYERS layers, heads
                do not divide, head_dim is odd, or the layers' kinds do not fit.
        """
        self._check_layers(_bad)
        for field in ("vocab_size", "max_context"):
            if getattr(self, field) < 1:
                raise _bad(f"a positive {field}", f"it is {getattr(self, field)}")
        if self.head_dim % 2:
            raise _bad("an even head_dim, which RoPE needs", f"it is {self.head_dim}")
        for field in ("embedding_scale", "attention_softcap", "logits_softcap"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise _bad(f"a positive {field}", f"it is {value}")

    @property
    def is_recurrent(self) -> bool:
        """Whether some layer is linear attention with a state."""
        return any(isinstance(kind.attention, Recurrent) for kind in self.layer_kinds)

    @property
    def kind_counts(self) -> dict[LayerKind, int]:
        """How many layers there are of each kind, by first use."""
        rounds, rest = divmod(self.num_layers, len(self.layer_cycle))
        counts = dict.fromkeys(self.layer_kinds, 0)
        for place, kind in enumerate(self.layer_cycle[: self.num_layers]):
            counts[kind] += rounds + (place < rest)
        return counts

    @property
    def caching_layers(self) -> int:
        """Layers that hold a key and a value of every token."""
        counts = self.kind_counts.items()
        return sum(n for kind, n in counts if not isinstance(kind.attention, Recurrent))

    @property
    def exact_keys(self) -> int:
        """Keys of a row that its polynomial attention treats exactly; 0 for a model without."""
        variants = (kind.attention for kind in self.layer_kinds)
        return max((v.sink + v.window for v in variants if isinstance(v, FftRope)), default=0)

    @property
    def has_windows(self) -> bool:
        """Whether some layer sees the last keys only."""
        return any(kind.window is not None for kind in self.layer_kinds)

    def within(self, context: int) -> ModelShape:
        """The same model for sequences of at most `context` tokens: windows that wide are none."""
        cycle = tuple(
            replace(kind, window=None) if kind.window and kind.window >= context else kind
            for kind in self.layer_cycle
        )
        return replace(self, layer_cycle=cycle)

    @property
    def q_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    def linears(self, kind: LayerKind | None = None) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: name within the block -> (outputs, inputs).

        Args:
            kind: of the block; None for one of softmax attention.
        """
        d, f = self.hidden_size, self.intermediate_size
        mlp = {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
        if kind is not None and isinstance(kind.attention, Recurrent):
            return {**kind.attention.linears(d), **mlp}
        if self.fused:
            return {
                "self_attn.qkv_proj": (self.q_size + 2 * self.kv_size, d),
                "self_attn.o_proj": (d, self.q_size),
                "mlp.gate_up_proj": (2 * f, d),
                "mlp.down_proj": (d, f),
            }
        return {
            "self_attn.q_proj": ((2 if self.output_gate else 1) * self.q_size, d),
            "self_attn.k_proj": (self.kv_size, d),
            "self_attn.v_proj": (self.kv_size, d),
            "self_attn.o_proj": (d, self.q_size),
            **mlp,
        }

    @property
    def linear_weights(self) -> int:
        """Weights of the linear layers of all blocks."""
        return sum(
            count * sum(n * k for n, k in self.linears(kind).values())
            for kind, count in self.kind_counts.items()
        )

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model, tied embeddings counted once."""
        others = sum(count * self._vectors(kind) for kind, count in self.kind_counts.items())
        tables = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.linear_weights + others + tables + self.hidden_size

    def _vectors(self, kind: LayerKind) -> int:
        """Weights of one block beside those of `linears`."""
        norms = (4 if self.output_norms else 2) * self.hidden_size
        if isinstance(kind.attention, Recurrent):
            sizes = kind.attention.parameters(self.hidden_size).values()
            return norms + sum(math.prod(size) for size in sizes)
        biases = (self.q_size + 2 * self.kv_size) if self.qkv_bias else 0
        return norms + biases + (2 * self.head_dim if self.qk_norm else 0)

    def to_dict(self) -> dict[str, Any]:
        """The shape as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelShape:
        """The inverse of `to_dict`."""
        cycle = tuple(layer_kind(kind) for kind in values["layer_cycle"])
        return cls(**{**values, "layer_cycle": cycle})


def check_depth(num_layers: int) -> None:
    """Refuses more layers than any model has, before something counts up to them.

    A config.json is read also where no weights stand beside it to compare with.

    Raises:
        CheckpointError: there are more than MOST_LAYERS.
    """
    if num_layers > MOST_LAYERS:
        raise _bad(f"at most {MOST_LAYERS:,} layers", f"there are {num_layers:,}")


def layer_kind(values: Mapping[str, Any]) -> LayerKind:
    """The inverse of `dataclasses.asdict` for a kind of layer."""
    rope, attention = values["rope"], layer_attention(values.get("attention"))
    if rope is None:
        return LayerKind(None, values["window"], attention)
    scaling = {**rope["scaling"], "divisors": tuple(rope["scaling"]["divisors"])}
    rotary = Rope(rope["dim"], rope["theta"], RopeScaling(**scaling))
    return LayerKind(rotary, values["window"], attention)


def _bad(expected: str, came: str) -> CheckpointError:
    return CheckpointError(
        expected=expected, came=came, todo="check the checkpoint's config.json or GGUF header"
    )

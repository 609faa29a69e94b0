"""`EncoderShape`: the numbers that fix an encoder's architecture, known without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from edgeattn.attention import Lion
from edgeattn.errors import CheckpointError
from edgeattn.shape import LayerKind, Layers, ModelShape, layer_kind

Norm = Literal["layer", "rms"]
Activation = Literal["gelu", "gelu-tanh", "relu", "silu"]
Pooling = Literal["mean", "first"]
Head = Literal["pooler", "first", "first-and-mean"]
Task = Literal["hidden", "embedding", "classification"]
# What a graph gives for each task.
OUTPUTS: Mapping[Task, str] = {
    "hidden": "last_hidden_state",
    "embedding": "sentence_embedding",
    "classification": "logits",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# Of LION-S and LION-D: the decay of each head, told from a token, or learned.
DECAY_GATE, DECAY = "self_attn.gate_proj", "self_attn.decay"
# In the dictionary of a shape, beside those of decoders.
KIND = "encoder"


@dataclass(frozen=True)
class TokenInput:
    """Text as an encoder reads it.

    Attributes:
        vocab_size: rows of the embedding.
        max_positions: tokens of a text, at most.
        learned_positions: a table of positions is added to the tokens.
        token_types: rows of a table of segments that is added to them; 0 without one.
        norm: whether their sum is normalised.
    """

    vocab_size: int
    max_positions: int
    learned_positions: bool = False
    token_types: int = 0
    norm: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The graph's inputs."""
        types = ("token_type_ids",) if self.token_types else ()
        return ("input_ids", "attention_mask", *types)


@dataclass(frozen=True)
class PatchInput:
    """Images as an encoder reads them: square patches, behind a class token.

    Attributes:
        height: of an image in pixels, a multiple of `patch`.
        width: likewise.
        patch: height and width of a patch.
        channels: of a pixel.
    """

    height: int
    width: int
    patch: int
    channels: int = 3

    @property
    def names(self) -> tuple[str, ...]:
        """The graph's inputs."""
        return ("pixel_values",)

    @property
    def tokens(self) -> int:
        """Patches, and the class token."""
        return (self.height // self.patch) * (self.width // self.patch) + 1


@dataclass(frozen=True)
class EncoderShape(Layers):
    """Layers, heads and widths of a transformer whose tokens all see each other.

    Attributes:
        family: name in `edgeattn.models.encoder_families`.
        input: what it reads, and how that becomes tokens.
        num_layers: transformer blocks.
        hidden_size: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides num_heads.
        head_dim: width of one head.
        intermediate_size: width of the MLP.
        norm_eps: epsilon of the norms.
        layer_cycle: the kinds of the layers, repeated from the first layer on.
        norm: LayerNorm with a bias, or RMSNorm.
        pre_norm: norms stand before attention and MLP, and one behind the last layer; else each
            normalises the sum with the residual stream.
        gated: the MLP is down(activation(gate(x)) * up(x)), not down(activation(up(x))).
        activation: of the MLP.
        qkv_bias: q, k and v projections carry a bias.
        bias: the other linear layers of a block do.
        layer_scale: what attention and MLP give is multiplied with a vector each.
        task: what comes out: token states, one normalised vector, or logits of classes.
        pooling: what an embedding is made of: all tokens, or the first one.
        head: what classes are told from.
        num_labels: classes, for that task.
    """

    family: str
    input: TokenInput | PatchInput
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    layer_cycle: tuple[LayerKind, ...]
    norm: Norm = "layer"
    pre_norm: bool = False
    gated: bool = False
    activation: Activation = "gelu"
    qkv_bias: bool = True
    bias: bool = True
    layer_scale: bool = False
    task: Task = "hidden"
    pooling: Pooling = "mean"
    head: Head = "pooler"
    num_labels: int = 0

    def __post_init__(self) -> None:
        """Refuses numbers no encoder can have.

        Raises:
            CheckpointError: a count is not positive, there are more layers than any model has,
                heads or patches do not divide, or the task does not fit.
        """
        self._check_layers(_bad)
        for field, value in asdict(self.input).items():
            if not isinstance(value, bool) and field != "token_types":
                _check_positive(field, value)
        if isinstance(self.input, PatchInput):
            for side in (self.input.height, self.input.width):
                if side % self.input.patch:
                    raise _bad(f"images of whole patches of {self.input.patch}", f"one is {side}")
        if self.task == "classification":
            _check_positive("num_labels", self.num_labels)

    @property
    def max_context(self) -> int:
        """Tokens of a row, at most; of an image always as many."""
        fixed = isinstance(self.input, PatchInput)
        return self.input.tokens if fixed else self.input.max_positions  # type: ignore[union-attr]

    @property
    def output(self) -> str:
        """The name of the graph's output."""
        return OUTPUTS[self.task]

    def with_attention(self, attention: Lion) -> EncoderShape:
        """The same encoder with another attention in every layer."""
        return replace(
            self,
            layer_cycle=tuple(replace(kind, attention=attention) for kind in self.layer_cycle),
        )

    def linears(self, kind: LayerKind | None = None) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: name within the block -> (outputs, inputs).

        Args:
            kind: of the layer; None for that of the first.
        """
        d, f = self.hidden_size, self.intermediate_size
        attention = (kind or self.layer_kind(0)).attention
        decay = isinstance(attention, Lion) and attention.variant == "s"
        gate = {"mlp.gate_proj": (f, d)} if self.gated else {}
        return {
            "self_attn.q_proj": (self.q_size, d),
            "self_attn.k_proj": (self.kv_size, d),
            "self_attn.v_proj": (self.kv_size, d),
            **({DECAY_GATE: (self.num_heads, d)} if decay else {}),
            "self_attn.o_proj": (d, self.q_size),
            **gate,
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }

    @property
    def num_parameters(self) -> int:
        """Weights of the whole model."""
        d, read = self.hidden_size, self.input
        norm = 2 * d if self.norm == "layer" else d
        blocks = sum(
            self._block_parameters(self.layer_kind(i), norm) for i in range(self.num_layers)
        )
        if isinstance(read, PatchInput):
            tables = d * (read.channels * read.patch**2 + 1) + d * (1 + read.tokens)
        else:
            places = read.max_positions if read.learned_positions else 0
            tables = d * (read.vocab_size + places + read.token_types) + (norm if read.norm else 0)
        last = norm if self.pre_norm else 0
        return blocks + tables + last + self._head_parameters

    def has_bias(self, linear: str) -> bool:
        """Whether a linear layer of a block, by its name, carries a bias."""
        if linear == DECAY_GATE:
            return True
        return self.qkv_bias if linear in QKV else self.bias

    def _block_parameters(self, kind: LayerKind, norm: int) -> int:
        linears, attention = self.linears(kind), kind.attention
        learned = isinstance(attention, Lion) and attention.variant == "d"
        return (
            sum(n * k + (n if self.has_bias(name) else 0) for name, (n, k) in linears.items())
            + 2 * norm
            + (2 * self.hidden_size if self.layer_scale else 0)
            + (self.num_heads if learned else 0)
        )

    @property
    def _head_parameters(self) -> int:
        if self.task != "classification":
            return 0
        d = self.hidden_size
        pooler = d * d + d if self.head == "pooler" else 0
        inputs = 2 * d if self.head == "first-and-mean" else d
        return pooler + self.num_labels * (inputs + 1)

    def to_dict(self) -> dict[str, Any]:
        """The shape as JSON-ready values."""
        return {"kind": KIND, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderShape:
        """The inverse of `to_dict`."""
        known = {name: value for name, value in values.items() if name != "kind"}
        read = PatchInput if "patch" in values["input"] else TokenInput
        cycle = tuple(layer_kind(kind) for kind in values["layer_cycle"])
        return cls(**{**known, "input": read(**values["input"]), "layer_cycle": cycle})


AnyShape = ModelShape | EncoderShape


def is_image(shape: AnyShape) -> bool:
    """Whether it reads images, whose tokens are always as many."""
    return isinstance(shape, EncoderShape) and isinstance(shape.input, PatchInput)


def _check_positive(field: str, value: int) -> None:
    if value < 1:
        raise _bad(f"a positive {field}", f"it is {value}")


def _bad(expected: str, came: str) -> CheckpointError:
    return CheckpointError(expected=expected, came=came, todo="check the checkpoint's config.json")

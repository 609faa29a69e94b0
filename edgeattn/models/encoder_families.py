"""Families of encoders as data: how their configs and tensors map onto the one encoder.

Adding a family that this encoder can express is one entry in `ENCODER_FAMILIES`. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeattn.attention import Lion
from edgeattn.encoder_shape import DECAY, EncoderShape, Head, Norm, TokenInput
from edgeattn.models.families import EMBEDDING
from edgeattn.shape import LayerKind

# Parameters beside those of blocks; those of a text are named as a decoder's.
POSITIONS, TOKEN_TYPES = "embed_positions.weight", "embed_types.weight"
PATCHES, CLASS_TOKEN, PATCH_POSITIONS = "embed_patches", "class_token", "position_embeddings"
EMBEDDING_NORM, FINAL_NORM = "embed_norm", "norm"
POOLER, CLASSIFIER = "pooler", "classifier"


@dataclass(frozen=True)
class EncoderFamily:
    """One family of checkpoints.

    Attributes:
        name: `model_type` in config.json.
        examples: checkpoints a user may know it by.
        reads_images: pixels, not tokens.
        learned_positions: a table of positions is added to the tokens.
        rope: queries and keys are rotated.
        norm: LayerNorm or RMSNorm.
        eps_key: config key of its epsilon.
        eps: what transformers takes for a config without that key.
        embedding_norm: the sum of the embeddings is normalised.
        pre_norm: see `EncoderShape`.
        gated: likewise.
        qkv_bias: config key that says whether q, k and v have a bias; None where they always do.
        bias: linear layers carry one.
        layer_scale: see `EncoderShape`.
        head: what classes are told from; None for a family without.
        prefix: of the names in a checkpoint with a head.
        renamed: beginning of a parameter's name -> what it is in the files; within a block behind
            the block's own name.
        block: name of a block in the files, its number as {}.
        left_out: beginnings of stored names that no task here reads.
        unsupported: config keys whose truthy value this encoder cannot honour, with the reason.
    """

    name: str
    examples: str
    reads_images: bool = False
    learned_positions: bool = True
    rope: bool = False
    norm: Norm = "layer"
    eps_key: str = "layer_norm_eps"
    eps: float = 1e-12
    embedding_norm: bool = False
    pre_norm: bool = False
    gated: bool = False
    qkv_bias: str | None = None
    bias: bool = True
    layer_scale: bool = False
    head: Head | None = None
    prefix: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    block: str = "encoder.layer.{}."
    left_out: tuple[str, ...] = ()
    unsupported: Mapping[str, str] = field(default_factory=dict)


_VIT = {
    CLASS_TOKEN: "embeddings.cls_token",
    PATCH_POSITIONS: "embeddings.position_embeddings",
    PATCHES: "embeddings.patch_embeddings.projection",
    FINAL_NORM: "layernorm",
    "self_attn.q_proj": "attention.attention.query",
    "self_attn.k_proj": "attention.attention.key",
    "self_attn.v_proj": "attention.attention.value",
    "self_attn.o_proj": "attention.output.dense",
}
_QUANTIZED = {"quantization_config": "weights that were quantised by another tool"}

ENCODER_FAMILIES: dict[str, EncoderFamily] = {
    f.name: f
    for f in (
        EncoderFamily(
            "bert",
            examples="BERT, MiniLM, BGE, E5",
            embedding_norm=True,
            head="pooler",
            prefix="bert.",
            renamed={
                EMBEDDING: "embeddings.word_embeddings.weight",
                POSITIONS: "embeddings.position_embeddings.weight",
                TOKEN_TYPES: "embeddings.token_type_embeddings.weight",
                EMBEDDING_NORM: "embeddings.LayerNorm",
                POOLER: "pooler.dense",
                "self_attn.q_proj": "attention.self.query",
                "self_attn.k_proj": "attention.self.key",
                "self_attn.v_proj": "attention.self.value",
                "self_attn.o_proj": "attention.output.dense",
                "post_attention_layernorm": "attention.output.LayerNorm",
                "mlp.up_proj": "intermediate.dense",
                "mlp.down_proj": "output.dense",
                "post_mlp_layernorm": "output.LayerNorm",
            },
            left_out=("embeddings.position_ids", "pooler.", "cls.", CLASSIFIER),
            unsupported={
                "is_decoder": "a causal mask",
                "add_cross_attention": "attention to another text",
                **_QUANTIZED,
            },
        ),
        EncoderFamily(
            "vit",
            examples="ViT",
            reads_images=True,
            pre_norm=True,
            qkv_bias="qkv_bias",
            head="first",
            prefix="vit.",
            renamed={
                **_VIT,
                "input_layernorm": "layernorm_before",
                "post_attention_layernorm": "layernorm_after",
                "mlp.up_proj": "intermediate.dense",
                "mlp.down_proj": "output.dense",
            },
            left_out=("pooler.", "embeddings.mask_token", CLASSIFIER),
            unsupported=_QUANTIZED,
        ),
        EncoderFamily(
            "dinov2",
            examples="DINOv2",
            reads_images=True,
            eps=1e-6,
            pre_norm=True,
            qkv_bias="qkv_bias",
            layer_scale=True,
            head="first-and-mean",
            prefix="dinov2.",
            renamed={
                **_VIT,
                "input_layernorm": "norm1",
                "attention_scale": "layer_scale1.lambda1",
                "post_attention_layernorm": "norm2",
                "mlp_scale": "layer_scale2.lambda1",
                "mlp.up_proj": "mlp.fc1",
                "mlp.down_proj": "mlp.fc2",
            },
            left_out=("embeddings.mask_token", CLASSIFIER),
            unsupported={"use_swiglu_ffn": "a gated MLP of stacked matrices", **_QUANTIZED},
        ),
        EncoderFamily(
            "eurobert",
            examples="EuroBERT",
            learned_positions=False,
            rope=True,
            norm="rms",
            eps_key="rms_norm_eps",
            eps=1e-5,
            pre_norm=True,
            gated=True,
            bias=False,
            prefix="model.",
            block="layers.{}.",
            left_out=("lm_head.", "dense.", CLASSIFIER),
            unsupported={
                "attention_bias": "biases in the attention",
                "mlp_bias": "biases in the MLP",
                **_QUANTIZED,
            },
        ),
    )
}


def encoder_parameters(shape: EncoderShape) -> dict[str, tuple[int, ...]]:
    """Every parameter of the encoder: name -> shape, in the order it is streamed."""
    d, names = shape.hidden_size, _inputs(shape)
    for i in range(shape.num_layers):
        names |= {
            f"layers.{i}.{name}": size for name, size in _block(shape, shape.layer_kind(i)).items()
        }
    if shape.pre_norm:
        names |= _norm(FINAL_NORM, shape)
    if shape.task == "classification":
        if shape.head == "pooler":
            names |= {f"{POOLER}.weight": (d, d), f"{POOLER}.bias": (d,)}
        inputs = 2 * d if shape.head == "first-and-mean" else d
        names[f"{CLASSIFIER}.weight"] = (shape.num_labels, inputs)
        names[f"{CLASSIFIER}.bias"] = (shape.num_labels,)
    return names


def _inputs(shape: EncoderShape) -> dict[str, tuple[int, ...]]:
    d, read = shape.hidden_size, shape.input
    if not isinstance(read, TokenInput):
        return {
            f"{PATCHES}.weight": (d, read.channels, read.patch, read.patch),
            f"{PATCHES}.bias": (d,),
            CLASS_TOKEN: (1, 1, d),
            PATCH_POSITIONS: (1, read.tokens, d),
        }
    names: dict[str, tuple[int, ...]] = {EMBEDDING: (read.vocab_size, d)}
    if read.learned_positions:
        names[POSITIONS] = (read.max_positions, d)
    if read.token_types:
        names[TOKEN_TYPES] = (read.token_types, d)
    return names | (_norm(EMBEDDING_NORM, shape) if read.norm else {})


def _block(shape: EncoderShape, kind: LayerKind) -> dict[str, tuple[int, ...]]:
    d = shape.hidden_size
    names = _norm("input_layernorm", shape) if shape.pre_norm else {}
    for linear, size in shape.linears(kind).items():
        names[f"{linear}.weight"] = size
        if shape.has_bias(linear):
            names[f"{linear}.bias"] = size[:1]
    if isinstance(kind.attention, Lion) and kind.attention.variant == "d":
        names[DECAY] = (shape.num_heads,)
    names |= _norm("post_attention_layernorm", shape)
    if not shape.pre_norm:
        names |= _norm("post_mlp_layernorm", shape)
    if shape.layer_scale:
        names |= {"attention_scale": (d,), "mlp_scale": (d,)}
    return names


def _norm(name: str, shape: EncoderShape) -> dict[str, tuple[int, ...]]:
    parts = ("weight", "bias") if shape.norm == "layer" else ("weight",)
    return {f"{name}.{part}": (shape.hidden_size,) for part in parts}

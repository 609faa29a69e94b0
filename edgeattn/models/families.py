"""Model families as data: how a family's config and tensors map onto the one decoder.

Adding a family that this decoder can express is one entry in `FAMILIES`. No torch here: a
dry run reads shapes on machines without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgeattn.errors import CheckpointError
from edgeattn.recurrent import Recurrent, Rule
from edgeattn.shape import ModelShape

# Parameter names inside edgeattn are Hugging Face's Llama names without the leading "model.".
EMBEDDING = "embed_tokens.weight"
FINAL_NORM = "norm.weight"
LM_HEAD = "lm_head.weight"
QKV = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "qkv"))


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    Attributes:
        name: `model_type` in config.json.
        examples: checkpoints a user may know it by.
        qkv_bias: q, k and v projections carry a bias.
        qk_norm: RMSNorm on q and k per head.
        output_gate: softmax attention's output is multiplied with a sigmoid.
        rule: of its linear attention, which takes the place of softmax attention in all or most
            layers (`recurrent_config`); None when the family has none.
        output_norms: RMSNorm on what attention and MLP give, too.
        scaled_embedding: the embedding is multiplied with the root of its width.
        softcaps: the config may bound attention scores and logits by a tanh.
        tied_embeddings: what a config without `tie_word_embeddings` means.
        activation_key: config key of the MLP's activation.
        full_attention_period: where `sliding_window` is set, every n-th layer still sees all keys;
            0 when none does, None when the family has no windows.
        local_rope: layers with a window have rotary positions of their own.
        skips_rope: the config names layers without rotary positions.
        gain_offset: what is added to the stored gains of norms.
        renamed: parameter within a block -> its name in the files.
        fused: tensor within a block -> the parameters it holds, stacked by rows.
        gguf_architecture: `general.architecture` of the family in GGUF, None if not read.
        unsupported: config keys whose truthy value this decoder cannot honour, with the reason.
    """

    name: str
    examples: str
    qkv_bias: bool = False
    qk_norm: bool = False
    output_gate: bool = False
    rule: Rule | None = None
    output_norms: bool = False
    scaled_embedding: bool = False
    softcaps: bool = False
    tied_embeddings: bool = False
    activation_key: str = "hidden_act"
    full_attention_period: int | None = None
    local_rope: bool = False
    skips_rope: bool = False
    gain_offset: float = 0.0
    renamed: Mapping[str, str] = field(default_factory=dict)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gguf_architecture: str | None = None
    unsupported: Mapping[str, str] = field(default_factory=dict)


_QUANTIZED = {"quantization_config": "weights that were quantised by another tool"}
_BIASES = {
    "mlp_bias": "biases in the MLP",
    "attention_bias": "a bias on the attention output",
    **_QUANTIZED,
}
_WINDOW = {"use_sliding_window": "sliding-window attention"}
_BIDIRECTIONAL = {"use_bidirectional_attention": "attention to later tokens"}
# Where Llama has a norm before the MLP, Gemma has one of that name after the attention.
_GEMMA_NORMS = {
    "attention_output_norm.weight": "post_attention_layernorm.weight",
    "post_attention_layernorm.weight": "pre_feedforward_layernorm.weight",
    "mlp_output_norm.weight": "post_feedforward_layernorm.weight",
}
_GATED_DELTA_NET = {
    "linear_attn.qkv_proj.weight": "linear_attn.in_proj_qkv.weight",
    "linear_attn.gate_proj.weight": "linear_attn.in_proj_z.weight",
    "linear_attn.rate.weight": "linear_attn.in_proj_b.weight",
    "linear_attn.decay.weight": "linear_attn.in_proj_a.weight",
    "linear_attn.decay_bias": "linear_attn.dt_bias",
    "linear_attn.decay_log": "linear_attn.A_log",
    "linear_attn.conv_weight": "linear_attn.conv1d.weight",
}
_GATED_LINEAR = {
    EMBEDDING: "embeddings.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "mlp_norm.weight",
    **{f"linear_attn.{name}_proj.weight": f"attn.{name}_proj.weight" for name in "qkv"},
    "linear_attn.gate_proj.weight": "attn.g_proj.weight",
    "linear_attn.out_proj.weight": "attn.o_proj.weight",
    "linear_attn.decay_down.weight": "attn.gk_proj.0.weight",
    "linear_attn.decay_up.weight": "attn.gk_proj.1.weight",
    "linear_attn.decay_up.bias": "attn.gk_proj.1.bias",
    "linear_attn.norm.weight": "attn.g_norm_swish_gate.weight",
}
_PHI_FUSED = {
    "self_attn.qkv_proj.weight": tuple(f"self_attn.{p}_proj.weight" for p in "qkv"),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}

FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        Family(
            "llama",
            examples="Llama 2, 3, 3.1, 3.2, SmolLM2, TinyLlama",
            gguf_architecture="llama",
            unsupported=_BIASES,
        ),
        Family(
            "mistral",
            examples="Mistral 7B, Mistral Nemo",
            full_attention_period=0,
            unsupported=_BIASES,
        ),
        Family(
            "qwen2",
            examples="Qwen2, Qwen2.5",
            qkv_bias=True,
            unsupported={**_WINDOW, **_QUANTIZED},
        ),
        Family("qwen3", examples="Qwen3", qk_norm=True, unsupported={**_BIASES, **_WINDOW}),
        Family(
            "smollm3",
            examples="SmolLM3",
            tied_embeddings=True,
            skips_rope=True,
            unsupported={**_BIASES, **_WINDOW},
        ),
        Family(
            "phi3",
            examples="Phi-3, Phi-3.5-mini, Phi-4, Phi-4-mini",
            full_attention_period=0,
            fused=_PHI_FUSED,
            unsupported=_BIASES,
        ),
        Family(
            "gemma2",
            examples="Gemma 2",
            output_norms=True,
            scaled_embedding=True,
            softcaps=True,
            tied_embeddings=True,
            activation_key="hidden_activation",
            full_attention_period=2,
            gain_offset=1.0,
            renamed=_GEMMA_NORMS,
            unsupported={**_BIASES, **_BIDIRECTIONAL},
        ),
        Family(
            "gemma3_text",
            examples="Gemma 3 270M and 1B (text)",
            qk_norm=True,
            output_norms=True,
            scaled_embedding=True,
            softcaps=True,
            tied_embeddings=True,
            activation_key="hidden_activation",
            full_attention_period=6,
            local_rope=True,
            gain_offset=1.0,
            renamed=_GEMMA_NORMS,
            unsupported={**_BIASES, **_BIDIRECTIONAL},
        ),
        Family(
            "qwen3_5_text",
            examples="Qwen3.5 (text)",
            qk_norm=True,
            output_gate=True,
            rule="gated-delta",
            gain_offset=1.0,
            renamed=_GATED_DELTA_NET,
            unsupported=_BIASES,
        ),
        Family(
            "gla",
            examples="GLA 340M, 1.3B and 2.7B",
            rule="gated",
            renamed=_GATED_LINEAR,
            unsupported={
                "feature_map": "a feature map on queries and keys",
                "use_short_conv": "short convolutions",
                "use_gv": "a decay per value channel",
                "clamp_min": "a bound on decays",
                "attn": "layers of softmax attention",
                "attnres_block_size": "attention over residuals",
                **_QUANTIZED,
            },
        ),
    )
}


def find_family(model_type: object) -> Family:
    """The family of a config's `model_type`.

    Raises:
        CheckpointError: no such family is known.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            expected=f"a checkpoint of a supported family ({', '.join(FAMILIES)})",
            came=f"its model_type is {model_type!r}",
            todo="convert it to one of these architectures or ask for the family in an issue",
        )
    return FAMILIES[model_type]


def parameter_names(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Every parameter of the decoder: name -> shape, in the order it is streamed."""
    d = shape.hidden_size
    names: dict[str, tuple[int, ...]] = {EMBEDDING: (shape.vocab_size, d)}
    for i in range(shape.num_layers):
        prefix, kind = f"layers.{i}.", shape.layer_kind(i)
        names[prefix + "input_layernorm.weight"] = (d,)
        for linear, (outputs, inputs) in shape.linears(kind).items():
            names[f"{prefix}{linear}.weight"] = (outputs, inputs)
            if shape.qkv_bias and linear in QKV:
                names[f"{prefix}{linear}.bias"] = (outputs,)
        if isinstance(kind.attention, Recurrent):
            for name, size in kind.attention.parameters(d).items():
                names[prefix + name] = size
        elif shape.qk_norm:
            names[prefix + "self_attn.q_norm.weight"] = (shape.head_dim,)
            names[prefix + "self_attn.k_norm.weight"] = (shape.head_dim,)
        names[prefix + "post_attention_layernorm.weight"] = (d,)
        if shape.output_norms:
            names[prefix + "attention_output_norm.weight"] = (d,)
            names[prefix + "mlp_output_norm.weight"] = (d,)
    names[FINAL_NORM] = (d,)
    if not shape.tied_embeddings:
        names[LM_HEAD] = (shape.vocab_size, d)
    return names

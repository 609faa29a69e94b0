"""genai_config.json: the bundle described for onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeattn.shape import ModelShape


def token_ids(value: object) -> list[int]:
    """An id or a list of ids from a config, as a list; anything else is no id."""
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def genai_config(
    shape: ModelShape,
    *,
    context: int,
    shared_buffer: bool,
    model_file: str,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
) -> dict[str, Any]:
    """The description of a decoder graph, as onnxruntime-genai 0.18 reads it.

    Source: onnxruntime-genai's config reference; names of inputs and outputs are those of
    `edgeattn.exporters.trace`.

    Args:
        shape: architecture.
        context: longest sequence in tokens.
        shared_buffer: the graph writes its cache in place where past and present are one buffer.
        model_file: name of the ONNX file.
        config: the checkpoint's config.json, for special token ids.
        generation_config: preferred over `config` for them.
    """

    def ids(key: str) -> list[int]:
        found = generation_config.get(key)
        return token_ids(config.get(key) if found is None else found)

    # Where a config names no end, genai ends at token 0.
    eos = ids("eos_token_id") or [0]
    # A common entry for none is -1, which genai would write behind a row that ended.
    pad = [i for i in ids("pad_token_id") if 0 <= i < shape.vocab_size] or eos
    return {
        "model": {
            # A decoder with positions and a cache, which is all that genai has to know. By its own
            # name a phi3 would be computed anew from the start at its 4097th token.
            "type": "llama",
            "vocab_size": shape.vocab_size,
            "context_length": context,
            "bos_token_id": (ids("bos_token_id") or eos)[0],
            "eos_token_id": eos if len(eos) > 1 else eos[0],
            "pad_token_id": pad[0],
            "decoder": {
                "filename": model_file,
                "head_size": shape.head_dim,
                "hidden_size": shape.hidden_size,
                "num_attention_heads": shape.num_heads,
                "num_key_value_heads": shape.num_kv_heads,
                "num_hidden_layers": shape.num_layers,
                "session_options": {"provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "past_present_share_buffer": shared_buffer,
        },
    }

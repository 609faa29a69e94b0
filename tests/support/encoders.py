"""Tiny random encoders that transformers makes, saves and runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
_TEXT = {**_SIZES, "vocab_size": 272, "max_position_embeddings": 40, "num_labels": 5}
_IMAGE = {**_SIZES, "image_size": 32, "patch_size": 8, "num_labels": 5}
_EUROBERT = {
    **_TEXT,
    "head_dim": 32,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "mask_token_id": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
_DINOV2 = {**_IMAGE, "mlp_ratio": 2}
# Name -> class of transformers, class of its config, options.
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", _TEXT),
    "bert-relu": ("BertModel", "BertConfig", {**_TEXT, "hidden_act": "relu"}),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", _TEXT),
    "vit": ("ViTModel", "ViTConfig", _IMAGE),
    "vit-wide": ("ViTModel", "ViTConfig", {**_IMAGE, "image_size": [16, 40], "qkv_bias": False}),
    "vit-classifier": ("ViTForImageClassification", "ViTConfig", _IMAGE),
    "dinov2": ("Dinov2Model", "Dinov2Config", _DINOV2),
    "dinov2-classifier": ("Dinov2ForImageClassification", "Dinov2Config", _DINOV2),
    "eurobert": ("EuroBertModel", "EuroBertConfig", _EUROBERT),
}


def save_encoder(name: str, path: Path, **changes: Any) -> torch.nn.Module:
    """Saves a random encoder as a checkpoint and returns what transformers runs.

    Every parameter is drawn, gains and biases too, so that none can be left out unnoticed.

    Args:
        name: one of `ENCODERS`.
        path: folder of the checkpoint.
        changes: options of its configuration that are others.
    """
    model_class, config_class, options = ENCODERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**options, **changes})
    model = getattr(transformers, model_class)(config).eval()
    for parameter_name, parameter in model.named_parameters():
        is_gain = parameter.dim() == 1 and parameter_name.endswith(("weight", "lambda1"))
        spread = 0.2 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        parameter.data = spread * torch.randn_like(parameter) + is_gain
    model.save_pretrained(path)
    return model


def save_embedder(path: Path, tokenizer: Path, pooling: str = "mean") -> torch.nn.Module:
    """As `save_encoder`, with what sentence-transformers saves beside it, and a tokenizer."""
    model = save_encoder("bert", path)
    kinds = {
        f"pooling_mode_{kind}": kind.startswith(pooling) for kind in ("cls_token", "mean_tokens")
    }
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps(kinds))
    shutil.copy(tokenizer, path / "tokenizer.json")
    return model


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    """Two texts of different length, or two images."""
    torch.manual_seed(1)
    options = ENCODERS[name][2]
    if "image_size" in options:
        size = options["image_size"]
        height, width = size if isinstance(size, list) else (size, size)
        return {"pixel_values": torch.randn(2, 3, height, width)}
    ids = torch.randint(0, options["vocab_size"], (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    found = {"input_ids": ids, "attention_mask": mask}
    if name.startswith("bert"):
        found["token_type_ids"] = (torch.arange(9) > 3).long().expand(2, -1).contiguous()
    return found

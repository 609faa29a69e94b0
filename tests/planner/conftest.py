"""The model whose figures the planner's tests know."""

from __future__ import annotations

import pytest

from edgeattn.models.huggingface import shape_from_config
from edgeattn.shape import ModelShape

SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


@pytest.fixture
def shape() -> ModelShape:
    """SmolLM2-135M."""
    return shape_from_config(SMOLLM2)

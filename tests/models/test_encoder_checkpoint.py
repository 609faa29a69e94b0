"""Encoders' checkpoints: tasks are chosen, what does not fit is refused in a sentence."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
pytest.importorskip("transformers")

import transformers
from encoders import save_embedder, save_encoder

from edgeattn.errors import CheckpointError, UsageError
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.encoder_checkpoint import is_encoder, open_encoder, read_encoder_shape
from edgeattn.models.encoder_config import encoder_shape_from_config
from edgeattn.models.encoder_families import ENCODER_FAMILIES

BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
}
VIT = {**BERT, "model_type": "vit", "image_size": 32, "patch_size": 8}


@pytest.mark.parametrize(
    ("config", "task", "said"),
    [
        ({**BERT, "is_decoder": True}, None, "is_decoder"),
        ({**BERT, "hidden_act": "mish"}, None, "mish"),
        ({**BERT, "position_embedding_type": "relative_key"}, None, "relative_key"),
        ({**BERT, "num_attention_heads": 0}, None, "num_heads"),
        ({**BERT, "num_attention_heads": "four"}, None, "four"),
        ({**BERT, "vocab_size": 0}, None, "vocab_size"),
        ({**BERT, "num_hidden_layers": 10**9}, None, "at most 2,000 layers"),
        ({**BERT, "num_key_value_heads": 3}, None, "3 KV heads"),
        ({**VIT, "image_size": 30}, None, "whole patches of 8"),
        ({**VIT, "image_size": "large"}, None, "large"),
        ({**VIT, "model_type": "dinov2", "use_swiglu_ffn": True}, None, "use_swiglu_ffn"),
        ({**VIT, "mlp_ratio": float("nan")}, None, "mlp_ratio"),
        ({**BERT, "architectures": 7}, None, "architectures"),
        (BERT, "classification", "trained to classify"),
        (VIT, "embedding", "reads images"),
        (BERT, "embeding", "embedding"),
    ],
)
def test_what_does_not_fit_is_refused(config: dict[str, Any], task: str | None, said: str) -> None:
    with pytest.raises((CheckpointError, UsageError), match=r"expected .*, but .*: ") as caught:
        encoder_shape_from_config(config, task=task)
    assert said in str(caught.value)


COUNTS = [key for key, value in BERT.items() if isinstance(value, int)]


@settings(deadline=None)
@given(changed=st.dictionaries(st.sampled_from(COUNTS), st.integers(), min_size=1))
def test_any_counts_are_an_encoder_or_refused(changed: dict[str, int]) -> None:
    """Parameters are counted layer by layer, and no weights bound a config.json by itself."""
    with contextlib.suppress(CheckpointError):
        assert encoder_shape_from_config({**BERT, **changed}).num_parameters > 0


@pytest.mark.parametrize("name", ENCODER_FAMILIES)
def test_defaults_are_those_of_transformers(name: str) -> None:
    """A config that says only what it must; another epsilon gives numbers that are nearly right."""
    classes = {"bert": "Bert", "vit": "ViT", "dinov2": "Dinov2", "eurobert": "EuroBert"}
    config = getattr(transformers, f"{classes[name]}Config")()
    shape = encoder_shape_from_config({**BERT, "model_type": name})
    assert shape.norm_eps == getattr(config, ENCODER_FAMILIES[name].eps_key)


def test_the_task_is_what_the_checkpoint_was_made_for(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    tokenizer = tiny_checkpoint / "tokenizer.json"
    save_embedder(tmp_path / "mean", tokenizer)
    save_embedder(tmp_path / "first", tokenizer, "cls")
    assert read_encoder_shape(tmp_path / "mean").output == "sentence_embedding"
    assert read_encoder_shape(tmp_path / "mean").pooling == "mean"
    assert read_encoder_shape(tmp_path / "first").pooling == "first"
    assert read_encoder_shape(tmp_path / "mean", task="hidden").output == "last_hidden_state"


@pytest.mark.parametrize(
    ("modes", "dense", "said"),
    [
        (["max_tokens"], False, "names pooling_mode_max_tokens"),
        (["cls_token", "mean_tokens"], False, "cls_token and pooling_mode_mean_tokens"),
        ([], False, "names none"),
        (["mean_tokens"], True, "a linear layer follows"),
    ],
)
def test_embeddings_made_in_another_way_are_refused(
    modes: list[str], dense: bool, said: str, tmp_path: Path
) -> None:
    """Not given the mean of the tokens, which would be another vector."""
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    for folder in ("1_Pooling", "2_Dense")[: 1 + dense]:
        (tmp_path / folder).mkdir()
        on = {f"pooling_mode_{mode}": True for mode in modes}
        (tmp_path / folder / "config.json").write_text(json.dumps({"word": 1, **on}))
    for task in (None, "embedding"):
        with pytest.raises(CheckpointError, match=said) as caught:
            read_encoder_shape(tmp_path, task=task)
        assert "--task hidden" in str(caught.value)
    assert read_encoder_shape(tmp_path, task="hidden").task == "hidden"


def test_a_decoder_is_none_and_an_encoder_no_decoder(tmp_path: Path, tiny_checkpoint: Path) -> None:
    save_encoder("bert", tmp_path)
    assert not is_encoder(tiny_checkpoint)
    assert not is_encoder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="bert is an encoder"):
        open_checkpoint(tmp_path)


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_encoder("vit", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value, said in (
        ("num_hidden_layers", 2, "layer.2"),
        ("num_hidden_layers", 4, "layer.3"),
        ("num_hidden_layers", 2000, "weights of 2000 layers"),
        ("patch_size", 4, "projection.weight"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(CheckpointError, match=said):
            open_encoder(tmp_path)

"""Linear attention against independent definitions, with padding, in pieces, and step by step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from gated_linear_attention import gla_logits
from safetensors.torch import load_file

from edgeattn.errors import CheckpointError, RuntimeInputError
from edgeattn.models.decoder import Decoder
from edgeattn.models.families import parameter_names
from edgeattn.models.hub import open_model
from edgeattn.models.huggingface import shape_from_config
from edgeattn.models.model import load_decoder, model_of
from edgeattn.recurrent import Recurrent
from edgeattn.shape import ModelShape

DELTA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GLA: dict[str, Any] = {
    "model_type": "gla",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_heads": 4,
    "expand_k": 0.5,
    "expand_v": 1.5,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LENGTH = 21


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random Qwen3.5 of transformers, and where it saved itself."""
    torch.manual_seed(0)
    model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**DELTA)).eval()
    for name, parameter in model.named_parameters():
        if not name.endswith("A_log"):  # others at a size that makes each part of the model count
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    path = tmp_path_factory.mktemp("theirs") / "qwen3_5"
    model.save_pretrained(path)
    return model, path


@pytest.fixture(params=["gated-delta", "gated"])
def decoder(
    request: pytest.FixtureRequest, qwen: tuple[Any, Path], random_checkpoint: Callable[..., Path]
) -> Decoder:
    """A random decoder of each rule."""
    path = qwen[1] if request.param == "gated-delta" else random_checkpoint(**GLA)
    return load(path)


def load(path: Path) -> Decoder:
    fp32 = {"weight_dtype": torch.float32, "compute_dtype": torch.float32}
    return load_decoder(model_of(open_model(path)), **fp32)


def tokens(rows: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, 97, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def run(decoder: Decoder, ids: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Logits of rows without padding that come in pieces, `[B, T, vocab]`."""
    past, found = decoder.empty_cache(len(ids)), []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        ones = torch.ones(len(ids), end, dtype=torch.int64)
        positions = torch.arange(begin, end).expand(len(ids), -1)
        output = decoder(ids[:, begin:end], ones, positions, past)
        past = output.present
        found.append(output.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("ends", [[LENGTH], list(range(1, LENGTH + 1)), [2, 9, 10, LENGTH]])
def test_gated_delta_net_is_transformers(qwen: tuple[Any, Path], ends: list[int]) -> None:
    """Prefill, step by step, and in pieces shorter than the convolution is wide."""
    model, path = qwen
    ids = tokens(2)
    with torch.inference_mode():
        expected = model(ids).logits
    assert expected.std() > 0.2
    torch.testing.assert_close(run(load(path), ids, ends), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("ends", [[LENGTH], list(range(1, LENGTH + 1))])
def test_gated_linear_attention_is_its_paper(
    random_checkpoint: Callable[..., Path], ends: list[int]
) -> None:
    path, ids = random_checkpoint(**GLA), tokens(2)
    expected = gla_logits(load_file(path / "model.safetensors"), GLA, ids).float()
    assert expected.std() > 0.2
    torch.testing.assert_close(run(load(path), ids, ends), expected, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_padding_on_the_right_changes_nothing(decoder: Decoder) -> None:
    """Two rows of different length, padded twice: with a past, and so that a row gets nothing."""
    ids, lengths = tokens(2), [[5, 2], [0, 4], [3, 1]]
    past, mask, at = decoder.empty_cache(2), torch.zeros(2, 0, dtype=torch.int64), [0, 0]
    alone = [run(decoder, ids[row : row + 1], [LENGTH]) for row in (0, 1)]
    for counts in lengths:
        new = torch.full((2, max(counts)), 7)
        valid = torch.zeros_like(new)
        for row, count in enumerate(counts):
            new[row, :count] = ids[row, at[row] : at[row] + count]
            valid[row, :count] = 1
        positions = torch.tensor([[at[row]] for row in (0, 1)]) + torch.arange(new.shape[1])
        mask = torch.cat((mask, valid), dim=1)
        output = decoder(new, mask, positions, past)
        past = output.present
        for row, count in enumerate(counts):
            expected = alone[row][0, at[row] : at[row] + count]
            torch.testing.assert_close(output.logits[row, :count], expected, atol=1e-5, rtol=0)
            at[row] += count


@torch.inference_mode()
def test_padding_on_the_left_is_refused(decoder: Decoder) -> None:
    """Such a row is made NaN before the first layer, which the operator does not take."""
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    with pytest.raises(RuntimeInputError, match="nan came"):
        decoder(tokens(2, 3), mask, torch.arange(3).expand(2, -1), decoder.empty_cache(2))


def test_the_state_is_fp32_whatever_the_model_is(decoder: Decoder) -> None:
    half = decoder.convert(torch.float16)
    states = [tensor for layer in half.empty_cache(1) for tensor in layer]
    kinds = [name for i in range(len(half.layers)) for name in half.shape.layer_kind(i).states]
    found = {name: tensor.dtype for name, tensor in zip(kinds, states, strict=True)}
    assert found.pop("recurrent_state") == torch.float32
    assert set(found.values()) <= {torch.float16}


@pytest.mark.parametrize("config", [{**DELTA, "model_type": "qwen3_5_text"}, GLA])
def test_the_shape_knows_its_parameters(config: dict[str, Any]) -> None:
    shape = shape_from_config(config)
    sizes = parameter_names(shape).values()
    assert shape.num_parameters == sum(torch.Size(size).numel() for size in sizes)
    assert ModelShape.from_dict(shape.to_dict()) == shape
    assert sum(shape.kind_counts.values()) == shape.num_layers
    softmax = 1 if config is not GLA else 0
    assert shape.caching_layers == softmax


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({**GLA, "use_short_conv": True}, "short convolutions"),
        ({**GLA, "fuse_norm": False}, "one norm and gate"),
        ({**GLA, "num_kv_heads": 2}, "num_kv_heads"),
        ({**GLA, "expand_k": 0.3}, "expand_k"),
        ({**GLA, "expand_v": "much"}, "a number under 'expand_v'"),
        ({**GLA, "num_heads": 0}, "expand_k"),
        ({**DELTA, "model_type": "qwen3_5_text", "layer_types": ["mamba"] * 5}, "layer_types"),
        ({**DELTA, "model_type": "qwen3_5_text", "layer_types": ["full_attention"]}, "5 entries"),
        ({**DELTA, "model_type": "qwen3_5_text", "linear_num_key_heads": 3}, "value heads"),
        ({**DELTA, "model_type": "qwen3_5_text", "linear_conv_kernel_dim": 0}, "conv_width"),
    ],
)
def test_another_architecture_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        shape_from_config(config)


def test_where_no_layer_is_named_every_fourth_is_softmax_attention() -> None:
    shape = shape_from_config({**DELTA, "model_type": "qwen3_5_text"})
    found = [isinstance(shape.layer_kind(i).attention, Recurrent) for i in range(5)]
    assert found == [True, True, True, False, True]
    every = shape_from_config({**DELTA, "model_type": "qwen3_5_text", "full_attention_interval": 9})
    assert every.caching_layers == 0

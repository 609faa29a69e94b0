"""Checkpoint -> hf_writer -> reload: the same tensors, and the same logits in transformers."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from edgeattn.errors import CheckpointError
from edgeattn.models.checkpoint import Checkpoint, open_checkpoint
from edgeattn.models.families import FAMILIES, LM_HEAD, parameter_names
from edgeattn.models.hf_writer import checkpoint_config, stored_tensors, write_weights
from edgeattn.models.model import TORCH_DTYPES, Model, model_of

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    # transformers puts those of its defaults beyond this vocabulary
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**SIZES, "head_dim": 12, "sliding_window": 7}
# Square roots of 12 / 5 and 12 / 20, so that no query factor is a power of two.
MODELS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama-tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=20),
    "smollm3": transformers.SmolLM3Config(**SIZES),
    "phi3": transformers.Phi3Config(**SIZES, sliding_window=7),
    "gemma2": transformers.Gemma2Config(**GEMMA, query_pre_attn_scalar=5),
    "gemma3": transformers.Gemma3TextConfig(**GEMMA, query_pre_attn_scalar=20),
    "qwen3_5": transformers.Qwen3_5TextConfig(
        **SIZES,
        head_dim=16,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=12,
        linear_value_head_dim=8,
    ),
}
# Of another library than transformers; its checkpoints are compared in test_recurrent.py.
ELSEWHERE = {"gla"}

SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """A function from a name to a random model of transformers and where it saved itself."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(name: str) -> tuple[Any, Path]:
        if name not in made:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(MODELS[name]).float().eval()
            for parameter in model.parameters():
                # Norm gains and biases start at 1 and 0, which would hide a missing one.
                parameter.data.add_(torch.randn_like(parameter) * 0.05)
            path = tmp_path_factory.mktemp("theirs") / name
            model.save_pretrained(path)
            made[name] = (model, path)
        return made[name]

    return make


def written(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: str = "fp32",
    *,
    model: Model | None = None,
    **k: Any,
) -> dict[str, int]:
    """The checkpoint's model, or another one, with a config in `folder`."""
    model = model or model_of(checkpoint)
    folder.mkdir()
    config = checkpoint_config(checkpoint.config, model.shape, dtype)
    (folder / "config.json").write_text(json.dumps(config))
    return write_weights(folder, model, checkpoint.config, dtype, **k)


def parameters(path: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.weights.read(name) for name in parameter_names(checkpoint.shape)}


def their_logits(model: Any) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.arange(40).unsqueeze(0) * 7 % 97).logits
    return logits


def load(path: Path) -> Any:
    """What transformers makes of a directory, which must hold every tensor and no other."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def test_every_family_is_here() -> None:
    assert {config.model_type for config in MODELS.values()} == FAMILIES.keys() - ELSEWHERE


@pytest.mark.parametrize("name", MODELS)
def test_the_same_model(
    name: str, theirs: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    model, path = theirs(name)
    ours = tmp_path / "ours"
    written(open_checkpoint(path), ours)
    assert json.loads((ours / "config.json").read_text()) == {
        **json.loads((path / "config.json").read_text()),
        "tie_word_embeddings": open_checkpoint(path).shape.tied_embeddings,
    }
    expected, found = parameters(path), parameters(ours)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=0, rtol=0, msg=key)
    # Our own reader may share an error with the writer: the files and the logits speak, too.
    stored = load_file(ours / SINGLE)
    for key, tensor in load_file(path / SINGLE).items():
        torch.testing.assert_close(stored.pop(key), tensor, atol=1e-7, rtol=1e-6, msg=key)
    assert not stored
    logits = their_logits(model)
    assert logits.std() > 0.1
    torch.testing.assert_close(their_logits(load(ours)), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_dtypes(
    dtype: str, name: str, theirs: Callable[[str], tuple[Any, Path]], tmp_path: Path
) -> None:
    """The files of a checkpoint in the same dtype; of Gemma the gain is rounded, not 1 + gain."""
    model = copy.deepcopy(theirs(name)[0]).to(TORCH_DTYPES[dtype])
    model.save_pretrained(tmp_path / "theirs")
    written(open_checkpoint(tmp_path / "theirs"), tmp_path / "ours", dtype)
    expected, found = (load_file(tmp_path / who / SINGLE) for who in ("theirs", "ours"))
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        # The reader's fp32 drops bits of a gain below 2**-24 where it adds 1, and of no other.
        torch.testing.assert_close(found[key], tensor, atol=2**-24, rtol=0, msg=key)
    assert load(tmp_path / "ours").dtype == TORCH_DTYPES[dtype]


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_config_keeps_its_own_name_of_the_dtype(key: str, tiny_checkpoint: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    config = checkpoint_config({"hidden_size": 64, key: "bfloat16"}, checkpoint.shape, "fp16")
    assert config == {"hidden_size": 64, key: "float16", "tie_word_embeddings": True}


@pytest.mark.parametrize("name", ["llama-tied", "phi3"])
def test_shards(name: str, theirs: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    model, path = theirs(name)
    ours, most = tmp_path / "ours", 50_000
    counts: list[tuple[int, int]] = []
    files = written(
        open_checkpoint(path), ours, shard_bytes=most, progress=lambda *count: counts.append(count)
    )
    assert len(files) > 3
    assert {file.name: file.stat().st_size for file in ours.glob("*.safetensors")} == files
    assert list(files)[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    held = {file: load_file(ours / file) for file in files}
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in held.values()]
    assert all(size <= most or len(t) == 1 for size, t in zip(sizes, held.values(), strict=True))
    index = json.loads((ours / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == counts[-1][0] == counts[-1][1]
    assert index["weight_map"] == {name: file for file, t in held.items() for name in t}
    torch.testing.assert_close(their_logits(load(ours)), their_logits(model), atol=1e-5, rtol=0)


def test_a_file_is_aligned_and_in_order(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    written(checkpoint, tmp_path / "ours", "bf16")
    content = (tmp_path / "ours" / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert list(header) == [t.name for t in stored_tensors(checkpoint.shape, checkpoint.config)]
    assert max(e["data_offsets"][1] for e in header.values()) == len(content) - 8 - length


def test_an_untied_head(theirs: Callable[[str], tuple[Any, Path]], tmp_path: Path) -> None:
    """As a rotation leaves it: a matrix of its own, and a config that knows of it."""
    model, path = theirs("qwen2")
    checkpoint = open_checkpoint(path)
    source = model_of(checkpoint)
    untied = Model(replace(source.shape, tied_embeddings=False), _WithHead(source.weights))
    written(checkpoint, tmp_path / "ours", model=untied)
    found = load(tmp_path / "ours")
    assert found.config.tie_word_embeddings is False
    torch.testing.assert_close(their_logits(found), 2 * their_logits(model), atol=1e-5, rtol=0)


class _WithHead:
    """Weights whose head is twice the embedding."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def format(self, name: str) -> None:
        return None

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._source.read("embed_tokens.weight" if name == LM_HEAD else name)
        return 2 * tensor if name == LM_HEAD else tensor


def test_a_weight_beyond_the_dtype_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_checkpoint)
    source = model_of(checkpoint)
    large = replace(source, weights=_Large(source.weights))
    with pytest.raises(CheckpointError, match=r"finite weights in norm\.weight.*wider --dtype"):
        written(checkpoint, tmp_path / "fp16", "fp16", model=large)
    written(checkpoint, tmp_path / "bf16", "bf16", model=large)


class _Large(_WithHead):
    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._source.read(name)
        return tensor + 70_000 if name == "norm.weight" else tensor


def test_a_family_needs_no_code_here(
    monkeypatch: pytest.MonkeyPatch, random_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Names, stacks, offset and factor are data of a family, also of one that is not known yet."""
    odd = replace(
        FAMILIES["qwen3"],
        name="odd",
        gain_offset=-0.25,
        renamed={"mlp.down_proj.weight": "mlp.odd.weight"},
        fused={"odd.weight": ("mlp.up_proj.weight", "self_attn.v_proj.weight")},
    )
    monkeypatch.setitem(FAMILIES, "odd", odd)
    path = random_checkpoint(model_type="odd", query_pre_attn_scalar=11)
    written(open_checkpoint(path), tmp_path / "ours")
    names = _names(path / SINGLE)
    assert {"model.layers.1.odd.weight", "model.layers.2.mlp.odd.weight"} <= names.keys()
    assert _names(tmp_path / "ours" / SINGLE) == names
    expected, found = parameters(path), parameters(tmp_path / "ours")
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=0, rtol=0, msg=key)


def _names(file: Path) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in load_file(file).items()}

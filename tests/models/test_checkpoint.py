"""Broken checkpoints: each is refused in one sentence that says what, what came, what to do."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from edgeattn.errors import CheckpointError, EdgeattnError
from edgeattn.models.checkpoint import open_checkpoint, read_shape
from edgeattn.models.huggingface import shape_from_config
from edgeattn.shape import ModelShape

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, path)
    return path


@pytest.fixture
def refused(
    edgeattn: Callable[..., Any], tmp_path: Path, shared_traces: None
) -> Callable[..., str]:
    """Exports a checkpoint through the command line, which must refuse it; gives the sentence."""

    def check(model: Path, *words: str, options: tuple[str, ...] = ()) -> str:
        output = tmp_path / "out" / "bundle"
        done = edgeattn("export", model, "--target", "cpu", "-o", output, *options)
        assert done.exit_code == 1, done.output
        assert "Traceback" not in done.output
        assert "internal error" not in done.stderr
        sentence = done.stderr.strip().splitlines()[-1]
        assert sentence.startswith("edgeattn: expected ")
        assert ", but " in sentence
        for word in words:
            assert word in sentence
        assert not output.parent.exists() or list(output.parent.iterdir()) == []
        return sentence

    return check


def change_config(model: Path, **values: Any) -> None:
    """Sets keys of config.json, or removes those that are None."""
    config = json.loads((model / "config.json").read_text()) | values
    kept = {key: value for key, value in config.items() if value is not None}
    (model / "config.json").write_text(json.dumps(kept))


def change_tensors(model: Path, **tensors: np.ndarray | None) -> None:
    file = model / "model.safetensors"
    held = load_file(file) | tensors
    save_file({key: value for key, value in held.items() if value is not None}, file)


def shard(model: Path) -> dict[str, str]:
    """Splits the single file in two with an index."""
    held = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(held)
    place = {name: SHARDS[i % 2] for i, name in enumerate(names)}
    for file in SHARDS:
        save_file({name: held[name] for name in names if place[name] == file}, model / file)
    (model / INDEX).write_text(json.dumps({"weight_map": place}))
    return place


def test_shards_hold_the_same_model(copy: Path, tiny_checkpoint: Path) -> None:
    pytest.importorskip("torch")
    shard(copy)
    whole, sharded = open_checkpoint(tiny_checkpoint), open_checkpoint(copy)
    assert sharded.shape == whole.shape
    for name in "embed_tokens.weight", "layers.2.mlp.down_proj.weight", "norm.weight":
        assert sharded.weights.read(name).equal(whole.weights.read(name))
    assert set(sharded.identity["files"]) == set(SHARDS)


@pytest.mark.parametrize("kind", ["absent", "text file", "empty folder"])
def test_no_checkpoint(tmp_path: Path, refused: Callable[..., str], kind: str) -> None:
    model = tmp_path / "model"
    if kind == "text file":
        model.write_text("weights")
    elif kind == "empty folder":
        model.mkdir()
    wanted = "a config.json in" if kind == "empty folder" else "a Hugging Face directory or"
    refused(model, wanted, str(model))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("to be JSON", "does not parse")),
        (b"{", ("to be JSON", "does not parse")),
        (b"\xff\xfe", ("to be JSON", "does not parse")),
        (b"[" * 100_000, ("to be JSON", "does not parse")),
        (b"[]", ("a JSON object", "holds a list")),
        (b"null", ("a JSON object", "holds a NoneType")),
    ],
)
def test_a_broken_config(
    copy: Path, refused: Callable[..., str], content: bytes, words: tuple[str, ...]
) -> None:
    (copy / "config.json").write_bytes(content)
    refused(copy, "config.json", *words)


def test_a_config_that_cannot_be_read(
    copy: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def forbidden(self: Path) -> bytes:
        if self.name == "config.json":
            raise PermissionError(13, "Permission denied")
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    refused(copy, "config.json", "Permission denied")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": None}, ("a supported family", "llama", "model_type is None")),
        ({"model_type": "gpt2"}, ("a supported family", "qwen3", "'gpt2'")),
        ({"model_type": ["llama"]}, ("a supported family", "['llama']")),
        ({"hidden_act": "gelu"}, ("activation silu", "hidden_act is 'gelu'")),
        ({"hidden_act": ["silu"]}, ("activation silu", "hidden_act is ['silu']")),
        ({"num_hidden_layers": None}, ("'num_hidden_layers'", "the key is missing")),
        ({"hidden_size": None}, ("'hidden_size'", "the key is missing")),
        ({"vocab_size": "272"}, ("an integer under 'vocab_size'", "'272'")),
        ({"vocab_size": 272.0}, ("an integer under 'vocab_size'", "272.0")),
        ({"vocab_size": True}, ("an integer under 'vocab_size'", "True")),
        ({"rms_norm_eps": "tiny"}, ("a number under 'rms_norm_eps'", "'tiny'")),
        ({"rms_norm_eps": 0}, ("a positive norm_eps", "it is 0")),
        ({"rms_norm_eps": 10**400}, ("rms_norm_eps",)),
        ({"rope_theta": -1}, ("a positive rope_theta", "it is -1")),
        ({"num_hidden_layers": 0}, ("a positive num_layers", "it is 0")),
        ({"num_hidden_layers": -(10**30)}, ("a positive num_layers",)),
        ({"num_hidden_layers": 10**15}, ("at most 2,000 layers", "1,000,000,000,000,000")),
        (
            {"model_type": "gemma2", "sliding_window_pattern": 10**9, "num_hidden_layers": 10**9},
            ("at most 2,000 layers",),
        ),
        ({"num_hidden_layers": 2000}, ("weights of 2000 layers", "holds")),
        ({"hidden_size": 10**30}, ("an integer up to 2^53 under 'hidden_size'", "is 1000000")),
        ({"hidden_size": -(10**30), "head_dim": None}, ("'hidden_size'", "is -1000000")),
        ({"head_dim": 10**20}, ("an integer up to 2^53 under 'head_dim'", "is 1000000")),
        ({"num_attention_heads": 0}, ("a positive num_heads", "it is 0")),
        ({"num_key_value_heads": 3}, ("query heads that KV heads divide", "4 query and 3 KV")),
        ({"head_dim": 15}, ("an even, positive number of rotated elements", "it is 15")),
        (
            {"rope_scaling": {"rope_type": "yarn"}},
            ("default, linear, llama3 or longrope", "'yarn'"),
        ),
        ({"rope_scaling": {"rope_type": "llama3"}}, ("'factor'", "the key is missing")),
        ({"rope_scaling": {"rope_type": "linear"}}, ("'factor'", "the key is missing")),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, ("a positive factor",)),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            ("'original_max_position_embeddings'", "the key is missing"),
        ),
        (
            {
                "rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]},
                "original_max_position_embeddings": 64,
            },
            ("8 divisors", "there are 1"),
        ),
        ({"partial_rotary_factor": 0}, ("rotated elements", "it is 0")),
        ({"partial_rotary_factor": 2}, ("at most 16 rotated elements", "there are 32")),
        ({"partial_rotary_factor": 0.19}, ("an even, positive number", "it is 3")),
        ({"rope_scaling": "llama3"}, ("an object under 'rope_scaling'",)),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 0,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": 64,
                }
            },
            ("factor",),
        ),
        ({"model_type": "mistral", "sliding_window": 0}, ("a positive sliding window",)),
        ({"model_type": "mistral", "sliding_window": "4k"}, ("an integer under 'sliding_window'",)),
        ({"model_type": "qwen2", "use_sliding_window": True}, ("without sliding-window",)),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, ("a list of 3 entries",)),
        ({"model_type": "smollm3", "no_rope_layer_interval": 0}, ("a positive number",)),
        (
            {"model_type": "gemma3_text", "sliding_window": 4, "layer_types": ["full"] * 3},
            ("sliding_attention or full_attention", "'full'"),
        ),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, ("later tokens",)),
        ({"model_type": "gemma2", "final_logit_softcapping": 0}, ("a positive logits_softcap",)),
        ({"hidden_act": "relu"}, ("silu or swish or gelu_pytorch_tanh", "'relu'")),
        ({"attention_bias": True}, ("without a bias", "attention_bias to True")),
        ({"quantization_config": {"bits": 4}}, ("quantised by another tool",)),
        ({"vocab_size": 300}, ("embed_tokens.weight of shape [300, 64]", "[272, 64]")),
        ({"num_hidden_layers": 4}, ("model.layers.3.", "no file of the checkpoint holds it")),
        ({"tie_word_embeddings": False}, ("lm_head.weight", "no file")),
    ],
)
def test_a_config_that_does_not_fit(
    copy: Path, refused: Callable[..., str], values: dict[str, Any], words: tuple[str, ...]
) -> None:
    change_config(copy, **values)
    refused(copy, *words)


def test_truncated_weights(copy: Path, refused: Callable[..., str]) -> None:
    file = copy / "model.safetensors"
    content = file.read_bytes()
    for length in (0, 4, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        refused(copy, "model.safetensors to be a whole safetensors file", "download it again")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [(), ("--quant", "w4-rtn"), ("--no-verify",)])
def test_weights_that_are_no_numbers(
    copy: Path, refused: Callable[..., str], bad: float, options: tuple[str, ...]
) -> None:
    pytest.importorskip("torch")
    weight = load_file(copy / "model.safetensors")[Q_PROJ]
    weight[3, 5] = bad
    change_tensors(copy, **{Q_PROJ: weight})
    refused(copy, "finite weights in layers.1.self_attn.q_proj", "NaN or inf", options=options)


def test_weights_too_large_for_fp16(
    copy: Path, edgeattn: Callable[..., Any], shared_traces: None
) -> None:
    pytest.importorskip("torch")
    weight = load_file(copy / "model.safetensors")[Q_PROJ]
    weight[3, 5] = 1e6
    change_tensors(copy, **{Q_PROJ: weight})
    output = copy.parent / "bundle"
    done = edgeattn("export", copy, "--target", "jetson-orin@jetpack6.2", "-o", output)
    assert done.exit_code == 1
    assert "layers.1.self_attn.q_proj.weight" in done.stderr
    assert "wider --dtype" in done.stderr
    assert not output.exists()


def test_a_wrong_shape(copy: Path, refused: Callable[..., str]) -> None:
    change_tensors(copy, **{Q_PROJ: np.ones((64, 32), np.float32)})
    refused(copy, f"{Q_PROJ} of shape [64, 64]", "its shape is [64, 32]")


def test_a_missing_tensor(copy: Path, refused: Callable[..., str]) -> None:
    change_tensors(copy, **{Q_PROJ: None})
    refused(copy, f"a tensor {Q_PROJ}", "no file of the checkpoint holds it")


@pytest.mark.parametrize("extra", ["model.layers.0.self_attn.q_proj.bias", "model.layers.7.x"])
def test_a_weight_that_nothing_reads(copy: Path, refused: Callable[..., str], extra: str) -> None:
    tensors = load_file(copy / "model.safetensors")
    save_file({**tensors, extra: np.zeros(64, np.float32)}, copy / "model.safetensors")
    refused(copy, f"also holds {extra}")


def test_integers_for_weights(copy: Path, refused: Callable[..., str]) -> None:
    change_tensors(copy, **{Q_PROJ: np.ones((64, 64), np.int8)})
    refused(copy, Q_PROJ, "it is stored as I8", "unquantised checkpoint")


def test_pickles_are_never_loaded(copy: Path, refused: Callable[..., str]) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(copy, "model.safetensors", "holds neither", "pickled .bin files are never loaded")


def test_a_missing_shard(copy: Path, refused: Callable[..., str]) -> None:
    shard(copy)
    (copy / SHARDS[1]).unlink()
    refused(copy, f"shard {SHARDS[1]}", "the file is missing", "download it")


def test_a_truncated_shard(copy: Path, refused: Callable[..., str]) -> None:
    shard(copy)
    content = (copy / SHARDS[1]).read_bytes()
    (copy / SHARDS[1]).write_bytes(content[:-10])
    refused(copy, SHARDS[1], "to be a whole safetensors file")


def test_a_shard_that_lacks_a_tensor(copy: Path, refused: Callable[..., str]) -> None:
    place = shard(copy)
    held = load_file(copy / place[Q_PROJ])
    del held[Q_PROJ]
    save_file(held, copy / place[Q_PROJ])
    refused(copy, f"tensor {Q_PROJ} in {place[Q_PROJ]}", "the shard does not hold it")


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "..", ".", "", "sub/x.safetensors"]
)
def test_an_index_that_leads_outside(
    copy: Path, tiny_checkpoint: Path, refused: Callable[..., str], name: str
) -> None:
    place = shard(copy)
    shutil.copy(tiny_checkpoint / "model.safetensors", copy.parent / "other.safetensors")
    (copy / INDEX).write_text(json.dumps({"weight_map": {**place, Q_PROJ: name}}))
    refused(copy, f"'{name}', which leads outside the checkpoint")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "\n"])
def test_an_index_that_names_what_no_disk_holds(
    copy: Path, refused: Callable[..., str], name: str
) -> None:
    place = shard(copy)
    (copy / INDEX).write_text(json.dumps({"weight_map": {**place, Q_PROJ: name}}))
    with pytest.raises(CheckpointError):
        open_checkpoint(copy)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "does not parse"),
        (b"[]", "holds a list"),
        (b"{}", "a weight_map"),
        (b'{"weight_map": []}', "a weight_map"),
        (b'{"weight_map": {"a": 1}}', "a weight_map"),
        (b'{"weight_map": {}}', "the checkpoint holds 0 tensors"),
    ],
)
def test_a_broken_index(copy: Path, refused: Callable[..., str], content: bytes, word: str) -> None:
    shard(copy)
    (copy / INDEX).write_bytes(content)
    refused(copy, word)


def test_a_wrong_tokenizer(copy: Path, refused: Callable[..., str]) -> None:
    pytest.importorskip("torch")
    for content in (b"", b"{}", b'{"model": {"type": "none"}}', b"\xff"):
        (copy / "tokenizer.json").write_bytes(content)
        refused(copy, "a tokenizer.json that the tokenizers library reads")


def test_a_generation_config_of_any_kind(copy: Path, refused: Callable[..., str]) -> None:
    (copy / "generation_config.json").write_text("[]")
    refused(copy, "generation_config.json to hold a JSON object")


def header(content: bytes) -> tuple[int, bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return length, content[8 : 8 + length]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_weights_file_is_read_or_refused(
    data: st.DataObject, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Header bytes changed, cut off or replaced."""
    content = (tiny_checkpoint / "model.safetensors").read_bytes()
    length, _ = header(content)
    kind = data.draw(st.sampled_from(["bytes", "cut", "random", "length"]))
    changed = bytearray(content)
    if kind == "bytes":
        places = st.tuples(st.integers(0, 7 + length), st.integers(0, 255))
        for place, byte in data.draw(st.lists(places, min_size=1, max_size=5)):
            changed[place] = byte
    elif kind == "cut":
        changed = changed[: data.draw(st.integers(0, len(content) - 1))]
    elif kind == "length":
        changed[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
    else:
        changed = bytearray(data.draw(st.binary(max_size=200)))
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    (model / "model.safetensors").write_bytes(changed)
    with contextlib.suppress(EdgeattnError):
        open_checkpoint(model)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["llama", "qwen2", "qwen3", "silu", "llama3", "linear"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_config_is_a_shape_or_refused(data: st.DataObject, tiny_checkpoint: Path) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    keys = [*config, "rope_scaling", "rope_parameters", "attention_bias", "num_key_value_heads"]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        config[key] = data.draw(values)
    with contextlib.suppress(EdgeattnError):
        assert isinstance(shape_from_config(config), ModelShape)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=100))
@example(content=b'{"a": ' + b"1" * 5000 + b"}")
@example(content=b'{"a": 1e400}')
def test_any_bytes_as_config_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(EdgeattnError):
        read_shape(tmp_path)

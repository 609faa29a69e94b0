"""GGUF files as checkpoints: shapes, weights, names, and files that are broken in every way."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgeattn.errors import CheckpointError, EdgeattnError, MissingDependencyError
from edgeattn.models.checkpoint import open_checkpoint, read_shape
from edgeattn.models.families import parameter_names
from edgeattn.models.gguf import open_gguf
from edgeattn.models.gguf_header import read_header
from edgeattn.models.gguf_metadata import recover_rope_scaling, rope_factors_of
from edgeattn.models.huggingface import shape_from_config
from edgeattn.shape import LayerKind, ModelShape, Rope, RopeScaling

SHAPE = ModelShape(
    family="llama", num_layers=2, hidden_size=256, num_heads=8, num_kv_heads=2, head_dim=32,
    intermediate_size=512, vocab_size=96, max_context=128, norm_eps=1e-5,
    layer_cycle=(LayerKind(Rope(32, 10000.0)),),
)  # fmt: skip


def shaped(head_dim: int, theta: float = 10000.0) -> ModelShape:
    """SHAPE with other heads."""
    return replace(SHAPE, head_dim=head_dim, layer_cycle=(LayerKind(Rope(head_dim, theta)),))


IN_BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
QUANTISABLE = (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)
READ_ONLY = (
    Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.TQ1_0, Kind.TQ2_0, Kind.IQ4_NL,
    Kind.IQ4_XS, Kind.IQ3_S, Kind.IQ3_XXS, Kind.IQ2_S, Kind.IQ2_XS, Kind.IQ2_XXS, Kind.IQ1_S,
    Kind.IQ1_M, Kind.MXFP4, Kind.NVFP4,
)  # fmt: skip


def random_weights(shape: ModelShape, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(size).astype(np.float32) * 0.05
        for name, size in parameter_names(shape).items()
    }


def permute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """The row order llama.cpp's converter gives q and k."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def stored_name(name: str) -> str:
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        return f"blk.{layer}.{IN_BLOCK[rest]}"
    return {
        "embed_tokens.weight": "token_embd.weight",
        "norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }[name]


def write_gguf(
    path: Path,
    shape: ModelShape = SHAPE,
    weights: Mapping[str, np.ndarray] | None = None,
    kind: Kind = Kind.F32,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, tuple[np.ndarray, Kind] | None] | None = None,
    architecture: str = "llama",
) -> Path:
    """A model file; `keys` and `tensors` replace or (None) drop what it would hold."""
    llama: dict[str, Any] = {
        "block_count": shape.num_layers,
        "context_length": shape.max_context,
        "embedding_length": shape.hidden_size,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.num_heads,
        "attention.head_count_kv": shape.num_kv_heads,
        "rope.freq_base": shape.ropes[0].theta,
        "rope.dimension_count": shape.head_dim,
        "attention.layer_norm_rms_epsilon": shape.norm_eps,
        "vocab_size": shape.vocab_size,
    }
    if shape.head_dim * shape.num_heads != shape.hidden_size:
        llama["attention.key_length"] = llama["attention.value_length"] = shape.head_dim
    values = {f"llama.{key}": value for key, value in llama.items()} | dict(keys or {})
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in values.items():
        _add_key(writer, key, value)
    held: dict[str, tuple[np.ndarray, Kind] | None] = {}
    for name, weight in (weights or random_weights(shape)).items():
        heads = {"q_proj": shape.num_heads, "k_proj": shape.num_kv_heads}.get(name.split(".")[-2])
        data = permute(weight, heads) if heads else weight
        to = kind if data.ndim > 1 else Kind.F32
        held[stored_name(name)] = (gguf.quantize(data, to), to)
    for name, tensor in {**held, **(tensors or {})}.items():
        if tensor is not None:
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_dim", [32, 64])
def test_shape_and_config_say_what_was_written(tmp_path: Path, tied: bool, head_dim: int) -> None:
    shape = replace(shaped(head_dim), tied_embeddings=tied)
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf", shape))
    assert checkpoint.shape == shape
    assert shape_from_config(json.loads(json.dumps(checkpoint.config))) == shape
    assert read_shape(tmp_path / "m.gguf") == shape
    assert checkpoint.text == {}


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_plain_types_come_back_as_they_are_stored(tmp_path: Path, kind: Kind) -> None:
    weights = random_weights(SHAPE)
    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", weights=weights, kind=kind))
    dtype = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}[kind]
    for name, weight in weights.items():
        read = checkpoint.weights.read(name)
        wanted = dtype if weight.ndim > 1 else torch.float32
        assert read.dtype == wanted
        assert torch.equal(read, torch.from_numpy(weight).to(wanted)), name
    assert checkpoint.config["torch_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("kind", QUANTISABLE, ids=lambda k: k.name)
def test_quantised_types_are_dequantised_close_to_the_originals(tmp_path: Path, kind: Kind) -> None:
    weights = random_weights(SHAPE)
    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", weights=weights, kind=kind))
    bits = int(kind.name[1])
    for name, weight in weights.items():
        read = checkpoint.weights.read(name)
        assert read.dtype == torch.float32
        step = np.abs(weight).max() * 2 / (2**bits - 1)
        assert np.abs(read.numpy() - weight).max() <= (1.01 * step if weight.ndim > 1 else 0), name
    assert checkpoint.identity["tensor_types"] == {"F32": 5, kind.name: 16}


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # random scales
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", READ_ONLY, ids=lambda k: k.name)
def test_every_type_gguf_dequantises_is_read(tmp_path: Path, kind: Kind) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = 512, 256
    raw = np.random.default_rng(1).integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
    path = write_gguf(tmp_path / "m.gguf", tensors={"blk.1.ffn_up.weight": (raw, kind)})
    read = open_gguf(path).weights.read("layers.1.mlp.up_proj.weight")
    assert read.dtype == torch.float32
    np.testing.assert_array_equal(read.numpy(), gguf.dequantize(raw, kind))


def test_large_tensors_are_dequantised_in_pieces_without_a_seam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeattn.models.gguf._CHUNK", 7 * 256)
    weights = random_weights(SHAPE)
    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", weights=weights, kind=Kind.Q4_1))
    raw = gguf.quantize(weights["embed_tokens.weight"], Kind.Q4_1)
    read = checkpoint.weights.read("embed_tokens.weight")
    np.testing.assert_array_equal(read.numpy(), gguf.dequantize(raw, Kind.Q4_1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0], ids=lambda k: k.name)
def test_transformers_reads_the_same_weights_and_config(tmp_path: Path, kind: Kind) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", kind=kind))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    theirs = model.state_dict()
    for name in parameter_names(SHAPE):
        key = name if name.startswith("lm_head") else f"model.{name}"
        assert torch.equal(checkpoint.weights.read(name).float(), theirs[key]), name
    config = LlamaConfig(**checkpoint.config)
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "vocab_size"):
        assert getattr(config, key) == getattr(model.config, key), key
    assert config.rms_norm_eps == pytest.approx(model.config.rms_norm_eps, rel=1e-7)
    assert config.rope_parameters["rope_theta"] == model.config.rope_parameters["rope_theta"]


def converter_factors(scaling: RopeScaling, theta: float, head_dim: int) -> list[float]:
    """The factors as llama.cpp's converter computes them: one at a time, frequencies in float32."""
    factors = []
    for freq in 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim):
        wavelength = 2 * math.pi / freq
        smooth = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        if wavelength < scaling.original_context / scaling.high_freq_factor:
            factors.append(1.0)
        elif wavelength > scaling.original_context / scaling.low_freq_factor:
            factors.append(scaling.factor)
        else:
            factors.append(float(1 / ((1 - smooth) / scaling.factor + smooth)))
    return factors


@pytest.mark.parametrize(
    ("scaling", "theta", "head_dim"),
    [
        (RopeScaling("llama3", 8.0, 1.0, 4.0, 8192), 500000.0, 128),  # Llama 3.1
        (RopeScaling("llama3", 32.0, 1.0, 4.0, 8192), 500000.0, 64),  # Llama 3.2
        (RopeScaling("llama3", 16.0, 1.0, 4.0, 2048), 500000.0, 128),
        (RopeScaling("llama3", 4.0, 1.0, 8.0, 6000), 500000.0, 128),
        (RopeScaling("llama3", 2.5, 1.0, 2.5, 3000), 10000.0, 128),
        (RopeScaling(), 500000.0, 128),
    ],
)
def test_llama3_scaling_is_recovered_from_its_factors(
    tmp_path: Path, scaling: RopeScaling, theta: float, head_dim: int
) -> None:
    factors = np.float32(
        converter_factors(scaling, theta, head_dim)
        if scaling.kind == "llama3"
        else [1.0] * (head_dim // 2)
    )
    assert recover_rope_scaling(factors.tolist(), theta, head_dim) == scaling
    path = write_gguf(
        tmp_path / "m.gguf",
        shaped(head_dim, theta),
        tensors={"rope_freqs.weight": (factors, Kind.F32)},
    )
    checkpoint = open_gguf(path)
    assert checkpoint.shape.ropes == (Rope(head_dim, theta, scaling),)
    assert shape_from_config(checkpoint.config) == checkpoint.shape


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rope_factors_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    factors = np.float32(converter_factors(scaling, 500000.0, 32))
    path = write_gguf(
        tmp_path / "m.gguf",
        shaped(32, 500000.0),
        tensors={"rope_freqs.weight": (factors, Kind.F32)},
    )
    config = LlamaConfig(**open_gguf(path).config)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(np.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(
        plain / rope_factors_of(scaling, 500000.0, 32), theirs.numpy(), rtol=2e-6
    )


F32 = Kind.F32
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "gptneox"}, "gptneox"),
    "experts": ({"keys": {"llama.expert_count": 8}}, "expert_count"),
    "sliding window": ({"keys": {"llama.attention.sliding_window": 64}}, "sliding_window"),
    "yarn": ({"keys": {"llama.rope.scaling.type": "yarn"}}, "yarn"),
    "linear": ({"keys": {"llama.rope.scaling.factor": 4.0}}, "linear"),
    "partial rotation": ({"keys": {"llama.rope.dimension_count": 16}}, "dimension_count"),
    "value width": ({"keys": {"llama.attention.value_length": 16}}, "value_length"),
    "heads per layer": ({"keys": {"llama.attention.head_count": [8, 8]}}, "head_count"),
    "kv heads per layer": ({"keys": {"llama.attention.head_count_kv": [2, 4]}}, "head_count_kv"),
    "widths per layer": ({"keys": {"llama.feed_forward_length": [9, 9]}}, "feed_forward_length"),
    "no layers key": ({"keys": {"llama.block_count": None}}, "block_count"),
    "text for a number": ({"keys": {"llama.block_count": "two"}}, "'two'"),
    "absurd layers": ({"keys": {"llama.block_count": 2**32 - 1}}, "block_count"),
    "no layers": ({"keys": {"llama.block_count": 0}}, "num_layers"),
    "one part of many": ({"keys": {"split.count": 3}}, "llama-gguf-split"),
    "no embedding": ({"tensors": {"token_embd.weight": None}}, "token_embd.weight"),
    "tensor missing": ({"tensors": {"blk.1.attn_k.weight": None}}, "blk.1.attn_k.weight"),
    "wrong shape": (
        {"tensors": {"blk.0.ffn_up.weight": (np.zeros((64, 256), np.float32), F32)}},
        "[512, 256]",
    ),
    "bias": (
        {"tensors": {"blk.0.attn_q.bias": (np.zeros(256, np.float32), F32)}},
        "blk.0.attn_q.bias",
    ),
    "rope factors of another kind": (
        {"tensors": {"rope_freqs.weight": (np.linspace(1, 9, 16).astype(np.float32), F32)}},
        "rope_freqs.weight",
    ),
    "rope factors of another width": (
        {"tensors": {"rope_freqs.weight": (np.ones(5, np.float32), F32)}},
        "rope_freqs.weight",
    ),
    "unreadable type": (
        {"tensors": {"blk.0.ffn_norm.weight": (np.zeros(256, np.int32), Kind.I32)}},
        "I32",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_decoder_cannot_do_is_refused_by_name(tmp_path: Path, case: str) -> None:
    arguments, named = REFUSALS[case]
    with pytest.raises(CheckpointError) as refusal:
        open_gguf(write_gguf(tmp_path / "m.gguf", **arguments))
    assert named in str(refusal.value)


def test_neutral_values_of_unsupported_keys_are_accepted(tmp_path: Path) -> None:
    keys = {
        "llama.expert_count": 0,
        "llama.rope.scaling.type": "none",
        "llama.rope.scaling.factor": 4.0,
        "llama.logit_scale": 1.0,
    }
    assert open_gguf(write_gguf(tmp_path / "m.gguf", keys=keys)).shape == SHAPE


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1", "SmolLM2-135M-Instruct"),
        ("Llama-3.2-1B-Instruct-Q4_K_M", "Llama-3.2-1B-Instruct"),
        ("tinyllama-1.1b-chat-v1.0.iq3_xxs", "tinyllama-1.1b-chat-v1.0"),
        ("model-BF16", "model"),
        ("model-UD-Q4_K_XL", "model"),
        ("plain", "plain"),
    ],
)
def test_name_drops_the_type(tmp_path: Path, file: str, name: str) -> None:
    assert open_gguf(write_gguf(tmp_path / f"{file}.gguf")).name == name


def test_a_file_that_shrinks_after_opening_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    checkpoint = open_gguf(path)
    places = read_header(path).tensors
    last = max(parameter_names(SHAPE), key=lambda name: places[stored_name(name)].offset)
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(CheckpointError, match="ends within tensor"):
        checkpoint.weights.read(last)
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.weights.read("norm.weight")


def test_identity_changes_with_header_and_size(tmp_path: Path) -> None:
    first = open_gguf(write_gguf(tmp_path / "a.gguf")).identity
    again = open_gguf(write_gguf(tmp_path / "b.gguf")).identity
    other = open_gguf(write_gguf(tmp_path / "c.gguf", keys={"general.name": "x"})).identity
    assert first["fingerprint"] == again["fingerprint"] != other["fingerprint"]
    assert first["files"] == {"a.gguf": (tmp_path / "a.gguf").stat().st_size}
    assert first["format"] == "gguf"


def test_without_the_gguf_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(MissingDependencyError, match=r"edgeattn\[export\]"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("start", "named"),
    [
        (b"", "empty"),
        (b"GG", "magic"),
        (b"GGML\x03\0\0\0", "GGUF"),
        (b"GGUF\x01\0\0\0", "version 1"),
        (b"GGUF\x63\0\0\0", "version 99"),
        (b"GGUF\0\0\0\x03", "big-endian"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, start: bytes, named: str) -> None:
    (tmp_path / "m.gguf").write_bytes(start)
    with pytest.raises(CheckpointError) as refusal:
        open_gguf(tmp_path / "m.gguf")
    assert named in str(refusal.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small whole file with a tokenizer."""
    tokens = ["<s>", "</s>", "a", "b", "ab", "\u0120"]
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }
    shape = ModelShape(
        family="llama", num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16,
        intermediate_size=32, vocab_size=6, max_context=64, norm_eps=1e-5,
        layer_cycle=(LayerKind(Rope(16, 10000.0)),),
    )  # fmt: skip
    factors = np.float32(converter_factors(RopeScaling("llama3", 8.0), 10000.0, 16))
    path = tmp_path_factory.mktemp("whole") / "m.gguf"
    tensors = {"rope_freqs.weight": (factors, Kind.F32)}
    return write_gguf(path, shape, kind=Kind.Q4_0, keys=keys, tensors=tensors).read_bytes()


def _open_all(data: bytes, directory: Path) -> None:
    """Opens the bytes as a file and reads every weight; only our own errors may come out."""
    path = directory / "m.gguf"
    path.write_bytes(data)
    try:
        checkpoint = open_gguf(path)
        for name in parameter_names(checkpoint.shape):
            checkpoint.weights.read(name)
    except EdgeattnError:
        return


FUZZ = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(whole: bytes, tmp_path: Path, cut: float) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(CheckpointError):
        open_gguf(path)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflow in damaged scales
@FUZZ
@given(data=st.data())
def test_flipped_bytes_end_in_one_sentence_at_most(
    whole: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    header = whole.index(b"rope_freqs.weight") + 60
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    _open_all(bytes(damaged), tmp_path)


def test_header_says_what_the_gguf_package_reads(smollm2_gguf: Path) -> None:
    ours, theirs = read_header(smollm2_gguf), gguf.GGUFReader(smollm2_gguf)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            expected = field.contents()
            if isinstance(expected, float):
                expected = pytest.approx(expected, rel=1e-7)
            assert ours.metadata.values[key] == expected, key
    assert len(ours.metadata.values) == theirs.fields["GGUF.kv_count"].contents()
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.kind, info.offset, info.size) == (
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_smollm2_equals_transformers(smollm2_gguf: Path) -> None:
    from transformers import AutoModelForCausalLM

    checkpoint = open_gguf(smollm2_gguf)
    assert checkpoint.name == "SmolLM2-135M-Instruct"
    assert checkpoint.identity["tensor_types"] == {"F32": 61, "Q4_1": 210, "Q8_0": 1}
    assert checkpoint.shape.norm_eps == 1e-5
    assert checkpoint.shape.num_parameters == 134_515_008
    model = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    theirs = model.state_dict()
    names = parameter_names(checkpoint.shape)
    assert {f"model.{n}" for n in names} == set(theirs) - {"lm_head.weight"}
    for name in names:
        assert torch.equal(checkpoint.weights.read(name), theirs[f"model.{name}"]), name


def test_reading_keeps_no_earlier_tensor_in_memory(smollm2_gguf: Path) -> None:
    script = """
import sys
from pathlib import Path
import gguf, torch
from edgeattn.models.families import parameter_names
from edgeattn.models.gguf import open_gguf

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

checkpoint = open_gguf(Path(sys.argv[1]))
before = resident()
most = 0
for name in parameter_names(checkpoint.shape):
    tensor = checkpoint.weights.read(name)
    most = max(most, resident() - tensor.nbytes - before)
print(most)
"""
    if not Path("/proc/self/statm").is_file():
        pytest.skip("resident memory is read from /proc")
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, str(smollm2_gguf)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    # The weights are 538 MB in float32 and the file 98 MB: less than either stays resident.
    assert int(done.stdout) < 64 << 20

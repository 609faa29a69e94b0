"""`edgeattn quantize`: transformers computes with its files what our quantised model computes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import gguf
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgeattn.bundle import bundle as layout
from edgeattn.calibration.store import LayerStore
from edgeattn.devices.registry import parse_target
from edgeattn.models import hf_writer
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.families import parameter_names
from edgeattn.models.model import TORCH_DTYPES, Model, load_decoder, rounded
from edgeattn.pipeline import quantize_checkpoint
from edgeattn.pipeline.clock import Clock
from edgeattn.pipeline.transform import Transformed, transform
from edgeattn.planner.lowering import Lowering, plan_lowering
from edgeattn.recipe import Recipe

TOLERANCE = 1e-4
# transformers puts those of its defaults beyond this vocabulary
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1]},
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False, "sliding_window": None},
}
SENTENCE = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n"


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: Callable[..., Path]) -> Callable[[str], Path]:
    """A function from a family to a random checkpoint."""
    return lambda name: random_checkpoint(**{**TOKENS, **MODELS[name]})


@pytest.fixture
def text(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "text.txt"
    file.write_text(SENTENCE * 40)
    yield file
    file.unlink()


def quantised(path: Path, quant: str, work: Path, dtype: str = "fp32", **fields: Any) -> Model:
    """The model that a bundle of the same scheme and dtype would hold."""
    recipe = Recipe("cpu", quant=quant, **fields)
    lowering = plan_lowering(recipe, parse_target("cpu"))
    lowering = replace(lowering, attention="standard", kv_cache="concat", dtype=dtype)  # type: ignore[arg-type]
    return transform(open_checkpoint(path), recipe, lowering, work, Clock(None)).model


@torch.inference_mode()
def our_logits(model: Model, ids: Tensor) -> Tensor:
    decoder = load_decoder(model, weight_dtype=torch.float32, compute_dtype=torch.float32)
    positions = torch.arange(ids.shape[1]).unsqueeze(0)
    logits: Tensor = decoder(ids, torch.ones_like(ids), positions, decoder.empty_cache(1)).logits
    return logits


@torch.inference_mode()
def their_logits(path: Path, ids: Tensor) -> Tensor:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    logits: Tensor = model.eval()(ids).logits
    return logits


def check_equal(copy: Path, model: Model, original: Path) -> None:
    """The copy gives the model's logits, and not the original's."""
    ids = torch.randint(3, 256, (1, 30))
    found = their_logits(copy, ids)
    torch.testing.assert_close(found, our_logits(model, ids), atol=TOLERANCE, rtol=0)
    assert (found - their_logits(original, ids)).abs().max() > 10 * TOLERANCE


def sentence(done: Any, exit_code: int) -> str:
    """The one sentence of a refusal."""
    assert done.exit_code == exit_code, done.output
    assert "internal error" not in done.stderr
    line: str = done.stderr.strip().splitlines()[-1]
    assert line.startswith("edgeattn: expected ")
    return line


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("quant", ["w8-rtn", "w4-rtn"])
@pytest.mark.parametrize("name", MODELS)
def test_transformers_computes_the_same(
    name: str,
    quant: str,
    checkpoint: Callable[[str], Path],
    edgeattn: Callable[..., Any],
    tmp_path: Path,
) -> None:
    path, copy = checkpoint(name), tmp_path / "copy"
    done = edgeattn("quantize", path, "--quant", quant, "-o", copy)
    assert done.exit_code == 0, done.output
    assert f"{quant} dequantised to fp32" in done.stdout
    assert names(tmp_path) == ["copy"]
    assert names(copy) == ["config.json", "edgeattn.json", "model.safetensors", "tokenizer.json"]
    check_equal(copy, quantised(path, quant, tmp_path / "work"), path)


@pytest.mark.parametrize("quant", ["w4a16-gptq:group=32", "w4a16-spinquant:group=32"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3"])
def test_calibrated(
    name: str,
    quant: str,
    checkpoint: Callable[[str], Path],
    edgeattn: Callable[..., Any],
    text: Path,
    tmp_path: Path,
) -> None:
    path, copy = checkpoint(name), tmp_path / "copy"
    options = ("--calibration", text, "--calibration-windows", 2)
    done = edgeattn("quantize", path, "--quant", quant, "-o", copy, *options)
    assert done.exit_code == 0, done.output
    assert names(tmp_path) == ["copy", "text.txt"]
    fields = {"calibration": str(text), "calibration_windows": 2}
    model = quantised(path, quant, tmp_path / "work", **fields)
    check_equal(copy, model, path)
    config = json.loads((copy / "config.json").read_text())
    assert config["tie_word_embeddings"] is model.shape.tied_embeddings
    about = json.loads((copy / "edgeattn.json").read_text())
    assert about["scheme"]["label"] == quant
    assert about["transforms"]["calibration"]["windows"] == 2
    assert ("rotation" in about["transforms"]) == ("spinquant" in quant)


def test_int8_activations_are_left_out(
    checkpoint: Callable[[str], Path], edgeattn: Callable[..., Any], text: Path, tmp_path: Path
) -> None:
    path, copy, quant = checkpoint("llama"), tmp_path / "copy", "w8a8:keep=0"
    options = ("--calibration", text, "--calibration-windows", 2)
    done = edgeattn("quantize", path, "--quant", quant, "-o", copy, *options)
    assert done.exit_code == 0, done.output
    assert "activations are not rounded in this copy" in done.stdout
    fields = {"calibration": str(text), "calibration_windows": 2}
    model = quantised(path, quant, tmp_path / "work", **fields)
    check_equal(copy, replace(model, reads={}), path)
    about = json.loads((copy / "edgeattn.json").read_text())
    assert about["activations"] == "not rounded in this copy"
    assert about["activation_scales"] == {n: read.scale for n, read in model.reads.items()}
    assert len(about["activation_scales"]) == 3 * 7


@pytest.mark.parametrize(
    ("quant", "not_rounded"),
    [
        ("w8a8-spinquant:online=off,keep=0", ("activations",)),
        ("w4a16-spinquant:group=32,kv=int8", ("keys and values",)),
        ("w8a8-spinquant:online=off,kv=int8", ("activations", "keys and values")),
    ],
)
def test_what_runs_at_run_time_is_in_the_report(
    quant: str,
    not_rounded: tuple[str, ...],
    checkpoint: Callable[[str], Path],
    edgeattn: Callable[..., Any],
    text: Path,
    tmp_path: Path,
) -> None:
    path, copy = checkpoint("llama"), tmp_path / "copy"
    options = ("--calibration", text, "--calibration-windows", 2)
    done = edgeattn("quantize", path, "--quant", quant, "-o", copy, *options)
    assert done.exit_code == 0, done.output
    assert f"{' and '.join(not_rounded)} are not rounded in this copy" in done.stdout
    fields = {"calibration": str(text), "calibration_windows": 2}
    model = quantised(path, quant, tmp_path / "work", **fields)
    check_equal(copy, replace(model, reads={}, caches={}), path)
    about = json.loads((copy / "edgeattn.json").read_text())
    for part in ("activations", "keys and values"):
        expected = "not rounded in this copy" if part in not_rounded else "as they are"
        assert about.get(part, "as they are") == expected
    scales = {n: read.scale for n, read in model.reads.items() if read.scale is not None}
    assert about["activation_scales"] == scales
    caches = {str(layer): list(cache.scales) for layer, cache in model.caches.items()}
    assert about["cache_scales"] == caches
    assert bool(scales) == ("activations" in not_rounded)
    assert len(caches) == (3 if "keys and values" in not_rounded else 0)
    assert about["transforms"]["rotation"]["R1, of the residual stream"] == "Hadamard of 64, full"
    assert ("int8 cache" in about["transforms"]) == ("keys and values" in not_rounded)


def test_learned_rotations_are_kept(
    checkpoint: Callable[[str], Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For --rotations of a later command; transformers looks past the file."""

    def learning(
        checkpoint: Any, recipe: Recipe, lowering: Lowering, work: Path, clock: Clock
    ) -> Transformed:
        (work / layout.ROTATIONS).write_bytes(b"learned")
        scheme = replace(lowering.scheme, rotation="none", method="rtn")
        return transform(checkpoint, recipe, replace(lowering, scheme=scheme), work, clock)

    monkeypatch.setattr("edgeattn.pipeline.quantize.transform", learning)
    copy, quant = tmp_path / "copy", "w4a16-spinquant-learned:group=32"
    quantize_checkpoint(checkpoint("llama"), Recipe("cpu", quant, calibration=str(text)), copy)
    assert (copy / layout.ROTATIONS).read_bytes() == b"learned"
    assert names(tmp_path) == ["copy", "text.txt"]
    assert their_logits(copy, torch.arange(9).unsqueeze(0)).isfinite().all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_dtypes_hold_what_a_bundle_holds(
    dtype: str, checkpoint: Callable[[str], Path], edgeattn: Callable[..., Any], tmp_path: Path
) -> None:
    path, copy = checkpoint("qwen2"), tmp_path / "copy"
    done = edgeattn("quantize", path, "--quant", "w4-rtn", "--dtype", dtype, "-o", copy, "--json")
    assert json.loads(done.stdout)["dtype"] == dtype
    model, found = quantised(path, "w4-rtn", tmp_path, dtype), open_checkpoint(copy)
    for name in parameter_names(model.shape):
        expected = rounded(name, model.weights.read(name), TORCH_DTYPES[dtype])
        torch.testing.assert_close(found.weights.read(name), expected, atol=0, rtol=0, msg=name)


def test_a_scheme_of_no_quantisation_copies(
    checkpoint: Callable[[str], Path], edgeattn: Callable[..., Any], tmp_path: Path
) -> None:
    path, copy = checkpoint("phi3"), tmp_path / "copy"
    done = edgeattn("quantize", path, "--quant", "none", "-o", copy)
    assert done.exit_code == 0, done.output
    found = load_file(copy / "model.safetensors")
    for name, tensor in load_file(path / "model.safetensors").items():
        torch.testing.assert_close(found.pop(name), tensor, atol=0, rtol=0)
    assert not found


def test_a_gguf(
    checkpoint: Callable[[str], Path], edgeattn: Callable[..., Any], tmp_path: Path
) -> None:
    source, copy = checkpoint("llama"), tmp_path / "copy"
    path = write_gguf(tmp_path / "tiny-F32.gguf", source)
    done = edgeattn("quantize", path, "--quant", "w8-rtn", "-o", copy)
    assert done.exit_code == 0, done.output
    config = json.loads((copy / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    assert config["architectures"] == ["LlamaForCausalLM"]
    # The same weights in a Hugging Face directory, to catch rows in a wrong order.
    check_equal(copy, quantised(source, "w8-rtn", tmp_path), source)


@pytest.mark.slow
def test_a_real_gguf(smollm2_gguf: Path, edgeattn: Callable[..., Any], tmp_path: Path) -> None:
    """With its tokenizer and a weight file of half a gigabyte."""
    copy = tmp_path / "copy"
    done = edgeattn("quantize", smollm2_gguf, "--quant", "w8-rtn", "-o", copy)
    assert done.exit_code == 0, done.output
    tokenizer = transformers.AutoTokenizer.from_pretrained(copy)
    ids = tokenizer(SENTENCE, return_tensors="pt").input_ids
    expected = our_logits(quantised(smollm2_gguf, "w8-rtn", tmp_path), ids)
    torch.testing.assert_close(their_logits(copy, ids), expected, atol=1e-3, rtol=0)


def write_gguf(path: Path, source: Path) -> Path:
    """A Llama as llama.cpp stores it: names, and the rows of q and k, are its own."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    for name, tensor in load_file(source / "model.safetensors").items():
        kind = name.split(".")[-2]
        if kind in heads:
            tensor = tensor.unflatten(0, (config[heads[kind]], 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy()
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_report(
    checkpoint: Callable[[str], Path], edgeattn: Callable[..., Any], tmp_path: Path
) -> None:
    path, copy = checkpoint("llama"), tmp_path / "copy"
    (tmp_path / "source").mkdir()
    for file in path.iterdir():
        shutil.copy(file, tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text('{"temperature": 0.5}')
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    done = edgeattn(
        "quantize", tmp_path / "source", "--quant", "w4-rtn:group=32", "-o", copy, "--json"
    )
    report = json.loads(done.stdout)
    assert report["checkpoint"] == str(copy)
    assert report["scheme"]["label"] == "w4-rtn:group=32"
    assert report["weight_files"] == {
        "model.safetensors": (copy / "model.safetensors").stat().st_size
    }
    assert {"reading the checkpoint", "writing the weights"} == report["seconds"].keys()
    about = json.loads((copy / "edgeattn.json").read_text())
    assert about["model"] == "source"
    assert about["source"] == open_checkpoint(tmp_path / "source").identity
    assert about["scheme"] == report["scheme"]
    assert about["activations"] == "as they are"
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (copy / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    assert json.loads((copy / "generation_config.json").read_text()) == {"temperature": 0.5}
    source = json.loads((path / "config.json").read_text())
    config = json.loads((copy / "config.json").read_text())
    assert config == {**source, "torch_dtype": "float32"}


@pytest.mark.parametrize(
    ("quant", "options", "exit_code", "words"),
    [
        ("w4-rnt", (), 2, ("did you mean w4-rtn",)),
        ("w4-rtn", ("--dtype", "fp15"), 2, ("a known dtype",)),
        ("w4-rtn:group=128", (), 1, ("divides the 64 inputs", "128")),
        ("w4a16-gptq:group=32", (), 2, ("--calibration FILE",)),
        (
            "w8a8-spinquant:keep=0",
            ("--calibration", "absent"),
            1,
            ("at run time", "--quant w8a8-spinquant:keep=0,online=off"),
        ),
    ],
)
def test_refusals(
    quant: str,
    options: tuple[str, ...],
    exit_code: int,
    words: tuple[str, ...],
    checkpoint: Callable[[str], Path],
    edgeattn: Callable[..., Any],
    tmp_path: Path,
) -> None:
    path, output = checkpoint("llama"), tmp_path / "copy"
    done = edgeattn("quantize", path, "--quant", quant, "-o", output, *options)
    line = sentence(done, exit_code)
    assert all(word in line for word in words), line
    assert names(tmp_path) == []


def test_what_must_be_named(edgeattn: Callable[..., Any], tmp_path: Path) -> None:
    done = edgeattn("quantize", tmp_path, "-o", tmp_path / "copy")
    assert done.exit_code == 2
    assert "--quant" in done.stderr
    done = edgeattn("quantize", tmp_path, "--quant", "w8-rtn")
    assert done.exit_code == 2
    assert "--output" in done.stderr


def test_a_rotation_that_a_family_has_no_place_for(
    random_checkpoint: Callable[..., Path],
    edgeattn: Callable[..., Any],
    text: Path,
    tmp_path: Path,
) -> None:
    path = random_checkpoint(model_type="gemma2", hidden_activation="gelu_pytorch_tanh")
    options = ("--quant", "w4a16-spinquant:group=32", "--calibration", text)
    line = sentence(edgeattn("quantize", path, *options, "-o", tmp_path / "copy"), 1)
    assert "no rotation commutes with" in line
    assert names(tmp_path) == ["text.txt"]


def test_too_small_a_disk(
    checkpoint: Callable[[str], Path],
    edgeattn: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    options = ("--quant", "w8-rtn", "-o", tmp_path / "copy")
    line = sentence(edgeattn("quantize", checkpoint("llama"), *options), 1)
    assert "0.5 MB of free disk" in line
    assert "0.1 MB are free" in line
    assert names(tmp_path) == []


def test_the_disk_must_hold_finished_layers_too(
    checkpoint: Callable[[str], Path],
    edgeattn: Callable[..., Any],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The copy alone takes 0.52 MB."""
    usage = shutil.disk_usage(tmp_path)._replace(free=550_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    options = ("-o", tmp_path / "copy", "--calibration", text, "--calibration-windows", 2)
    line = sentence(edgeattn("quantize", checkpoint("llama"), *options, "--quant", "w8a8"), 1)
    assert "0.6 MB of free disk" in line
    assert names(tmp_path) == ["text.txt"]
    assert edgeattn("quantize", checkpoint("llama"), *options, "--quant", "w8-rtn").exit_code == 0


def test_without_torch(
    edgeattn: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    missing = lambda name, *a: None if name == "torch" else find(name, *a)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    done = edgeattn("quantize", tmp_path, "--quant", "w8-rtn", "-o", tmp_path / "copy")
    assert "pip install 'edgeattn[export]'" in sentence(done, 1)


def test_force(
    checkpoint: Callable[[str], Path], edgeattn: Callable[..., Any], tmp_path: Path
) -> None:
    path, copy = checkpoint("llama"), tmp_path / "copy"
    assert edgeattn("quantize", path, "--quant", "w8-rtn", "-o", copy).exit_code == 0
    again = ("quantize", path, "--quant", "w4-rtn", "-o", copy)
    line = sentence(edgeattn(*again), 1)
    assert "a quantised checkpoint is already there" in line
    assert "--force" in line
    assert json.loads((copy / "edgeattn.json").read_text())["scheme"]["name"] == "w8-rtn"
    assert edgeattn(*again, "--force").exit_code == 0
    assert json.loads((copy / "edgeattn.json").read_text())["scheme"]["name"] == "w4-rtn"
    assert names(tmp_path) == ["copy"]


def test_only_a_copy_is_ever_replaced(
    checkpoint: Callable[[str], Path], edgeattn: Callable[..., Any], tmp_path: Path
) -> None:
    """Least of all the original."""
    path = tmp_path / "model"
    shutil.copytree(checkpoint("llama"), path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    done = edgeattn("quantize", path, "--quant", "w8-rtn", "-o", path, "--force")
    assert "something that is no quantised checkpoint is there" in sentence(done, 1)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_copy_over_itself(
    checkpoint: Callable[[str], Path], edgeattn: Callable[..., Any], tmp_path: Path
) -> None:
    """A copy may be its own source: its files are read until they are replaced."""
    copy = tmp_path / "copy"
    options = ("--quant", "w8-rtn", "-o", copy)
    assert edgeattn("quantize", checkpoint("llama"), *options).exit_code == 0
    done = edgeattn("quantize", copy, *options, "--force")
    assert done.exit_code == 0, done.output
    ids = torch.arange(3, 30).unsqueeze(0)
    assert their_logits(copy, ids).isfinite().all()
    assert names(tmp_path) == ["copy"]


def test_a_bad_weight_leaves_nothing(
    checkpoint: Callable[[str], Path], edgeattn: Callable[..., Any], tmp_path: Path
) -> None:
    path, output = tmp_path / "model", tmp_path / "copy"
    shutil.copytree(checkpoint("llama"), path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, path / "model.safetensors")
    line = sentence(edgeattn("quantize", path, "--quant", "w8-rtn", "-o", output), 1)
    assert "layers.2.mlp.up_proj.weight" in line
    assert names(tmp_path) == ["model"]


def test_interrupted_while_writing(
    checkpoint: Callable[[str], Path],
    edgeattn: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = hf_writer._stored_values

    def interrupted(model: Model, name: str, *rest: Any) -> Tensor:
        if name.startswith("layers.1"):
            raise KeyboardInterrupt
        return values(model, name, *rest)

    monkeypatch.setattr(hf_writer, "_stored_values", interrupted)
    options = ("--quant", "w8-rtn", "-o", tmp_path / "copy")
    done = edgeattn("quantize", checkpoint("llama"), *options)
    assert done.exit_code == 130
    assert "nothing half-written was left behind" in done.stderr
    assert names(tmp_path) == []


def test_interrupted_work_goes_on(
    checkpoint: Callable[[str], Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finished layers wait beside the place, are not made again, and go when the copy is there."""
    path, copy = checkpoint("llama"), tmp_path / "copy"
    fields = {"calibration": str(text), "calibration_windows": 2}
    recipe = Recipe("cpu", quant="w4a16-gptq:group=32", **fields)
    write, made = LayerStore.write, []

    def counted(self: LayerStore, layer: int, *rest: Any) -> None:
        if layer == 2 and len(made) == 2:
            made.append(-1)
            raise KeyboardInterrupt
        write(self, layer, *rest)
        made.append(layer)

    monkeypatch.setattr(LayerStore, "write", counted)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(path, recipe, copy)
    assert names(tmp_path) == [".copy.layers", "text.txt"]
    stages: list[str] = []
    report = quantize_checkpoint(
        path, recipe, copy, progress=lambda stage, *_: stages.append(stage)
    )
    assert made == [0, 1, -1, 2]
    assert names(tmp_path) == ["copy", "text.txt"]
    assert list(dict.fromkeys(stages)) == list(report.seconds)
    check_equal(copy, quantised(path, recipe.quant, tmp_path / "work", **fields), path)

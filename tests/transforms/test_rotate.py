"""Rotations change no number a model gives; every wrong way to merge them is caught."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import Tensor
from wrapped_weights import changed

from edgeattn.devices.registry import parse_target
from edgeattn.errors import CheckpointError, LoweringError, ProofError
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.families import EMBEDDING, FINAL_NORM, LM_HEAD, parameter_names
from edgeattn.models.model import Model, load_decoder, model_of
from edgeattn.models.stream import Head, final_hidden
from edgeattn.planner.lowering import fit_lowering, plan_lowering
from edgeattn.quant.hadamard import HadamardFactors
from edgeattn.recipe import Recipe
from edgeattn.shape import ModelShape
from edgeattn.transforms.rotate import (
    Rotations,
    check_equivalence,
    fold_norms,
    hadamard_rotations,
    rotate,
)

TOLERANCE = 1e-4
# Keys beside those of the tiny Llama: 64 wide, 128 in the MLP, 4 heads of 16 on 2 KV heads, tied.
MODELS: dict[str, dict[str, Any]] = {
    "llama-tied": {},
    "llama-untied": {"tie_word_embeddings": False},
    "llama-mha-of-48": {
        "hidden_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "intermediate_size": 80,
    },
    "llama-blocks": {"hidden_size": 92, "intermediate_size": 172},  # full matrices are not known
    "llama-fp16": {"dtype": "float16"},
    "mistral-window": {"model_type": "mistral", "sliding_window": 4},
    "qwen2-tied": {"model_type": "qwen2", "num_key_value_heads": 1},
    "qwen2-untied": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3-heads-of-24": {"model_type": "qwen3", "hidden_size": 96, "head_dim": 24},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "phi3-partial-rotary": {
        "model_type": "phi3",
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
    },
}
GEMMA2 = {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4}


@pytest.fixture
def model_named(random_checkpoint: Callable[..., Path]) -> Callable[[str], Model]:
    """A function from a name in `MODELS` to the model."""
    return lambda name: model_of(open_checkpoint(random_checkpoint(**MODELS[name])))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, model_named: Callable[[str], Model]) -> Model:
    return model_named(request.param)


@pytest.fixture
def llama(model_named: Callable[[str], Model]) -> Model:
    return model_named("llama-tied")


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(0, 272, (2, 19))


@torch.inference_mode()
def decoder_logits(model: Model, windows: Tensor) -> Tensor:
    """Of the whole decoder at once, with a prefill and a decode step."""
    decoder = load_decoder(model, weight_dtype=torch.float32, compute_dtype=torch.float32)
    past, found, rows = decoder.empty_cache(len(windows)), [], len(windows)
    for begin, end in ((0, 12), (12, windows.shape[1])):
        mask = torch.ones(rows, end, dtype=torch.int64)
        positions = torch.arange(begin, end).expand(rows, -1)
        output = decoder(windows[:, begin:end], mask, positions, past)
        past = output.present
        found.append(output.logits)
    return torch.cat(found, dim=1)


def streamed_logits(model: Model, windows: Tensor) -> Tensor:
    return Head(model).logits(final_hidden(model, windows))


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q


def random_rotations(shape: ModelShape, down: HadamardFactors | None = None) -> Rotations:
    """Not symmetric, so that a matrix and its inverse are told apart."""
    heads = tuple(orthogonal(shape.head_dim) for _ in range(shape.num_layers))
    return Rotations(orthogonal(shape.hidden_size), heads, down)


@pytest.mark.parametrize("online", [False, True], ids=["merged", "online"])
def test_hadamard_rotations_change_no_logit(model: Model, windows: Tensor, online: bool) -> None:
    rotations = hadamard_rotations(model.shape, online=online)
    rotated = rotate(model, rotations)
    found, expected = (decoder_logits(m, windows) for m in (rotated, model))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    result = check_equivalence(model, rotated, rotations, windows)
    assert result.logit_difference < TOLERANCE
    assert result.tokens == windows.numel()


def test_any_orthogonal_matrices_change_no_logit(model: Model, windows: Tensor) -> None:
    rotations = random_rotations(model.shape, hadamard_rotations(model.shape, online=True).down)
    rotated = rotate(model, rotations)
    found, expected = (decoder_logits(m, windows) for m in (rotated, model))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    check_equivalence(model, rotated, rotations, windows)


@pytest.mark.parametrize("part", ["residual", "heads", "down"])
def test_each_rotation_alone_changes_no_logit(
    model_named: Callable[[str], Model], windows: Tensor, part: str
) -> None:
    model = model_named("qwen2-tied")
    whole = random_rotations(model.shape, hadamard_rotations(model.shape, online=True).down)
    rotations = Rotations(**{part: getattr(whole, part)})
    check_equivalence(model, rotate(model, rotations), rotations, windows)


def test_another_seed_is_another_rotation_and_the_same_function(
    llama: Model, windows: Tensor
) -> None:
    first, second = (hadamard_rotations(llama.shape, online=True, seed=s) for s in (0, 100))
    assert first.residual is not None
    assert second.residual is not None
    assert not torch.equal(first.residual, second.residual)
    assert not torch.equal(first.heads[0], first.heads[1])
    check_equivalence(llama, rotate(llama, second), second, windows)


@pytest.mark.parametrize(("name", "blocks"), [("llama-tied", 1), ("llama-blocks", 43)])
def test_where_no_full_hadamard_matrix_is_known_blocks_are_rotated(
    model_named: Callable[[str], Model], name: str, blocks: int
) -> None:
    down = hadamard_rotations(model_named(name).shape, online=True).down
    assert down is not None
    assert (down.blocks, down.full) == (blocks, blocks == 1)


def test_folding_moves_the_gains_and_changes_no_logit(model: Model, windows: Tensor) -> None:
    folded = fold_norms(model)
    found, expected = (decoder_logits(m, windows) for m in (folded, model))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    for name in parameter_names(folded.shape):
        value = folded.weights.read(name)
        assert isinstance(value, Tensor)
        if name == FINAL_NORM or name.endswith("layernorm.weight"):
            assert (value == 1).all()
        elif name.endswith(("q_norm.weight", "k_norm.weight", "o_proj.weight", ".bias")):
            assert torch.equal(value, read(model, name).float())
    assert not folded.reads


def test_the_head_gets_a_matrix_of_its_own(llama: Model) -> None:
    rotated = rotate(llama, Rotations())
    assert not rotated.shape.tied_embeddings
    assert torch.equal(read(rotated, EMBEDDING), read(llama, EMBEDDING))
    expected = read(llama, EMBEDDING).double() * read(llama, FINAL_NORM).double()
    assert torch.equal(read(rotated, LM_HEAD), expected.float())


def test_rotations_really_rotate(llama: Model) -> None:
    """The residual stream of the rotated model is that of the original one times R1."""
    rotations = random_rotations(llama.shape)
    rotated = rotate(llama, rotations)
    windows = torch.randint(0, 272, (2, 9))
    found, plain = final_hidden(rotated, windows), final_hidden(llama, windows)
    assert rotations.residual is not None
    expected = (plain.double() @ rotations.residual).float()
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert (found - plain).abs().max() > 0.1


@pytest.mark.parametrize("name", ["qwen2-tied", "qwen2-untied", "llama-blocks"])
def test_merged_weights_are_the_products_in_fp64_rounded_once(
    model_named: Callable[[str], Model], name: str
) -> None:
    model = model_named(name)
    down = hadamard_rotations(model.shape, online=True).down
    rotations = random_rotations(model.shape, down)
    rotated = rotate(model, rotations)
    for parameter in parameter_names(rotated.shape):
        exact = brute_force(model, rotations, parameter)
        found = read(rotated, parameter)
        assert found.dtype == torch.float32
        # Half a unit in the last place, and what sums of hundreds of fp64 numbers lose.
        allowed = exact.abs() * 2**-24 + exact.abs().max() * 1e-13
        assert ((found.double() - exact).abs() <= allowed).all(), parameter


def test_a_merge_in_fp32_would_be_seen(llama: Model) -> None:
    """The bound of the test above is only worth something if cheaper arithmetic exceeds it."""
    rotations = random_rotations(llama.shape)
    assert rotations.residual is not None
    exact = brute_force(llama, rotations, "layers.0.mlp.down_proj.weight")
    weight = read(llama, "layers.0.mlp.down_proj.weight")
    cheap = rotations.residual.float().T @ weight
    allowed = exact.abs() * 2**-24 + exact.abs().max() * 1e-13
    assert not ((cheap.double() - exact).abs() <= allowed).all()


def read(model: Model, name: str) -> Tensor:
    value = model.weights.read(name)
    assert isinstance(value, Tensor)
    return value


def brute_force(model: Model, rotations: Rotations, name: str) -> Tensor:
    """A parameter of the rotated model as products of whole matrices, fp64."""
    shape, residual = model.shape, rotations.residual
    assert residual is not None
    if name == EMBEDDING:
        return read(model, name).double() @ residual
    if name == LM_HEAD:
        table = read(model, EMBEDDING if shape.tied_embeddings else LM_HEAD).double()
        return table @ read(model, FINAL_NORM).double().diag() @ residual
    weight = read(model, name).double()
    if name == FINAL_NORM or name.endswith("layernorm.weight"):
        return torch.ones_like(weight)
    layer = int(name.split(".")[1])
    head = rotations.heads[layer]
    per_kv_head = torch.block_diag(*[head] * shape.num_kv_heads)
    per_head = torch.block_diag(*[head] * shape.num_heads)
    if name.endswith("v_proj.bias"):
        return per_kv_head.T @ weight
    if name.endswith(("q_proj.bias", "k_proj.bias")):
        return weight
    if name.endswith("o_proj.weight"):
        return residual.T @ weight @ per_head
    if name.endswith("down_proj.weight"):
        merged = residual.T @ weight
        return merged if rotations.down is None else merged @ online_matrix(rotations.down)
    norm = "input" if "self_attn" in name else "post_attention"
    gain = read(model, f"layers.{layer}.{norm}_layernorm.weight").double()
    merged = weight @ gain.diag() @ residual
    return per_kv_head.T @ merged if name.endswith("v_proj.weight") else merged


def online_matrix(factors: HadamardFactors) -> Tensor:
    one = torch.kron(factors.left, factors.right)
    return torch.block_diag(*[one / len(one) ** 0.5] * factors.blocks)


def test_without_online_leaves_those_layers_unrotated(llama: Model, windows: Tensor) -> None:
    rotations = hadamard_rotations(llama.shape, online=True)
    names = [f"layers.{i}.mlp.down_proj.weight" for i in range(3)]
    rotated = rotate(llama, rotations, without_online=frozenset(names[1:2]))
    merged = rotate(llama, replace(rotations, down=None))
    everywhere = rotate(llama, rotations)
    assert set(rotated.reads) == {names[0], names[2]}
    assert torch.equal(read(rotated, names[1]), read(merged, names[1]))
    for name in (names[0], names[2]):
        assert torch.equal(read(rotated, name), read(everywhere, name))
        assert not torch.equal(read(rotated, name), read(merged, name))
        assert rotated.reads[name].rotation is rotations.down
    check_equivalence(llama, rotated, rotations, windows)


def test_the_figures_of_a_comparison(llama: Model, windows: Tensor) -> None:
    rotations = random_rotations(llama.shape)
    rotated = rotate(llama, rotations)
    result = check_equivalence(llama, rotated, rotations, windows)
    found, expected = (streamed_logits(m, windows) for m in (rotated, llama))
    assert result.logit_difference == float((found - expected).abs().max())
    assert result.logit_rms == pytest.approx(float(expected.square().mean().sqrt()))
    assert 0 < result.orthogonality_error < 1e-12
    assert json.loads(json.dumps(result.to_dict())) == {
        "logit_difference": result.logit_difference,
        "logit_rms": result.logit_rms,
        "orthogonality_error": result.orthogonality_error,
        "tokens": 38,
    }
    assert Rotations().orthogonality_error() == 0


def test_a_weight_that_is_not_finite_is_still_refused(llama: Model) -> None:
    broken = changed(llama, lambda name, value: value / 0 if name == EMBEDDING else value)
    rotated = rotate(broken, hadamard_rotations(llama.shape, online=False))
    with pytest.raises(CheckpointError):
        load_decoder(rotated, weight_dtype=torch.float32, compute_dtype=torch.float32)


def mixed(model: Model, other: Model, *endings: str) -> Model:
    """The model with the parameters of those endings from another one."""
    return changed(model, lambda n, value: read(other, n) if n.endswith(endings) else value)


def _one_sided(model: Model, rotations: Rotations) -> Model:
    """R1 on what reads the residual stream and not on what writes it."""
    half = rotate(model, replace(rotations, residual=None))
    return mixed(rotate(model, rotations), half, "o_proj.weight", "down_proj.weight")


def _embedding_left_out(model: Model, rotations: Rotations) -> Model:
    return mixed(rotate(model, rotations), model, EMBEDDING)


def _head_of_the_rotated_table(model: Model, rotations: Rotations) -> Model:
    """R1 twice on tied embeddings."""
    assert rotations.residual is not None
    again = rotations.residual.float()
    rotated = rotate(model, rotations)
    return changed(rotated, lambda name, value: value @ again if name == LM_HEAD else value)


def _value_bias_left_out(model: Model, rotations: Rotations) -> Model:
    return mixed(rotate(model, rotations), model, "v_proj.bias")


def _query_bias_rotated(model: Model, rotations: Rotations) -> Model:
    def change(name: str, value: Tensor) -> Tensor:
        if not name.endswith("q_proj.bias"):
            return value
        head = rotations.heads[0].float()
        return (value.unflatten(0, (-1, len(head))) @ head).flatten()

    return changed(rotate(model, rotations), change)


def _means_removed(model: Model, rotations: Rotations) -> Model:
    """What QuaRot and SpinQuant do to embeddings; right for LayerNorm, wrong for RMSNorm."""

    def change(name: str, value: Tensor) -> Tensor:
        return value - value.mean(dim=1, keepdim=True) if name == EMBEDDING else value

    return mixed(rotate(changed(model, change), rotations), rotate(model, rotations), LM_HEAD)


def _no_inverse_of_heads(model: Model, rotations: Rotations) -> Model:
    without = rotate(model, replace(rotations, heads=()))
    return mixed(rotate(model, rotations), without, "o_proj.weight")


def _heads_of_another_layer(model: Model, rotations: Rotations) -> Model:
    shifted = replace(rotations, heads=(*rotations.heads[1:], rotations.heads[0]))
    return mixed(rotate(model, rotations), rotate(model, shifted), "o_proj.weight")


def _transposed_residual_on_the_way_back(model: Model, rotations: Rotations) -> Model:
    assert rotations.residual is not None
    transposed = rotate(model, replace(rotations, residual=rotations.residual.T))
    return mixed(rotate(model, rotations), transposed, "down_proj.weight")


def _online_without_its_inverse(model: Model, rotations: Rotations) -> Model:
    without = rotate(model, replace(rotations, down=None))
    return mixed(rotate(model, rotations), without, "down_proj.weight")


def _inverse_without_online(model: Model, rotations: Rotations) -> Model:
    return replace(rotate(model, rotations), reads={})


def _one_layer_not_online(model: Model, rotations: Rotations) -> Model:
    rotated = rotate(model, rotations)
    reads = {name: read for name, read in rotated.reads.items() if ".1." not in name}
    return replace(rotated, reads=reads)


def _gains_twice(model: Model, rotations: Rotations) -> Model:
    return mixed(rotate(model, rotations), model, "layernorm.weight")


def _gains_behind_the_rotation(model: Model, rotations: Rotations) -> Model:
    """The norms keep their gains, which do not commute with R1."""
    ones = changed(model, lambda name, value: value**0 if _is_norm(name) else value)
    return mixed(rotate(ones, rotations), model, "layernorm.weight", FINAL_NORM)


def _gains_lost(model: Model, rotations: Rotations) -> Model:
    ones = changed(model, lambda name, value: value**0 if _is_norm(name) else value)
    return rotate(ones, rotations)


def _is_norm(name: str) -> bool:
    return name == FINAL_NORM or name.endswith("layernorm.weight")


MISTAKES: Mapping[str, Callable[[Model, Rotations], Model]] = {
    mistake.__name__.lstrip("_"): mistake
    for mistake in (
        _one_sided,
        _embedding_left_out,
        _head_of_the_rotated_table,
        _value_bias_left_out,
        _query_bias_rotated,
        _means_removed,
        _no_inverse_of_heads,
        _heads_of_another_layer,
        _transposed_residual_on_the_way_back,
        _online_without_its_inverse,
        _inverse_without_online,
        _one_layer_not_online,
        _gains_twice,
        _gains_behind_the_rotation,
        _gains_lost,
    )
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_merging_is_caught(
    model_named: Callable[[str], Model], windows: Tensor, mistake: str
) -> None:
    model = model_named("qwen2-tied")  # it has every part that a mistake can be made with
    rotations = random_rotations(model.shape, hadamard_rotations(model.shape, online=True).down)
    check_equivalence(model, rotate(model, rotations), rotations, windows)
    with pytest.raises(ProofError, match="logits") as caught:
        check_equivalence(model, MISTAKES[mistake](model, rotations), rotations, windows)
    details = caught.value.details
    assert details["logit_difference"] > 10 * 1e-3 * details["logit_rms"]
    assert details["orthogonality_error"] < 1e-12


@pytest.mark.parametrize("part", ["residual", "heads"])
@pytest.mark.parametrize("factor", [1.001, 1 + 1e-6])
def test_a_matrix_that_is_not_orthogonal_is_caught(
    llama: Model, windows: Tensor, part: str, factor: float
) -> None:
    """Even where an RMS norm hides that it stretches."""
    rotations = random_rotations(llama.shape)
    assert rotations.residual is not None
    residual, heads = rotations.residual, rotations.heads
    if part == "residual":
        wrong = Rotations(residual * factor, heads)
    else:
        wrong = Rotations(residual, (heads[0], heads[1] * factor, heads[2]))
    with pytest.raises(ProofError, match="orthogonality error") as caught:
        check_equivalence(llama, rotate(llama, wrong), wrong, windows)
    error = caught.value.details["orthogonality_error"]
    assert error == pytest.approx(factor**2 - 1, rel=1e-3)


def test_logits_that_are_no_numbers_are_caught(llama: Model, windows: Tensor) -> None:
    rotations = random_rotations(llama.shape)
    huge = changed(
        rotate(llama, rotations), lambda n, v: v * 1e38 if n.endswith("up_proj.weight") else v
    )
    with pytest.raises(ProofError):
        check_equivalence(llama, huge, rotations, windows)


@pytest.mark.parametrize("quant", ["w4a16-spinquant:group=32", "w8a8-spinquant"])
def test_norms_of_what_is_added_are_refused_by_the_planner(
    random_checkpoint: Callable[..., Path], quant: str
) -> None:
    shape = open_checkpoint(random_checkpoint(**GEMMA2)).shape
    assert shape.output_norms
    target = parse_target("cpu")
    with pytest.raises(LoweringError, match="family gemma2") as caught:
        fit_lowering(plan_lowering(Recipe("cpu", quant), target), shape, target)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "w4a16-gptq" in sentence, "it says what to choose instead"
    fit_lowering(plan_lowering(Recipe("cpu", "w4a16-gptq:group=32"), target), shape, target)

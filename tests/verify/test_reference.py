"""The reference, run layer by layer, equals the decoder run at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeattn.devices.registry import parse_target
from edgeattn.models.attention import OperatorForm
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.decoder import Decoder
from edgeattn.models.model import load_decoder, model_of
from edgeattn.planner.lowering import plan_lowering
from edgeattn.recipe import Recipe
from edgeattn.transforms.quantize import quantize
from edgeattn.verify.cases import Case, build_cases
from edgeattn.verify.drive import Tensors, drive
from edgeattn.verify.reference import run_reference
from edgeattn.verify.tolerance import Plain, relative_error

FORMS: dict[str, OperatorForm] = {"cpu": "standard", "jetson-orin@jetpack6.2": "primitive"}


class DecoderBackend:
    """The whole decoder of `edgeattn.models` as an implementation to drive."""

    name = "decoder"
    packed_cache = False

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    @torch.inference_mode()
    def step(self, inputs, past):
        pairs = self.decoder.empty_cache(len(inputs.input_ids))
        if past is not None:
            layers = range(self.decoder.shape.num_layers)
            pairs = tuple((past[f"present.{i}.key"], past[f"present.{i}.value"]) for i in layers)
        arrays = (inputs.input_ids, inputs.attention_mask, inputs.position_ids)
        output = self.decoder(*map(torch.from_numpy, arrays), pairs)
        found = {"logits": output.logits}
        for layer, (key, value) in enumerate(output.present):
            found |= {f"present.{layer}.key": key, f"present.{layer}.value": value}
        return found | {f"hidden.{i}": tensor for i, tensor in enumerate(output.hidden)}

    def to_numpy(self, value):
        return value.float().numpy()


def both(
    path: Path, target: str, quant: str, logits: str
) -> tuple[tuple[Case, ...], Tensors, Tensors]:
    recipe = Recipe(target, quant=quant, dtype="fp32", logits=logits)
    lowering = plan_lowering(recipe, parse_target(target))
    model = quantize(model_of(open_checkpoint(path)), lowering.scheme, scale_dtype=torch.float32)
    cases = build_cases(model.shape.vocab_size, model.shape.max_context)
    _, [plain] = run_reference(model, lowering, cases, [Plain(lowering.dtype)])
    decoder = load_decoder(
        model,
        weight_dtype=torch.float32,
        compute_dtype=torch.float32,
        form=FORMS[target],
        last_logits_only=logits == "last",
    )
    return cases, plain, drive(DecoderBackend(decoder), cases)


@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize("quant", ["none", "w8-rtn", "w4-rtn"])
@pytest.mark.parametrize("target", FORMS)
def test_layer_by_layer_equals_at_once(
    tiny_checkpoint: Path, target: str, quant: str, logits: str
) -> None:
    _, plain, whole = both(tiny_checkpoint, target, quant, logits)
    assert plain.keys() == whole.keys()
    for name, value in whole.items():
        # Same weights and operators in fp32; only the head is multiplied in pieces.
        assert relative_error(plain[name], value) < 1e-6, name


@pytest.mark.parametrize(
    "config", [{"model_type": "qwen2", "tie_word_embeddings": False}, {"model_type": "qwen3"}]
)
def test_other_families(random_checkpoint: Callable[..., Path], config: dict) -> None:
    _, plain, whole = both(random_checkpoint(**config), "cpu", "none", "all")
    assert plain.keys() == whole.keys()
    for name, value in whole.items():
        assert relative_error(plain[name], value) < 1e-6, name


def test_padding_is_left_out(tiny_checkpoint: Path) -> None:
    cases, plain, _ = both(tiny_checkpoint, "cpu", "none", "last")
    (_, ragged, _) = cases
    assert plain["ragged.0.hidden.0"].shape[0] == 11 + 6
    assert plain["ragged.0.logits"].shape[0] == 1  # the short row ends in padding
    assert plain["ragged.present.0.key"].shape[0] == 11 + 6 + 2 * (len(ragged.steps) - 1)


def test_the_reference_is_more_exact_than_the_plain_run(tiny_checkpoint: Path) -> None:
    """fp64 beside fp32: they differ, by rounding only."""
    lowering = plan_lowering(Recipe("cpu"), parse_target("cpu"))
    model = model_of(open_checkpoint(tiny_checkpoint))
    cases = build_cases(model.shape.vocab_size, model.shape.max_context)
    reference, [plain] = run_reference(model, lowering, cases, [Plain(lowering.dtype)])
    errors = [relative_error(plain[name], value) for name, value in reference.items()]
    assert 0 < max(errors) < 1e-5
    assert all(np.isfinite(value).all() for value in reference.values())

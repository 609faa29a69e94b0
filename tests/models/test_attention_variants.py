"""Decoders with an attention variant against the same decoder with softmax attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_models import with_fft_rope, with_head_sparse
from torch import Tensor

from edgeattn.models.attention import Attention
from edgeattn.models.attention_variants import group_scores
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.decoder import Decoder
from edgeattn.models.model import Model, load_decoder, load_layer, model_of

TOKENS = 9


@pytest.fixture(scope="module")
def softmax(tiny_checkpoint: Path) -> Model:
    return model_of(open_checkpoint(tiny_checkpoint))


def decoder(model: Model) -> Decoder:
    return load_decoder(model, weight_dtype=torch.float32, compute_dtype=torch.float32)


@torch.inference_mode()
def logits(network: Decoder, ids: Tensor, ends: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of all places, read in steps that end there; the mask is of the whole."""
    mask = torch.ones_like(ids) if mask is None else mask
    past, found, begin = network.empty_cache(len(ids)), [], 0
    for end in ends:
        seen = mask[:, :end]
        positions = (seen.cumsum(1) - 1).clamp(min=0)[:, begin:]
        output = network(ids[:, begin:end], seen, positions, past)
        past, begin = output.present, end
        found.append(output.logits)
    return torch.cat(found, 1)


def ids_of(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 272, (rows, TOKENS), generator=generator)


STEPS = [[TOKENS], [4, *range(5, TOKENS + 1)], [3, 6, TOKENS], list(range(1, TOKENS + 1))]


@pytest.mark.parametrize("ends", STEPS)
@pytest.mark.parametrize("groups", [False, True])
def test_with_all_heads_active_nothing_changes(
    softmax: Model, ends: list[int], groups: bool
) -> None:
    slots = softmax.shape.num_kv_heads if groups else softmax.shape.num_heads
    sparse = with_head_sparse(softmax, slots, groups=groups)
    ids = ids_of(2)
    expected = logits(decoder(softmax), ids, ends)
    torch.testing.assert_close(logits(decoder(sparse), ids, ends), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ends", STEPS)
def test_exact_heads_are_softmax(softmax: Model, ends: list[int]) -> None:
    exact = with_fft_rope(softmax, polynomial_heads=0)
    ids = ids_of(2)
    expected = logits(decoder(softmax), ids, ends)
    torch.testing.assert_close(logits(decoder(exact), ids, ends), expected, rtol=1e-4, atol=1e-5)
    rough = logits(decoder(with_fft_rope(softmax)), ids, ends)
    assert (rough - expected).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["fft-rope", "head-sparse"])
@pytest.mark.parametrize("ends", [[6, 7, 8, 9], [6, 9]])
def test_a_ragged_row_equals_the_row_alone(softmax: Model, kind: str, ends: list[int]) -> None:
    """Padded on the right of the prefill, and of a later step of several tokens."""
    model = with_fft_rope(softmax) if kind == "fft-rope" else with_head_sparse(softmax, 2)
    network, ids = decoder(model), ids_of(2)
    mask = torch.ones_like(ids)
    mask[1, 4:6] = 0
    if len(ends) == 2:
        mask[1, 8:] = 0
    found = logits(network, ids, ends, mask)[1][mask[1].bool()]
    alone = [int(mask[1, :end].sum()) for end in ends]
    expected = logits(network, ids[1:][:, mask[1].bool()], alone)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_left_padding_is_no_number(softmax: Model) -> None:
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[1, 0] = 0
    found = logits(decoder(with_head_sparse(softmax, 2)), ids_of(2), [TOKENS], mask)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_a_router_decides_only_in_decoding(softmax: Model) -> None:
    network, ids = decoder(with_head_sparse(softmax, 1)), ids_of(1)
    expected = logits(decoder(softmax), ids, [TOKENS])
    torch.testing.assert_close(logits(network, ids, [TOKENS]), expected, rtol=1e-4, atol=1e-5)
    decoded = logits(network, ids, [TOKENS - 1, TOKENS])
    assert (decoded[:, -1] - expected[:, -1]).abs().max() > 1e-4


def test_the_heads_with_the_largest_logits_are_active(softmax: Model) -> None:
    """By hand: heads that the bias rules out add nothing to what the output projection reads."""
    model = with_head_sparse(softmax, 2)
    tables = {name: table.clone() for name, table in model.tables[1].items()}
    tables["router_bias"] = torch.tensor([0.0, 1e4, 0.0, 1e4])
    layer = load_layer(replace(model, tables={1: tables}), 1, weight_dtype=torch.float32)
    plain = load_layer(softmax, 1, weight_dtype=torch.float32)
    size, width = model.shape.hidden_size, model.shape.head_dim
    x = torch.randn(2, 5, size, generator=torch.Generator().manual_seed(2))
    found, expected = (
        _last_row(block.self_attn, m, x) for block, m in ((layer, model), (plain, softmax))
    )
    expected = expected.unflatten(-1, (-1, width)).clone()
    expected[:, :, [0, 2]] = 0
    torch.testing.assert_close(found.unflatten(-1, (-1, width)), expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def _last_row(attention: Attention, model: Model, x: Tensor) -> Tensor:
    """What attention gives the output projection for the last token, after a prefill."""
    from edgeattn.models.layer_inputs import layer_inputs
    from edgeattn.models.rotary import inverse_frequencies

    frequencies = [inverse_frequencies(rope) for rope in model.shape.ropes]
    past, y = attention.no_past(len(x), x.dtype), x
    for begin, end in ((0, 4), (4, 5)):
        mask = torch.ones(len(x), end, dtype=torch.int64)
        positions = torch.arange(begin, end).expand(len(x), -1)
        shared = layer_inputs(model.shape, frequencies, mask, positions, dtype=x.dtype)
        y, past = attention.mix(x[:, begin:end], shared[model.shape.layer_kind(1)], past)
    return y


def test_a_group_counts_as_its_best_head() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0, 3.0, -1.0, -2.0]])
    assert group_scores(logits, 3).tolist() == [[5.0, 3.0, -1.0]]


def test_tables_keep_their_dtype(softmax: Model) -> None:
    network = decoder(with_fft_rope(softmax)).convert(torch.float16)
    tables = dict(network.layers[1].self_attn.tables.named_buffers())
    assert tables["coefficients"].dtype == torch.float32
    assert tables["backend"].dtype == torch.int32
    assert network.layers[1].self_attn.q_proj.weight.dtype == torch.float16

"""Slots of a static cache: what is written, what is seen, and the decoder against a growing one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import library

from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.decoder import Decoder, KVCache
from edgeattn.models.layer_inputs import causal_mask
from edgeattn.models.model import load_decoder, model_of
from edgeattn.models.static_cache import TENSOR_SCATTER, static_keys

SLOTS, PROMPT, STEPS = 16, 8, 3
TOLERANCE = 1e-5


def test_each_row_is_written_from_its_own_slot() -> None:
    past, new = torch.zeros(2, 3, 6, 4), torch.rand(2, 3, 2, 4) + 1
    found = TENSOR_SCATTER(past, new, torch.tensor([0, 4]))
    assert torch.equal(found[0, :, :2], new[0])
    assert torch.equal(found[1, :, 4:], new[1])
    assert not found[0, :, 2:].any()
    assert not found[1, :, :4].any()
    assert not past.any(), "the past stays as it was"


def test_it_is_an_operator_of_torch() -> None:
    inputs = (torch.rand(2, 3, 6, 4), torch.rand(2, 3, 2, 4), torch.tensor([0, 4]))
    library.opcheck(TENSOR_SCATTER, inputs)


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises((RuntimeError, IndexError)):
        TENSOR_SCATTER(torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 2, 2), torch.tensor([3]))


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_is_that_of_a_growing_cache(side: str, window: int | None) -> None:
    valid = padded(side)
    expected = causal_mask(valid, PROMPT, window)
    slots = torch.nn.functional.pad(valid, (0, SLOTS - PROMPT))
    found = static_keys(slots, torch.zeros(2, dtype=torch.int64), PROMPT, window)
    assert torch.equal(found.mask[..., :PROMPT], expected)
    assert not found.mask[..., PROMPT:].any()


@pytest.mark.parametrize("window", [None, 3])
def test_slots_behind_a_token_are_hidden_whatever_the_mask_says(window: int | None) -> None:
    begin = torch.tensor([2, 5])
    every = static_keys(torch.ones(2, SLOTS, dtype=torch.int64), begin, 2, window)
    until = (torch.arange(SLOTS) < begin[:, None] + 2).to(torch.int64)
    assert torch.equal(every.mask, static_keys(until, begin, 2, window).mask)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "mistral", "sliding_window": 4},
        {"model_type": "smollm3", "num_hidden_layers": 5},
    ],
    ids=["llama", "window", "no rotary positions"],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_steps_are_those_of_a_growing_cache(
    random_checkpoint: Callable[..., Path], config: dict[str, Any], side: str
) -> None:
    """Prefill and decode of two rows; the slots hold noise at first."""
    decoder = decoder_of(random_checkpoint(**config))
    ids = torch.randint(0, 272, (2, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))
    mask = torch.nn.functional.pad(padded(side), (0, STEPS), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    growing, slots = decoder.empty_cache(2), noise(decoder)
    for begin, end in ((0, PROMPT), *((i, i + 1) for i in range(PROMPT, PROMPT + STEPS))):
        new = (ids[:, begin:end], positions[:, begin:end])
        expected = run(decoder, new, mask[:, :end], growing)
        wide = torch.nn.functional.pad(mask[:, :end], (0, SLOTS - end))
        found = run(decoder, new, wide, slots, torch.full((2,), begin))
        valid = mask[:, begin:end].bool()
        torch.testing.assert_close(
            found.logits[valid], expected.logits[valid], atol=TOLERANCE, rtol=TOLERANCE
        )
        growing, slots = expected.present, found.present


def test_rows_may_begin_in_slots_of_their_own(random_checkpoint: Callable[..., Path]) -> None:
    """Rows of 5 and 8 tokens without a gap: the next token of each goes right behind its last."""
    decoder, lengths = decoder_of(random_checkpoint()), torch.tensor([5, 8])
    ids = torch.randint(0, 272, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    places = torch.arange(SLOTS)
    first = (ids, torch.arange(PROMPT).expand(2, -1))
    mask = (places < lengths[:, None]).to(torch.int64)
    slots = run(decoder, first, mask, noise(decoder), torch.zeros(2, dtype=torch.int64)).present
    second = (torch.tensor([[7], [9]]), lengths[:, None])
    mask = (places < lengths[:, None] + 1).to(torch.int64)
    found = run(decoder, second, mask, slots, lengths).logits
    for row, length in enumerate(lengths.tolist()):
        alone = torch.cat((ids[row, :length], second[0][row])).unsqueeze(0)
        every = torch.ones_like(alone)
        expected = run(
            decoder, (alone, torch.arange(length + 1)[None]), every, decoder.empty_cache(1)
        ).logits[0, -1]
        torch.testing.assert_close(found[row, 0], expected, atol=TOLERANCE, rtol=TOLERANCE)


def padded(side: str) -> torch.Tensor:
    """A mask of two rows, the second three tokens shorter."""
    mask = torch.ones(2, PROMPT, dtype=torch.int64)
    mask[1, slice(0, 3) if side == "left" else slice(PROMPT - 3, PROMPT)] = 0
    return mask


def decoder_of(path: Path) -> Decoder:
    fp32 = torch.float32
    return load_decoder(model_of(open_checkpoint(path)), weight_dtype=fp32, compute_dtype=fp32)


def noise(decoder: Decoder) -> KVCache:
    """Slots that hold what an earlier text left."""
    shape, generator = decoder.shape, torch.Generator().manual_seed(1)
    size = (2, shape.num_kv_heads, SLOTS, shape.head_dim)
    return tuple(
        (torch.randn(size, generator=generator), torch.randn(size, generator=generator))
        for _ in range(shape.num_layers)
    )


@torch.inference_mode()
def run(
    decoder: Decoder,
    new: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor,
    past: KVCache,
    begin: torch.Tensor | None = None,
) -> Any:
    ids, positions = new
    return decoder(ids, mask, positions, past, begin)

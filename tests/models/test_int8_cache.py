"""Decoders with int8 caches: against attention by hand in fp64, and against themselves in steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import numpy as np
import torch
from torch import Tensor

from edgeattn.models import attention as module
from edgeattn.models.attention import OperatorForm
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.decoder import Decoder, DecoderOutput
from edgeattn.models.model import Model, load_decoder, load_layer, model_of
from edgeattn.models.stream import final_hidden
from edgeattn.quant.hadamard import HadamardFactors, hadamard_factors
from edgeattn.quant.kv_cache import Int8Cache

ROWS, LENGTH, LAYERS = 2, 14, 3
# Grouped and equal heads, a window shorter than the text, capped scores.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-mha": {"num_key_value_heads": 4},
    "mistral-window": {"model_type": "mistral", "sliding_window": 4},
    "gemma2": {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 4,
        "attn_logit_softcapping": 1.0,
        "final_logit_softcapping": 2.0,
    },
}
# Of the root mean square; angles are computed in fp32.
TOLERANCE = 1e-5


@pytest.fixture(params=MODELS)
def plain(request: pytest.FixtureRequest, random_checkpoint: Callable[..., Path]) -> Model:
    return model_of(open_checkpoint(random_checkpoint(**MODELS[request.param])))


@pytest.fixture
def llama(tiny_checkpoint: Path) -> Model:
    return model_of(open_checkpoint(tiny_checkpoint))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 272, (ROWS, LENGTH))


def decoder_of(
    model: Model, dtype: torch.dtype = torch.float64, form: OperatorForm = "standard"
) -> Decoder:
    return load_decoder(model, weight_dtype=torch.float32, compute_dtype=dtype, form=form)


@torch.inference_mode()
def run(decoder: Decoder, ids: Tensor, ends: Sequence[int] = (LENGTH,)) -> list[DecoderOutput]:
    """The steps that end there, the cache carried from one to the next."""
    found: list[DecoderOutput] = []
    for begin, end in zip((0, *ends[:-1]), ends, strict=True):
        past = found[-1].present if found else decoder.empty_cache(len(ids))
        mask = torch.ones(len(ids), end, dtype=torch.int64)
        positions = torch.arange(begin, end).expand(len(ids), -1)
        found.append(decoder(ids[:, begin:end], mask, positions, past))
    return found


def with_caches(
    model: Model, *, rotated: bool = True, layers: Sequence[int] = range(LAYERS)
) -> Model:
    """Scales that clip a few keys and values, those of no layer like another's."""
    factors = hadamard_factors(model.shape.head_dim) if rotated else None
    caches = {i: Int8Cache(0.014 + 0.002 * i, 0.008 + 0.002 * i, factors) for i in layers}
    return replace(model, caches=caches)


def relative(found: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    found, expected = (torch.as_tensor(value).double() for value in (found, expected))
    return float((found - expected).norm() / expected.norm())


@dataclass(frozen=True)
class Seen:
    """What went through one attention.

    Attributes:
        x: its input, `[B, T, hidden]`.
        mixed: what its output projection reads, `[B, T, H * D]`.
        present: keys and values, `[B, Hkv, T, D]` as the decoder gave them.
    """

    x: np.ndarray
    mixed: np.ndarray
    present: tuple[np.ndarray, np.ndarray]


def seen(decoder: Decoder, ids: Tensor) -> list[Seen]:
    inputs: list[np.ndarray] = []
    mixed: list[np.ndarray] = []

    def keep(place: list[np.ndarray]) -> Callable[..., None]:
        return lambda part, arguments: place.append(arguments[0].double().numpy())

    for block in decoder.blocks():
        block.self_attn.register_forward_pre_hook(keep(inputs))
        block.self_attn.o_proj.register_forward_pre_hook(keep(mixed))
    (output,) = run(decoder, ids)
    arrays = [(keys.numpy(), values.numpy()) for keys, values in output.present]
    return [Seen(*parts) for parts in zip(inputs, mixed, arrays, strict=True)]


class ByHand:
    """One attention in numpy and fp64, written from the formulas."""

    def __init__(self, model: Model, layer: int) -> None:
        self.shape, self._layer, self._weights = model.shape, layer, model.weights
        self._kind = model.shape.layer_kind(layer)

    def heads(self, x: np.ndarray, name: str) -> np.ndarray:
        """`[B, T, hidden]` -> `[B, heads, T, D]`, rotated by position but for values."""
        weight = self._weights.read(f"layers.{self._layer}.self_attn.{name}_proj.weight")
        assert isinstance(weight, Tensor)
        product = x @ weight.double().numpy().T
        heads = product.reshape(*x.shape[:2], -1, self.shape.head_dim).swapaxes(1, 2)
        return heads if name == "v" else self._turned(heads)

    def _turned(self, heads: np.ndarray) -> np.ndarray:
        """Pairs (i, i + D/2) as complex numbers, times e^(i position theta^(-2i/D))."""
        rope, half = self._kind.rope, self.shape.head_dim // 2
        assert rope is not None
        assert rope.dim == 2 * half
        frequencies = rope.theta ** (-np.arange(half) / half)
        angles = np.arange(heads.shape[2])[:, None] * frequencies
        turned = (heads[..., :half] + 1j * heads[..., half:]) * np.exp(1j * angles)
        return np.concatenate((turned.real, turned.imag), axis=-1)

    def attend(self, queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """`[B, T, H * D]`, one query after the other."""
        shape = self.shape
        group = shape.num_heads // shape.num_kv_heads
        found = np.zeros_like(queries)
        for row, head, place in np.ndindex(queries.shape[:3]):
            first = 0 if self._kind.window is None else max(0, place + 1 - self._kind.window)
            visible = (row, head // group, slice(first, place + 1))
            scores = keys[visible] @ queries[row, head, place] / math.sqrt(shape.head_dim)
            if shape.attention_softcap is not None:
                scores = shape.attention_softcap * np.tanh(scores / shape.attention_softcap)
            weights = np.exp(scores - scores.max())
            found[row, head, place] = weights / weights.sum() @ values[visible]
        return found.swapaxes(1, 2).reshape(*queries.shape[::2], -1)[:, : queries.shape[2]]


def dense(factors: HadamardFactors | None, width: int) -> np.ndarray:
    if factors is None:
        return np.eye(width)
    left, right = factors.left.numpy(), factors.right.numpy()
    block = np.kron(left, right) / math.sqrt(len(left) * len(right))
    return np.kron(np.eye(factors.blocks), block)


@pytest.mark.parametrize("rotated", [True, False])
def test_attention_is_that_of_the_dequantised_integers(
    plain: Model, ids: Tensor, rotated: bool
) -> None:
    model = with_caches(plain, rotated=rotated)
    for layer, found in enumerate(seen(decoder_of(model), ids)):
        hand, cache = ByHand(model, layer), model.caches[layer]
        rotation = dense(cache.rotation, model.shape.head_dim)
        queries = hand.heads(found.x, "q") @ rotation
        keys, values = found.present[0] * cache.key_scale, found.present[1] * cache.value_scale
        assert relative(hand.attend(queries, keys, values), found.mixed) < TOLERANCE
        mistakes = {
            "scales swapped": hand.attend(
                queries, found.present[0] * cache.value_scale, found.present[1] * cache.key_scale
            ),
            "key scale": hand.attend(queries, keys * 1.1, values),
            "value scale": hand.attend(queries, keys, values * 1.1),
            "past alone": hand.attend(queries, np.roll(keys, 1, axis=2), values),
        }
        if rotated:
            mistakes["keys alone rotated"] = hand.attend(queries @ rotation.T, keys, values)
        for name, wrong in mistakes.items():
            assert relative(wrong, found.mixed) > 500 * TOLERANCE, name


@pytest.mark.parametrize("rotated", [True, False])
def test_integers_are_keys_and_values_rounded_once(
    plain: Model, ids: Tensor, rotated: bool
) -> None:
    model = with_caches(plain, rotated=rotated)
    for layer, found in enumerate(seen(decoder_of(model), ids)):
        hand, cache = ByHand(model, layer), model.caches[layer]
        keys = hand.heads(found.x, "k") @ dense(cache.rotation, model.shape.head_dim)
        expected = (keys / cache.key_scale, hand.heads(found.x, "v") / cache.value_scale)
        for integers, exact in zip(found.present, expected, strict=True):
            assert integers.dtype == np.int8
            difference = integers - np.clip(np.rint(exact), -128, 127)
            assert abs(difference).max() <= 1
            assert (difference != 0).mean() < 1e-3
            assert (abs(exact) > 130).any(), "something is clipped"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["standard", "primitive"])
def test_present_is_int8_whatever_is_computed_in(
    llama: Model, ids: Tensor, dtype: torch.dtype, form: OperatorForm
) -> None:
    outputs = run(decoder_of(with_caches(llama), dtype, form), ids, (LENGTH - 1, LENGTH))
    for output, length in zip(outputs, (LENGTH - 1, LENGTH), strict=True):
        assert output.logits.dtype == dtype
        for tensor in (tensor for pair in output.present for tensor in pair):
            assert (tensor.dtype, tensor.shape) == (torch.int8, (ROWS, 2, length, 16))


@pytest.mark.parametrize("ends", [(LENGTH - 1, LENGTH), (7, LENGTH), (1, 2, 9, LENGTH)])
def test_steps_give_what_one_pass_gives(plain: Model, ids: Tensor, ends: Sequence[int]) -> None:
    decoder = decoder_of(with_caches(plain))
    (whole,), parts = run(decoder, ids), run(decoder, ids, ends)
    logits = torch.cat([part.logits for part in parts], dim=1)
    torch.testing.assert_close(logits, whole.logits, atol=1e-9, rtol=0)
    for found, expected in zip(parts[-1].present, whole.present, strict=True):
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("form", ["standard", "primitive"])
def test_a_step_reads_the_integers_it_is_given(
    llama: Model, ids: Tensor, form: OperatorForm
) -> None:
    """Otherwise the test of steps would compare a decoder with itself."""
    decoder = decoder_of(with_caches(llama), form=form)
    first, second = run(decoder, ids, (LENGTH - 1, LENGTH))
    mask, positions = torch.ones(ROWS, LENGTH), torch.full((ROWS, 1), LENGTH - 1)
    step = (ids[:, -1:], mask.long(), positions)
    for part in (0, 1):
        past = [list(pair) for pair in first.present]
        past[1][part] = past[1][part] // 2
        with torch.inference_mode():
            other = decoder(*step, tuple((keys, values) for keys, values in past))
        assert relative(other.logits, second.logits) > 1e-3


def test_padded_rows_give_what_they_give_alone(plain: Model, ids: Tensor) -> None:
    decoder, padding = decoder_of(with_caches(plain)), 5
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        both = decoder(ids, mask, positions, decoder.empty_cache(ROWS))
    (alone,) = run(decoder, ids[1:, padding:], (LENGTH - padding,))
    torch.testing.assert_close(both.logits[1:, padding:], alone.logits, atol=1e-9, rtol=0)
    for found, expected in zip(both.present, alone.present, strict=True):
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine[1:, :, padding:], theirs)


def unrounded(x: Tensor, scale: float) -> Tensor:
    return x / scale


@pytest.mark.parametrize("rotated", [True, False])
def test_without_rounding_logits_are_those_of_floating_point(
    plain: Model, ids: Tensor, monkeypatch: pytest.MonkeyPatch, rotated: bool
) -> None:
    (expected,) = run(decoder_of(plain), ids)
    monkeypatch.setattr(module, "to_int8", unrounded)
    (found,) = run(decoder_of(with_caches(plain, rotated=rotated)), ids)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-10, rtol=0)


class _KeysAlone(Int8Cache):
    """Rotates what has as many heads as keys have."""

    def rotate(self, x: Tensor) -> Tensor:
        return super().rotate(x) if x.shape[1] == 2 else x


class _QueriesAlone(Int8Cache):
    def rotate(self, x: Tensor) -> Tensor:
        return super().rotate(x) if x.shape[1] == 4 else x


@pytest.mark.parametrize("mistake", [_KeysAlone, _QueriesAlone])
def test_a_rotation_of_one_side_is_another_model(
    llama: Model, ids: Tensor, monkeypatch: pytest.MonkeyPatch, mistake: type[Int8Cache]
) -> None:
    (expected,) = run(decoder_of(llama), ids)
    right = with_caches(llama)
    caches = {i: mistake(c.key_scale, c.value_scale, c.rotation) for i, c in right.caches.items()}
    wrong = replace(llama, caches=caches)
    monkeypatch.setattr(module, "to_int8", unrounded)
    (found,) = run(decoder_of(wrong), ids)
    assert relative(found.logits, expected.logits) > 0.1


def fitting(model: Model, ids: Tensor, rotated: bool = True) -> Mapping[int, Int8Cache]:
    """Scales that clip nothing of this text, from the caches of a run in floating point."""
    (output,) = run(decoder_of(model), ids)
    factors = hadamard_factors(model.shape.head_dim) if rotated else None
    rotation = torch.from_numpy(dense(factors, model.shape.head_dim))
    return {
        i: Int8Cache(
            float((keys @ rotation).abs().max() / 127), float(values.abs().max() / 127), factors
        )
        for i, (keys, values) in enumerate(output.present)
    }


@pytest.mark.parametrize("rotated", [True, False])
def test_eight_bits_lose_little(plain: Model, ids: Tensor, rotated: bool) -> None:
    (expected,) = run(decoder_of(plain), ids)
    fit = fitting(plain, ids, rotated)
    (found,) = run(decoder_of(replace(plain, caches=fit)), ids)
    assert 1e-4 < relative(found.logits, expected.logits) < 0.03
    coarse = {i: Int8Cache(8 * c.key_scale, 8 * c.value_scale, c.rotation) for i, c in fit.items()}
    (rough,) = run(decoder_of(replace(plain, caches=coarse)), ids)
    assert relative(rough.logits, expected.logits) > 3 * relative(found.logits, expected.logits)


@pytest.mark.parametrize("layers", [(1,), (0, 2), (2,), ()])
def test_some_layers_may_hold_integers(llama: Model, ids: Tensor, layers: tuple[int, ...]) -> None:
    model = with_caches(llama, layers=layers)
    decoder = decoder_of(model)
    assert [keys.dtype for keys, _ in decoder.empty_cache(1)] == [
        torch.int8 if i in layers else torch.float64 for i in range(LAYERS)
    ]
    (expected,), (found,) = run(decoder_of(llama), ids), run(decoder, ids)
    for i, pair in enumerate(found.present):
        assert {part.dtype for part in pair} == {torch.int8 if i in layers else torch.float64}
    before = min(layers, default=LAYERS)
    for i, (mine, theirs) in enumerate(zip(found.hidden, expected.hidden, strict=True)):
        assert torch.equal(mine, theirs) == (i <= before)
    parts = run(decoder, ids, (9, LENGTH))
    torch.testing.assert_close(parts[-1].logits, found.logits[:, 9:], atol=1e-9, rtol=0)


def test_spellings_of_attention_agree(plain: Model, ids: Tensor) -> None:
    model = with_caches(plain)
    standard, primitive = (
        run(decoder_of(model, form=form), ids)[0] for form in ("standard", "primitive")
    )
    # The primitive spelling computes softmax in fp32.
    assert relative(primitive.logits, standard.logits) < 1e-3
    for found, expected in zip(primitive.present, standard.present, strict=True):
        for mine, theirs in zip(found, expected, strict=True):
            assert (mine != theirs).double().mean() < 0.005


def test_layer_by_layer_equals_the_decoder(plain: Model, ids: Tensor) -> None:
    model = with_caches(plain, layers=(0, 2))
    (expected,) = run(decoder_of(model, torch.float32), ids)
    found = final_hidden(model, ids)
    # One number on the other side of a boundary spoils the token it belongs to.
    errors = (found - expected.hidden[-1]).norm(dim=-1) / expected.hidden[-1].norm(dim=-1)
    assert errors.median() < TOLERANCE
    assert relative(final_hidden(plain, ids), expected.hidden[-1]) > 1e-3


@pytest.mark.parametrize("layers", [(1,), ()])
def test_an_empty_past_has_the_format_of_its_layer(llama: Model, layers: tuple[int, ...]) -> None:
    model = with_caches(llama, layers=layers)
    attention = load_layer(model, 1, weight_dtype=torch.float32).self_attn
    assert attention.cache is model.caches.get(1)
    expected = torch.int8 if layers else torch.float16
    for empty in attention.no_past(3, torch.float16):
        assert (empty.dtype, empty.shape) == (expected, (3, 2, 0, 16))

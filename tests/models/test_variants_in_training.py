"""Attention variants as training computes them: values of the operators, and their gradients."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from attention_models import with_fft_rope, with_head_sparse
from torch import Tensor

from edgeattn.models.attention_variants import Tables, attend_variant
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.decoder import Decoder
from edgeattn.models.model import Model, load_decoder, load_layer, model_of
from edgeattn.models.packed_keys import pack_keys

TOKENS = 9
KINDS = ("fft-rope", "head-sparse", "head-sparse groups")


@pytest.fixture(scope="module")
def softmax(tiny_checkpoint: Path) -> Model:
    return model_of(open_checkpoint(tiny_checkpoint))


def with_kind(softmax: Model, kind: str) -> Model:
    if kind == "fft-rope":
        return with_fft_rope(softmax, polynomial_heads=softmax.shape.num_heads - 1)
    groups = kind.endswith("groups")
    return with_head_sparse(softmax, 1 if groups else 2, groups=groups)


@torch.inference_mode()
def logits(network: Decoder, ids: Tensor, ends: list[int]) -> Tensor:
    """Logits of all places, read in steps that end there."""
    past, found, begin = network.empty_cache(len(ids)), [], 0
    for end in ends:
        positions = torch.arange(begin, end).expand(len(ids), -1)
        seen = torch.ones(len(ids), end, dtype=torch.int64)
        output = network(ids[:, begin:end], seen, positions, past)
        past, begin = output.present, end
        found.append(output.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_in_training_is_what_the_operators_give_token_by_token(
    softmax: Model, kind: str
) -> None:
    network = load_decoder(
        with_kind(softmax, kind), weight_dtype=torch.float32, compute_dtype=torch.float32
    )
    ids = torch.randint(0, 272, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    expected = logits(network, ids, list(range(1, TOKENS + 1)))
    whole = logits(network, ids, [TOKENS])
    found = logits(network.train(), ids, [TOKENS])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if kind != "fft-rope":  # a whole window is dense to the operator
        assert (whole - found).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_a_double_loop(softmax: Model, kind: str) -> None:
    """In fp64, over rows and heads, each of them by its formula."""
    model = with_kind(softmax, kind)
    attention = load_layer(model, 1, weight_dtype=torch.float32).self_attn
    shape, generator = model.shape, torch.Generator().manual_seed(3)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    q, k, v = (
        torch.randn(1, n, TOKENS, shape.head_dim, generator=generator).requires_grad_()
        for n in heads
    )
    x = torch.randn(1, TOKENS, shape.hidden_size, generator=generator)
    keys = pack_keys(torch.ones(1, TOKENS, dtype=torch.int64), TOKENS)
    assert attention.variant is not None
    assert attention.tables is not None
    found = attend_variant(attention.variant, attention.tables, x, q, k, v, keys, training=True)
    wide = [part.detach().double().requires_grad_() for part in (q, k, v)]
    expected = _double_loop(kind, attention.tables, x[0].double(), *(part[0] for part in wide))
    weights = torch.randn(found.shape, generator=generator)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-4, atol=1e-5)
    (found * weights).sum().backward()
    (expected * weights[0]).sum().backward()
    for part, other in zip((q, k, v), wide, strict=True):
        assert part.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(part.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


def _double_loop(kind: str, tables: Tables, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shared = len(q) // len(k)
    rows = []
    for head in range(len(q)):
        for row in range(TOKENS):
            y = _row(kind, tables, q[head, row], k[head // shared, : row + 1], head)
            y = y @ v[head // shared, : row + 1]
            rows.append(y if _is_active(kind, tables, x[row], head, shared) else 0 * y)
    return torch.stack(rows).unflatten(0, (len(q), TOKENS))


def _row(kind: str, tables: Tables, q: Tensor, k: Tensor, head: int) -> Tensor:
    """Weights of the keys a row sees: sink 1 and window 2 are near, see `with_fft_rope`."""
    scores = k @ q / math.sqrt(len(q))
    weights = scores.exp()
    far = list(range(1, len(k) - 2))
    if kind == "fft-rope" and int(tables.backend[head]) and far:  # type: ignore[index]
        centre = scores[far].mean()
        for j in far:
            s = scores[j] - centre
            weights = weights.clone()
            weights[j] = centre.exp() * (1 + s + 0.55 * s * s)
    return weights / weights.sum()


def _is_active(kind: str, tables: Tables, x: Tensor, head: int, shared: int) -> bool:
    if kind == "fft-rope":
        return True
    weight, bias = tables.router_weight, tables.router_bias
    scores = (x @ weight.double() + bias.double()).tolist()  # type: ignore[operator,union-attr]
    if kind == "head-sparse":
        return head in sorted(range(len(scores)), key=lambda h: scores[h])[-2:]
    best = max(range(len(scores)), key=lambda h: scores[h])
    return head // shared == best // shared

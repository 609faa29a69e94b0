"""Bounds by peak rate and bandwidth, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgeattn.devices.registry import parse_target
from edgeattn.models.huggingface import shape_from_config
from edgeattn.planner.attention_gains import attention_gains
from edgeattn.planner.head_sparsity import cache_share, decode_speedup, least_context
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.planner.memory import cache_bytes_per_token, read_bytes, weight_bytes
from edgeattn.planner.roofline import Rates, decode_work, predict, prompt_work, rates_of
from edgeattn.recipe import Recipe
from edgeattn.shape import ModelShape

LLAMA = {
    "model_type": "llama",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "hidden_act": "silu",
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
LLAMAS = {
    "1B": shape_from_config(
        LLAMA
        | {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "tie_word_embeddings": True,
        }
    ),
    "8B": shape_from_config(
        LLAMA
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "tie_word_embeddings": False,
        }
    ),
}


def lowering(shape: ModelShape, target: str, **fields: str) -> Lowering:
    place = parse_target(target)
    return fit_lowering(plan_lowering(Recipe(target, **fields), place), shape, place)


def test_rates_are_the_targets() -> None:
    shape = LLAMAS["1B"]
    orin = rates_of(parse_target("orin-nano"), lowering(shape, "orin-nano"))
    assert orin == Rates(102e9, 16.5e12, 16.5e12, ("MAXN_SUPER",))
    four_bits = lowering(shape, "l4", quant="w4-rtn")
    assert rates_of(parse_target("l4"), four_bits) == Rates(300e9, 121e12, 121e12), (
        "multiplied in fp16"
    )
    int8 = rates_of(parse_target("l4"), lowering(shape, "l4", quant="w8a8"))
    assert int8 == Rates(300e9, 121e12, 242.5e12)
    assert rates_of(parse_target("cpu"), lowering(shape, "cpu")) is None


def test_a_step_reads_the_weights_once_and_each_rows_cache() -> None:
    shape = LLAMAS["8B"]
    stored = lowering(shape, "h100")
    table = 128256 * 4096
    assert weight_bytes(shape, stored) - read_bytes(shape, stored) == 2 * table
    tied = LLAMAS["1B"]
    assert read_bytes(tied, stored) == weight_bytes(tied, stored)
    # 8.03 billion weights in fp16 but for the embedding; 128 KiB of cache per token
    step = decode_work(shape, stored, 8192, 4)
    assert step.moved_bytes == pytest.approx(2 * (8.030e9 - table) + 4 * 8192 * 131072, rel=1e-3)
    products = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert step.linear_flops == 4 * 2 * products
    assert step.head_flops == pytest.approx(4 * 2 * table, rel=1e-3)
    assert step.attention_flops == 4 * 32 * 32 * 8192 * 4 * 128


def test_a_rotated_head_is_read_beside_no_embedding(shape: ModelShape) -> None:
    stored = lowering(shape, "l4", quant="w4a16-spinquant")
    table = 49152 * 576 + 49152 * 2 + 49152  # int8, a scale and a zero point each row
    assert weight_bytes(shape, stored) - read_bytes(shape, stored) == table


def test_a_prompt_sees_half_of_itself() -> None:
    shape, context = LLAMAS["1B"], 1000
    stored = lowering(shape, "l4")
    prompt = prompt_work(shape, stored, context, 2)
    attention = sum(16 * 32 * seen * 4 * 64 for seen in range(1, context + 1))
    assert prompt.attention_flops == pytest.approx(2 * attention, rel=2e-3)
    step = decode_work(shape, stored, context, 2)
    assert prompt.linear_flops == context * step.linear_flops
    assert prompt.head_flops == context * step.head_flops
    last = prompt_work(shape, lowering(shape, "l4", logits="last"), context, 2)
    assert last.head_flops == step.head_flops


def test_tokens_per_second_by_hand() -> None:
    """A nano reads 0.78 GB of weights and 0.27 GB of cache in 10.3 ms."""
    shape, target = LLAMAS["1B"], parse_target("orin-nano")
    stored = lowering(shape, "orin-nano", quant="w4-rtn")
    rates = rates_of(target, stored)
    assert rates is not None
    found = predict(shape, stored, 8192, 1, rates)
    # 973 million weights of 4.25 bits, the table in int8 with 3 bytes more a row
    moved = 973.1e6 * 4.25 / 8 + 128256 * (2048 + 3) + 8192 * 16 * 2 * 8 * 64 * 2
    assert found.tokens_per_s == pytest.approx(102e9 / moved, rel=1e-3)
    assert found.bound == "memory"
    flops = 8192 * 2 * 1.2358e9 + 16 * 32 * 4 * 64 * 8192**2 / 2
    assert found.prompt_s == pytest.approx(flops / 16.5e12, rel=1e-3)


def test_what_bounds_a_step(shape: ModelShape) -> None:
    stored = lowering(shape, "l4")
    step = decode_work(shape, stored, 1024, 1)
    fast = Rates(step.moved_bytes / 2, step.flops / 4, step.flops / 4)
    found = predict(shape, stored, 1024, 1, fast)
    assert (found.bound, found.tokens_per_s) == ("compute", pytest.approx(1 / 4))
    slow = Rates(step.moved_bytes / 8, step.flops / 4, step.flops / 4)
    assert predict(shape, stored, 1024, 1, slow).tokens_per_s == pytest.approx(1 / 8)
    unknown = predict(shape, stored, 1024, 1, Rates(step.moved_bytes / 8, None, None))
    assert (unknown.bound, unknown.prompt_s) == ("memory alone", None)
    assert unknown.tokens_per_s == pytest.approx(1 / 8)


def test_rows_share_the_weights() -> None:
    shape, rates = LLAMAS["8B"], Rates(300e9, 121e12, 121e12)
    stored = lowering(shape, "l4", quant="w4-rtn")

    def speed(batch: int, context: int) -> float:
        return predict(shape, stored, context, batch, rates).tokens_per_s

    assert speed(1, 1024) < speed(8, 1024) < 8 * speed(1, 1024)
    assert speed(8, 32768) < speed(8, 1024)
    wide = predict(shape, lowering(shape, "l4"), 1024, 1, rates)
    assert wide.tokens_per_s < speed(1, 1024)


# Decoding on the edge: share of the cache beside all weights, and most that 5/8 and half of the
# heads gain. We leave out the embedding of the 8B, which no step reads: its shares are larger.
EDGE = [
    ("1B", "w4-rtn", 1, 2048, 0.08, 1.03, 1.04),
    ("1B", "w4-rtn", 1, 8192, 0.26, 1.11, 1.15),
    ("1B", "w4-rtn", 1, 32768, 0.59, 1.28, 1.42),
    ("8B", "w4-rtn", 1, 2048, 0.05, 1.02, 1.03),
    ("8B", "w4-rtn", 1, 8192, 0.19, 1.08, 1.10),
    ("8B", "w4-rtn", 1, 32768, 0.48, 1.22, 1.31),
    ("8B", "w4-rtn", 8, 8192, 0.65, 1.32, 1.48),
    ("8B", "w4-rtn", 32, 8192, 0.88, 1.49, 1.79),
    ("8B", "none", 1, 8192, 0.06, 1.02, 1.03),
]


@pytest.mark.parametrize(("model", "quant", "batch", "context", "share", "most", "half"), EDGE)
def test_head_sparsity_on_the_edge(
    model: str, quant: str, batch: int, context: int, share: float, most: float, half: float
) -> None:
    shape, target = LLAMAS[model], parse_target("jetson-orin")
    stored = lowering(shape, "jetson-orin", quant=quant)
    found = attention_gains(shape, stored, target, context, batch).head_sparsity
    assert [gain.density for gain in found] == [0.625, 0.5]
    per_token = cache_bytes_per_token(shape, stored)
    assert cache_share(weight_bytes(shape, stored), per_token, context, batch) == pytest.approx(
        share, abs=0.015
    )
    assert found[0].cache_share == cache_share(read_bytes(shape, stored), per_token, context, batch)
    assert [gain.speedup for gain in found] == pytest.approx([most, half], abs=0.03)
    for gain in found:
        assert gain.worth_it == (gain.speedup >= 1.05) == (context >= gain.least_context)


def test_the_least_context_gains_just_enough() -> None:
    found = least_context(4e9, 131072, 2, 0.5)
    share = found * 131072 * 2 / (found * 131072 * 2 + 4e9)
    assert decode_speedup(share, 0.5) == pytest.approx(1.05)
    assert least_context(4e9, 131072, 2, 0.96) == float("inf"), "a cache alone gains 1.04 times"


def test_polynomials_save_no_short_prompt() -> None:
    shape, target = LLAMAS["1B"], parse_target("jetson-orin")
    stored = lowering(shape, "jetson-orin", quant="w4-rtn")
    short = attention_gains(shape, stored, target, 1024, 1).polynomials
    assert [(gain.degree, gain.prompt, gain.worth_it) for gain in short] == [
        (1, 1, False),
        (2, 1, False),
    ]
    long = attention_gains(shape, stored, target, 65536, 1).polynomials
    assert 1 < long[1].prompt < long[0].prompt
    work = prompt_work(shape, stored, 65536, 1)
    most = work.flops / (work.flops - work.attention_flops)
    for gain in long:
        assert gain.prompt < gain.attention
        assert gain.prompt < most
    assert long[1].attention == pytest.approx(65536 / 6500, rel=0.15), "by the crossover of FLOPs"


def test_polynomials_without_figures_are_judged_by_flops() -> None:
    shape, target = LLAMAS["1B"], parse_target("cpu")
    found = attention_gains(shape, lowering(shape, "cpu"), target, 65536, 1).polynomials
    assert [gain.speed_crossover for gain in found] == [None, None]
    assert found[1].prompt > 1.05


def test_a_cap_on_scores_allows_no_variant() -> None:
    shape, target = replace(LLAMAS["1B"], attention_softcap=50.0), parse_target("l4")
    found = attention_gains(shape, lowering(shape, "l4"), target, 8192, 1)
    assert (found.head_sparsity, found.polynomials) == ((), ())
    assert found.refused is not None
    assert "cap" in found.refused

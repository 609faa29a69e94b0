"""What polynomial attention costs, against the table of crossovers and by counting."""

from __future__ import annotations

from itertools import combinations_with_replacement

import pytest

from edgeattn.devices.registry import parse_target
from edgeattn.ops.fft_rope_kernels import segments_of
from edgeattn.planner.polynomial import (
    LEAST_SEGMENTS,
    Machine,
    attention_gain,
    crossover,
    exact_cost,
    exact_flops,
    factorised_flops,
    features,
    fft_flops,
    flops_crossover,
    machine_of,
    polynomial_cost,
    segment_length,
    speed_crossover,
    state_bytes,
)
from edgeattn.shape import LayerKind, ModelShape

SHAPE = ModelShape(
    family="llama",
    num_layers=4,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=100,
    max_context=8192,
    norm_eps=1e-5,
    layer_cycle=(LayerKind(None),),
)
NEAR = 68


def test_features_are_counted():
    for width, degree in ((5, 0), (5, 1), (4, 2), (6, 3)):
        orders = range(degree + 1)
        found = sum(len(list(combinations_with_replacement(range(width), r))) for r in orders)
        assert features(width, degree) == found


@pytest.mark.parametrize(
    ("width", "value_width", "degree", "count", "full", "causal"),
    [
        (16, 64, 2, 153, 250, 500),
        (16, 64, 4, 4845, 7.9e3, 16e3),
        (64, 64, 1, 65, 66, 132),
        (64, 64, 2, 2145, 2.2e3, 4.4e3),
        (64, 64, 3, 47905, 49e3, 97e3),
        (128, 128, 1, 129, 130, 260),
        (128, 128, 2, 8385, 8.5e3, 17e3),
        (128, 128, 3, 366145, 369e3, 738e3),
    ],
)
def test_crossovers_of_the_published_table(width, value_width, degree, count, full, causal):
    assert features(width, degree) == count
    assert crossover(width, value_width, degree, causal=False) == pytest.approx(full, rel=0.03)
    assert crossover(width, value_width, degree) == pytest.approx(causal, rel=0.03)


def test_both_cost_the_same_at_the_crossover():
    context = crossover(64, 64, 2)
    assert exact_flops(64, 64, context) == pytest.approx(factorised_flops(64, 64, 2))


@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_segments_are_those_of_the_kernels(width, degree):
    found = segments_of(100_000, 100_000, width, degree, 1)
    assert found.length == segment_length(width, degree)
    short = LEAST_SEGMENTS * found.length
    assert segments_of(100_000, short, width, degree, 1).number == LEAST_SEGMENTS
    assert segments_of(100_000, short - 1, width, degree, 1).number == 0


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_heads_cost_the_same_at_their_crossover(degree):
    context = flops_crossover(64, degree, NEAR)
    shorter = polynomial_cost(SHAPE, degree, NEAR, int(context) - 1, 2)
    longer = polynomial_cost(SHAPE, degree, NEAR, int(context) + 1, 2)
    assert shorter.flops >= exact_cost(SHAPE, int(context) - 1, 2).flops
    assert longer.flops <= exact_cost(SHAPE, int(context) + 1, 2).flops


def test_state():
    assert state_bytes(64, 64, 2) == 2145 * 65 * 4


@pytest.mark.parametrize("context", [64, 8192, 1 << 20])
@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_fft_is_never_cheaper_than_features(context, degree):
    assert fft_flops(64, 64, degree, context) > 10 * factorised_flops(64, 64, degree)


def test_roofline_is_the_slower_of_two():
    machine = Machine(flops_per_s=100, bytes_per_s=10, element_bytes=2)
    assert machine.seconds(200, 1) == 2
    assert machine.seconds(200, 50) == 5


def test_machine_has_the_targets_figures():
    machine = machine_of(parse_target("jetson-orin"))
    assert machine == Machine(42.5e12, 204.8e9, 2)
    assert machine_of(parse_target("jetson-orin"), "fp32") == Machine(5.3e12, 204.8e9, 4)
    assert machine_of(parse_target("jetson-orin"), "bf16") is None, "not published"
    assert machine_of(parse_target("cpu")) is None


def test_speed_crossover_is_where_the_faster_one_changes():
    machine = machine_of(parse_target("jetson-orin"))
    assert machine is not None
    context = speed_crossover(SHAPE, 2, NEAR, machine)

    def seconds(at: int) -> tuple[float, float]:
        pair = (exact_cost(SHAPE, at, 2), polynomial_cost(SHAPE, 2, NEAR, at, 2))
        exact, polynomial = (machine.seconds(c.flops, c.moved_bytes) for c in pair)
        return exact, polynomial

    assert seconds(context)[1] < seconds(context)[0]
    assert seconds(context - 1)[1] >= seconds(context - 1)[0]
    # The state is moved besides: later than by FLOPs.
    assert context > crossover(64, 64, 2)


def test_gain_of_no_head_is_none():
    gain = attention_gain(SHAPE, {}, NEAR, 8192, Machine(1e12, 1e11, 2))
    assert (gain.flops, gain.speed) == (1, 1)


def test_gain_grows_with_heads_and_context():
    def flops(heads: dict[int, tuple[int, int]], context: int) -> float:
        return attention_gain(SHAPE, heads, NEAR, context, None).flops

    assert attention_gain(SHAPE, {}, NEAR, 8192, None).speed is None
    some, all_heads = {0: (2, 9)}, {layer: (2, 9) for layer in range(4)}
    assert 1 < flops(some, 8192) < flops(all_heads, 8192)
    assert flops(all_heads, 8192) < flops(all_heads, 100_000)
    assert flops(all_heads, 1024) == 1, "short prompts are read key by key"
    exact, polynomial = exact_cost(SHAPE, 8192, 2), polynomial_cost(SHAPE, 2, NEAR, 8192, 2)
    mean = (3 * exact.flops + polynomial.flops) / 4
    assert flops(some, 8192) == pytest.approx(exact.flops / mean)

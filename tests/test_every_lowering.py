"""Every graph that any target, software, scheme and dtype can ask for, really exported and built.

The combinations are many, the distinct graphs a few dozen. Each is exported once from a tiny model
and proven in ONNX Runtime, and TensorRT-RTX parses and builds it for every compute capability that
some target checks it with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from edgeattn.bundle.bundle import Bundle
from edgeattn.devices.registry import Target, all_targets, parse_target
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.errors import LoweringError
from edgeattn.exporters import export as exporter
from edgeattn.exporters.trace import trace_decoder
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.huggingface import shape_from_config
from edgeattn.models.model import model_of
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.quant.scheme import GROUP_SIZES, SCHEMES
from edgeattn.recipe import DTYPES, LOGITS, Recipe
from edgeattn.verify.verify import check_tensorrt

needs_rtx = pytest.mark.skipif(
    not TENSORRT_RTX.is_available(), reason="needs TensorRT-RTX: install edgeattn[rtx]"
)

# Every group of int4 weights divides every width.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 272,
    "max_position_embeddings": 256,
}
# The second has what makes the planner fall back: a window, which the CPU's GroupQueryAttention is
# not asked for, and heads narrower than TensorRT's Attention takes.
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"model_type": "llama", **SIZES},
    "narrow": {
        "model_type": "mistral",
        **SIZES,
        "num_attention_heads": 16,
        "head_dim": 8,
        "sliding_window": 7,
    },
}
# Those that follow from the checkpoint alone; tests/test_schemes.py has those that need a text.
PLAIN = {name for name, scheme in SCHEMES.items() if not scheme.needs_calibration}
QUANTS = (*sorted(PLAIN), *(f"w4-rtn:group={group}" for group in GROUP_SIZES))


@dataclass(frozen=True)
class Request:
    """What to export to get a graph.

    Attributes:
        model: in MODELS.
        recipe: of the first target that leads to the graph.
    """

    model: str
    recipe: Recipe


def graph_of(lowering: Lowering) -> Lowering:
    """The lowering without what is read only when an engine is built."""
    return replace(lowering, target="", flavour="tensorrt", strip_functions=False, rtx_sm=None)


def recipes(target: Target) -> Iterator[Recipe]:
    """Every scheme in every dtype; for the default of both the logits of the last place alone, too.

    A static cache in every dtype, and with quantised weights in the default one.
    """
    for quant, dtype in itertools.product(QUANTS, DTYPES):
        yield Recipe(target.name, quant, dtype)
    yield from (Recipe(target.name, logits=logits) for logits in LOGITS)
    yield from (Recipe(target.name, dtype=dtype, kv_cache="static") for dtype in DTYPES)
    yield from (Recipe(target.name, quant, kv_cache="static") for quant in sorted(PLAIN))


def lowered(model: str, target: Target) -> Iterator[tuple[Lowering, Request]]:
    """What a target does with a model, refusals left out."""
    shape = shape_from_config(MODELS[model])
    for recipe in recipes(target):
        try:
            lowering = fit_lowering(plan_lowering(recipe, target), shape, target)
        except LoweringError:
            continue
        yield lowering, Request(model, recipe)


def requests() -> tuple[dict[Lowering, Request], list[tuple[Lowering, int]]]:
    """Every distinct graph with what leads to it, and the compute capabilities it is built for."""
    graphs: dict[Lowering, Request] = {}
    builds: dict[tuple[Lowering, int], None] = {}
    for model, target in itertools.product(MODELS, all_targets()):
        for lowering, request in lowered(model, target):
            graph = graph_of(lowering)
            graphs.setdefault(graph, request)
            if lowering.rtx_sm is not None:
                builds[graph, lowering.rtx_sm] = None
    return graphs, sorted(builds, key=lambda build: (list(graphs).index(build[0]), build[1]))


GRAPHS, BUILDS = requests()


def build_parameters() -> list[Any]:
    """Every build; those that differ from a build of the plain model least are slow.

    TensorRT-RTX takes about a second for each. Fallbacks are made of the operators of other graphs,
    and logits of one place are a slice: one compute capability tells whether it takes them.
    """
    found = []
    for graph, sm in BUILDS:
        marks = []
        if sm != 86 and (GRAPHS[graph].model != "plain" or graph.logits == "last"):
            marks.append(pytest.mark.slow)
        found.append(pytest.param(graph, sm, marks=marks))
    return found


def name_of(value: object) -> str:
    """A graph's choices, or the compute capability, as part of a test's name."""
    if not isinstance(value, Lowering):
        return f"sm{value}"
    choices = [f"opset{value.opset}", value.attention, value.kv_cache, value.embedding]
    choices += [value.dtype, value.scheme.label]
    return "-".join(choices + (["last"] if value.logits == "last" else []))


@pytest.fixture(scope="module")
def bundle_of(
    export_tiny: Callable[..., Path], random_checkpoint: Callable[..., Path]
) -> Callable[[Lowering], Bundle]:
    """A function from a graph to a proven bundle that holds it."""

    def make(graph: Lowering) -> Bundle:
        request = GRAPHS[graph]
        recipe = request.recipe
        path = export_tiny(
            recipe.target,
            recipe.quant,
            model=random_checkpoint(**MODELS[request.model]),
            dtype=recipe.dtype,
            logits=recipe.logits,
            kv_cache=recipe.kv_cache,
        )
        return Bundle.open(path)

    return make


@pytest.mark.parametrize("graph", GRAPHS, ids=name_of)
def test_it_is_exported_and_proven(graph: Lowering, bundle_of: Callable[..., Bundle]) -> None:
    manifest = bundle_of(graph).manifest
    assert manifest.verification.status == "passed"
    assert graph_of(Lowering.from_dict(manifest.lowering)) == graph


@needs_rtx
@pytest.mark.parametrize(("graph", "sm"), build_parameters(), ids=name_of)
def test_tensorrt_builds_it(graph: Lowering, sm: int, bundle_of: Callable[..., Bundle]) -> None:
    bundle = bundle_of(graph)
    report = check_tensorrt(bundle.model_file, replace(graph, rtx_sm=sm), bundle.shape)
    assert report is not None
    assert report.status == "built", report.reason
    assert report.log_errors == ()


@pytest.mark.parametrize("target", all_targets(), ids=lambda target: target.name)
def test_every_target_leads_to_what_is_covered(target: Target) -> None:
    """Counted without the loops above: schemes and dtypes as the target itself lists them."""
    quants = ["none", *(f"w{bits}-rtn" for bits in target.weight_bits)]
    quants += [f"w4-rtn:group={g}" for g in target.int4_group_sizes if g in GROUP_SIZES]
    for quant, dtype in itertools.product(quants, (None, *target.dtypes)):
        lowering = plan_lowering(Recipe(target.name, quant, dtype), target)
        assert graph_of(lowering) in GRAPHS
        if lowering.rtx_sm is not None:
            assert (graph_of(lowering), lowering.rtx_sm) in BUILDS


def test_every_choice_of_the_planner_occurs() -> None:
    """Written by hand: a loop above that leaves something out fails here."""
    spellings = {(g.opset, g.attention, g.kv_cache, g.embedding) for g in GRAPHS}
    assert spellings == {
        (20, "primitive", "concat", "dequantize-gather"),
        (21, "primitive", "concat", "dequantize-gather"),
        (23, "primitive", "concat", "dequantize-gather"),
        (23, "standard", "concat", "dequantize-gather"),
        (23, "standard", "concat", "gather-dequantize"),
        (23, "group-query", "shared-buffer", "gather-dequantize"),
        (24, "primitive", "static", "dequantize-gather"),
        (24, "standard", "static", "dequantize-gather"),
        (24, "standard", "static", "gather-dequantize"),
    }
    assert {graph.logits for graph in GRAPHS} == {"all", "last"}
    assert {graph.dtype for graph in GRAPHS} == {"fp32", "fp16", "bf16"}
    assert {graph.scheme.name for graph in GRAPHS} == PLAIN
    assert {sm for _, sm in BUILDS} == {75, 80, 86, 89, 120, 121}


def test_what_is_left_out_of_a_graph_does_not_change_it(
    random_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lowerings that share a graph here are written as the same bytes, each with its own trace."""
    monkeypatch.setattr(exporter, "trace_decoder", trace_decoder)  # not the shared one
    model = model_of(open_checkpoint(random_checkpoint(**MODELS["plain"])))
    one = plan_lowering(Recipe("l4"), parse_target("l4"))
    other = replace(one, target="another", flavour="tensorrt-rtx", strip_functions=True, rtx_sm=120)
    assert graph_of(one) == graph_of(other)
    weights = tmp_path / "model.onnx.data"
    written = []
    for lowering in (one, other):
        exporter.export_graph(model, lowering, tmp_path / "model.onnx", weights)
        written.append((tmp_path / "model.onnx").read_bytes() + weights.read_bytes())
    assert written[0] == written[1]

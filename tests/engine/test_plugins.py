"""The plugin library as a file: reading its table, and refusing what does not fit."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

pytest.importorskip("torch")

from hypothesis import given
from hypothesis import strategies as st
from library_files import library_file, table
from op_cases import constant_states, op_model

from edgeattn.engine.plugins import (
    PLUGIN_ABI,
    PluginLibrary,
    expected_layers,
    missing_plugins,
    plugin_nodes,
    read_library,
    require_states,
    require_variants,
    runs_on,
)
from edgeattn.errors import BundleError, LoweringError
from edgeattn.ops.hadamard_transform import SPEC as HADAMARD
from edgeattn.ops.recurrent_linear_attention import SPEC
from edgeattn.ops.spec import Case


@pytest.fixture
def library(tmp_path: Path) -> PluginLibrary:
    return read_library(library_file(tmp_path, table()))


def case(**changed: int) -> Case:
    dims = {"B": 1, "H": 2, "Hkv": 2, "T": 20, "Dk": 64, "Dv": 64, "Dg": 1}
    attributes = {n: changed.pop(n) for n in ("delta", "normalise") if n in changed}
    return Case("one", {**dims, **changed}, "fp16", attributes)


def nodes(case: Case, *dynamic: str):
    return plugin_nodes(op_model(SPEC, case, 21, dynamic=dynamic))


def test_the_table_of_another_architecture_is_read(library: PluginLibrary) -> None:
    assert (library.abi, library.arch, library.sms) == (PLUGIN_ABI, "aarch64", (80, 87))
    assert len(library.variants) == 8
    assert json.loads(json.dumps(library.to_dict()))["ops"] == ["RecurrentLinearAttention"]
    library.require("aarch64")


def test_a_library_for_another_processor_or_abi_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"for x86_64, but .* is for aarch64"):
        read_library(library_file(tmp_path, table())).require("x86_64")
    other = library_file(tmp_path, {"abi": PLUGIN_ABI + 1, "another": "table"})
    with pytest.raises(BundleError, match=f"ABI {PLUGIN_ABI}, but .* ABI {PLUGIN_ABI + 1}"):
        read_library(other)


def test_what_is_no_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is none"):
        read_library(tmp_path / "none.so")
    with pytest.raises(BundleError, match=r"there is none|Is a directory|system says"):
        read_library(tmp_path)
    text = tmp_path / "text.so"
    text.write_text("no ELF")
    with pytest.raises(BundleError, match="no shared library"):
        read_library(text)
    with pytest.raises(BundleError, match="no table"):
        read_library(Path("/bin/sh"))
    with pytest.raises(BundleError, match="it says x86_64 and is for aarch64"):
        read_library(library_file(tmp_path, table(arch="x86_64")))


@given(cut=st.integers(0, 2000), junk=st.binary(max_size=20))
def test_a_damaged_library_is_refused_in_a_sentence_or_read(
    cut: int, junk: bytes, tmp_path_factory
) -> None:
    file = library_file(tmp_path_factory.mktemp("damaged"), table())
    content = file.read_bytes()
    file.write_bytes(content[:cut] + junk + content[cut + len(junk) :])
    with contextlib.suppress(BundleError):
        assert read_library(file).path == file


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"variants": [{"kernel": "a"}]}, "does not read"),
        ({"variants": 3}, "does not read"),
        ({"unknown": 1}, "does not read"),
    ],
)
def test_a_table_of_another_shape_is_refused(tmp_path: Path, changed: dict, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        read_library(library_file(tmp_path, table(**changed)))


def test_nodes_are_read_from_a_graph() -> None:
    (node,) = nodes(case(delta=1), "B", "T")
    assert (node.op, node.dtype) == ("RecurrentLinearAttention", "fp16")
    assert node.shapes[0] == (None, 2, None, 64)
    assert node.attributes["delta"] == 1
    assert node.attributes["epsilon"] == pytest.approx(1e-6)


@pytest.mark.parametrize("sm", [80, 86, 87, 89])
@pytest.mark.parametrize("dynamic", [(), ("T",)])
@pytest.mark.parametrize("delta", [0, 1])
def test_a_graph_with_kernels_passes(library, sm, dynamic, delta) -> None:
    require_variants(library, nodes(case(delta=delta), *dynamic), sm)


@pytest.mark.parametrize(
    ("changed", "sm", "words"),
    [
        ({}, 90, r"recurrent_linear_attention.*on SM 90 .*it holds that for SM 80, 87"),
        ({}, 75, "on SM 75"),
        ({"Dk": 128}, 87, "BLOCK=128"),
        ({"Dk": 40, "Dv": 24, "T": 3}, 87, ""),
        ({"Dg": 64}, 87, "CHANNELS=1"),
        ({"Dk": 256}, 87, "head dimensions that are multiples of 8 up to 128"),
        ({"Dv": 12}, 87, "head dimensions that are multiples of 8"),
        ({"T": 2**23 + 1}, 87, "at most 8388608 rows of 64 numbers .* but 8388609 came"),
    ],
    ids=str,
)
def test_a_missing_kernel_is_named(library, changed: dict, sm: int, words: str) -> None:
    found = nodes(case(**changed))
    if not words:
        require_variants(library, found, sm)
        return
    with pytest.raises(LoweringError, match=words):
        require_variants(library, found, sm)


def test_the_normaliser_needs_all_values_in_one_program(tmp_path: Path) -> None:
    """As the plugin asks for it, where the state is updated in place."""
    content = table()
    for variant in content["variants"]:
        if variant["kernel"].endswith("decode"):
            variant["constants"] = {"BLOCK": 64, "BLOCK_V": 32}
    apart = read_library(library_file(tmp_path, content))
    require_variants(apart, nodes(case(T=1)), 87)
    with pytest.raises(LoweringError, match=r"decode in fp16 with BLOCK=64 BLOCK_V=64"):
        require_variants(apart, nodes(case(T=1, normalise=1)), 87)


def test_what_is_not_declared_is_inferred_or_refused(library: PluginLibrary) -> None:
    model = op_model(SPEC, case(), 21)
    (call,) = model.graph.node
    for i, name in enumerate(call.input):  # values whose shapes no line of the graph gives
        model.graph.node.append(onnx.helper.make_node("Identity", [name], [f"same_{name}"]))
        call.input[i] = f"same_{name}"
    model.graph.node.append(model.graph.node.pop(0))
    (found,) = plugin_nodes(model)
    assert found.shapes == plugin_nodes(op_model(SPEC, case(), 21))[0].shapes
    require_variants(library, [found], 87)
    with pytest.raises(LoweringError, match=r"fixed dimensions .* \[1, 2, 20, \?\]"):
        require_variants(library, nodes(case(), "Dk"), 87)


@pytest.mark.parametrize(
    ("name", "axis", "size", "words"),
    [
        ("past_state", 2, 32, r"past_state .* with Dk = 64"),
        ("log_decay", 3, 5, "one log-decay per row or one per each of 64 channels"),
        ("q", 1, 3, "query heads in groups of one size"),
        ("delta", None, 2, "delta of 0 or 1"),
    ],
)
def test_what_no_implementation_takes_is_the_models_fault(
    library: PluginLibrary, name: str, axis: int | None, size: int, words: str
) -> None:
    model = op_model(SPEC, case(delta=1), 21)
    if axis is None:
        (attribute,) = (a for a in model.graph.node[0].attribute if a.name == name)
        attribute.i = size
    else:
        (value,) = (value for value in model.graph.input if value.name == name)
        value.type.tensor_type.shape.dim[axis].dim_value = size
    with pytest.raises(LoweringError, match=rf"{words}.*, in node .*correct the model"):
        require_variants(library, plugin_nodes(model), 87)


def test_states_that_are_computed_from_constants_are_constants(library: PluginLibrary) -> None:
    model = op_model(SPEC, case(), 21)
    constant_states(model, constant=True, output=False)
    (call,) = model.graph.node
    zeros = model.graph.initializer.pop(0)
    nodes = [
        onnx.helper.make_node("Constant", [], ["given"], value=zeros),
        onnx.helper.make_node("Identity", ["given"], [zeros.name]),
    ]
    del model.graph.node[:]
    model.graph.node.extend([*nodes, call])
    with pytest.raises(LoweringError, match=r"past_state of node .* it is a constant"):
        require_states(library, model)


@pytest.mark.parametrize(
    ("constant", "output", "refused"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_states_that_cannot_be_updated_in_place_are_refused(
    library: PluginLibrary, constant: bool, output: bool, refused: bool
) -> None:
    """Those, and those alone, that TensorRT's builder fails at (tests/plugins)."""
    model = op_model(SPEC, case(), 21)
    constant_states(model, constant=constant, output=output)
    if not refused:
        require_states(library, model)
        return
    with pytest.raises(
        LoweringError, match=r"past_state of node .* in place, but it is a constant"
    ):
        require_states(library, model)


def test_nodes_that_no_layer_count_would_see_are_refused() -> None:
    model = op_model(SPEC, case(), 21)
    body = onnx.helper.make_graph([model.graph.node.pop()], "body", [], [])
    model.graph.node.append(onnx.helper.make_node("Loop", [], [], body=body))
    with pytest.raises(LoweringError, match="in the graph itself, but a subgraph has node"):
        plugin_nodes(model)
    model = op_model(SPEC, case(), 21)
    model.functions[0].node.append(model.graph.node.pop())
    with pytest.raises(LoweringError, match="function RecurrentLinearAttention has node"):
        plugin_nodes(model)


def test_another_dtype_is_named(library: PluginLibrary) -> None:
    one = case()
    found = nodes(Case(one.name, one.dims, "bf16"))
    with pytest.raises(LoweringError, match=r"in bf16 with BLOCK=64"):
        require_variants(library, found, 87)


def test_operators_without_a_plugin_keep_their_body(
    library: PluginLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {HADAMARD.name: replace(HADAMARD, plugin=False), SPEC.name: SPEC}
    monkeypatch.setattr("edgeattn.engine.plugins.find_op", plain.__getitem__)
    model = op_model(HADAMARD, HADAMARD.cases[0], 21)
    found = plugin_nodes(model)
    require_variants(library, found, 90)
    assert expected_layers(library, found) == 0
    assert expected_layers(None, nodes(case())) == 0
    assert expected_layers(library, nodes(case())) == 1
    assert missing_plugins(model, found) == set()
    del model.functions[:]
    assert missing_plugins(model, found) == {"HadamardTransform"}


def test_a_library_of_an_older_edgeattn_lacks_a_plugin(tmp_path: Path) -> None:
    older = read_library(library_file(tmp_path, table(ops=["Older"])))
    with pytest.raises(LoweringError, match=r"the plugin RecurrentLinearAttention.* has Older"):
        require_variants(older, nodes(case()), 87)


def test_another_number_of_inputs_is_refused() -> None:
    model = op_model(SPEC, case(), 21)
    del model.graph.node[0].input[-1]
    with pytest.raises(LoweringError, match=r"7 inputs .* it has 6"):
        plugin_nodes(model)


def test_an_unknown_operator_is_refused() -> None:
    model = op_model(SPEC, case(), 21)
    model.graph.node[0].op_type = "FutureAttention"
    with pytest.raises(LoweringError, match="FutureAttention"):
        plugin_nodes(model)
    assert plugin_nodes(onnx.ModelProto()) == []


RUNS = {75: {75}, 80: {80}, 86: {80, 86}, 87: {87}, 89: {80, 86, 89}, 90: {90}, 100: {100}}


@pytest.mark.parametrize("sm", RUNS)
def test_which_cubins_a_gpu_runs(sm: int) -> None:
    assert {compiled for compiled in (*RUNS, 110, 120, 121) if runs_on(sm, compiled)} == RUNS[sm]


def test_the_abi_is_that_of_the_header() -> None:
    from importlib.resources import files

    header = files("edgeattn.plugins").joinpath("include/edgeattn/plugins.h").read_text("utf-8")
    assert f"#define EDGEATTN_PLUGIN_ABI {PLUGIN_ABI}\n" in header

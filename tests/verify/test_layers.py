"""Each layer of a graph judged alone: a right graph passes with margin, a wrong scale does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from edgeattn.calibration.store import LayerStore
from edgeattn.devices.registry import parse_target
from edgeattn.errors import ProofError
from edgeattn.exporters.export import export_graph
from edgeattn.models.checkpoint import open_checkpoint
from edgeattn.models.model import TORCH_DTYPES, Model, model_of
from edgeattn.planner.lowering import Lowering, fit_lowering, plan_lowering
from edgeattn.recipe import Recipe
from edgeattn.transforms.calibrate import quantize_on_text
from edgeattn.transforms.fuse import fuse_projections
from edgeattn.transforms.rotate import hadamard_rotations, rotate
from edgeattn.verify.cases import build_cases
from edgeattn.verify.compare import Comparison, group_of, locate
from edgeattn.verify.golden import Golden
from edgeattn.verify.layers import compare_layers
from edgeattn.verify.ort_backend import OrtBackend
from edgeattn.verify.tolerance import typical_error
from edgeattn.verify.verify import check_onnxruntime, prove

SCHEMES = {
    "w8a8-spinquant": "w8a8-spinquant",
    "w8a8-spinquant:kv=int8": "w8a8-spinquant:kv=int8",
    "w4a16-gptq:kv=int8": "w4a16-gptq:group=64,down_proj=w8,kv=int8",
}
TARGETS = {"fp32": "cpu", "fp16": "jetson-orin"}
# Share of its bound that a right tensor may use.
MARGIN = 0.8


@dataclass(frozen=True)
class Exported:
    """A trained model of five layers, quantised; its graph, and the inputs of a proof."""

    model: Model
    lowering: Lowering
    file: Path
    tokens: list[int]

    def rows(self, file: Path | None = None) -> list[Comparison]:
        backend = OrtBackend(file or self.file, self.lowering, hidden=True)
        shape = self.model.shape
        cases = build_cases(shape.vocab_size, shape.max_context, self.tokens)
        return compare_layers(self.model, self.lowering, backend, cases)

    def rounding(self, proto: onnx.ModelProto, place: str, layer: int) -> onnx.NodeProto:
        """The QuantizeLinear of a place of a layer."""
        maker = {name: node for node in proto.graph.node for name in node.output}
        if place in ("key", "value"):
            found = maker[maker[f"present.{layer}.{place}"].input[1]]
        else:
            weight = f"layers.{layer}.{place}.weight"
            (reader,) = (
                node
                for node in proto.graph.node
                if node.op_type == "MatMul" and node.input[1].removesuffix("_dequantized") == weight
            )
            found = maker[maker[reader.input[0]].input[0]]
        assert found.op_type == "QuantizeLinear"
        return found

    def wrong(self, place: str, layer: int, factor: float) -> Path:
        """A graph beside the right one in which one QuantizeLinear has another scale."""
        proto = onnx.load(self.file, load_external_data=False)
        node = self.rounding(proto, place, layer)
        (old,) = (t for t in proto.graph.initializer if t.name == node.input[1])
        array = numpy_helper.to_array(old)
        node.input[1] = f"{old.name}_wrong"
        scaled = numpy_helper.from_array((array * factor).astype(array.dtype), node.input[1])
        proto.graph.initializer.append(scaled)
        file = self.file.with_name(f"{place}-{layer}-{factor}.onnx")
        file.write_bytes(proto.SerializeToString())
        return file


@pytest.fixture(scope="module")
def exported(
    stories260k: Path,
    shared_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    shared_traces: None,
) -> Callable[[str, str], Exported]:
    """A function from scheme and dtype to a graph, made once."""
    checkpoint = open_checkpoint(stories260k)
    ids = tokens_of(stories260k, shared_dir)
    made: dict[tuple[str, str], Exported] = {}

    def make(scheme: str, dtype: str) -> Exported:
        if (scheme, dtype) not in made:
            folder = tmp_path_factory.mktemp("layers")
            made[scheme, dtype] = export(model_of(checkpoint), SCHEMES[scheme], dtype, ids, folder)
        return made[scheme, dtype]

    return make


def tokens_of(checkpoint: Path, shared_dir: Path) -> list[int]:
    from tokenizers import Tokenizer

    text = shared_dir / "data" / "austen" / "emma.txt"
    if not text.is_file():
        pytest.skip("no novels in shared/data")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return tokenizer.encode(text.read_text("utf-8")[10000:20000], add_special_tokens=False).ids


def export(model: Model, quant: str, dtype: str, ids: Sequence[int], folder: Path) -> Exported:
    """Quantised on 1024 tokens; the proof runs others."""
    target = parse_target(TARGETS[dtype])
    planned = plan_lowering(Recipe(TARGETS[dtype], quant=quant, dtype=dtype), target)
    lowering = fit_lowering(planned, model.shape, target)
    if lowering.scheme.rotation != "none":
        model = rotate(model, hadamard_rotations(model.shape, online=True))
    model = quantize_on_text(
        model,
        lowering.scheme,
        torch.tensor(ids[: 16 * 64]).reshape(16, 64),
        LayerStore(folder / "work", {}),
        scale_dtype=TORCH_DTYPES[dtype],
    )
    if lowering.attention == "group-query":
        model = fuse_projections(model)
    file = folder / "model.onnx"
    export_graph(model, lowering, file, folder / "model.onnx.data")
    return Exported(model, lowering, file, list(ids[-64:]))


def wrong_layers(rows: Sequence[Comparison]) -> set[str]:
    return {row.tensor.rpartition(".")[0] for row in rows if not row.passed}


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_right_graph_passes_with_margin(
    exported: Callable[[str, str], Exported], scheme: str, dtype: str
) -> None:
    rows = exported(scheme, dtype).rows()
    parts = ("output", "key", "value")
    assert [row.tensor for row in rows] == [f"layer.{i}.{part}" for i in range(5) for part in parts]
    for row in rows:
        assert row.error < MARGIN * row.allowed, row


PLACES = {
    "w8a8-spinquant": [("self_attn.o_proj", 4), ("mlp.down_proj", 4)],
    "w8a8-spinquant:kv=int8": [
        ("value", 2),
        ("value", 4),
        ("self_attn.o_proj", 4),
        ("mlp.down_proj", 4),
    ],
    "w4a16-gptq:kv=int8": [("key", 2), ("value", 2), ("value", 4)],
}


@pytest.mark.parametrize("dtype", TARGETS)
@pytest.mark.parametrize(
    ("scheme", "place", "layer"), [(s, *where) for s, places in PLACES.items() for where in places]
)
def test_one_wrong_scale_is_found_in_its_layer(
    exported: Callable[[str, str], Exported], scheme: str, place: str, layer: int, dtype: str
) -> None:
    """In fp16 a tenth is as much as so many numbers rounded otherwise make of an activation."""
    right = exported(scheme, dtype)
    factor = 1.3 if dtype == "fp16" and place.endswith("proj") else 1.1
    rows = right.rows(right.wrong(place, layer, factor))
    assert wrong_layers(rows) == {f"layer.{layer}"}
    assert max(row.error / row.allowed for row in rows) > (100 if dtype == "fp32" else 1.5)


def test_the_proof_names_the_layer(
    exported: Callable[[str, str], Exported], tmp_path: Path
) -> None:
    """Of a graph that the comparison of whole networks lets pass."""
    right = exported("w8a8-spinquant:kv=int8", "fp32")
    wrong = right.wrong("mlp.down_proj", 4, 1.1)
    arguments = (right.model, right.lowering)
    with pytest.raises(ProofError, match=r"output of layer 4 differ") as caught:
        prove(*arguments, wrong, tmp_path / "golden.npz", tokens=right.tokens)
    (agreement,) = caught.value.details["agreements"]
    assert agreement["first_bad"] == "layer 4"
    bad = {row["tensor"] for row in agreement["comparisons"] if not row["passed"]}
    assert bad == {"layer.4.output"}
    assert agreement["worst"]["layers alone, outputs"] == "layer.4.output"


def test_a_proof_holds_the_rows_of_layers(
    exported: Callable[[str, str], Exported], tmp_path: Path
) -> None:
    right = exported("w4a16-gptq:kv=int8", "fp32")
    golden = tmp_path / "golden.npz"
    stages: set[str] = set()
    verification = prove(
        right.model,
        right.lowering,
        right.file,
        golden,
        tokens=right.tokens,
        progress=lambda stage, *_: stages.add(stage),
    )
    (agreement,) = verification.agreements
    assert agreement.passed
    assert agreement.first_bad is None
    assert "ONNX Runtime, each layer alone" in stages
    for part in ("outputs", "keys", "values"):
        assert f"layers alone, {part}" in agreement.worst_per_group()
    # Later proofs have no torch.
    later = check_onnxruntime(right.file, Golden.load(golden), right.lowering, num_layers=5)
    names = {row.tensor for row in agreement.comparisons}
    assert {n for n in names if not n.startswith("layer.")} == {r.tensor for r in later.comparisons}


def test_caches_that_are_written_in_place(
    tiny_checkpoint: Path, tmp_path: Path, shared_traces: None
) -> None:
    """Rows of unequal length are left out there; the rest is judged as elsewhere."""
    ids = np.random.default_rng(0).integers(0, 272, 1100).tolist()
    model = model_of(open_checkpoint(tiny_checkpoint))
    right = export(model, "w8a8-spinquant", "fp32", ids, tmp_path)
    assert right.lowering.kv_cache == "shared-buffer"
    rows = right.rows()
    assert len(rows) == 3 * 3
    assert all(row.error < MARGIN * row.allowed for row in rows)
    for place in ("self_attn.o_proj", "mlp.down_proj"):
        assert wrong_layers(right.rows(right.wrong(place, 1, 1.1))) == {"layer.1"}


ONE = np.zeros(9, int)


def test_a_typical_error_is_that_of_most_tokens() -> None:
    reference = np.random.default_rng(0).normal(size=(9, 4, 8))
    few, most = reference.copy(), reference.copy()
    few[:4] *= 3
    most[:5] *= 1.1
    assert typical_error(reference, reference, ONE) == typical_error(few, reference, ONE) == 0
    assert typical_error(most, reference, ONE) == pytest.approx(0.1)


def test_a_typical_error_is_that_of_the_worst_sequence() -> None:
    reference = np.random.default_rng(0).normal(size=(9, 8))
    one = reference.copy()
    one[6:] *= 1.1
    assert typical_error(one, reference, ONE) == 0
    assert typical_error(one, reference, np.arange(9) // 3) == pytest.approx(0.1)


def test_a_large_token_does_not_hide_the_others() -> None:
    reference = np.ones((9, 8))
    reference[0] = 1e4
    assert typical_error(reference * 1.1, reference, ONE) == pytest.approx(0.1)


def test_a_typical_error_of_what_cannot_be_compared_is_infinite() -> None:
    zeros, ones, one = np.zeros((3, 2)), np.ones((3, 2)), np.zeros(3, int)
    assert typical_error(zeros, zeros, one) == 0
    assert typical_error(zeros[:0], zeros[:0], one[:0]) == 0
    assert typical_error(ones, zeros, one) == float("inf")
    assert typical_error(ones, ones[:2], one) == float("inf")
    one_bad = ones.copy()
    one_bad[0, 0] = np.nan
    assert typical_error(one_bad, ones, one) == float("inf")


def test_a_layer_that_errs_alone_is_the_place() -> None:
    """What whole networks show first may come later: there more error is allowed."""
    bad = [Comparison(name, 1.0, 0.0, 0.1) for name in ("sequence.0.logits", "layer.3.key")]
    good = Comparison("layer.1.key", 0.0, 0.0, 0.1)
    assert locate([*bad, good], 5) == "layer 3"
    assert locate([bad[0], good], 5) == "final norm or LM head"
    assert group_of("layer.3.key") == "layers alone, keys"

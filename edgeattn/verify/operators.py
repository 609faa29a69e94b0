"""Nodes of domain edgeattn, each judged alone on the inputs it has in a run of the graph.

One sample per operator and set of attributes is kept in the bundle, so that its kernel can be
compared with the reference where the GPU is, without torch's model or the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeattn.engine.plugins import PluginNode, plugin_nodes
from edgeattn.errors import BundleError, ProofError, RuntimeInputError
from edgeattn.ops import find_op
from edgeattn.ops.spec import DOMAIN
from edgeattn.planner.lowering import Lowering
from edgeattn.verify.cases import Case
from edgeattn.verify.compare import OPERATOR, Agreement, Comparison
from edgeattn.verify.ort_backend import OrtBackend
from edgeattn.verify.tolerance import relative_error

if TYPE_CHECKING:
    from onnx import ModelProto

Array = NDArray[np.generic]
# A sample -> outputs.
Implementation = Callable[["Sample"], Sequence[Array]]

# Bits that a rounding keeps: the error of rounding once, 2^-bits, is what plain computation costs.
_PRECISION = {"fp32": 24, "fp16": 11, "bf16": 8}


@dataclass(frozen=True)
class Sample:
    """One node in one step.

    Attributes:
        node: its name.
        op: of its operator.
        dtype: of its first input.
        attributes: all of the operator's.
        inputs: in order; bf16 ones as fp32.
        found: what the graph made of them.
        expected: what the reference makes of them, in fp32.
    """

    node: str
    op: str
    dtype: str
    attributes: Mapping[str, Any]
    inputs: tuple[Array, ...]
    found: tuple[Array, ...]
    expected: tuple[Array, ...]

    def compare(self, outputs: Sequence[Array]) -> list[Comparison]:
        """One row per output: twice the error of rounding once, plus the operator's floor."""
        spec = find_op(self.op)
        floor = spec.tolerance[self.dtype].floor
        rows = []
        for tensor, value, exact in zip(spec.outputs, outputs, self.expected, strict=True):
            low = 2.0 ** -_PRECISION[self.dtype if tensor.variable == "T" else "fp32"]
            error = relative_error(_rows(value), _rows(exact))
            rows.append(
                Comparison(f"{OPERATOR}{self.node}.{tensor.name}", error, low, 2 * low + floor)
            )
        return rows


def _rows(tensor: Array) -> NDArray[np.float32]:
    """As one token, so that an error is relative to the whole tensor."""
    return tensor.astype(np.float32).reshape(1, -1)


def sample_operators(
    model_file: Path, lowering: Lowering, case: Case, *, every: bool = False
) -> list[Sample]:
    """Runs the first steps of a case in ONNX Runtime, and the reference on what nodes read there.

    Of a prefill and of a step behind it, as operators may do different things in them.

    Args:
        model_file: the graph.
        lowering: what was decided.
        case: what to run.
        every: all nodes; else the first of each operator and set of attributes.
    """
    watched = watch_operators(model_file, every=every)
    if not watched.nodes:
        return []
    backend = OrtBackend(model_file, lowering, expose=watched.inner, keep_rounding=True)
    samples, output = list[Sample](), None
    for step in case.steps[:2]:
        past = backend.past(len(step.input_ids), output) if watched.reads_inputs else {}
        output = backend.step(step, output)
        samples += watched.samples({**past, **output})
    return samples


@dataclass(frozen=True)
class WatchedNodes:
    """Nodes of a graph whose inputs and outputs are looked at.

    Attributes:
        nodes: each with the names of its inputs and outputs.
        constants: what they read of the graph's initialisers, by name.
        graph_inputs: names of the graph's inputs that they read.
    """

    nodes: Sequence[tuple[PluginNode, Sequence[str], Sequence[str]]]
    constants: Mapping[str, Array]
    graph_inputs: frozenset[str]

    @property
    def reads_inputs(self) -> bool:
        """Whether some node reads an input of the graph."""
        return bool(self.graph_inputs)

    @property
    def inner(self) -> list[str]:
        """Names of the values inside the graph that a run must give."""
        names = {name for _, inputs, outputs in self.nodes for name in (*inputs, *outputs)}
        return sorted(names - self.constants.keys() - self.graph_inputs)

    def samples(self, values: Mapping[str, Any]) -> list[Sample]:
        """What every node did in a run.

        Args:
            values: of the run, by name; constants are known.
        """
        known = {**self.constants, **values}
        return [
            _sample(node, *(tuple(np.array(known[n]) for n in names) for names in (given, made)))
            for node, given, made in self.nodes
        ]


def watch_operators(model_file: Path, *, every: bool = False) -> WatchedNodes:
    """The nodes of edgeattn's operators in a graph.

    Args:
        model_file: the graph.
        every: all nodes; else the first of each operator and set of attributes.
    """
    import onnx

    proto = onnx.load(model_file, load_external_data=False)
    chosen = _chosen(proto, every=every)
    read = {name for _, inputs, _ in chosen for name in inputs}
    constants = {
        tensor.name: _widened(onnx.numpy_helper.to_array(tensor, str(model_file.parent)))
        for tensor in proto.graph.initializer
        if tensor.name in read
    }
    return WatchedNodes(chosen, constants, frozenset(read & {v.name for v in proto.graph.input}))


def _widened(array: Array) -> Array:
    """Bf16 as fp32, as ONNX Runtime runs it here; numpy itself has no such dtype."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


def _chosen(
    proto: ModelProto, *, every: bool
) -> list[tuple[PluginNode, Sequence[str], Sequence[str]]]:
    found: list[tuple[PluginNode, Sequence[str], Sequence[str]]] = []
    seen = set()
    nodes = [node for node in proto.graph.node if node.domain == DOMAIN]
    for node, about in zip(nodes, plugin_nodes(proto), strict=True):
        key = json.dumps([about.op, about.dtype, about.dtypes, about.attributes], sort_keys=True)
        if every or key not in seen:
            found.append((about, list(node.input), list(node.output)))
        seen.add(key)
    return found


def _sample(node: PluginNode, inputs: tuple[Array, ...], found: tuple[Array, ...]) -> Sample:
    import torch

    spec = find_op(node.op)
    tensors = [torch.from_numpy(x) for x in inputs]
    if node.dtype == "bf16":  # ONNX Runtime ran them widened
        tensors = [
            x.bfloat16().float() if "bf16" in t.dtypes and x.is_floating_point() else x
            for t, x in zip(spec.inputs, tensors, strict=True)
        ]
    exact = [x.float() if x.is_floating_point() else x for x in tensors]
    try:
        result = spec.reference(*exact, **node.attributes)
    except RuntimeInputError as error:
        raise ProofError(
            expected=f"{error.expected} in node {node.name}",
            came=error.came,
            todo=f"see edgeattn ops {spec.name} for what it takes, and correct the model",
        ) from error
    outputs = result if isinstance(result, tuple) else (result,)
    return Sample(
        node.name,
        node.op,
        node.dtype,
        node.attributes,
        tuple(x.numpy() for x in tensors),
        found,
        tuple(y.numpy() for y in outputs),
    )


def with_operators(
    agreement: Agreement, sample: Callable[..., Sequence[Sample]], file: Path | None
) -> Agreement:
    """Adds what edgeattn's operators do alone; of a graph that disagrees, the first that is wrong.

    Args:
        agreement: of the graph.
        sample: gives samples of its operators, with `every=True` of all nodes.
        file: where the samples of a graph that agrees go, if there are any.
    """
    if not agreement.passed:
        operator = first_wrong_operator(sample(every=True))
        return replace(agreement, first_bad=operator or agreement.first_bad)
    samples = sample()
    rows = tuple(row for one in samples for row in one.compare(one.found))
    if samples and file is not None:
        save_samples(samples, file)
    agreement = replace(agreement, comparisons=(*agreement.comparisons, *rows))
    if agreement.passed:
        return agreement
    return replace(agreement, first_bad=first_wrong_operator(samples))


def first_wrong_operator(samples: Sequence[Sample]) -> str | None:
    """The first node that errs on its own, None where all agree."""
    return check_operators("", samples, lambda sample: sample.found).first_bad


def check_operators(
    name: str, samples: Sequence[Sample], implementation: Implementation
) -> Agreement:
    """Compares another implementation with the reference on kept inputs."""
    rows: list[Comparison] = []
    first_bad = None
    for sample in samples:
        found = sample.compare(implementation(sample))
        if first_bad is None and not all(row.passed for row in found):
            first_bad = f"{OPERATOR}{sample.node} ({sample.op})"
        rows += found
    return Agreement(name, tuple(rows), top1=None, kl=None, first_bad=first_bad)


def save_samples(samples: Sequence[Sample], path: Path) -> None:
    """Writes an .npz without any pickled object."""
    arrays: dict[str, Array] = {}
    for i, sample in enumerate(samples):
        about = {n: getattr(sample, n) for n in ("node", "op", "dtype", "attributes")}
        arrays[f"{i}/about"] = np.array([json.dumps(about)])
        for kind in ("inputs", "found", "expected"):
            for j, value in enumerate(getattr(sample, kind)):
                arrays[f"{i}/{kind}/{j}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load_samples(path: Path) -> list[Sample]:
    """Reads what `save_samples` wrote.

    Raises:
        BundleError: the file is damaged or none of these.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        count = 1 + max(int(name.partition("/")[0]) for name in found)
        return [_loaded(found, i) for i in range(count)]
    except Exception as error:  # zipfile and numpy raise what a broken archive leads them to
        raise BundleError(
            expected=f"samples of operators in {path}",
            came=f"the file does not read ({error})",
            todo="export the bundle again",
        ) from error


def _loaded(arrays: Mapping[str, Array], index: int) -> Sample:
    about = json.loads(str(arrays[f"{index}/about"][0]))

    def tensors(kind: str) -> tuple[Array, ...]:
        names = [name for name in arrays if name.startswith(f"{index}/{kind}/")]
        return tuple(arrays[f"{index}/{kind}/{j}"] for j in range(len(names)))

    sample = Sample(
        **about, inputs=tensors("inputs"), found=tensors("found"), expected=tensors("expected")
    )
    spec = find_op(sample.op)
    if (len(sample.inputs), len(sample.expected)) != (len(spec.inputs), len(spec.outputs)):
        raise ValueError(f"sample {index} does not fit operator {sample.op}")
    return sample

"""Compares an implementation with golden vectors tensor by tensor; finds the first bad layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from edgeattn.planner.lowering import Lowering
from edgeattn.verify.drive import Tensors
from edgeattn.verify.encoder_golden import EncoderGolden
from edgeattn.verify.golden import Golden
from edgeattn.verify.tolerance import allowed_error, rounding_floor

_HIDDEN = re.compile(r"hidden\.(\d+)$")
_PRESENT = re.compile(r"present\.(\d+)\.(key|value|conv_state|recurrent_state)$")
_ALONE = re.compile(r"layer\.(\d+)\.(output|key|value)$")
# What names of an operator's outputs begin with.
OPERATOR = "operator "
# A comparison of the head on the graph's own residual stream is this, a dot, and the logits' name.
HEAD = "head"
# The name under which golden vectors keep the KL of plain torch in low precision.
KL = "kl"
# What follows the last layer of a decoder.
LAST = "final norm or LM head"
# Nats, for schemes that round at run time: small errors could add up in one direction.
MAX_KL = 0.01


@dataclass(frozen=True)
class Comparison:
    """One tensor of one implementation against the reference.

    Attributes:
        tensor: name as in `measure.errors`, or "layer.3.output" (or .key, .value) of a layer that
            was run alone.
        error: `tolerance.relative_error`, of schemes that round at run time `typical_error`.
        low_precision_error: of plain torch, in the dtype that `tolerance` says.
        allowed: the bound on `error`.
    """

    tensor: str
    error: float
    low_precision_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound; an infinite one bounds nothing."""
        return self.error <= self.allowed < float("inf")


@dataclass(frozen=True)
class Agreement:
    """All comparisons of one implementation.

    Attributes:
        backend: its name.
        comparisons: one per tensor.
        top1: share of positions where it picks the reference's most likely token; None where no
            logits were compared.
        kl: mean KL(reference || implementation) of the next-token distribution, in nats; None
            likewise.
        max_kl: bound on `kl`, None without one.
        first_bad: the layer the first error sits in ("layer 3", "embedding", "LM head"), None when
            all agree.
        amplified: tensors beyond the usual bound that are not held against the graph, see
            `edgeattn.verify.amplified`.
    """

    backend: str
    comparisons: tuple[Comparison, ...]
    top1: float | None
    kl: float | None
    max_kl: float | None = None
    first_bad: str | None = None
    amplified: int = 0

    @property
    def passed(self) -> bool:
        """Whether every tensor is within its bound, and the distribution where it has one."""
        near = self.max_kl is None or self.kl is None or self.kl <= self.max_kl
        return near and all(c.passed for c in self.comparisons)

    def worst_per_group(self) -> dict[str, Comparison]:
        """The comparison nearest to (or furthest beyond) its bound, for each kind of tensor."""
        worst: dict[str, Comparison] = {}
        for comparison in self.comparisons:
            group = group_of(comparison.tensor)
            if group not in worst or _use(comparison) > _use(worst[group]):
                worst[group] = comparison
        return worst

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; infinite errors become the text "inf"."""
        rows = [{**asdict(c), "passed": c.passed} for c in self.comparisons]
        for row in rows:
            row["error"] = row["error"] if np.isfinite(row["error"]) else "inf"
        return {
            "backend": self.backend,
            "passed": self.passed,
            "first_bad": self.first_bad,
            "amplified": self.amplified,
            "top1_agreement": self.top1,
            "kl": self.kl if self.kl is None or np.isfinite(self.kl) else "inf",
            "worst": {group: c.tensor for group, c in self.worst_per_group().items()},
            "comparisons": rows,
        }


def compare(
    backend: str, found: Tensors, golden: Golden | EncoderGolden, lowering: Lowering
) -> Agreement:
    """Compares what an implementation gave with what was expected.

    A tensor the implementation does not give (the residual stream, unless asked for) is left out;
    logits and cache must be there.
    """
    quantized, comparisons = bool(lowering.scheme.weight_bits), []
    plain, rounds = _plain_errors(golden, lowering), lowering.decides_at_run_time
    for name, error in golden.errors(found, rounds=rounds).items():
        low = plain.get(name, 0.0)
        allowed = allowed_error(lowering.dtype, low, quantized=quantized)
        if lowering.scheme.kv_bits is not None and ".present." in name:
            allowed += rounding_floor(golden.expected[name])
        comparisons.append(Comparison(name, error, low, allowed))
    if not any(name.endswith(".logits") for name in golden.expected):
        return Agreement(backend, tuple(comparisons), None, None)
    top1, kl = distribution_agreement(found, golden.expected)
    max_kl = None
    if rounds:
        max_kl = 2 * golden.low_precision_error.get(KL, 0.0) + MAX_KL
    return Agreement(backend, tuple(comparisons), top1, kl, max_kl)


def _plain_errors(golden: Golden | EncoderGolden, lowering: Lowering) -> dict[str, float]:
    """The error of plain torch for each tensor.

    Where activations or caches are rounded to int8, a last bit decides on which side of a boundary
    a number falls, and which tensor that hits is chance: there the largest error among tensors of a
    kind stands for all of them.
    """
    known = golden.low_precision_error
    if not lowering.decides_at_run_time:
        return known
    largest: dict[str, float] = {}
    for name, error in known.items():
        kind = _kind(name)
        largest[kind] = max(error, largest.get(kind, 0.0))
    return {name: largest[_kind(name)] for name in known}


def _kind(tensor: str) -> str:
    """Logits, or what of which layer: "present.3.key", "hidden.4"."""
    return tensor.partition(".")[2].lstrip("0123456789.") or tensor


def compare_and_locate(
    run: Callable[[bool], tuple[str, Tensors]],
    golden: Golden | EncoderGolden,
    lowering: Lowering,
    num_layers: int,
    *,
    last: str = LAST,
) -> Agreement:
    """As `compare`; only when something disagrees is the graph run again, to name where.

    Args:
        run: gives the backend's name and what it computed; called with whether the residual stream
            is wanted, too.
        golden: what was expected.
        lowering: what was decided.
        num_layers: of the network.
        last: what an error behind all layers is put down to.
    """
    agreement = compare(*run(False), golden, lowering)
    if agreement.passed:
        return agreement
    detailed = compare(*run(True), golden, lowering)
    return replace(detailed, first_bad=locate(detailed.comparisons, num_layers, last=last))


def locate(comparisons: Sequence[Comparison], num_layers: int, *, last: str = LAST) -> str:
    """Names the place of the first error, walking the network from its input.

    A layer that errs on its own is the place, whatever its errors do to the layers behind it.

    Args:
        comparisons: with the residual stream among them, or layers run alone.
        num_layers: of the model.
        last: what comes behind the layers.
    """
    bad = [re.sub(r"^\w+\.", "", c.tensor, count=1) for c in comparisons if not c.passed]
    hidden = {int(m[1]) for name in bad if (m := _HIDDEN.search(name))}
    present = {int(m[1]) for name in bad if (m := _PRESENT.search(name))}
    if 0 in hidden:
        return "embedding"
    alone = [layer for c in comparisons if not c.passed and (layer := layer_alone(c)) is not None]
    if alone:
        return f"layer {min(alone)}"
    for layer in range(num_layers):
        if layer in present or layer + 1 in hidden:
            return f"layer {layer}"
    return last


def layer_alone(comparison: Comparison) -> int | None:
    """The layer that was run alone for this comparison, None where the network was."""
    match = _ALONE.match(comparison.tensor)
    return int(match[1]) if match else None


def group_of(tensor: str) -> str:
    """The row of the summary table a tensor belongs to, such as "ragged cache keys"."""
    if tensor.startswith(OPERATOR):
        return "operators alone"
    if match := _ALONE.match(tensor):
        return f"layers alone, {match[2]}s"
    case, _, rest = tensor.partition(".")
    if case == HEAD:
        return "LM head alone, logits"
    if _HIDDEN.search(rest):
        return f"{case} residual stream"
    if match := _PRESENT.search(rest):
        return f"{case} cache {match[2].replace('_', ' ')}s"
    if rest == "logits":
        return f"{case} logits"
    if not rest.endswith(".logits"):  # of an encoder, which has no steps
        return f"{case} {rest.replace('_', ' ')}"
    return f"{case} {'prefill' if rest == '0.logits' else 'decode'} logits"


def _use(comparison: Comparison) -> float:
    """Share of the bound that is used up."""
    return comparison.error / comparison.allowed


def distribution_agreement(
    found: Tensors, expected: Mapping[str, np.ndarray]
) -> tuple[float, float]:
    """Share of equal most likely tokens, and mean KL(expected || found) in nats, of all logits."""
    same, divergence, count = 0, 0.0, 0
    for name, reference in expected.items():
        value = found.get(name)
        if not name.endswith(".logits") or value is None or value.shape != reference.shape:
            continue
        same += int((value.argmax(-1) == reference.argmax(-1)).sum())
        p, q = _log_softmax(reference), _log_softmax(value)
        divergence += float((np.exp(p) * (p - q)).sum())
        count += reference.shape[0]
    return (same / count, divergence / count) if count else (0.0, float("inf"))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result

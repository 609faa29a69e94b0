"""Right graphs of models that amplify roundings.

Two fp32 implementations sum in other orders and differ in last bits. Some models, above all those
that lost something and were not trained since, make much of that in a layer or two, and at which
token is chance (`tolerance`). What the whole network then differs by says nothing of the graph; its
layers do, each on the graph's own inputs. The whole is not let go of: the distributions that come
out must be the same to a millionth of a nat.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edgeattn.models.model import TORCH_DTYPES, Model
from edgeattn.planner.lowering import Lowering
from edgeattn.verify.compare import HEAD, Agreement, Comparison, compare
from edgeattn.verify.drive import Tensors, drive
from edgeattn.verify.golden import Golden
from edgeattn.verify.layers import compare_layers
from edgeattn.verify.ort_backend import OrtBackend
from edgeattn.verify.reference import REFERENCE_DTYPES, run_head
from edgeattn.verify.tolerance import FLOORS, allowed_error, relative_error

# In nats. Measured 1e-9 where logits differ by 8e-5 of their RMS.
MOST_KL = 1e-6
# Relative, of any tensor: a hundred times the floor.
MOST_ERROR = 100 * FLOORS["fp32"]


def may_amplify(model: Model, lowering: Lowering) -> bool:
    """Whether layers can be judged alone, and last bits are all that may differ.

    Args:
        model: transformed and quantised.
        lowering: what was decided.
    """
    shape = model.shape
    plain = not lowering.decides_at_run_time and not lowering.scheme.weight_bits
    return plain and lowering.dtype == "fp32" and not shape.has_variants and not shape.is_recurrent


def excuse_amplified(
    agreement: Agreement,
    model: Model,
    lowering: Lowering,
    model_file: Path,
    golden: Golden,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Agreement, Golden]:
    """Judges a graph that disagrees as a whole by its layers, to the worst token of each.

    Args:
        agreement: of the whole network, in which something is beyond its bound.
        model: transformed and quantised as the recipe says.
        lowering: of which `may_amplify` holds.
        model_file: the graph, its weights beside it.
        golden: inputs, reference, and the errors of plain torch.
        progress: called with (layers done, all layers).

    Returns:
        Where embedding, every layer and the head are right alone and the distributions are the
        reference's, an agreement with those comparisons that passes, and golden vectors that allow
        later runs what was found here. Else what was given.
    """
    backend = OrtBackend(model_file, lowering, hidden=True)
    found = drive(backend, golden.cases)
    rows = compare_layers(model, lowering, backend, golden.cases, progress, relative_error)
    rows += _compare_head(model, lowering, golden, found)
    begun = [c for c in agreement.comparisons if c.tensor.endswith(".hidden.0")]
    beyond = {c.tensor: c.error for c in agreement.comparisons if not c.passed}
    same = agreement.kl is not None and agreement.kl <= MOST_KL
    if not (same and all(c.passed for c in (*rows, *begun)) and max(beyond.values()) <= MOST_ERROR):
        return agreement, golden
    # Twice of which is allowed.
    golden = replace(golden, low_precision_error={**golden.low_precision_error, **beyond})
    judged = compare(backend.name, found, golden, lowering)
    comparisons = (*judged.comparisons, *rows)
    return replace(judged, comparisons=comparisons, amplified=len(beyond)), golden


def _compare_head(
    model: Model, lowering: Lowering, golden: Golden, found: Tensors
) -> list[Comparison]:
    """Final norm and head, of the graph's own residual stream."""
    wide, narrow = (
        run_head(model, lowering, golden.cases, found, dtypes[lowering.dtype])
        for dtypes in (REFERENCE_DTYPES, TORCH_DTYPES)
    )
    rows = []
    for name, reference in wide.items():
        low = relative_error(narrow[name], reference)
        error = relative_error(found[name], reference)
        allowed = allowed_error(lowering.dtype, low, quantized=False)
        rows.append(Comparison(f"{HEAD}.{name}", error, low, allowed))
    return rows

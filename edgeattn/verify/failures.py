"""A failed proof in one sentence: what is wrong, and where first."""

from __future__ import annotations

from typing import Any

from edgeattn.errors import ProofError
from edgeattn.verify.compare import OPERATOR, Agreement, Comparison, layer_alone


def overflow_error(dtype: str, tensor: str) -> ProofError:
    """Of a model whose numbers no plain run could hold; fp32 bundles have tried fp16 and bf16."""
    if dtype == "fp32":
        return ProofError(
            expected="a model whose activations fit bf16, which reaches as far as fp32",
            came=f"plain torch overflows in fp16 and in bf16 at {tensor}",
            todo="report this checkpoint: no --dtype is wider",
        )
    return ProofError(
        expected=f"a model whose activations fit {dtype}",
        came=f"plain torch overflows in {dtype} at {tensor}",
        todo="export in a wider --dtype",
    )


def disagreement_error(agreement: Agreement, details: dict[str, Any]) -> ProofError:
    """Of an implementation that is not the reference; names the worst and the first place."""
    wrong = [c for c in agreement.comparisons if not c.passed]
    if not wrong:
        return ProofError(
            expected=f"{agreement.backend} within a KL of {agreement.max_kl:.2g} nats of torch",
            came=f"that of the next token's distribution is {agreement.kl:.3g}",
            todo="do not ship this graph; report it with the checkpoint's name",
            details=details,
        )
    alone = [c for c in wrong if layer_alone(c) is not None]
    if alone:
        return _wrong_layer(agreement, alone, details)
    worst = max(wrong, key=lambda c: c.error / c.allowed)
    where = f"; the first error is in {agreement.first_bad}" if agreement.first_bad else ""
    return ProofError(
        expected=f"{agreement.backend} within {worst.allowed:.2g} of the torch reference",
        came=f"{worst.tensor} differs by {worst.error:.3g} of its RMS{where}",
        todo="do not ship this graph; report it with the checkpoint's name",
        details=details,
    )


def _wrong_layer(
    agreement: Agreement, wrong: list[Comparison], details: dict[str, Any]
) -> ProofError:
    """Of a graph some of whose layers err on their own; the first of them is named."""
    backend, place = agreement.backend, agreement.first_bad or ""
    where = f"; the first error is in {place}" if place.startswith(OPERATOR) else ""
    first = min(layer for c in wrong if (layer := layer_alone(c)) is not None)
    here = [c for c in wrong if layer_alone(c) == first]
    worst = max(here, key=lambda c: c.error / c.allowed)
    what = {"output": "output", "key": "new keys", "value": "new values"}
    part = what[worst.tensor.rpartition(".")[2]]
    return ProofError(
        expected=f"each layer of {backend}, given the graph's own inputs of it, within "
        f"{worst.allowed:.2g} of the torch reference",
        came=f"for most tokens the {part} of layer {first} differ by "
        f"{worst.error:.3g} or more{where}",
        todo="do not ship this graph; report it with the checkpoint's name",
        details=details,
    )

"""What a reader sees first: key figures, the command, the budget, and what was not as asked."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from edgeattn.recipe import Recipe


class KeyFigure(NamedTuple):
    """A figure of the head of the page.

    Attributes:
        name: what it is.
        value: a number.
        form: how it is written: "size", "percent", "change" or "figure".
        about: what it compares with.
    """

    name: str
    value: float
    form: str
    about: str


class Fallback(NamedTuple):
    """Something that is not as it was asked for, or not everywhere."""

    what: str
    why: str


class Budget(NamedTuple):
    """How much of the loss that was allowed has been used.

    Attributes:
        allowed: most that the perplexity may rise, as a share.
        used: how much it rose.
        share: of the bar, for the picture.
    """

    allowed: float
    used: float
    share: float


def command(report: Mapping[str, Any]) -> str:
    """The command that asks for the same again."""
    source, recipe = report["source"], report["recipe"]
    model = report["model"]
    if "hub_id" in source:
        model = f"{source['hub_id']}@{source['commit']}"
    elif source["format"] == "gguf":
        model = next(iter(source["files"]))
    defaults = {field.name: field.default for field in fields(Recipe)}
    words = ["edgeattn", "export", str(model)]
    for name, value in recipe.items():
        if name not in defaults or value == defaults[name]:
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            words += [f"--{name.replace('_', '-')}", str(one)]
    return shlex.join([*words, "-o", str(report["bundle"])])


def key_figures(report: Mapping[str, Any]) -> list[KeyFigure]:
    """The figures most readers look for."""
    sizes, quality = report["sizes"], report["quality"]
    about = "as stored"
    if sizes.get("checkpoint"):
        about = f"{report['weight_bytes'] / sizes['checkpoint']:.0%} of the checkpoint"
    found = [KeyFigure("Weights", report["weight_bytes"], "size", about)]
    if sizes.get("cache_per_token"):
        held = sorted({row["cache"] for row in report["layers"]} - {"a state"})
        about = f"held in {' and '.join(held)}"
        found.append(KeyFigure("Cache, a token", sizes["cache_per_token"], "size", about))
    if quality is not None and "perplexity" in quality:
        asked = report["recipe"].get("max_ppl_increase")
        limit = "no budget given" if asked is None else f"at most {asked} allowed"
        found += [
            KeyFigure("Perplexity", quality["increase"], "change", limit),
            KeyFigure("KL divergence", quality["kl"], "figure", "nats, from the checkpoint"),
            KeyFigure("Same top token", quality["top1_agreement"], "percent", "of the places"),
        ]
    return found


def budget(report: Mapping[str, Any]) -> Budget | None:
    """How the loss stands to what was allowed; None where that was not measured or not asked."""
    from edgeattn.verify.quality import parse_budget

    asked, quality = report["recipe"].get("max_ppl_increase"), report["quality"]
    if asked is None or quality is None or "increase" not in quality:
        return None
    allowed, used = parse_budget(asked), quality["increase"]
    return Budget(allowed, used, min(1.0, max(0.0, used / allowed)) if allowed else 1.0)


def fallbacks(report: Mapping[str, Any]) -> list[Fallback]:
    """Everything that is not as it was asked for, or not in all layers, each with the reason."""
    return [*_in_transforms(report["transforms"]), *_at_run_time(report), *_in_proof(report)]


def _in_transforms(notes: Mapping[str, Any]) -> Iterator[Fallback]:
    for name, words in notes.items():
        if isinstance(words, str):
            yield Fallback(name.capitalize(), words)
    training = notes.get("recovery training", {})
    if not training.get("learned", True):
        yield Fallback("Recovery training", training["verdict"])
    yield from _exact_heads(notes.get("polynomial heads", {}))
    dense = [
        row["layer"]
        for row in notes.get("head sparsity", {}).get("layers", ())
        if row["recall"] is None
    ]
    if dense:
        yield Fallback(
            f"{_layers(dense)} stay{'s' if len(dense) == 1 else ''} dense",
            "no router: the first layer, and those that see a sliding window, keep all heads",
        )
    kept = [name for name in notes.get("kept at higher precision", {}) if name != "linears"]
    if kept:
        names = ", ".join(name.removesuffix(".weight") for name in kept)
        yield Fallback(
            f"Kept at higher precision: {names}",
            "quantised alone, these raised the loss most",
        )
    for name, words in notes.get("rotation", {}).items():
        if isinstance(words, str) and (match := re.fullmatch(r"(.+), as (.+)", words)):
            yield Fallback(f"{name}: {match[1]}", match[2])
    for name, words in notes.get("plugins", {}).items():
        if str(words).startswith(("no", "not")):
            yield Fallback(f"Plugins: {name}", str(words))


def _exact_heads(notes: Mapping[str, Any]) -> Iterator[Fallback]:
    rows = notes.get("layers", ())
    degrees = [degree for row in rows for degree in row["degree"]]
    if exact := degrees.count(None):
        limit = f"{100 * notes['tolerance']:.3g} %"
        yield Fallback(
            f"{exact} of {len(degrees)} heads stay exact",
            f"no polynomial keeps their error within {limit} with few rows beyond its bound",
        )
    reasons = dict.fromkeys(row["skipped"] for row in rows if row["skipped"])
    for reason in reasons:
        layers = [row["layer"] for row in rows if row["skipped"] == reason]
        yield Fallback(f"{_layers(layers)} without polynomials", reason)


def _at_run_time(report: Mapping[str, Any]) -> Iterator[Fallback]:
    share = (report["quality"] or {}).get("fallback_share")
    if share:
        yield Fallback(
            f"{100 * share:.3g} % of the rows of heads with a polynomial were computed exactly",
            "their scores may lie beyond the polynomial's bound",
        )


def _in_proof(report: Mapping[str, Any]) -> Iterator[Fallback]:
    proof = report["verification"]
    if proof is None:
        yield Fallback("The bundle is not verified", "the export was asked to skip the proof")
        return
    for words in proof["left_out"]:
        yield Fallback("Left out of the proof", words)
    tensorrt = proof["tensorrt"]
    if tensorrt is not None and tensorrt["status"] != "built":
        yield Fallback(f"TensorRT: {tensorrt['status']}", tensorrt["reason"])


def _layers(numbers: list[int]) -> str:
    """Layers by number: "Layer 3", "Layers 0, 4"."""
    return f"Layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"

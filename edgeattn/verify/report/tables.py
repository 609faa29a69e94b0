"""The rows of the page's tables: layers, comparisons, and what the transforms note."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# A table of notes that is longer shows its first rows alone.
_LONGEST, _FIRST = 40, 20
# Notes that have a table or a picture of their own.
_SHOWN_ELSEWHERE = re.compile(r"layers|texts|losses|layer \d+")
# Of a graph or a recipe, what only a decoder has.
_OF_DECODERS = frozenset({"kv_cache", "logits"})


class LayerRow(NamedTuple):
    """Layers that are alike, one after the other.

    Attributes:
        layers: "0" or "1–29".
        attention: kind.
        weights: format of the linear layers, then those that differ.
        inputs: of linear layers.
        cache: format.
        heads: what they take, where they differ among each other.
    """

    layers: str
    attention: str
    weights: str
    inputs: str
    cache: str
    heads: str


class NoteTable(NamedTuple):
    """What one transform notes.

    Attributes:
        name: of it.
        rows: to be shown.
        total: rows there are.
    """

    name: str
    rows: list[tuple[str, Any]]
    total: int


def layer_rows(report: Mapping[str, Any]) -> list[LayerRow]:
    """One row for each run of layers that are alike."""
    heads = _head_words(report["transforms"])
    runs: list[tuple[int, int, tuple[str, ...]]] = []
    for record in report["layers"]:
        layer = record["layer"]
        words = (
            _attention(record, report["shape"]),
            _weights(record["weights"]),
            _inputs(record),
            record["cache"],
            heads.get(layer, "all"),
        )
        if runs and runs[-1][2] == words:
            runs[-1] = (runs[-1][0], layer, words)
        else:
            runs.append((layer, layer, words))
    return [
        LayerRow(str(first) if first == last else f"{first}–{last}", *words)
        for first, last, words in runs
    ]


def _attention(record: Mapping[str, Any], shape: Mapping[str, Any]) -> str:
    about = dict(record["attention"])
    kind = about.pop("kind")
    if kind == "softmax":
        window = record["window"]
        return "softmax" if window is None else f"softmax over the last {window:,} keys"
    if kind == "fft-rope":
        exact = f"{about['sink']} first and {about['window']} nearest keys exact"
        return f"polynomial of degree {about['degree']}, {exact}"
    if kind == "head-sparse":
        units = "KV groups" if about["groups"] else "heads"
        total = shape["num_kv_heads" if about["groups"] else "num_heads"]
        return f"softmax in {about['slots']} of {total} {units} while decoding"
    settings = ", ".join(f"{name} {value}" for name, value in about.items() if value is not None)
    return f"{kind}: {settings}" if settings else str(kind)


def _weights(formats: Mapping[str, str]) -> str:
    """The commonest format, then the linear layers that have another one."""
    if not formats:
        return "none"
    (common, _), *_ = Counter(formats.values()).most_common(1)
    others: dict[str, list[str]] = {}
    for name, form in formats.items():
        if form != common:
            others.setdefault(form, []).append(name.rpartition(".")[2])
    parts = [f"{', '.join(names)}: {form}" for form, names in others.items()]
    return "; ".join([common, *parts])


def _inputs(record: Mapping[str, Any]) -> str:
    rounded = record["int8_inputs"]
    if not rounded:
        return "floating point"
    plain = [n.rpartition(".")[2] for n in record["weights"] if n not in rounded]
    return f"int8, but {', '.join(plain)}" if plain else "int8"


def _head_words(notes: Mapping[str, Any]) -> dict[int, str]:
    """What the heads of a layer take, by its number."""
    found = {
        row["layer"]: _groups(row["groups"])
        for row in notes.get("regrouped heads", {}).get("layers", ())
    }
    for row in notes.get("polynomial heads", {}).get("layers", ()):
        taken = sum(degree is not None for degree in row["degree"])
        some = f"{taken} of {len(row['degree'])} take polynomials"
        _add(found, row["layer"], some if taken else "all exact")
    for row in notes.get("head sparsity", {}).get("layers", ()):
        if row["recall"] is not None:
            _add(found, row["layer"], f"router finds {row['recall']:.1%} of the strongest")
    return found


def _add(found: dict[int, str], layer: int, words: str) -> None:
    found[layer] = f"{found[layer]}; {words}" if layer in found else words


def _groups(groups: Sequence[Sequence[int]]) -> str:
    """Which KV heads of the checkpoint became one."""
    if all(len(group) == 1 for group in groups):
        return "copies of KV heads " + ", ".join(str(group[0]) for group in groups)
    return "KV heads averaged: " + ", ".join(" + ".join(map(str, group)) for group in groups)


def graph_rows(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What was decided about the graph as a whole, and how large it came out."""
    decided = [
        (name.replace("_", " "), value["label"] if name == "scheme" else value)
        for name, value in report["lowering"].items()
        if value is not None and _is_meant(name, report)
    ]
    return [*decided, ("nodes", report["nodes"])]


def recipe_rows(report: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What was asked for, without settings that nothing here reads."""
    asked = report["recipe"]
    unused = set() if "calibration" in asked else {"calibration_windows"}
    return [(n, v) for n, v in asked.items() if n not in unused and _is_meant(n, report)]


def _is_meant(name: str, report: Mapping[str, Any]) -> bool:
    """Whether a setting means something for the model; an encoder has no cache and no logits."""
    return name not in _OF_DECODERS or report["shape"].get("kind") != "encoder"


def size_rows(report: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Name and bytes of each part that there is."""
    sizes, proof = report["sizes"], report["verification"] or {}
    names = {
        "checkpoint": "Checkpoint, for comparison",
        "weights": "Weights",
        "graph": "Graph",
        "plugins": "Plugin library",
        "cache_per_token": "Cache of a token, at run time",
        "cache": "Cache of all rows at the longest context",
    }
    rows = [(label, sizes[name]) for name, label in names.items() if sizes.get(name)]
    engine = (proof.get("tensorrt") or {}).get("engine_bytes")
    return rows if engine is None else [*rows, ("Engine of the check, not kept", engine)]


def agreements(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each implementation with the worst comparison of each kind of tensor, in full."""
    found = []
    for agreement in report["verification"]["agreements"] if report["verification"] else []:
        rows = {row["tensor"]: row for row in agreement["comparisons"]}
        worst = [
            {**rows[name], "group": group, "used": _used(rows[name])}
            for group, name in agreement["worst"].items()
        ]
        found.append({**agreement, "worst": worst})
    return found


def _used(row: Mapping[str, Any]) -> float | None:
    """Share of the bound that an error uses up; None where that is no number."""
    error = row["error"]
    return error / row["allowed"] if isinstance(error, int | float) and row["allowed"] else None


def note_tables(report: Mapping[str, Any]) -> list[NoteTable]:
    """What the transforms note beside what the page shows in another form."""
    found = []
    for name, notes in report["transforms"].items():
        if not isinstance(notes, Mapping):
            continue
        rows = [(key, value) for key, value in notes.items() if not _is_elsewhere(key, value)]
        shown = _FIRST if len(rows) > _LONGEST else len(rows)
        found.append(NoteTable(name, rows[:shown], len(rows)))
    return found


def _is_elsewhere(key: str, value: object) -> bool:
    is_table = isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)
    return is_table or _SHOWN_ELSEWHERE.fullmatch(key) is not None

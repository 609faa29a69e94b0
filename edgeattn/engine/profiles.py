"""Optimisation profiles: which sizes of its inputs an engine is built for, by dimension.

The graph names its dimensions (batch_size, sequence_length, past_sequence_length and their sum
total_sequence_length), so a profile says smallest, usual and largest of each, and the shapes of
every input follow. A static cache has fixed sizes instead of the last two; an encoder has the first
two, and one of images the first alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from edgeattn.encoder_shape import AnyShape, EncoderShape, TokenInput
from edgeattn.errors import BundleError, LoweringError, UsageError, unknown_name

Shape = tuple[int, ...]
Profile = tuple[Shape, Shape, Shape]

BATCH, LENGTH, PAST, TOTAL = (
    "batch_size",
    "sequence_length",
    "past_sequence_length",
    "total_sequence_length",
)
# A long prompt comes in pieces of so many tokens, as the runtime gives it.
PREFILL_PIECE = 512


@dataclass(frozen=True)
class Range:
    """Smallest, usual and largest size of a dimension."""

    low: int
    usual: int
    high: int

    def __post_init__(self) -> None:
        """Refuses sizes that are no range.

        Raises:
            UsageError: they are negative or in no order.
        """
        if not 0 <= self.low <= self.usual <= self.high:
            raise UsageError(
                expected="sizes min:opt:max, none larger than the next",
                came=f"they are {self}",
                todo="write for example sequence_length=1:128:512",
            )

    def __str__(self) -> str:
        return f"{self.low}:{self.usual}:{self.high}"

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The three of them."""
        return self.low, self.usual, self.high


@dataclass(frozen=True)
class DecoderProfile:
    """One optimisation profile of a decoder.

    Attributes:
        name: "prefill", "decode", or "any" for both.
        batch: rows.
        length: new tokens of a row.
        past: tokens in the cache.
    """

    name: str
    batch: Range
    length: Range
    past: Range

    @property
    def total(self) -> Range:
        """Past and new tokens together."""
        pairs = zip(self.past.sizes, self.length.sizes, strict=True)
        return Range(*(past + new for past, new in pairs))

    def dimensions(self) -> dict[str, Range]:
        """By the names the graph gives them."""
        return {BATCH: self.batch, LENGTH: self.length, PAST: self.past, TOTAL: self.total}

    def to_dict(self) -> dict[str, str]:
        """min:opt:max by dimension."""
        return {name: str(sizes) for name, sizes in self.dimensions().items()}


def decoder_profiles(context: int, batch: int, *, separate: bool) -> tuple[DecoderProfile, ...]:
    """What a decoder is run with: a prompt in pieces, then token by token.

    TensorRT chooses kernels for the usual sizes of a profile, so that prefill and decode have one
    each. TensorRT-RTX chooses when it runs, for the sizes it meets, and keeps fp16 weights once for
    each profile (measured with SmolLM2-135M: 505 MB with two, 286 MB with one).

    Args:
        context: most tokens of a row.
        batch: most rows.
        separate: one profile for each, or one for both.
    """
    piece, rows = min(PREFILL_PIECE, context), Range(1, 1, batch)
    past = Range(0, (context - 1) // 2, context - 1)
    if not separate:
        return (DecoderProfile("any", rows, Range(1, 1, piece), past),)
    # the last piece is a short one, after nearly all of the context
    prefill = DecoderProfile("prefill", rows, Range(1, piece, piece), replace(past, usual=0))
    return prefill, DecoderProfile("decode", rows, Range(1, 1, 1), past)


@dataclass(frozen=True)
class EncoderProfile:
    """One optimisation profile of an encoder.

    Attributes:
        name: of the profile.
        batch: rows.
        length: tokens of a row; None for images, which have a fixed number.
    """

    name: str
    batch: Range
    length: Range | None

    def dimensions(self) -> dict[str, Range]:
        """By the names the graph gives them."""
        length = {} if self.length is None else {LENGTH: self.length}
        return {BATCH: self.batch, **length}

    def to_dict(self) -> dict[str, str]:
        """min:opt:max by dimension."""
        return {name: str(sizes) for name, sizes in self.dimensions().items()}


AnyProfile = DecoderProfile | EncoderProfile


def encoder_profiles(shape: EncoderShape, context: int, batch: int) -> tuple[EncoderProfile, ...]:
    """What an encoder is run with: texts of any length up to the context, or images.

    Args:
        shape: the architecture.
        context: most tokens of a row.
        batch: most rows.
    """
    is_text = isinstance(shape.input, TokenInput)
    length = Range(1, max(1, context // 4), context) if is_text else None
    return (EncoderProfile("any", Range(1, batch, batch), length),)


def model_profiles(
    shape: AnyShape, context: int, batch: int, *, separate: bool
) -> tuple[AnyProfile, ...]:
    """What a model is run with; see `decoder_profiles` and `encoder_profiles`."""
    if isinstance(shape, EncoderShape):
        return encoder_profiles(shape, context, batch)
    return decoder_profiles(context, batch, separate=separate)


def encoder_check_profile(context: int, batch: int) -> EncoderProfile:
    """One profile for a check that keeps no engine; see `check_profile`."""
    return EncoderProfile("check", Range(1, 1, batch), Range(1, 1, context))


def check_profile(context: int, batch: int) -> DecoderProfile:
    """One profile for a check that keeps no engine: half the context past, half of it new."""
    half = max(1, context // 2)
    return DecoderProfile("check", Range(1, 1, batch), Range(1, 1, half), Range(0, half, half))


_OVERRIDE = re.compile(r"(?:(?P<profile>\w+)\.)?(?P<name>\w+)=(?P<sizes>\d+:\d+:\d+)")
_FIELDS = {BATCH: "batch", LENGTH: "length", PAST: "past"}


def with_sizes(
    profiles: Sequence[AnyProfile], asked: Iterable[str], *, context: int, batch: int
) -> tuple[AnyProfile, ...]:
    """The profiles with the sizes a user asks for.

    Args:
        profiles: of `model_profiles`.
        asked: each [PROFILE.]DIMENSION=min:opt:max; without a profile it is said of all that the
            dimension varies in.
        context: most tokens of a row that the bundle takes.
        batch: most rows.

    Raises:
        UsageError: not of that form, or an unknown name.
        LoweringError: sizes that the bundle was not exported for.
    """
    found = list(profiles)
    for text in asked:
        match = _OVERRIDE.fullmatch(text)
        if match is None:
            raise UsageError(
                expected="--profile [PROFILE.]DIMENSION=min:opt:max",
                came=f"'{text}' was given",
                todo=f"write for example --profile {found[0].name}.sequence_length=1:128:512",
            )
        field = _field(match["name"], found[0])
        names = [profile.name for profile in profiles]
        if match["profile"] is not None and match["profile"] not in names:
            raise unknown_name("optimisation profile", match["profile"], names)
        sizes = Range(*map(int, match["sizes"].split(":")))
        for i, profile in enumerate(found):
            if match["profile"] == profile.name or (
                match["profile"] is None and not (profile.name == "decode" and field == "length")
            ):
                changed: dict[str, Any] = {field: sizes}
                found[i] = replace(profile, **changed)
    for profile in found:
        _check_limits(profile, context, batch)
    return tuple(found)


def _field(name: str, profile: AnyProfile) -> str:
    known = {n: field for n, field in _FIELDS.items() if n in profile.dimensions()}
    if name not in known:
        raise unknown_name("dimension of the graph's inputs", name, known)
    return known[name]


def _check_limits(profile: AnyProfile, context: int, batch: int) -> None:
    limits = [("rows", profile.batch, 1, batch, "--batch")]
    if isinstance(profile, DecoderProfile):
        most = context - profile.length.low
        limits.append(("new tokens", profile.length, 1, context, "--context"))
        limits.append(("tokens in the cache", profile.past, 0, most, "--context"))
    elif profile.length is not None:
        limits.append(("tokens", profile.length, 1, context, "--context"))
    for what, sizes, least, most, flag in limits:
        if sizes.low < least or sizes.high > most:
            raise LoweringError(
                expected=f"{least} to {most} {what} in profile {profile.name}, as the bundle takes",
                came=f"it has {sizes}",
                todo=f"stay within them, or export with a larger {flag}",
            )


def input_shapes(model: Path, profile: AnyProfile) -> dict[str, Profile]:
    """Smallest, usual and largest shape of every input of a graph.

    Args:
        model: the ONNX file; its weights are not read.
        profile: the sizes of its dimensions.

    Raises:
        BundleError: the graph has a dimension of another name.
    """
    graph = onnx.load(model, load_external_data=False).graph
    known = profile.dimensions()
    return {value.name: _shapes(value, known) for value in graph.input}


def _shapes(value: onnx.ValueInfoProto, known: Mapping[str, Range]) -> Profile:
    sizes: list[tuple[int, int, int]] = []
    for dimension in value.type.tensor_type.shape.dim:
        name = dimension.dim_param
        if dimension.HasField("dim_value"):
            sizes.append((dimension.dim_value,) * 3)
        elif name in known:
            sizes.append(known[name].sizes)
        else:
            raise BundleError(
                expected=f"inputs with dimensions named {', '.join(known)}",
                came=f"{value.name} has one named '{name}'",
                todo="export the bundle again",
            )
    low, usual, high = (tuple(size[i] for size in sizes) for i in range(3))
    return low, usual, high


def dimension_names(model: Path) -> set[str]:
    """The names of the dimensions of a graph's inputs."""
    graph = onnx.load(model, load_external_data=False).graph
    return {d.dim_param for value in graph.input for d in value.type.tensor_type.shape.dim}

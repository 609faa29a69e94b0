"""Attention variants: what `--attention NAME[:key=value,…]` asks for, and what a layer then is.

No torch here; recipes and shapes are made of these values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any, Literal, get_args

from edgeattn.errors import UsageError, unknown_name
from edgeattn.recurrent import Recurrent

HIGHEST_DEGREE = 4
Unit = Literal["heads", "groups"]
Densities = Literal["uniform", "importance"]
LionVariant = Literal["lit", "d", "s"]
FeatureMap = Literal["elu", "silu"]


@dataclass(frozen=True)
class FftRope:
    """A layer whose attention is edgeattn::FftRopeAttention.

    Attributes:
        degree: of the polynomial of far scores.
        sink: first keys that are exact.
        window: offsets below which keys are exact; 1 is a row's own.
    """

    degree: int
    sink: int
    window: int


@dataclass(frozen=True)
class HeadSparse:
    """A layer whose attention is edgeattn::HeadSparseAttention, behind a router.

    Attributes:
        slots: heads, or KV groups, that are active for a token while decoding.
        groups: whether the router chooses KV groups.
    """

    slots: int
    groups: bool = False


@dataclass(frozen=True)
class Lion:
    """A layer of an encoder whose attention is edgeattn::BidirectionalLinearAttention.

    Attributes:
        variant: of its decay (arXiv 2502.16249): "lit" has none, "d" learned one for each head, and
            "s" tells each head's from the token.
        feature_map: of queries and keys, which makes them positive: elu(x) + 1, or silu(x) + 1/2
            with length 1.
    """

    variant: LionVariant
    feature_map: FeatureMap


# What computes attention over keys and values instead of softmax.
SoftmaxVariant = FftRope | HeadSparse
LayerAttention = SoftmaxVariant | Recurrent | Lion


def layer_attention(values: Mapping[str, Any] | None) -> LayerAttention | None:
    """The inverse of `dataclasses.asdict`; None is softmax attention."""
    if values is None:
        return None
    if "rule" in values:
        return Recurrent(**values)
    if "feature_map" in values:
        return Lion(**values)
    return FftRope(**values) if "degree" in values else HeadSparse(**values)


@dataclass(frozen=True)
class FftRopeRequest:
    """`fft-rope`: polynomial attention in the heads that a calibration text allows it for.

    Attributes:
        degree: of the polynomials, at most.
        sink: first keys that stay exact.
        window: nearest keys that stay exact.
        tolerance: largest relative error of a head's output.
        heads: a file that `edgeattn calibrate` wrote; None calibrates again.
    """

    degree: int = 2
    sink: int = 4
    window: int = 64
    tolerance: float = 0.05
    heads: str | None = None

    name = "fft-rope"

    @property
    def label(self) -> str:
        """The name with the options that differ from the defaults."""
        return _label(self)

    @property
    def needs_calibration(self) -> bool:
        """Whether a text must be run through the model."""
        return self.heads is None


@dataclass(frozen=True)
class HeadSparseRequest:
    """`head-sparse`: decoding with the heads that a router chooses for each token.

    Attributes:
        density: share of the heads, or KV groups, that are active, on the mean over the layers
            behind the first, which stays dense.
        unit: what the router chooses.
        layers: the same density in every layer, or more where a layer matters more.
        routers: a file that `edgeattn calibrate` wrote; None trains them.
    """

    density: Fraction
    unit: Unit = "heads"
    layers: Densities = "uniform"
    routers: str | None = None

    name = "head-sparse"

    @property
    def label(self) -> str:
        """The name with the options that differ from the defaults."""
        return _label(self)

    @property
    def needs_calibration(self) -> bool:
        """Whether a text must be run through the model."""
        return self.routers is None


@dataclass(frozen=True)
class GroupQueryRequest:
    """`gqa`: another number of KV heads, or fewer query heads; the layers keep softmax attention.

    Attributes:
        kv_heads: KV heads of a layer; None keeps their number.
        heads: query heads of a layer; None keeps their number.
    """

    kv_heads: int | None = None
    heads: int | None = None

    name = "gqa"
    # What is alike, and what is lost, is measured on a text.
    needs_calibration = True

    @property
    def label(self) -> str:
        """The name with the options that were given."""
        return _label(self)


@dataclass(frozen=True)
class RecurrentRequest:
    """`recurrent`: says that the checkpoint's own layers are linear attention with a state.

    It changes nothing: such a checkpoint is exported the same without it, and any other is refused.
    """

    name = "recurrent"
    label = "recurrent"
    needs_calibration = False


@dataclass(frozen=True)
class LionRequest:
    """`lion`: linear attention in every layer of an encoder, distilled from its softmax.

    Attributes:
        variant: see `Lion`.
    """

    variant: LionVariant

    name = "lion"
    # It learns, on the text of --finetune-text.
    needs_calibration = False

    @property
    def label(self) -> str:
        """The name with its variant."""
        return _label(self)

    @property
    def layer(self) -> Lion:
        """What the layers become, with the feature map of LION's own models."""
        return Lion(self.variant, "elu" if self.variant == "lit" else "silu")


LayerRequest = FftRopeRequest | HeadSparseRequest | RecurrentRequest | LionRequest
AttentionRequest = GroupQueryRequest | LayerRequest

REQUESTS: Mapping[str, type[AttentionRequest]] = {
    kind.name: kind
    for kind in (
        GroupQueryRequest,
        FftRopeRequest,
        HeadSparseRequest,
        RecurrentRequest,
        LionRequest,
    )
}


def parse_attention(text: str) -> AttentionRequest:
    """Reads `NAME[:key=value,…]`, for example "head-sparse:density=7/9".

    Raises:
        UsageError: unknown name or option, a missing one, or a value that is not allowed.
    """
    name, _, rest = text.partition(":")
    if name not in REQUESTS:
        raise unknown_name("attention variant", name, REQUESTS)
    kind, values = REQUESTS[name], dict[str, Any]()
    known = [f.name for f in fields(kind)]
    options = _NUMBERS_OF_HEADS if kind is GroupQueryRequest else _OPTIONS
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in known:
            raise unknown_name(f"option of {name}", key, known)
        if key in values:
            raise _refused(f"{key} once", "it was given twice", "leave one out")
        values[key] = options[key](key, value)
    if kind is FftRopeRequest and "heads" in values and len(values) > 1:
        raise _refused(
            "heads=FILE alone, which says degree, sink, window and tolerance itself",
            f"{', '.join(key for key in values if key != 'heads')} came with it",
            "leave out the others, or heads=",
        )
    if kind is HeadSparseRequest and "density" not in values:
        raise _refused(
            "head-sparse:density=D, the share of heads that stay active",
            "no density was given",
            "write for example head-sparse:density=0.75, or 7/9",
        )
    if kind is LionRequest and not values:
        raise _refused(
            "lion:variant=V, the decay of its attention",
            "no variant was given",
            "write for example lion:variant=d, or lit or s",
        )
    if kind is GroupQueryRequest and not values:
        raise _refused(
            "gqa:kv_heads=K, the KV heads of a layer, or heads=H, its query heads",
            "neither was given",
            "write for example gqa:kv_heads=2",
        )
    return kind(**values)


def _whole(low: int, high: int) -> Callable[[str, str], int]:
    def read(key: str, value: str) -> int:
        if not (value.isascii() and value.isdigit()) or not low <= int(value) <= high:
            raise _not_allowed(key, f"a whole number from {low} to {high}", value)
        return int(value)

    return read


def _tolerance(key: str, value: str) -> float:
    try:
        share = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise _not_allowed(key, "a share between 0 and 1, as 0.05 or 5%", value)
    return share


def _density(key: str, value: str) -> Fraction:
    # Not all that Fraction reads: 1e-9 of a head, or an exponent that fills the memory.
    found = re.fullmatch(
        r"(\d{1,12})/(\d{1,12})|(\d?\.?\d{1,9})(%?)|(\d{2,3}(?:\.\d{1,9})?)%", value
    )
    share = Fraction(0)
    if found and found[1] and int(found[2]):
        share = Fraction(int(found[1]), int(found[2]))
    elif found and (number := found[3] or found[5]):
        share = Fraction(number) / (100 if value.endswith("%") else 1)
    if not 0 < share <= 1:
        raise _not_allowed(key, "a share above 0 up to 1, as 0.75, 75% or 7/9", value)
    return share


def _choice(allowed: Any) -> Callable[[str, str], str]:
    def read(key: str, value: str) -> str:
        if value not in get_args(allowed):
            raise _not_allowed(key, " or ".join(get_args(allowed)), value)
        return value

    return read


def _file(key: str, value: str) -> str:
    if not value:
        raise _not_allowed(key, "FILE", value)
    return value


_LONGEST = 2**20
_OPTIONS: Mapping[str, Callable[[str, str], Any]] = {
    "degree": _whole(0, HIGHEST_DEGREE),
    "sink": _whole(0, _LONGEST),
    "window": _whole(1, _LONGEST),
    "tolerance": _tolerance,
    "heads": _file,
    "density": _density,
    "unit": _choice(Unit),
    "layers": _choice(Densities),
    "routers": _file,
    "variant": _choice(LionVariant),
}
_NUMBERS_OF_HEADS = {"kv_heads": _whole(1, _LONGEST), "heads": _whole(1, _LONGEST)}


def _label(request: AttentionRequest) -> str:
    settings = [
        f"{f.name}={value}"
        for f in fields(request)
        if (value := getattr(request, f.name)) != f.default
    ]
    return ":".join(filter(None, (request.name, ",".join(settings))))


def _not_allowed(key: str, allowed: str, value: str) -> UsageError:
    return _refused(f"{key}={allowed}", f"{key}={value} was given", "choose one of these")


def _refused(expected: str, came: str, todo: str) -> UsageError:
    return UsageError(expected=expected, came=came, todo=todo)

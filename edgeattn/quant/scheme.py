"""Quantisation schemes: each is one frozen value. No torch here; the planner reads schemes too."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from edgeattn.errors import UsageError, unknown_name

GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class WeightFormat:
    """How one weight matrix is stored: symmetric integers with floating scales.

    Attributes:
        bits: 8 or 4.
        group_size: weights along the input dimension that share a scale; None is one scale per
            output channel.
    """

    bits: Literal[4, 8]
    group_size: int | None = None

    @property
    def low(self) -> int:
        """The smallest integer; -127 at 8 bits keeps the range symmetric, as TensorRT expects."""
        return -127 if self.bits == 8 else -8

    @property
    def high(self) -> int:
        """The largest integer."""
        return 127 if self.bits == 8 else 7


INT8_PER_CHANNEL = WeightFormat(bits=8)


@dataclass(frozen=True)
class Scheme:
    """What is quantised, and how.

    Attributes:
        name: as on the command line.
        linear: format of the block's linear layers; None keeps them in the target's dtype.
        embedding: format of the embedding and the LM head.
        clip: "mse" chooses each scale by least error (`quant.affine`), "max" by the largest weight.
        options: the names a user may set with `--quant NAME:key=value`.
    """

    name: str
    linear: WeightFormat | None = None
    embedding: WeightFormat | None = None
    clip: Literal["mse", "max"] = "mse"
    options: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name with the options that differ from the registered scheme: "w4-rtn:group=32"."""
        group = self.linear.group_size if self.linear else None
        default = SCHEMES[self.name].linear
        if group is None or default is None or group == default.group_size:
            return self.name
        return f"{self.name}:group={group}"

    @property
    def weight_bits(self) -> frozenset[int]:
        """The integer widths the scheme stores."""
        return frozenset(f.bits for f in (self.linear, self.embedding) if f is not None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, for the manifest."""
        return {**asdict(self), "label": self.label}


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("none"),
        Scheme("w8-rtn", linear=INT8_PER_CHANNEL, embedding=INT8_PER_CHANNEL),
        Scheme(
            "w4-rtn",
            linear=WeightFormat(bits=4, group_size=64),
            embedding=INT8_PER_CHANNEL,
            options=("group",),
        ),
    )
}


def parse_scheme(text: str) -> Scheme:
    """Reads `NAME[:key=value,…]`, for example "w4-rtn:group=32".

    Raises:
        UsageError: unknown scheme or option, or a value that is not allowed.
    """
    name, _, rest = text.partition(":")
    if name not in SCHEMES:
        raise unknown_name("quantisation scheme", name, SCHEMES)
    scheme = SCHEMES[name]
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in scheme.options:
            allowed = ", ".join(scheme.options) or "none"
            raise UsageError(
                expected=f"an option of scheme {name} (it has: {allowed})",
                came=f"'{key}' was given",
                todo="leave it out or choose another scheme",
            )
        scheme = _with_group(scheme, value)
    return scheme


def _with_group(scheme: Scheme, value: str) -> Scheme:
    if not value.isascii() or not value.isdigit() or int(value) not in GROUP_SIZES:
        raise UsageError(
            expected=f"group={' or '.join(map(str, GROUP_SIZES))}",
            came=f"group={value} was given",
            todo="choose one of these",
        )
    assert scheme.linear is not None
    return replace(scheme, linear=replace(scheme.linear, group_size=int(value)))

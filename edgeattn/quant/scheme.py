"""Quantisation schemes: each is one frozen value. No torch here; the planner reads schemes too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from edgeattn.errors import UsageError, unknown_name

GROUP_SIZES = (32, 64, 128)
# A scale that clips nothing, or the one of least squared error.
Clip = Literal["max", "mse"]
Rotation = Literal["hadamard", "auto", "none", "learned"]
# KL(original network || rotated and quantised one), or cross-entropy of the text's next token.
# The second also draws the network towards the text: with a model of 260 thousand parameters and a
# novel unlike its own stories, it fell below that of the unrounded network, while KL behind GPTQ
# rose from 0.112 to 0.126. Learned by KL, it fell to 0.101, and by a tenth on its own stories, too.
Objective = Literal["kl", "cross-entropy"]


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
        down_proj: format of the down projections, where it differs from `linear`.
        embedding: format of the embedding and the LM head.
        small_head: the LM head has the format of the linear layers instead.
        clip: "mse" chooses each scale by least error (`quant.affine`), "max" by the largest weight.
        method: how integers are chosen: "rtn" rounds each weight to the nearest, "gptq" lets later
            weights make up for the rounding of earlier ones (`quant.gptq`).
        act_order: GPTQ rounds the columns of the largest inputs first.
        refit: weights first make up for what the layers before them have lost (`quant.refit`).
        rotation: of the residual stream and the value heads (`transforms.rotate`); "auto" keeps
            the Hadamard rotation where it lowers the loss on the calibration text.
        online: a Hadamard transform at run time before each down projection (R4).
        activation_bits: 8 rounds the inputs of linear layers to int8 with one scale each, measured
            on the calibration text; None keeps them in the target's dtype.
        range: how those scales are chosen: "max" clips nothing, "mse" where that lessens the error.
        kv_bits: 8 holds keys and values as int8, with one scale each per layer; under a rotation
            queries and keys are Hadamard transformed for it at run time (R3).
        keep: largest share of linear layers that stay at the next higher precision (16-bit
            activations, or int8 where weights are int4), chosen by measured sensitivity.
        steps: of learning the rotations.
        objective: what learning makes small: the cross-entropy of the text's next token, or the KL
            divergence from the original model's distribution, which does not teach the text.
        options: the names a user may set with `--quant NAME:key=value`.
        settings: those that were set, as key=value.
    """

    name: str
    linear: WeightFormat | None = None
    down_proj: WeightFormat | None = None
    embedding: WeightFormat | None = None
    small_head: bool = False
    clip: Clip = "mse"
    method: Literal["rtn", "gptq"] = "rtn"
    act_order: bool = False
    refit: bool = False
    rotation: Rotation = "none"
    online: bool = False
    activation_bits: Literal[8] | None = None
    range: Clip = "max"
    kv_bits: Literal[8] | None = None
    keep: float = 0.0
    steps: int = 0
    objective: Objective = "kl"
    options: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name with the options that were set: "w4-rtn:group=32"."""
        return ":".join(filter(None, (self.name, ",".join(self.settings))))

    @property
    def weight_bits(self) -> frozenset[int]:
        """The integer widths the scheme stores."""
        formats = (self.linear, self.down_proj, self.embedding)
        return frozenset(f.bits for f in formats if f is not None)

    @property
    def head(self) -> WeightFormat | None:
        """The format of an LM head that is a matrix of its own."""
        return self.linear if self.small_head else self.embedding

    @property
    def rounds_at_run_time(self) -> bool:
        """Whether integers are computed when the graph runs, not only when it is exported."""
        return self.activation_bits is not None or self.kv_bits is not None

    @property
    def needs_calibration(self) -> bool:
        """Whether a text must be run through the model to quantise it."""
        return self.method == "gptq" or self.activation_bits is not None or self.keep > 0

    def format_of(self, linear: str) -> WeightFormat | None:
        """The format of a linear layer, by its name or its weight's, as far as it is the scheme's.

        Which layers `keep` leaves at a higher precision depends on the model.
        """
        if self.down_proj is not None and linear.removesuffix(".weight").endswith("down_proj"):
            return self.down_proj
        return self.linear

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, for the manifest."""
        return {**asdict(self), "label": self.label}


_INT4 = WeightFormat(bits=4, group_size=64)
_W4 = Scheme("", linear=_INT4, embedding=INT8_PER_CHANNEL, options=("group", "down_proj"))
_GPTQ = replace(
    _W4,
    method="gptq",
    refit=True,
    options=("group", "down_proj", "order", "refit", "keep", "kv"),
)
_SPINQUANT = replace(_GPTQ, rotation="hadamard", options=(*_GPTQ.options, "head", "rotation"))
_W8A8 = Scheme(
    "",
    linear=INT8_PER_CHANNEL,
    embedding=INT8_PER_CHANNEL,
    activation_bits=8,
    range="mse",
    refit=True,
    keep=0.05,
    options=("refit", "keep", "range", "kv"),
)

SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("none"),
        Scheme("w8-rtn", linear=INT8_PER_CHANNEL, embedding=INT8_PER_CHANNEL),
        replace(_W4, name="w4-rtn"),
        replace(_GPTQ, name="w4a16-gptq"),
        replace(_SPINQUANT, name="w4a16-spinquant"),
        replace(
            _SPINQUANT,
            name="w4a16-spinquant-learned",
            rotation="learned",
            steps=60,
            options=(*_GPTQ.options, "head", "steps", "objective"),
        ),
        replace(_W8A8, name="w8a8"),
        replace(
            _W8A8,
            name="w8a8-spinquant",
            rotation="hadamard",
            online=True,
            options=(*_W8A8.options, "rotation", "online"),
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
    scheme, given = SCHEMES[name], {}
    for item in filter(None, rest.split(",")):
        key, _, value = item.partition("=")
        if key not in scheme.options:
            allowed = ", ".join(scheme.options) or "none"
            raise UsageError(
                expected=f"an option of scheme {name} (it has: {allowed})",
                came=f"'{key}' was given{_NEEDS.get(key, '')}",
                todo="leave it out or choose another scheme",
            )
        scheme, given[key] = _OPTIONS[key](scheme, value), value
    default = SCHEMES[name]
    changes = [
        k for k in scheme.options if k in given and _OPTIONS[k](default, given[k]) != default
    ]
    if scheme.rotation == "none" and given.get("online") == "on":
        raise UsageError(
            expected="a scheme that rotates its weights, for online=on",
            came="rotation=none was given",
            todo="leave out one of the two",
        )
    # Without a rotation in the weights there is none at run time either.
    online = scheme.online and scheme.rotation != "none"
    settings = tuple(f"{key}={given[key]}" for key in changes)
    return replace(scheme, online=online, settings=settings)


_NEEDS = {"kv": ", whose scales are measured on a calibration text"}


def _with_group(scheme: Scheme, value: str) -> Scheme:
    if not value.isascii() or not value.isdigit() or int(value) not in GROUP_SIZES:
        raise _not_allowed("group", " or ".join(map(str, GROUP_SIZES)), value)
    assert scheme.linear is not None
    return replace(scheme, linear=replace(scheme.linear, group_size=int(value)))


def _with_keep(scheme: Scheme, value: str) -> Scheme:
    try:
        share = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise _not_allowed("keep", "a share from 0 to 1, as 0.05 or 5%", value)
    return replace(scheme, keep=share)


def _with_steps(scheme: Scheme, value: str) -> Scheme:
    if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= 100_000:
        raise _not_allowed("steps", "a number from 1 to 100000", value)
    return replace(scheme, steps=int(value))


def _choice(key: str, field: str, values: Mapping[str, object]) -> Callable[[Scheme, str], Scheme]:
    def choose(scheme: Scheme, value: str) -> Scheme:
        if value not in values:
            raise _not_allowed(key, " or ".join(values), value)
        return replace(scheme, **{field: values[value]})  # type: ignore[arg-type]

    return choose


def _names(values: object, *, without: str = "") -> dict[str, str]:
    """The strings of a Literal, each meaning itself."""
    return {name: name for name in get_args(values) if name != without}


_OPTIONS: Mapping[str, Callable[[Scheme, str], Scheme]] = {
    "group": _with_group,
    "down_proj": _choice("down_proj", "down_proj", {"w4": None, "w8": INT8_PER_CHANNEL}),
    "head": _choice("head", "small_head", {"w4": True, "w8": False}),
    "order": _choice("order", "act_order", {"act": True, "natural": False}),
    # Learned rotations are a scheme of their own.
    "rotation": _choice("rotation", "rotation", _names(Rotation, without="learned")),
    "objective": _choice("objective", "objective", _names(Objective)),
    "refit": _choice("refit", "refit", {"on": True, "off": False}),
    "online": _choice("online", "online", {"on": True, "off": False}),
    "range": _choice("range", "range", _names(Clip)),
    "kv": _choice("kv", "kv_bits", {"int8": 8, "float": None}),
    "keep": _with_keep,
    "steps": _with_steps,
}


def _not_allowed(key: str, allowed: str, value: str) -> UsageError:
    return UsageError(
        expected=f"{key}={allowed}",
        came=f"{key}={value} was given",
        todo="choose one of these",
    )

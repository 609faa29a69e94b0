"""The frozen value that says what is asked for: from flags, from TOML, or from a manifest."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgeattn.attention import AttentionRequest, parse_attention
from edgeattn.errors import UsageError, unknown_name
from edgeattn.quant.scheme import Scheme, parse_scheme

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DTYPES = ("fp32", "fp16", "bf16")
LOGITS = ("all", "last")
# Tokens of a calibration window, where the model's context is as long; and how many windows.
CALIBRATION_LENGTH, CALIBRATION_WINDOWS = 512, 64
_COUNTS = ("context", "batch", "calibration_windows")


@dataclass(frozen=True)
class Recipe:
    """What a user asks of `export`; everything else is derived from it, the model and the target.

    Attributes:
        target: NAME[@SOFTWARE].
        quant: NAME[:key=value,…] of a quantisation scheme.
        dtype: activations and unquantised weights; None takes the target's preferred one.
        context: longest sequence in tokens; None takes the checkpoint's own.
        batch: most rows at once.
        logits: "all" positions or the "last" one only.
        attention: NAME[:key=value,…] of an attention variant; at most one for now.
        calibration: a text file, or a folder of them, for what is calibrated.
        calibration_windows: stretches of 512 tokens that are taken from it.
        rotations: a file of learned rotations to use again.
        eval_text: a text on which the exported graph's quality is measured.
        max_ppl_increase: most its perplexity may be above the checkpoint's, as "10%".
    """

    target: str
    quant: str = "none"
    dtype: str | None = None
    context: int | None = None
    batch: int = 1
    logits: str = "all"
    attention: tuple[str, ...] = ()
    calibration: str | None = None
    calibration_windows: int = CALIBRATION_WINDOWS
    rotations: str | None = None
    eval_text: str | None = None
    max_ppl_increase: str | None = None

    def __post_init__(self) -> None:
        """Refuses values that are no recipe, whatever the target.

        Raises:
            UsageError: naming the field, what it allows and what came.
        """
        _check_types(self)
        parse_scheme(self.quant)
        _check_attention(self.attention)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
        if self.logits not in LOGITS:
            raise unknown_name("choice of logits", self.logits, LOGITS)
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(
                    expected=f"a positive {name}", came=f"it is {value}", todo="give at least 1"
                )

    @property
    def scheme(self) -> Scheme:
        """The parsed quantisation scheme."""
        return parse_scheme(self.quant)

    @property
    def attention_request(self) -> AttentionRequest | None:
        """The parsed attention variant; None for softmax in every layer."""
        return parse_attention(self.attention[0]) if self.attention else None

    @property
    def needs_calibration(self) -> bool:
        """Whether a text must be run through the model."""
        request = self.attention_request
        return self.scheme.needs_calibration or bool(request and request.needs_calibration)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values without the fields that say nothing."""
        return {key: value for key, value in asdict(self).items() if value not in (None, ())}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Builds a recipe from names and values.

        Raises:
            UsageError: an unknown field, a missing target, or a value of the wrong type.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise unknown_name("field of a recipe", key, known)
        if "target" not in values:
            raise UsageError(
                expected="a target",
                came="none was named",
                todo='pass --target NAME or write target = "NAME" into the recipe',
            )
        if isinstance(values.get("attention"), list):  # of TOML or JSON
            values = {**values, "attention": tuple(values["attention"])}
        return cls(**values)


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields of a recipe file, still unchecked so that flags can override them.

    Raises:
        UsageError: the file is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            expected=f"a TOML recipe at {path}",
            came=f"it cannot be read ({error})",
            todo='write lines like target = "jetson-orin"',
        ) from error


def _check_attention(asked: tuple[str, ...]) -> None:
    labels = [parse_attention(text).label for text in asked]
    if len(labels) > 1:
        raise UsageError(
            expected="one attention variant, as they do not compose yet",
            came=f"{' and '.join(labels)} were given",
            todo="leave one out",
        )


def _check_types(recipe: Recipe) -> None:
    for f in fields(recipe):
        value = getattr(recipe, f.name)
        if f.name == "attention":
            if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
                raise UsageError(
                    expected="attention as a list of texts",
                    came=f"it is {value!r}",
                    todo='write attention = ["head-sparse:density=0.75"]',
                )
            continue
        kind = int if f.name in _COUNTS else str
        optional = f.default is None and value is None
        if not optional and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UsageError(
                expected=f"{f.name} as {'a whole number' if kind is int else 'a text'}",
                came=f"it is {value!r}",
                todo="correct the recipe",
            )

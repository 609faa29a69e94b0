"""The file of `edgeattn calibrate --attention fft-rope`: which heads take polynomials, and which.

It holds all that `--attention fft-rope:heads=FILE` needs, and what was measured for the choice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.types import Strict

from edgeattn.attention import HIGHEST_DEGREE, FftRope
from edgeattn.errors import UsageError
from edgeattn.shape import ModelShape

KIND: Literal["edgeattn polynomial heads"] = "edgeattn polynomial heads"
SCHEMA_VERSION: Literal[1] = 1
_LARGEST_FILE = 1 << 28

Number = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1.0001, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]
Degree = Annotated[int, Field(ge=0, le=HIGHEST_DEGREE)]
Numbers = Annotated[tuple[Number, ...], Strict(False)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Candidate(_Record):
    """A polynomial that was tried on a head.

    Attributes:
        degree: of it.
        fitted: to this head; else Taylor's of exp.
        coefficients: from the constant on.
        score_bound: up to which it is used; rows beyond are exact.
        error: relative L2 error of the head's output with it in every row, on the worst window that
            was not fitted.
        fallback: share of those windows' rows that lie beyond the bound.
    """

    degree: Degree
    fitted: bool
    coefficients: Numbers
    score_bound: NotNegative
    error: NotNegative
    fallback: Share

    @model_validator(mode="after")
    def _has_all_coefficients(self) -> Candidate:
        if len(self.coefficients) != self.degree + 1:
            raise ValueError(f"degree {self.degree} with {len(self.coefficients)} coefficients")
        return self


class Head(_Record):
    """What was measured of a query head.

    Attributes:
        spread: standard deviation of a row's scores, on the mean over rows.
        lowest: least far score, from its row's centre.
        highest: greatest.
        sink_mass: softmax weight of the first keys, on the mean over rows.
        near_mass: that of the window.
        candidates: what was tried.
        chosen: index of the candidate that is used; None for exact attention.
    """

    spread: NotNegative
    lowest: Number
    highest: Number
    sink_mass: Share
    near_mass: Share
    candidates: Annotated[tuple[Candidate, ...], Strict(False)]
    chosen: Annotated[int, Field(ge=0)] | None

    @property
    def polynomial(self) -> Candidate | None:
        """The candidate that is used."""
        return None if self.chosen is None else self.candidates[self.chosen]

    @model_validator(mode="after")
    def _chose_a_candidate(self) -> Head:
        if self.chosen is not None and self.chosen >= len(self.candidates):
            raise ValueError(f"candidate {self.chosen} of {len(self.candidates)} chosen")
        return self

    def error(self, degree: int, *, fitted: bool) -> float | None:
        """Of a candidate; None where there is none."""
        found = [c.error for c in self.candidates if (c.degree, c.fitted) == (degree, fitted)]
        return found[0] if found else None


class Layer(_Record):
    """The heads of a layer.

    Attributes:
        skipped: why the layer was not measured; None where it was.
        key_mean: mean key of each KV head.
        heads: its query heads; none where it was not measured.
    """

    skipped: str | None
    key_mean: Annotated[tuple[Numbers, ...], Strict(False)]
    heads: Annotated[tuple[Head, ...], Strict(False)]

    @property
    def degree(self) -> int | None:
        """Of the layer's node; None where no head takes a polynomial."""
        degrees = [head.polynomial.degree for head in self.heads if head.polynomial]
        return max(degrees, default=None)

    @property
    def passed(self) -> int:
        """Heads that take polynomials."""
        return sum(head.chosen is not None for head in self.heads)


class PolynomialHeads(_Record):
    """The whole file.

    Attributes:
        kind: what the file is.
        schema_version: of its form.
        edgeattn: version that wrote it.
        model: name of the checkpoint.
        checkpoint: its fingerprint.
        text: name of the calibration text.
        text_sha256: of its content.
        length: tokens of a window.
        fitted_windows: on which coefficients were fitted.
        held_out_windows: others, on which errors were measured.
        sink: first keys that are exact.
        window: offsets below which keys are exact.
        degree: highest that was allowed.
        tolerance: largest error of a head that takes a polynomial.
        layers: all of the model.
    """

    kind: Literal["edgeattn polynomial heads"]
    schema_version: Literal[1]
    edgeattn: str
    model: str
    checkpoint: str
    text: str
    text_sha256: str
    length: Count
    fitted_windows: Count
    held_out_windows: Count
    sink: Annotated[int, Field(ge=0)]
    window: Annotated[int, Field(ge=0)]
    degree: Degree
    tolerance: Annotated[float, Field(gt=0, lt=1)]
    layers: Annotated[tuple[Layer, ...], Strict(False)]

    @property
    def passed(self) -> int:
        """Heads that take polynomials."""
        return sum(layer.passed for layer in self.layers)

    def attention(self, layer: int) -> FftRope | None:
        """What a layer's attention becomes; None where it stays softmax."""
        degree = self.layers[layer].degree
        return None if degree is None else FftRope(degree, self.sink, self.window)

    def passing(self, degree: int, *, fitted: bool, tolerance: float | None = None) -> float:
        """Share of all measured heads whose error at a degree is within the tolerance."""
        limit = self.tolerance if tolerance is None else tolerance
        errors = [h.error(degree, fitted=fitted) for layer in self.layers for h in layer.heads]
        within = sum(error is not None and error <= limit for error in errors)
        return within / len(errors) if errors else 0.0


def read_polynomial_heads(path: Path) -> PolynomialHeads:
    """Reads what `calibrate` wrote.

    Raises:
        UsageError: there is no such file, or it is another or a broken one.
    """
    if not path.is_file():
        raise _refused(f"a file {path}", "there is none")
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise _refused(f"calibrated heads in {path}", "it is too large to be such a file")
        return PolynomialHeads.model_validate_json(path.read_bytes())
    except OSError as error:
        raise _refused(f"calibrated heads in {path}", f"it does not read ({error.strerror})") from (
            error
        )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise _refused(f"calibrated heads in {path}", f"{place}: {first['msg']}") from error


def check_fits(heads: PolynomialHeads, shape: ModelShape, fingerprint: str) -> None:
    """Refuses heads of another model.

    Args:
        heads: that were read.
        shape: of the model.
        fingerprint: of its checkpoint.

    Raises:
        UsageError: they were calibrated on another checkpoint, or do not fit its shape.
    """
    if heads.checkpoint != fingerprint:
        raise _refused(
            "heads that were calibrated on this checkpoint",
            f"they are of another one, {heads.model}",
        )
    if len(heads.layers) != shape.num_layers:
        raise _refused(f"heads of {shape.num_layers} layers", f"there are {len(heads.layers)}")
    wanted = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    for index, layer in enumerate(heads.layers):
        if layer.skipped is not None and not layer.heads:
            continue
        if layer.passed and shape.layer_kind(index).window is not None:
            raise _refused(
                "polynomial heads in layers that see all keys",
                f"layer {index} sees a sliding window of them",
            )
        widths = {len(mean) for mean in layer.key_mean}
        found = (len(layer.heads), len(layer.key_mean), *widths)
        if found != wanted:
            expected = f"{wanted[0]} heads, {wanted[1]} of keys, {wanted[2]} wide, in layer {index}"
            raise _refused(expected, f"there are {' and '.join(map(str, found))}")


def _refused(expected: str, came: str) -> UsageError:
    return UsageError(
        expected=expected,
        came=came,
        todo="pass what `edgeattn calibrate --attention fft-rope` wrote for the model",
    )

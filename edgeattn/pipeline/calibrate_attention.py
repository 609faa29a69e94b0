"""`calibrate --attention fft-rope`: which heads of a checkpoint may take polynomials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn import __version__
from edgeattn.attention import FftRopeRequest
from edgeattn.bundle import bundle as layout
from edgeattn.devices.registry import Target, parse_target
from edgeattn.errors import UsageError
from edgeattn.pipeline.clock import Clock, Progress
from edgeattn.pipeline.heat_map import HAS_MATPLOTLIB, heat_map
from edgeattn.pipeline.transform import open_checked, require_torch
from edgeattn.pipeline.work import own_work, require_output
from edgeattn.planner.attention_calibration import FAR_LENGTH
from edgeattn.planner.polynomial import (
    Gain,
    attention_gain,
    flops_crossover,
    machine_of,
    speed_crossover,
)
from edgeattn.planner.polynomial_heads import KIND, SCHEMA_VERSION, PolynomialHeads
from edgeattn.shape import ModelShape
from edgeattn.text_file import read_text

if TYPE_CHECKING:
    from edgeattn.models.checkpoint import Checkpoint
    from edgeattn.models.model import Model

# Of a text, where nothing else is asked for.
WINDOWS = 8
# Rows of a window that have far keys, at least.
_LEAST_ROWS = 64
_IMAGE = ".png"


@dataclass(frozen=True)
class PolynomialReport:
    """What `calibrate_polynomial_heads` found.

    Attributes:
        path: the file it wrote.
        image: the heat map beside it; None without matplotlib.
        heads: what the file holds.
        context: length of a prompt that figures of cost are for.
        target: they are for; None for FLOPs alone.
        gain: what the chosen heads buy there; above 1 is cheaper than exact attention.
        flops_crossover: context from which a degree takes fewer FLOPs than exact attention.
        speed_crossover: the same of the target's roofline; empty without.
        seconds: wall time by stage.
    """

    path: Path
    image: Path | None
    heads: PolynomialHeads
    context: int
    target: str | None
    gain: Gain
    flops_crossover: Mapping[int, float]
    speed_crossover: Mapping[int, int]
    seconds: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; single heads are in the file."""
        heads, measured = self.heads, sum(len(layer.heads) for layer in self.heads.layers)
        return {
            "path": str(self.path),
            "image": None if self.image is None else str(self.image),
            "tolerance": heads.tolerance,
            "heads": measured,
            "passed": heads.passed,
            "share": heads.passed / measured if measured else 0.0,
            "layers": [
                {"layer": i, "degree": layer.degree, "passed": layer.passed, "of": len(layer.heads)}
                for i, layer in enumerate(heads.layers)
            ],
            "context": self.context,
            "target": self.target,
            "gain": asdict(self.gain),
            "flops_crossover": {str(k): round(v) for k, v in self.flops_crossover.items()},
            "speed_crossover": {str(k): v for k, v in self.speed_crossover.items()},
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


@dataclass(frozen=True)
class CalibrationText:
    """The text that is run through the model.

    Attributes:
        file: plain text, or a folder of such.
        length: tokens of a window; None takes 2048, or the model's context where it is shorter.
        windows: how many, half of them to fit and half to judge by.
        length_option: with which a user says the length.
        windows_option: and how many.
    """

    file: Path
    length: int | None = None
    windows: int = WINDOWS
    length_option: str = "--length"
    windows_option: str = "--windows"


def calibrate_polynomial_heads(
    model: str | Path,
    request: FftRopeRequest,
    text: CalibrationText,
    output: Path | None = None,
    *,
    target: str | None = None,
    context: int | None = None,
    offline: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> PolynomialReport:
    """Measures all heads of a checkpoint on a text and writes which take polynomials.

    Args:
        model: Hugging Face directory, GGUF file or, as a str, a hub id owner/name[@revision].
        request: first keys, window, degree and tolerance.
        text: what is run through the model.
        output: the JSON file to write, its heat map beside it; None names it after the model.
        target: whose roofline says what the heads buy.
        context: length of the prompt this is said for; None is the model's own.
        offline: take a hub id from the cache alone.
        force: replace a file that is already there.
        progress: called with (stage, done, total).

    Raises:
        EdgeattnError: a refusal. Nothing half-written stays; finished layers wait beside the
            output, and the error notes where.
    """
    require_torch("calibrating")
    if request.heads is not None:
        raise UsageError(
            expected="an attention to calibrate",
            came="heads=FILE names what was calibrated before",
            todo="leave it out",
        )
    read_text(text.file)
    machine = None if target is None else parse_target(target)
    if output is not None:
        _require_outputs(output, force=force)
    clock = Clock(progress)
    checkpoint, _ = open_checked(model, lambda outline: None, clock, offline=offline)
    path = output or Path(f"{checkpoint.name}-fft-rope.json")
    _require_outputs(path, force=force)
    _length(checkpoint.shape, request, text)
    at = _context(checkpoint.shape, context)
    from edgeattn.models.model import model_of

    plain = model_of(checkpoint)
    plain = replace(plain, shape=plain.shape.within(plain.shape.max_context))
    with own_work(path) as work:
        heads = calibrated_heads(checkpoint, plain, request, text, {}, work, clock)
        image = _write(path, heads, clock)
    return _report(path, image, heads, checkpoint.shape, at, machine, clock.seconds)


def calibrated_heads(
    checkpoint: Checkpoint,
    model: Model,
    request: FftRopeRequest,
    text: CalibrationText,
    made_from: Mapping[str, Any],
    work: Path,
    clock: Clock,
) -> PolynomialHeads:
    """Measures the heads of a model on a text and chooses among their polynomials.

    Args:
        checkpoint: the model's, for tokenizer and fingerprint.
        model: with softmax attention, perhaps quantised.
        request: first keys, window, degree and tolerance.
        text: what is run through the model.
        made_from: JSON-ready values of what else the result depends on.
        work: folder of unfinished work.
        clock: for the stage and its progress.

    Raises:
        EdgeattnError: the text does not fit, or the model takes no polynomials.
    """
    from edgeattn.calibration.windows import text_sha256, token_windows
    from edgeattn.calibration.work import WorkFolder
    from edgeattn.models.model import checkpoint_digest
    from edgeattn.transforms.polynomial import calibrate_polynomials

    content, length = read_text(text.file), _length(model.shape, request, text)
    windows = token_windows(
        content,
        checkpoint.text.get(layout.TOKENIZER),
        windows=text.windows,
        length=length,
        vocab_size=checkpoint.shape.vocab_size,
        option=text.windows_option,
    )
    about: dict[str, Any] = {
        "edgeattn": __version__,
        "checkpoint": checkpoint_digest(checkpoint),
        "text": text.file.name,
        "text_sha256": text_sha256(content),
        "length": length,
        "sink": request.sink,
        "window": request.window,
        "degree": request.degree,
        "tolerance": request.tolerance,
    }
    folder = WorkFolder(work, {**about, **made_from, "windows": text.windows})
    clock.start("measuring heads layer by layer")
    layers = calibrate_polynomials(model, windows, request, folder, progress=clock.count)
    return PolynomialHeads(
        kind=KIND,
        schema_version=SCHEMA_VERSION,
        model=checkpoint.name,
        fitted_windows=(text.windows + 1) // 2,
        held_out_windows=text.windows // 2,
        layers=tuple(layers),
        **about,
    )


def _write(path: Path, heads: PolynomialHeads, clock: Clock) -> Path | None:
    """The JSON file and, with matplotlib, the heat map; each appears whole or not at all."""
    from edgeattn.bundle.whole_file import write_bytes, write_text

    write_text(path, heads.model_dump_json(indent=1) + "\n")
    image = None
    if HAS_MATPLOTLIB:
        clock.start("drawing")
        image = path.with_suffix(_IMAGE)
        write_bytes(image, heat_map(heads))
    clock.stop()
    return image


def _report(
    path: Path,
    image: Path | None,
    heads: PolynomialHeads,
    shape: ModelShape,
    context: int,
    target: Target | None,
    seconds: Mapping[str, float],
) -> PolynomialReport:
    machine, near = None if target is None else machine_of(target), heads.sink + heads.window
    chosen = _chosen(heads)
    degrees = sorted({degree for degree, _ in chosen.values()})
    return PolynomialReport(
        path,
        image,
        heads,
        context,
        None if target is None else target.name,
        attention_gain(shape, chosen, near, context, machine),
        {degree: flops_crossover(shape.head_dim, degree, near) for degree in degrees},
        {degree: speed_crossover(shape, degree, near, machine) for degree in degrees}
        if machine is not None
        else {},
        seconds,
    )


def _length(shape: ModelShape, request: FftRopeRequest, text: CalibrationText) -> int:
    from edgeattn.calibration.far_sums import FarField

    length = min(FAR_LENGTH, shape.max_context) if text.length is None else text.length
    least = FarField(request.sink, request.window).first_row + _LEAST_ROWS
    if not least <= length <= shape.max_context:
        raise UsageError(
            expected=f"windows of {least} to {shape.max_context} tokens, which have far keys and "
            "which the model knows",
            came=f"the length is {length}",
            todo=f"pass another {text.length_option}, or a smaller sink and window",
        )
    return length


def _require_outputs(path: Path, *, force: bool) -> None:
    """Refuses a place for the file, or for the heat map beside it, that is taken."""
    if path.suffix == _IMAGE:
        raise UsageError(
            expected="a file for the heads, whose heat map lies beside it",
            came=f"{path} has the name of a picture",
            todo="choose a name such as heads.json with -o",
        )
    require_output(path, force=force)
    require_output(path.with_suffix(_IMAGE), force=force)


def cost_notes(heads: PolynomialHeads, shape: ModelShape, context: int) -> dict[str, Any]:
    """What a report says of chosen heads: how many, and whether they pay at a context."""
    gain = attention_gain(shape, _chosen(heads), heads.sink + heads.window, context, None)
    measured = sum(len(layer.heads) for layer in heads.layers)
    share = heads.passed / measured if measured else 0.0
    notes: dict[str, Any] = {
        "passed": f"{heads.passed} of {measured} heads ({share:.1%}) within {heads.tolerance:.1%}",
        "calibrated on": f"{heads.text}, windows of {heads.length:,} tokens",
        "FLOPs of attention": f"{1 / gain.flops:.2f} times those of exact attention, for a prompt "
        f"of {context:,} tokens with the kernels, by arithmetic; a function body computes all "
        "scores and saves none",
    }
    for degree in sorted({degree for degree, _ in _chosen(heads).values()}):
        tokens = flops_crossover(shape.head_dim, degree, heads.sink + heads.window)
        notes[f"degree {degree}"] = f"takes fewer FLOPs from {tokens:,.0f} tokens on"
    return notes


def _chosen(heads: PolynomialHeads) -> dict[int, tuple[int, int]]:
    """Degree and number of the heads with a polynomial, by layer."""
    return {
        index: (layer.degree, layer.passed)
        for index, layer in enumerate(heads.layers)
        if layer.degree is not None
    }


def _context(shape: ModelShape, context: int | None) -> int:
    found = shape.max_context if context is None else context
    if not 1 <= found <= shape.max_context:
        raise UsageError(
            expected=f"a context of 1 to {shape.max_context} tokens, which the model knows",
            came=f"--context is {found}",
            todo="pass another one",
        )
    return found

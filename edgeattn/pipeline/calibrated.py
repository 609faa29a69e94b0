"""Transforms that run the model on a text: rotation, choice of what to keep, quantising."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from edgeattn.bundle.bundle import ROTATIONS
from edgeattn.calibration.sensitivity import Trial, choose_kept, measure_sensitivity
from edgeattn.calibration.store import LayerStore
from edgeattn.calibration.windows import split_windows
from edgeattn.calibration.work import WorkFolder
from edgeattn.models.model import Model
from edgeattn.models.stream import Head, final_hidden
from edgeattn.pipeline.clock import Clock
from edgeattn.quant.hadamard import hadamard_factors
from edgeattn.quant.scheme import Scheme
from edgeattn.shape import ModelShape
from edgeattn.transforms.calibrate import quantize_on_text
from edgeattn.transforms.rotate import (
    Rotations,
    check_equivalence,
    hadamard_rotations,
    rotate,
)

if TYPE_CHECKING:
    from edgeattn.transforms.learn import LearnReport

# Tokens on which a rotated model is compared with the original one.
_EQUIVALENCE_LENGTH = 64
# Windows on which rotation=auto compares the quantised models.
_AUTO_WINDOWS = 8
# In the notes, as the papers call them.
_R3 = "R3, at run time, of queries and keys"
_R4 = "R4, at run time before down_proj"


@dataclass(frozen=True)
class CalibratedQuantizer:
    """Quantises a model on windows of a text, as one scheme says.

    Attributes:
        scheme: what to do.
        scale_dtype: dtype of weight scales.
        windows: token ids `[N, L]`.
        work: folder where finished parts wait for the rest.
        made_from: JSON-ready values that say what those depend on.
        clock: for stages and progress.
    """

    scheme: Scheme
    scale_dtype: torch.dtype
    windows: Tensor
    work: Path
    made_from: dict[str, Any]
    clock: Clock

    def run(self, model: Model, rotations_file: Path | None) -> tuple[Model, dict[str, Any]]:
        """The quantised model, and notes on every choice, JSON-ready.

        Args:
            model: in floating point.
            rotations_file: learned rotations to use instead of the scheme's own.

        Raises:
            EdgeattnError: unfinished work of another command, or what cannot be quantised.
        """
        WorkFolder(self.work, self.made_from)  # before anything is done that it would not let go on
        if self.scheme.rotation == "auto":
            return self._rotated_or_not(model, rotations_file)
        if self.scheme.rotation == "learned" and rotations_file is None:
            return self._learned_or_hadamard(model)
        return self._quantize(model, self._rotations(model, rotations_file))

    def _rotations(
        self, model: Model, rotations_file: Path | None
    ) -> tuple[Rotations, dict[str, Any]] | None:
        scheme, shape = self.scheme, model.shape
        if scheme.rotation == "none":
            return None
        start = hadamard_rotations(shape, online=scheme.online)
        online = {} if start.down is None else {_R4: start.down.description}
        if rotations_file is not None:
            rotations, notes = self._loaded(rotations_file, shape)
            return replace(rotations, down=start.down), {**notes, **online}
        widths = {
            "R1, of the residual stream": hadamard_factors(shape.hidden_size).description,
            "R2, of each head's values": hadamard_factors(shape.head_dim).description,
        }
        if scheme.rotation != "learned":
            return start, {"kind": "randomised Hadamard", **widths, **online}
        learned, report = self._learned(model, start)
        starts = {name: f"learned from a {width}" for name, width in widths.items()}
        return learned, {"kind": "learned", **starts, **online, **report.to_dict()}

    def _loaded(self, file: Path, shape: ModelShape) -> tuple[Rotations, dict[str, Any]]:
        from edgeattn.transforms.rotations_file import load_rotations

        rotations, noted = load_rotations(file, shape)
        notes = {"kind": file.name}
        if noted.get("checkpoint") != self.made_from["checkpoint"]:
            known = "another checkpoint than this one"
            notes["learned on"] = known if "checkpoint" in noted else "the file does not say what"
        return rotations, notes

    def _learned(self, model: Model, start: Rotations) -> tuple[Rotations, LearnReport]:
        from edgeattn.transforms.learn import learn_rotations
        from edgeattn.transforms.rotations_file import save_rotations

        self.clock.start("learning rotations")
        WorkFolder(self.work, self.made_from).begin()
        learned, report = learn_rotations(
            model,
            self.scheme,
            self.windows,
            start,
            steps=self.scheme.steps,
            objective=self.scheme.objective,
            device="cuda" if torch.cuda.is_available() else "cpu",
            state_file=self.work / "learning.safetensors",
            made_from=self.made_from,
            progress=self.clock.count,
        )
        save_rotations(self.work / ROTATIONS, learned, self.made_from)
        return learned, report

    def _quantize(
        self, model: Model, rotating: tuple[Rotations, dict[str, Any]] | None, part: str = "layers"
    ) -> tuple[Model, dict[str, Any]]:
        store = LayerStore(self.work, self.made_from, part)
        notes: dict[str, Any] = {}
        basis: Callable[[frozenset[str]], Model] = lambda kept: model  # noqa: E731
        if rotating is not None:
            rotations, about = rotating
            basis = lambda kept: rotate(model, rotations, without_online=kept)  # noqa: E731
            self.clock.start("rotating")
            sample = self.windows[:1, :_EQUIVALENCE_LENGTH]
            equivalence = check_equivalence(model, basis(frozenset()), rotations, sample)
            notes["rotation"] = {**about, **equivalence.to_dict()}
        kept = frozenset[str]()
        if self.scheme.keep > 0:
            trials = self._trials(basis(kept), store)
            linears = len(model.shape.linears()) * model.shape.num_layers
            kept = choose_kept(trials, self.scheme, linears)
            notes["kept at higher precision"] = {
                "linears": f"{len(kept)} of {linears}",
                **{name: "" for name in sorted(kept)},
            }
            notes["sensitivity (nats)"] = {", ".join(t.linears): t.increase for t in trials}
        self.clock.start("quantising layer by layer")
        quantized = quantize_on_text(
            basis(kept),
            self.scheme,
            self.windows,
            store,
            scale_dtype=self.scale_dtype,
            kept=kept,
            progress=self.clock.count,
        )
        if quantized.caches:
            notes["int8 cache"] = _about_caches(quantized)
        return quantized, notes

    def _trials(self, model: Model, store: LayerStore) -> list[Trial]:
        self.clock.start("measuring sensitivity")
        found = store.remembered(
            "sensitivity",
            lambda: [
                trial.to_dict()
                for trial in measure_sensitivity(
                    model, self.scheme, self.windows, progress=self.clock.count
                )
            ],
        )
        return [Trial(tuple(trial["linears"]), trial["increase"]) for trial in found]

    def _rotated_or_not(
        self, model: Model, rotations_file: Path | None
    ) -> tuple[Model, dict[str, Any]]:
        """rotation=auto: quantised with and without."""
        rotated = replace(self, scheme=replace(self.scheme, rotation="hadamard"))
        plain = replace(self, scheme=replace(self.scheme, rotation="none", online=False))
        rotations = rotated._rotations(model, rotations_file)
        candidates = {
            "rotated": rotated._quantize(model, rotations, "rotated"),
            "not rotated": plain._quantize(model, None, "plain"),
        }
        return self._best("rotation=auto", candidates, self.windows[-_AUTO_WINDOWS:])

    def _learned_or_hadamard(self, model: Model) -> tuple[Model, dict[str, Any]]:
        """Quantised with learned rotations and with those that learning started from.

        What is learned is learned on a network whose weights are rounded to the nearest. GPTQ and
        refitting repair much of what such a network suffers from, so that the better rotations
        there need not be the better ones here.
        """
        plain = replace(self, scheme=replace(self.scheme, rotation="hadamard"))
        hadamard = plain._rotations(model, None)
        learned = self._rotations(model, None)
        assert learned is not None
        about = {"learning": learned[1]}
        if not learned[1]["learned"]:  # they are those that learning started from
            found, notes = plain._quantize(model, hadamard, "hadamard")
            chosen = {"chosen": "Hadamard", "learned": "no better where it was learned"}
        else:
            candidates = {
                "learned": self._quantize(model, learned, "learned"),
                "Hadamard": plain._quantize(model, hadamard, "hadamard"),
            }
            found, notes = self._best(
                "learned rotations", candidates, split_windows(self.windows)[1]
            )
            chosen = notes["learned rotations"]
        if chosen["chosen"] != "learned":  # and are not kept for others
            (self.work / ROTATIONS).unlink(missing_ok=True)
            notes = {**about, **notes}
        return found, {**notes, "learned rotations": chosen}

    def _best(
        self, title: str, candidates: dict[str, tuple[Model, dict[str, Any]]], sample: Tensor
    ) -> tuple[Model, dict[str, Any]]:
        """The candidate that reads some windows best, noted under `title`."""
        self.clock.start("comparing rotations")
        perplexities = {
            name: math.exp(float(Head(found).losses(final_hidden(found, sample), sample).mean()))
            for name, (found, _) in candidates.items()
        }
        chosen = min(
            perplexities, key=lambda name: (math.isnan(perplexities[name]), perplexities[name])
        )
        found, notes = candidates[chosen]
        perplexity = {f"perplexity {name}": value for name, value in perplexities.items()}
        return found, {title: {"chosen": chosen, **perplexity}, **notes}


def _about_caches(model: Model) -> dict[str, Any]:
    """Notes on caches that all have one form."""
    rotation = next(iter(model.caches.values())).rotation
    keys, values = zip(*(cache.scales for cache in model.caches.values()), strict=True)
    return {
        _R3: "none" if rotation is None else rotation.description,
        "key scales": f"{min(keys):.3g} to {max(keys):.3g}",
        "value scales": f"{min(values):.3g} to {max(values):.3g}",
    }

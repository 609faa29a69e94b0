"""Golden vectors: inputs and reference outputs in the bundle, so that torch is not needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeattn.errors import BundleError
from edgeattn.verify.cases import Case, StepInputs
from edgeattn.verify.drive import Tensors

_INPUTS = ("input_ids", "attention_mask", "position_ids")


@dataclass(frozen=True)
class Golden:
    """What an implementation must reproduce.

    Attributes:
        cases: the inputs.
        expected: outputs of the reference on the weights the bundle stores.
        low_precision_error: per tensor, of plain torch in low precision (`tolerance`).
    """

    cases: tuple[Case, ...]
    expected: Tensors
    low_precision_error: dict[str, float]

    def save(self, path: Path) -> None:
        """Writes an .npz without any pickled object."""
        arrays: dict[str, NDArray[np.generic]] = {}
        for case in self.cases:
            for index, step in enumerate(case.steps):
                for field in _INPUTS:
                    arrays[f"input/{case.name}/{index}/{field}"] = getattr(step, field)
        arrays.update({f"expected/{name}": value for name, value in self.expected.items()})
        names = sorted(self.low_precision_error)
        arrays["low_precision_error/names"] = np.array(names)
        arrays["low_precision_error/values"] = np.array(
            [self.low_precision_error[n] for n in names]
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Reads what `save` wrote.

        Raises:
            BundleError: the file is damaged or no golden file.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return cls._parse({name: arrays[name] for name in arrays.files})
        except Exception as error:  # zipfile and numpy raise what a broken archive leads them to
            raise BundleError(
                expected=f"golden vectors in {path}",
                came=f"the file does not read ({error})",
                todo="export the bundle again",
            ) from error

    @classmethod
    def _parse(cls, arrays: dict[str, NDArray[np.generic]]) -> Golden:
        steps: dict[str, dict[int, dict[str, NDArray[np.generic]]]] = {}
        expected: Tensors = {}
        for name, value in arrays.items():
            kind, _, rest = name.partition("/")
            if value.dtype.kind not in "fiU" or not value.ndim:
                raise ValueError(f"{name} is no array of numbers or names")
            if kind == "input":
                case, index, field = rest.split("/")
                steps.setdefault(case, {}).setdefault(int(index), {})[field] = value
            elif kind == "expected":
                expected[rest] = value.astype(np.float32)
                if not np.isfinite(expected[rest]).all():
                    raise ValueError(f"{name} is not finite")
        if not steps or not expected:
            raise ValueError("it holds no inputs or no expected outputs")
        cases = tuple(
            Case(case, tuple(StepInputs(**found[i]) for i in range(len(found))))  # type: ignore[arg-type]
            for case, found in steps.items()
        )
        names = arrays["low_precision_error/names"].tolist()
        values = arrays["low_precision_error/values"].tolist()
        return cls(cases, expected, dict(zip(names, values, strict=True)))

"""Golden vectors: inputs and reference outputs in the bundle, so that torch is not needed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeattn.errors import BundleError
from edgeattn.verify.cases import Case, StepInputs
from edgeattn.verify.drive import Tensors
from edgeattn.verify.measure import errors

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
        write_arrays(path, arrays, self.expected, self.low_precision_error)

    def errors(self, found: Tensors, *, rounds: bool) -> dict[str, float]:
        """The error of every tensor, see `measure.errors`."""
        return errors(found, self.expected, self.cases, rounds=rounds)

    def only(self, names: Collection[str]) -> Golden:
        """The part of it that belongs to some cases.

        Args:
            names: of the cases.
        """
        cases = tuple(case for case in self.cases if case.name in names)
        expected = {n: value for n, value in self.expected.items() if n.partition(".")[0] in names}
        return Golden(cases, expected, self.low_precision_error)

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Reads what `save` wrote.

        Raises:
            BundleError: the file is damaged or no golden file.
        """
        with reading(path) as arrays:
            inputs, expected, low = parse_arrays(arrays)
            steps: dict[str, dict[int, dict[str, NDArray[np.generic]]]] = {}
            for name, value in inputs.items():
                case, index, field = name.split("/")
                steps.setdefault(case, {}).setdefault(int(index), {})[field] = value
            cases = tuple(
                Case(case, tuple(StepInputs(**found[i]) for i in range(len(found))))  # type: ignore[arg-type]
                for case, found in steps.items()
            )
            return cls(cases, expected, low)


def write_arrays(
    path: Path,
    inputs: Mapping[str, NDArray[np.generic]],
    expected: Tensors,
    low_precision_error: Mapping[str, float],
) -> None:
    """Writes golden vectors as an .npz without any pickled object.

    Args:
        path: of the file.
        inputs: their names begin with "input/".
        expected: outputs of the reference.
        low_precision_error: see `Golden`.
    """
    arrays = dict(inputs)
    arrays.update({f"expected/{name}": value for name, value in expected.items()})
    names = sorted(low_precision_error)
    arrays["low_precision_error/names"] = np.array(names)
    arrays["low_precision_error/values"] = np.array([low_precision_error[n] for n in names])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


@contextmanager
def reading(path: Path) -> Iterator[dict[str, NDArray[np.generic]]]:
    """The arrays of a file; what goes wrong until they are understood is its fault.

    Raises:
        BundleError: the file is damaged or no golden file.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            yield {name: arrays[name] for name in arrays.files}
    except Exception as error:  # zipfile and numpy raise what a broken archive leads them to
        raise BundleError(
            expected=f"golden vectors in {path}",
            came=f"the file does not read ({error})",
            todo="export the bundle again",
        ) from error


def parse_arrays(
    arrays: Mapping[str, NDArray[np.generic]],
) -> tuple[dict[str, NDArray[np.generic]], Tensors, dict[str, float]]:
    """What `write_arrays` was given: inputs without "input/", outputs, low-precision errors.

    Raises:
        ValueError: an array that is none of them.
    """
    inputs: dict[str, NDArray[np.generic]] = {}
    expected: Tensors = {}
    for name, value in arrays.items():
        kind, _, rest = name.partition("/")
        if value.dtype.kind not in "fiU" or not value.ndim:
            raise ValueError(f"{name} is no array of numbers or names")
        if kind == "input":
            inputs[rest] = value
        elif kind == "expected":
            expected[rest] = value.astype(np.float32)
            if not np.isfinite(expected[rest]).all():
                raise ValueError(f"{name} is not finite")
    if not inputs or not expected:
        raise ValueError("it holds no inputs or no expected outputs")
    names = arrays["low_precision_error/names"].tolist()
    values = arrays["low_precision_error/values"].tolist()
    return inputs, expected, dict(zip(names, values, strict=True))

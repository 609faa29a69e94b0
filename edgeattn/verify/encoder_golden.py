"""What encoders are compared on: inputs all at once, outputs of the reference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeattn.encoder_shape import EncoderShape, PatchInput
from edgeattn.verify.drive import Tensors
from edgeattn.verify.golden import parse_arrays, reading, write_arrays
from edgeattn.verify.tolerance import relative_error, typical_error

TEXT_TOKENS = 48
RAGGED_LENGTHS = (13, 6, 1)
IMAGES = 2


@dataclass(frozen=True)
class EncoderCase:
    """Rows that pass an encoder together.

    Attributes:
        name: of the case.
        inputs: by the names the graph gives them.
    """

    name: str
    inputs: Mapping[str, NDArray[np.generic]]

    @property
    def valid(self) -> NDArray[np.bool_] | None:
        """`[B, T]`: which tokens are no padding; None for images."""
        mask = self.inputs.get("attention_mask")
        return None if mask is None else mask.astype(bool)

    def kept(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """What of a tensor must agree: token states `[B, T, hidden]` lose their padding."""
        if states.ndim != 3:
            return states
        valid = self.valid
        kept: NDArray[np.float32]
        kept = states.reshape(-1, states.shape[-1]) if valid is None else states[valid]
        return kept


@dataclass(frozen=True)
class EncoderGolden:
    """What an implementation of an encoder must reproduce; see `edgeattn.verify.golden.Golden`.

    Attributes:
        cases: the inputs.
        expected: outputs of the reference, named "text.hidden.3" and "text.sentence_embedding".
        low_precision_error: per tensor, of plain torch in low precision (`tolerance`).
    """

    cases: tuple[EncoderCase, ...]
    expected: Tensors
    low_precision_error: dict[str, float]

    def only(self, names: Collection[str]) -> EncoderGolden:
        """The part of it that belongs to some cases.

        Args:
            names: of the cases.
        """
        cases = tuple(case for case in self.cases if case.name in names)
        expected = {n: value for n, value in self.expected.items() if n.partition(".")[0] in names}
        return EncoderGolden(cases, expected, self.low_precision_error)

    def errors(self, found: Tensors, *, rounds: bool) -> dict[str, float]:
        """The error of every tensor, infinite where one is missing.

        The residual stream is only compared where an implementation gives it.

        Args:
            found: of an implementation.
            rounds: whether the scheme rounds at run time.
        """
        measure = typical_error if rounds else relative_error
        return {
            name: measure(found[name], reference) if name in found else float("inf")
            for name, reference in self.expected.items()
            if name in found or ".hidden." not in name
        }

    def save(self, path: Path) -> None:
        """Writes an .npz without any pickled object."""
        inputs = {
            f"input/{case.name}/{name}": value
            for case in self.cases
            for name, value in case.inputs.items()
        }
        write_arrays(path, inputs, self.expected, self.low_precision_error)

    @classmethod
    def load(cls, path: Path) -> EncoderGolden:
        """Reads what `save` wrote.

        Raises:
            BundleError: the file is damaged or no golden file.
        """
        with reading(path) as arrays:
            inputs, expected, low = parse_arrays(arrays)
            by_case: dict[str, dict[str, NDArray[np.generic]]] = {}
            for name, value in inputs.items():
                case, field = name.split("/")
                by_case.setdefault(case, {})[field] = value
            cases = tuple(EncoderCase(name, found) for name, found in by_case.items())
            return cls(cases, expected, low)


def run_cases(
    run: Callable[[Mapping[str, NDArray[np.generic]]], Mapping[str, NDArray[np.float32]]],
    cases: Sequence[EncoderCase],
    progress: Callable[[int, int], None] | None = None,
) -> Tensors:
    """What an implementation gives for every case, by the names of `EncoderGolden.expected`.

    Args:
        run: inputs to outputs, both by the names the graph gives them.
        cases: what to run.
        progress: called with (done, total).
    """
    found: Tensors = {}
    for done, case in enumerate(cases, start=1):
        for name, value in run(case.inputs).items():
            found[f"{case.name}.{name}"] = case.kept(value)
        if progress:
            progress(done, len(cases))
    return found


def encoder_cases(
    shape: EncoderShape, context: int, tokens: Sequence[int] | None = None
) -> tuple[EncoderCase, ...]:
    """The cases every bundle of an encoder is verified with.

    Args:
        shape: the architecture.
        context: most tokens of a text; shorter contexts get shorter cases.
        tokens: ids of a text, repeated as needed; without them ids are drawn with a fixed seed.
    """
    random, read = np.random.default_rng(0), shape.input
    if isinstance(read, PatchInput):
        size = (IMAGES, read.channels, read.height, read.width)
        pixels = random.standard_normal(size, dtype=np.float32)
        return (EncoderCase("images", {"pixel_values": pixels}),)
    lengths = [min(length, context) for length in RAGGED_LENGTHS]
    count = min(TEXT_TOKENS, context) + sum(lengths)
    if tokens:
        ids = np.resize(np.asarray(tokens, dtype=np.int64), count)
    else:
        ids = random.integers(0, read.vocab_size, count, dtype=np.int64)
    rows, begin = [], min(TEXT_TOKENS, context)
    for length in lengths:
        # A padding id that also occurs as a token: an implementation may not tell them by value.
        rows.append(np.pad(ids[begin : begin + length], (0, max(lengths) - length), mode="wrap"))
        begin += length
    ragged = np.arange(max(lengths)) < np.array(lengths)[:, None]
    text = ids[None, : min(TEXT_TOKENS, context)]
    return (
        EncoderCase("text", _inputs(text, np.ones_like(text), read.token_types)),
        EncoderCase("ragged", _inputs(np.stack(rows), ragged.astype(np.int64), read.token_types)),
    )


def _inputs(
    ids: NDArray[np.int64], mask: NDArray[np.int64], token_types: int
) -> dict[str, NDArray[np.generic]]:
    inputs: dict[str, NDArray[np.generic]] = {"input_ids": ids, "attention_mask": mask}
    if token_types:  # of a text and another one behind it
        second = np.arange(ids.shape[1]) >= ids.shape[1] // 2
        inputs["token_type_ids"] = np.broadcast_to(second * (token_types > 1), ids.shape).astype(
            np.int64
        )
    return inputs

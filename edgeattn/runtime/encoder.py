"""`EncoderSession`: an encoder's bundle that is loaded and runs; texts or images in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeattn.bundle.bundle import Bundle
from edgeattn.encoder_shape import EncoderShape, PatchInput, TokenInput
from edgeattn.errors import RuntimeInputError
from edgeattn.runtime.arrays import as_array
from edgeattn.runtime.backend import (
    BackendName,
    BackendOptions,
    EncoderBackend,
    open_encoder_backend,
)
from edgeattn.runtime.session import check_mask, whole_numbers
from edgeattn.runtime.text import Text

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# Texts that pass the encoder together.
ROWS = 32


class EncoderSession:
    """A loaded encoder; open one with `EncoderSession.open`. Safe to share between threads."""

    def __init__(self, bundle: Bundle, backend: EncoderBackend) -> None:
        self._bundle, self._backend = bundle, backend
        self._shape = bundle.encoder_shape
        context = bundle.manifest.lowering.get("context")
        self._context = context if isinstance(context, int) else self._shape.max_context

    @classmethod
    def open(
        cls,
        bundle: Path | str | Bundle,
        *,
        backend: BackendName = "onnxruntime",
        provider: str = "cpu",
        threads: int | None = None,
        exact: bool = False,
        engine: Path | str | None = None,
        check_hashes: bool = True,
    ) -> EncoderSession:
        """Loads a bundle; see `edgeattn.runtime.Session.open` for the arguments.

        Raises:
            BundleError: no bundle of an encoder; else as of that one.
            UsageError: likewise.
            LoweringError: likewise.
            MissingDependencyError: likewise.
        """
        options = BackendOptions(backend, provider, threads, exact, engine)
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle, check_hashes=check_hashes)
        bundle.require_encoder()
        return cls(bundle, open_encoder_backend(bundle, options))

    @property
    def bundle(self) -> Bundle:
        """The bundle it runs."""
        return self._bundle

    @property
    def shape(self) -> EncoderShape:
        """Architecture, with the task."""
        return self._shape

    @property
    def context(self) -> int:
        """Most tokens of a row."""
        return self._context

    @cached_property
    def text(self) -> Text:
        """The bundle's tokenizer.

        Raises:
            BundleError: the bundle has no tokenizer, or one that does not load.
            MissingDependencyError: tokenizers is not installed.
        """
        return Text.open(self._bundle)

    def run(
        self,
        input_ids: ArrayLike,
        *,
        attention_mask: ArrayLike | None = None,
        token_type_ids: ArrayLike | None = None,
    ) -> NDArray[np.float32]:
        """Runs the encoder on tokens.

        Args:
            input_ids: `[B, T]`, whole numbers.
            attention_mask: `[B, T]`, 1 at tokens and 0 at padding, which must be on the right;
                None when there is none.
            token_type_ids: `[B, T]`, which of two texts a token belongs to; None for one text. Of
                no use to families that do not tell.

        Returns:
            What the task gives: token states `[B, T, hidden]`, which mean nothing at padding,
            vectors `[B, hidden]` of length 1, or logits `[B, labels]`; fp32.

        Raises:
            RuntimeInputError: an encoder of images, a shape, type, id or mask that does not fit, or
                an output that is not finite.
        """
        read = self._shape.input
        if not isinstance(read, TokenInput):
            raise _wrong_input("texts", "images", "run_images")
        ids = whole_numbers("input_ids", input_ids)
        if ids.ndim != 2 or 0 in ids.shape:
            raise RuntimeInputError(
                expected="input_ids of shape [batch, length], both at least 1",
                came=f"the shape is {list(ids.shape)}",
                todo="put the token ids of each text into one row",
            )
        if ids.shape[1] > self._context:
            raise self._too_long(ids.shape[1])
        mask = np.ones_like(ids) if attention_mask is None else check_mask(attention_mask, ids)
        if not mask.any(axis=1).all():
            raise RuntimeInputError(
                expected="at least one token in each row of attention_mask",
                came="a row is all padding",
                todo="leave that row out",
            )
        ids = ids * mask  # an id at padding may be a marker such as -100
        _check_below("input_ids", ids, read.vocab_size)
        feeds = {"input_ids": ids, "attention_mask": mask}
        if read.token_types:
            feeds["token_type_ids"] = _types(token_type_ids, ids, read.token_types)
        found = self._backend.run(feeds)
        # token states mean nothing at padding
        _check_finite(found[mask == 1] if found.ndim == 3 else found)
        return found

    def run_images(self, pixel_values: ArrayLike) -> NDArray[np.float32]:
        """Runs the encoder on images: as `run`, the tokens being class token and patches.

        Args:
            pixel_values: `[B, C, height, width]`, scaled and normalised as the model was trained.

        Raises:
            RuntimeInputError: an encoder of texts, images of another size, or an output that is not
                finite.
        """
        read = self._shape.input
        if not isinstance(read, PatchInput):
            raise _wrong_input("images", "texts", "run")
        pixels = as_array("pixel_values", pixel_values)
        size = (read.channels, read.height, read.width)
        if pixels.ndim != 4 or pixels.shape[1:] != size or not len(pixels):
            raise RuntimeInputError(
                expected=f"images as an array of shape [batch, {', '.join(map(str, size))}]",
                came=f"the shape is {list(pixels.shape)}",
                todo="scale them to that size",
            )
        given, kind = pixels.dtype, pixels.dtype.kind
        if kind == "f":
            with np.errstate(over="ignore"):  # what float32 cannot hold is refused
                pixels = pixels.astype(np.float32, copy=False)
        if kind != "f" or not np.isfinite(pixels).all():
            raise RuntimeInputError(
                expected="pixels as finite floating-point numbers",
                came=f"they are {given}" if kind != "f" else "some are not",
                todo="scale and normalise them as the model was trained",
            )
        found = self._backend.run({"pixel_values": pixels})
        _check_finite(found)
        return found

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Token ids and attention mask of texts, `[B, T]` each, padded on the right.

        Raises:
            RuntimeInputError: no text, or one that is empty or longer than the context, or a single
                one instead of several.
            BundleError: the bundle has no tokenizer.
        """
        _check_texts(texts)
        rows = [self.text.encode(text) for text in texts]
        if not rows or not all(rows):
            raise RuntimeInputError(
                expected="texts of at least one token",
                came="there is none" if not rows else "one is empty",
                todo="pass a text",
            )
        if (longest := max(map(len, rows))) > self._context:
            raise self._too_long(longest)
        mask = np.array([[1] * len(row) + [0] * (longest - len(row)) for row in rows], np.int64)
        ids = np.array([row + [0] * (longest - len(row)) for row in rows], np.int64)
        return ids, mask

    def embed(self, texts: Sequence[str], *, rows: int = ROWS) -> NDArray[np.float32]:
        """One vector of length 1 for each text, `[texts, hidden]`.

        Args:
            texts: in any order; those of like length pass the encoder together.
            rows: texts that do, at most.

        Raises:
            RuntimeInputError: a bundle of another task, or a text that is empty or too long.
            BundleError: the bundle has no tokenizer.
        """
        if self._shape.task != "embedding":
            raise RuntimeInputError(
                expected="a bundle whose task is embedding",
                came=f"it is {self._shape.task}",
                todo="export it with --task embedding",
            )
        _check_texts(texts)
        found = np.zeros((len(texts), self._shape.hidden_size), np.float32)
        for places in _batches(texts, rows):
            ids, mask = self.encode([texts[i] for i in places])
            found[places] = self.run(ids, attention_mask=mask)
        return found

    def _too_long(self, length: int) -> RuntimeInputError:
        return RuntimeInputError(
            expected=f"texts of at most {self._context} tokens, the context of the bundle",
            came=f"one has {length}",
            todo="shorten it, or split it into several",
        )


def _batches(texts: Sequence[str], rows: int) -> Iterator[list[int]]:
    """Places of texts, longest first, so that little is padding."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for begin in range(0, len(order), max(rows, 1)):
        yield order[begin : begin + max(rows, 1)]


def _types(values: ArrayLike | None, ids: NDArray[np.int64], token_types: int) -> NDArray[np.int64]:
    if values is None:
        return np.zeros_like(ids)
    types = whole_numbers("token_type_ids", values)
    if types.shape != ids.shape:
        raise RuntimeInputError(
            expected=f"token_type_ids of shape {list(ids.shape)}, as input_ids has",
            came=f"their shape is {list(types.shape)}",
            todo="give every token its type",
        )
    _check_below("token_type_ids", types, token_types)
    return types


def _check_texts(texts: Sequence[str]) -> None:
    # a text is a sequence of texts, too: its characters
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise RuntimeInputError(
            expected="a list of texts",
            came="it is a single text" if isinstance(texts, str) else "not all in it are texts",
            todo="pass [text]",
        )


def _check_finite(found: NDArray[np.float32]) -> None:
    if not np.isfinite(found).all():
        raise RuntimeInputError(
            expected="a finite output",
            came="the model returned NaN or infinity",
            todo="run `edgeattn verify` on the bundle; fp16 may be too narrow for this model",
        )


def _check_below(name: str, ids: NDArray[np.int64], limit: int) -> None:
    wrong = (ids < 0) | (ids >= limit)
    if wrong.any():
        raise RuntimeInputError(
            expected=f"{name} from 0 to {limit - 1}",
            came=f"there is {ids[wrong][0]}",
            todo="use the bundle's own tokenizer",
        )


def _wrong_input(asked: str, reads: str, call: str) -> RuntimeInputError:
    return RuntimeInputError(
        expected=f"an encoder of {asked}", came=f"it reads {reads}", todo=f"use {call}"
    )

"""`Session`: a bundle that is loaded and runs; tokens in, logits and a new state out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeattn.attention import HeadSparseRequest, parse_attention
from edgeattn.bundle.bundle import CONFIG, GENERATION_CONFIG, Bundle
from edgeattn.errors import BundleError, RuntimeInputError
from edgeattn.runtime.arrays import as_array
from edgeattn.runtime.backend import Backend, BackendName, BackendOptions, open_backend
from edgeattn.runtime.layout import Layout
from edgeattn.runtime.text import Text

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class State:
    """What a session remembers of the tokens it has seen: opaque, immutable, reusable.

    Running a session returns a new state and leaves the old one as it was, so that several
    continuations can branch off one prefix. An engine of TensorRT keeps one cache on the GPU and
    writes it in place: there a state is good for one run, and a second one is refused.

    Attributes:
        batch: rows.
        length: slots of the cache, padding included.
    """

    _owner: Session = field(repr=False)
    # [B, P], 1 at tokens; None where none is padding.
    _mask: NDArray[np.int64] | None = field(repr=False)
    _cache: Any = field(repr=False)
    batch: int
    length: int


@dataclass(frozen=True, eq=False)
class Step:
    """The outcome of one run.

    Attributes:
        logits: `[B, T, V]` fp32; `[B, 1, V]` for a bundle exported with last-position logits. Yours
            to change; `torch.from_dlpack` takes them without a copy.
        likeliest: `[B, T]`, the id of the largest logit, of equal ones the smallest.
        state: pass it to the next run.
    """

    logits: NDArray[np.float32]
    likeliest: NDArray[np.int64]
    state: State


class Session:
    """A loaded bundle; open one with `Session.open`.

    Safe to share between threads: states are immutable, ONNX Runtime allows concurrent runs (which
    then compete for the same cores), and with TensorRT threads take turns.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self._bundle, self._backend = bundle, backend
        self._shape = bundle.shape
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
    ) -> Session:
        """Loads a bundle.

        Args:
            bundle: its directory, or an opened bundle.
            backend: "onnxruntime"; "tensorrt" for an engine that `edgeattn build` made.
            provider: of ONNX Runtime: "cpu"; "cuda" or "tensorrt" with onnxruntime-gpu.
            threads: threads of one operator; None takes every core this process may use.
            exact: multiply int4 weights in fp32. ONNX Runtime by default rounds activations to
                int8 there, which is faster and has errors up to 0.1.
            engine: of TensorRT: its file; None for the bundle's newest that runs here.
            check_hashes: read every file and compare with the manifest; sizes are always compared.

        Raises:
            BundleError: no bundle, a damaged one, or one that this ONNX Runtime cannot load; no
                engine, or one that was changed or belongs to another graph.
            UsageError: an unknown backend or provider, an option of the other backend, or `threads`
                below 1.
            LoweringError: the engine was made for another GPU, processor or TensorRT.
            MissingDependencyError: onnxruntime is not installed, or has no such provider; no GPU or
                no TensorRT.
        """
        options = BackendOptions(backend, provider, threads, exact, engine)
        if not isinstance(bundle, Bundle):
            bundle = Bundle.open(bundle, check_hashes=check_hashes)
        bundle.require_decoder()
        return cls(bundle, open_backend(bundle, options))

    @property
    def bundle(self) -> Bundle:
        """The bundle it runs."""
        return self._bundle

    @property
    def vocab_size(self) -> int:
        """Token ids lie below this."""
        return self._shape.vocab_size

    @property
    def context(self) -> int:
        """Most tokens of a row, prompt and continuation together."""
        return self._context

    @property
    def last_logits_only(self) -> bool:
        """Whether a run yields the logits of the last position alone."""
        return self._bundle.manifest.lowering.get("logits") == "last"

    @property
    def is_sparse_in_decoding(self) -> bool:
        """Whether a run of one token leaves out heads that a run of several has."""
        variant = self._bundle.manifest.lowering.get("variant")
        return bool(variant) and isinstance(parse_attention(str(variant)), HeadSparseRequest)

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a text, from generation_config.json or else config.json.

        Raises:
            BundleError: they are no token ids.
        """
        for name in (GENERATION_CONFIG, CONFIG):
            found = self._bundle.json(name).get("eos_token_id")
            if found is not None:
                return self._token_ids(found, name)
        return ()

    def _token_ids(self, found: object, name: str) -> tuple[int, ...]:
        ids = tuple(found) if isinstance(found, list) else (found,)
        if not all(type(i) is int and 0 <= i < self.vocab_size for i in ids):
            raise BundleError(
                expected=f"eos_token_id in {name} to be ids below {self.vocab_size}",
                came=f"it is {found!r}",
                todo="correct the checkpoint's file and export again",
            )
        return ids

    @cached_property
    def text(self) -> Text:
        """The bundle's tokenizer and chat template.

        Raises:
            BundleError: the bundle has no tokenizer, or one that does not load.
            MissingDependencyError: tokenizers is not installed.
        """
        return Text.open(self._bundle)

    def cache_bytes(self, state: State) -> int:
        """Memory of a state's cache in bytes."""
        return self._backend.cache_bytes(state._cache)

    def run(
        self,
        input_ids: ArrayLike,
        state: State | None = None,
        *,
        attention_mask: ArrayLike | None = None,
    ) -> Step:
        """Runs the model on new tokens.

        Args:
            input_ids: `[B, T]`, whole numbers, T >= 1; also a tensor with DLPack, as torch's.
            state: of the tokens before, from an earlier run of this session; it stays valid.
            attention_mask: `[B, T]`, 1 at tokens and 0 at padding, which must be on the right;
                None when there is none. Ids at padding count for nothing, logits there mean
                nothing.

        Raises:
            RuntimeInputError: a shape, type, id, mask or state that does not fit, more tokens than
                the context holds, or logits that are not finite.
        """
        ids = self._check_ids(input_ids)
        mask = None if attention_mask is None else check_mask(attention_mask, ids)
        self._check_vocabulary(ids, mask)
        self._check_state(state, ids)
        self._check_rows(mask, first=state is None)
        if mask is not None:
            # An id at padding may be a marker such as -100, which the embedding could not look up.
            ids = ids * mask
        past, cache = (0, None) if state is None else (state.length, state._cache)
        batch, length = ids.shape
        total = _join(state, mask, ids)
        layout = None if total is None else Layout.of_mask(total, length)
        logits, present = self._backend.run(ids, past, layout, cache)
        likeliest = _find_likeliest(logits, mask)
        return Step(logits, likeliest, State(self, total, present, batch, past + length))

    def _check_ids(self, input_ids: ArrayLike) -> NDArray[np.int64]:
        ids = whole_numbers("input_ids", input_ids)
        if ids.ndim != 2 or 0 in ids.shape:
            raise RuntimeInputError(
                expected="input_ids of shape [batch, length], both at least 1",
                came=f"the shape is {list(ids.shape)}",
                todo="put the token ids of each text into one row",
            )
        return ids

    def _check_vocabulary(self, ids: NDArray[np.int64], mask: NDArray[np.int64] | None) -> None:
        if ids.size == 1:  # a decode step: item() takes a tenth of the time
            smallest = largest = ids.item()
        else:
            smallest, largest = ids.min(), ids.max()
        if smallest >= 0 and largest < self.vocab_size:
            return
        wrong = (ids < 0) | (ids >= self.vocab_size)
        if mask is not None:
            wrong &= mask == 1
        if wrong.any():
            raise RuntimeInputError(
                expected=f"token ids from 0 to {self.vocab_size - 1}",
                came=f"there is {ids[wrong][0]}",
                todo="use the bundle's own tokenizer",
            )

    def _check_state(self, state: State | None, ids: NDArray[np.int64]) -> None:
        if state is not None and state._owner is not self:
            raise RuntimeInputError(
                expected="a state of this session",
                came="the state was made by another one",
                todo="run the earlier tokens with this session",
            )
        if state is not None and state.batch != len(ids):
            raise RuntimeInputError(
                expected=f"{state.batch} rows, as the state has",
                came=f"input_ids has {len(ids)}",
                todo="give every row a new token, or padding through attention_mask",
            )
        total = ids.shape[1] + (state.length if state else 0)
        if total > self.context:
            raise RuntimeInputError(
                expected=f"at most {self.context} tokens, the context of the bundle",
                came=f"there would be {total}",
                todo="give a shorter text, or export with a larger --context",
            )

    def _check_rows(self, mask: NDArray[np.int64] | None, *, first: bool) -> None:
        """Refuses padding that a run cannot take; `first` without a state."""
        if mask is None:
            return
        if first and not mask[:, 0].all():
            raise RuntimeInputError(
                expected="at least one token in every row",
                came=f"row {int(mask[:, 0].argmin())} is all padding",
                todo="leave that row out",
            )
        if self.last_logits_only and not mask[:, -1].all():
            raise RuntimeInputError(
                expected="rows of equal length for a bundle with logits of the last place only",
                came=f"row {int(mask[:, -1].argmin())} ends in padding",
                todo="run rows of one length together, or export with --logits all",
            )


def whole_numbers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    """The values as an array.

    Raises:
        RuntimeInputError: they are no whole numbers, or form no array.
    """
    if type(values) is np.ndarray and values.dtype == np.int64:
        return values
    array = as_array(name, values)
    if array.dtype.kind not in "iu":
        raise RuntimeInputError(
            expected=f"{name} as whole numbers in rows of one length",
            came=f"an array of {array.dtype} came",
            todo="pass an int64 array of shape [batch, length]",
        )
    return array.astype(np.int64, copy=False)


def _join(
    state: State | None, mask: NDArray[np.int64] | None, ids: NDArray[np.int64]
) -> NDArray[np.int64] | None:
    """The mask of all slots, past and new; None where none is padding."""
    past = None if state is None else state._mask
    if past is None and mask is None:
        return None
    new = np.ones(ids.shape, np.int64) if mask is None else mask
    if state is None:
        own: NDArray[np.int64] = new.copy()  # the caller may write into theirs
        return own
    old = np.ones((state.batch, state.length), np.int64) if past is None else past
    return np.concatenate((old, new), axis=1)


def check_mask(attention_mask: ArrayLike, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The mask of the new tokens, `[B, T]`.

    Raises:
        RuntimeInputError: it does not fit the ids, or is not ones, then zeros in each row.
    """
    mask = as_array("attention_mask", attention_mask)
    mask = whole_numbers("attention_mask", mask.view(np.uint8) if mask.dtype == np.bool_ else mask)
    if mask.shape != ids.shape:
        raise RuntimeInputError(
            expected=f"an attention_mask of shape {list(ids.shape)}, as input_ids has",
            came=f"its shape is {list(mask.shape)}",
            todo="mask the new tokens only; the state knows the earlier ones",
        )
    if not np.isin(mask, (0, 1)).all() or (np.diff(mask, axis=1) > 0).any():
        raise RuntimeInputError(
            expected="an attention_mask of ones, then zeros in each row",
            came="it holds other numbers or padding before a token",
            todo="pad on the right",
        )
    return mask


def _find_likeliest(
    logits: NDArray[np.float32], mask: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """The id of the largest logit at each place, `[B, T]`.

    One look at all logits serves two ends: the maximum is found at a NaN where there is one, at
    +inf where there is one, and is -inf where all are.

    Raises:
        RuntimeInputError: a maximum at a token is not finite.
    """
    found: NDArray[np.int64] = logits.argmax(axis=2)
    # item() and the standard library: a fifth of the time of numpy's indexing and isfinite
    if found.size == 1 and mask is None:
        sound = math.isfinite(logits.item(found.item()))
    else:
        rows = logits.reshape(-1, logits.shape[2])
        largest: Iterable[float] = map(rows.item, range(len(rows)), found.ravel().tolist())
        if mask is not None and logits.shape[1] == mask.shape[1]:
            largest = itertools.compress(largest, mask.ravel().tolist())
        sound = all(map(math.isfinite, largest))
    if not sound:
        raise RuntimeInputError(
            expected="finite logits",
            came="the model returned NaN or infinity",
            todo="run `edgeattn verify` on the bundle; fp16 may be too narrow for this model",
        )
    return found

"""Runs a graph that writes its KV cache in place (lowering `kv_cache = "shared-buffer"`).

ONNX Runtime's GroupQueryAttention appends keys where past and present are one buffer, so a decode
step costs no copy of the cache. States stay immutable all the same, as slices of an append-only
array do: the newest state of a buffer appends to it, any older one gets a copy first.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PAST, PRESENT = "past_key_values.", "present."
TOKENS = ("input_ids", "position_ids")
_ROOM, _ROUND = 64, 16
_NUMPY_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@dataclass(frozen=True, eq=False)
class Prefix:
    """The cache of one state: the first `places` places of a buffer.

    Each row's valid keys lie at the front of its places.
    """

    buffer: _Buffer = field(repr=False)
    places: int

    @property
    def nbytes(self) -> int:
        """Memory of the whole buffer."""
        return sum(array.nbytes for array in self.buffer.arrays.values())

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Keys and values by name of the graph's output, each `[B, Hkv, places, D]`, as views."""
        arrays = self.buffer.arrays.items()
        return {PRESENT + name[len(PAST) :]: array[:, :, : self.places] for name, array in arrays}


class _Buffer:
    """Keys and values of all layers, `[B, Hkv, capacity, D]`, bound to the session once."""

    def __init__(self, session: InferenceSession, arrays: dict[str, NDArray[Any]]) -> None:
        from onnxruntime import OrtValue

        self.arrays = arrays
        self.lock = threading.Lock()
        self.newest: Prefix | None = None
        # Tokens and logits `[B, 1, …]` of decode steps, while they are bound.
        self.step: dict[str, NDArray[Any]] | None = None
        self.binding = session.io_binding()
        # The values read and write the arrays in place and do not keep them alive.
        self._values = {name: OrtValue.ortvalue_from_numpy(a) for name, a in arrays.items()}
        for name, value in self._values.items():
            self.binding.bind_ortvalue_input(name, value)
            self.binding.bind_ortvalue_output(PRESENT + name[len(PAST) :], value)

    @property
    def capacity(self) -> int:
        return int(next(iter(self.arrays.values())).shape[2])


class InPlaceRunner:
    """Feeds a session and hands its cache on.

    Args:
        session: of a graph with GroupQueryAttention.
        context: most places a row can need.
        others: outputs to return beside the logits.
    """

    def __init__(self, session: InferenceSession, context: int, others: Sequence[str] = ()) -> None:
        self._session, self._context, self._others = session, context, list(others)
        self._past = {i.name: i for i in session.get_inputs() if i.name.startswith(PAST)}
        self._logits = next(o for o in session.get_outputs() if o.name == "logits")

    def run(
        self, feeds: Mapping[str, NDArray[np.int64]], cache: Prefix | None
    ) -> tuple[dict[str, NDArray[Any]], Prefix]:
        """One step.

        Several rows that have a past take their tokens one by one, as the operator demands.

        Args:
            feeds: input_ids and position_ids `[B, T]`, attention_mask `[B, P + T]`.
            cache: what the step before returned, None for an empty one.

        Returns:
            The outputs by name, and the cache to go on with.
        """
        batch, length = feeds["input_ids"].shape
        if cache is None or batch == 1 or length == 1:
            return self._run(feeds, cache)
        steps = []
        for i in range(length):
            new, seen = slice(i, i + 1), cache.places + 1
            one = {name: feeds[name][:, new] for name in ("input_ids", "position_ids")}
            one["attention_mask"] = feeds["attention_mask"][:, :seen]
            outputs, cache = self._run(one, cache)
            steps.append(outputs)
        joined = {name: np.concatenate([s[name] for s in steps], axis=1) for name in steps[0]}
        return joined, cache

    def _run(
        self, feeds: Mapping[str, NDArray[np.int64]], cache: Prefix | None
    ) -> tuple[dict[str, NDArray[Any]], Prefix]:
        mask = feeds["attention_mask"]
        if cache is not None and not mask[:, -1].all():
            # A row without a new token gets one all the same, behind its last: the row's next
            # token overwrites it. Otherwise it would overwrite the last.
            mask = mask.copy()
            mask[:, -1] = 1
        claimed = self._claim(cache, *mask.shape)
        buffer, (batch, length) = claimed.buffer, feeds["input_ids"].shape
        buffer.binding.bind_cpu_input("attention_mask", np.ascontiguousarray(mask, np.int64))
        for name in self._others:
            buffer.binding.bind_output(name)
        if length > 1:
            self._bind_tokens(buffer, feeds)
        elif buffer.step is None:
            buffer.step = self._bind_step(buffer, batch)
        if buffer.step is not None:
            for name in TOKENS:
                buffer.step[name][...] = feeds[name]
        self._session.run_with_iobinding(buffer.binding)
        return self._outputs(buffer), claimed

    def _bind_tokens(self, buffer: _Buffer, feeds: Mapping[str, NDArray[np.int64]]) -> None:
        """Binds tokens, and logits to memory of ONNX Runtime, which it uses again.

        In fresh memory of ours each page would cost a fault, a tenth of a prefill.
        """
        buffer.step = None
        for name in TOKENS:
            buffer.binding.bind_cpu_input(name, np.ascontiguousarray(feeds[name], np.int64))
        buffer.binding.bind_output("logits")

    def _bind_step(self, buffer: _Buffer, batch: int) -> dict[str, NDArray[Any]]:
        """Binds arrays that all decode steps fill and read."""
        from onnxruntime import OrtValue

        step: dict[str, NDArray[Any]] = {name: np.zeros((batch, 1), np.int64) for name in TOKENS}
        for name, array in step.items():
            buffer.binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        size = (batch, 1, self._logits.shape[2])
        step["logits"] = np.zeros(size, _NUMPY_DTYPES[self._logits.type])
        value = OrtValue.ortvalue_from_numpy(step["logits"])
        buffer.binding.bind_ortvalue_output("logits", value)
        return step

    def _outputs(self, buffer: _Buffer) -> dict[str, NDArray[Any]]:
        names = self._others if buffer.step else [*self._others, "logits"]
        outputs = {}
        if names:
            # They come in the order they were bound first: the cache, the others, the logits.
            values = buffer.binding.get_outputs_as_ortvaluevector()
            for place, name in enumerate(names, start=len(self._past)):
                outputs[name] = np.from_dlpack(values[place])
        if buffer.step:
            outputs["logits"] = buffer.step["logits"].copy()
        return outputs

    def _claim(self, cache: Prefix | None, batch: int, places: int) -> Prefix:
        """A prefix of `places` that holds what `cache` holds and that no other state will write."""
        if cache is not None:
            with cache.buffer.lock:
                if cache.buffer.newest is cache and places <= cache.buffer.capacity:
                    cache.buffer.newest = Prefix(cache.buffer, places)
                    return cache.buffer.newest
        buffer = self._allocate(batch, places)
        if cache is not None:
            for name, array in cache.buffer.arrays.items():
                buffer.arrays[name][:, :, : cache.places] = array[:, :, : cache.places]
        buffer.newest = Prefix(buffer, places)
        return buffer.newest

    def _allocate(self, batch: int, places: int) -> _Buffer:
        """A buffer with room to grow by half, so that copying stays a small part.

        Not by doubling: heads that lie a power of two apart compete for the same cache lines.
        """
        roomy = -(-(places * 3 // 2 + _ROOM) // _ROUND) * _ROUND
        capacity = max(places, min(roomy, self._context))
        arrays = {
            name: np.zeros((batch, i.shape[1], capacity, i.shape[3]), _NUMPY_DTYPES[i.type])
            for name, i in self._past.items()
        }
        return _Buffer(self._session, arrays)

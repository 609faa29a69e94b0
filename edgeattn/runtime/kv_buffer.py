"""Buffers for keys and values that a graph writes in place, and the states that lie in them.

Where past and present are one buffer, a decode step costs no copy of the cache. States stay
immutable all the same, as slices of an append-only array do: the newest state of a buffer appends
to it, any older one gets a copy first.
"""

from __future__ import annotations

import math
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding

PAST, PRESENT = "past_key_values.", "present."
# Results that a loop holds at once: the last, and the one it is replaced by.
_SLOTS = 2
NUMPY_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}


def empty_shape(declared: Sequence[object], batch: int) -> list[int]:
    """The shape of a state before the first token.

    Args:
        declared: the graph input's: rows first, then numbers, and a name where places are counted.
        batch: rows.
    """
    return [batch, *(size if isinstance(size, int) else 0 for size in declared[1:])]


@dataclass(eq=False)
class Prefix:
    """The cache of one state: the first `places` places of a buffer.

    Which of them hold a row's keys is the graph's to say: those the attention mask shows in a
    static cache, those at the front where it has GroupQueryAttention.
    """

    buffer: Buffer = field(repr=False)
    places: int

    @property
    def nbytes(self) -> int:
        """Memory of the whole buffer."""
        return sum(array.nbytes for array in self.buffer.arrays.values())

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Keys and values by name of the graph's output, each `[B, Hkv, places, D]`, as views."""
        arrays = self.buffer.arrays.items()
        return {PRESENT + name[len(PAST) :]: array[:, :, : self.places] for name, array in arrays}


class Results:
    """An output's memory: the same for each run, and other memory where a result is still held.

    Fresh memory each time would be taken from the system and given back, and a copy of the logits
    costs as much.

    Args:
        binding: of the session.
        name: of the output.
        shape: of the output.
        dtype: of the output.
    """

    def __init__(
        self, binding: IOBinding, name: str, shape: tuple[int, ...], dtype: type[np.generic]
    ) -> None:
        self._binding, self._name, self._shape, self._dtype = binding, name, shape, dtype
        self._slots: list[_Slot] = []
        self._bound: _Slot | None = None

    def bind(self) -> None:
        """Binds memory that nobody reads, before a run."""
        for slot in self._slots:
            if not slot.is_read():
                break
        else:
            slot = _Slot(self._shape, self._dtype)
            self._slots = [*self._slots, slot][-_SLOTS:]
        if slot is not self._bound:
            self._binding.bind_ortvalue_output(self._name, slot.value)
            self._bound = slot

    def take(self) -> NDArray[Any]:
        """What the run wrote; it stays as it is as long as somebody holds it or a view of it."""
        assert self._bound is not None
        return self._bound.memory.reshape(self._shape)


class _Slot:
    def __init__(self, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        from onnxruntime import OrtValue

        self.memory = np.empty(math.prod(shape), dtype)
        self.value = OrtValue.ortvalue_from_numpy(self.memory.reshape(shape))
        self._references = sys.getrefcount(self.memory)

    def is_read(self) -> bool:
        """Whether somebody holds a view: numpy's views refer to the array that owns the memory.

        Counting references costs a step a tenth of what a weak one to a fresh array does.
        """
        return sys.getrefcount(self.memory) > self._references


@dataclass(frozen=True)
class DecodeStep:
    """What is bound for runs of one token.

    Attributes:
        inputs: arrays by name, which each run fills.
        logits: what each run writes.
    """

    inputs: Mapping[str, NDArray[Any]]
    logits: Results


class Buffer:
    """Keys and values of all layers, `[B, Hkv, capacity, D]`, bound to the session once."""

    def __init__(self, session: InferenceSession, arrays: dict[str, NDArray[Any]]) -> None:
        from onnxruntime import OrtValue

        self.arrays = arrays
        self.capacity: int = next(iter(arrays.values())).shape[2]  # places of a row
        self.lock = threading.Lock()
        # Weak, so that a buffer goes with its last state and not when cycles are searched for.
        self._newest: weakref.ref[Prefix] | None = None
        self.step: DecodeStep | None = None  # while its arrays are bound
        self.binding = session.io_binding()
        # The values read and write the arrays in place and do not keep them alive.
        self._values = {name: OrtValue.ortvalue_from_numpy(a) for name, a in arrays.items()}
        for name, value in self._values.items():
            self.binding.bind_ortvalue_input(name, value)
            self.binding.bind_ortvalue_output(PRESENT + name[len(PAST) :], value)

    def is_newest(self, state: Prefix) -> bool:
        """Whether no later state was made of this buffer."""
        return self._newest is not None and self._newest() is state

    def prefix(self, places: int) -> Prefix:
        """The first `places` places, as the newest state."""
        state = Prefix(self, places)
        self._newest = weakref.ref(state)
        return state


class Buffers:
    """Makes the buffers of a session, larger ones as a text grows.

    Args:
        session: of a graph whose past and present may be one buffer of any capacity.
        capacity_for: places to make room for when so many are needed.
        committed: the memory of a buffer is taken at once, not page by page as places are filled.
    """

    def __init__(
        self,
        session: InferenceSession,
        capacity_for: Callable[[int], int],
        *,
        committed: bool = False,
    ) -> None:
        self._session, self._capacity_for, self._committed = session, capacity_for, committed
        self.past = {i.name: i for i in session.get_inputs() if i.name.startswith(PAST)}

    def claim(self, cache: Prefix | None, batch: int, places: int) -> Prefix:
        """A prefix of `places` that holds what `cache` holds and that no other state will write."""
        if cache is not None:
            with cache.buffer.lock:
                if cache.buffer.is_newest(cache) and places <= cache.buffer.capacity:
                    return cache.buffer.prefix(places)
        buffer = self._allocate(batch, self._capacity_for(places))
        if cache is not None:
            for name, array in cache.buffer.arrays.items():
                buffer.arrays[name][:, :, : cache.places] = array[:, :, : cache.places]
        return buffer.prefix(places)

    def _allocate(self, batch: int, capacity: int) -> Buffer:
        arrays = {
            name: np.zeros((batch, i.shape[1], capacity, i.shape[3]), NUMPY_DTYPES[i.type])
            for name, i in self.past.items()
        }
        if self._committed:
            for array in arrays.values():
                array.fill(0)
        return Buffer(self._session, arrays)

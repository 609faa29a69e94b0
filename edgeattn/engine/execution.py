"""Runs an engine: a decoder in TensorRT on this machine's GPU, its KV cache kept there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeattn.bundle.bundle import Bundle
from edgeattn.engine.cuda import Memory
from edgeattn.engine.loaded import LoadedEngine, Shape
from edgeattn.engine.record import Engine
from edgeattn.errors import LoweringError, RuntimeInputError

_PAST, _PRESENT = "past_key_values.", "present."


@dataclass(eq=False)
class DeviceCache:
    """Keys and values on the GPU.

    A step takes a cache and gives the next one. A growing cache that was taken lends its memory to
    the step after, a static one is written in place: either is good for one step.

    Attributes:
        shapes: `[B, Hkv, S, D]` by name of the graph's input.
        places: slots in use, padding included.
        taken: whether a step has it already.
    """

    buffers: dict[str, Memory]
    spare: dict[str, Memory]
    shapes: dict[str, Shape]
    places: int
    taken: bool = False

    @property
    def nbytes(self) -> int:
        """Memory on the GPU, with what the next step writes into."""
        every = {id(m): m.nbytes for held in (self.buffers, self.spare) for m in held.values()}
        return sum(every.values())


class EngineRunner(LoadedEngine):
    """An engine of a decoder; see `LoadedEngine`."""

    def __init__(self, engine: Engine, bundle: Bundle) -> None:
        super().__init__(engine, bundle)
        self._past = [name for name in self._inputs if name.startswith(_PAST)]
        # of a static cache the slots are a number in the graph
        keys = [name for name in self._past if name.endswith((".key", ".value"))]
        slots = int(tuple(self._engine.get_tensor_shape(keys[0]))[2]) if keys else -1
        self._capacity = slots if slots >= 0 else None

    def run(
        self,
        input_ids: NDArray[np.int64],
        attention_mask: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        cache: DeviceCache | None = None,
    ) -> tuple[NDArray[np.float32], DeviceCache]:
        """One step of the decoder.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, P + T]`, 1 at tokens.
            position_ids: `[B, T]`.
            cache: what the step before returned, or None for an empty one.

        Returns:
            Logits `[B, T, V]` (`[B, 1, V]` when the graph keeps the last only) and the new cache.

        Raises:
            LoweringError: the engine was built for other sizes.
            RuntimeInputError: the GPU fails, for one out of memory, or the cache was taken.
        """
        batch, length = input_ids.shape
        feeds = {"input_ids": input_ids, "position_ids": position_ids}
        feeds.update(self._places(attention_mask, length))
        with self._gpu.current():
            past = self._empty_cache(batch) if cache is None else cache
            if past.taken:
                raise RuntimeInputError(
                    expected="the newest cache of an engine",
                    came="this one was given to a step before, which has its memory",
                    todo="run the tokens again from the beginning",
                )
            shapes = {n: a.shape for n, a in feeds.items()} | past.shapes
            self._choose_profile(shapes, of="input_ids")  # decoding has its own
            alive = [self._feed(name, array) for name, array in feeds.items()]
            for name in self._past:
                self._set_shape(name, past.shapes[name])
                self._bind(name, past.buffers[name])
            present = self._present(past, attention_mask.shape[1])
            logits = self._output("logits")
            past.taken = True
            self._execute()
            del alive
            return self._download("logits", *logits), present

    def read(self, cache: DeviceCache, name: str) -> NDArray[np.float32]:
        """Keys or values `[B, Hkv, P, D]` of a cache, or a state, by name of the graph's output."""
        past = _PAST + name.removeprefix(_PRESENT)
        array = np.empty(cache.shapes[past], self._dtypes[past])
        with self._gpu.current():
            self._gpu.download(array, cache.buffers[past])
        found = self._to_float32(past, array)
        return found[:, :, : cache.places] if name.endswith((".key", ".value")) else found

    @property
    def cache_names(self) -> tuple[str, ...]:
        """The graph's outputs that are keys and values."""
        return tuple(_PRESENT + name.removeprefix(_PAST) for name in self._past)

    def _places(self, mask: NDArray[np.int64], length: int) -> dict[str, NDArray[np.int64]]:
        """The inputs that say where keys lie: of a static cache all slots, and the first new."""
        batch, places = mask.shape
        if self._capacity is None:
            return {"attention_mask": mask}
        if places > self._capacity:
            raise LoweringError(
                expected=f"at most {self._capacity} tokens in the static cache of {self._name}",
                came=f"there are {places}",
                todo="give fewer, or export with a larger --context",
            )
        slots = np.zeros((batch, self._capacity), np.int64)
        slots[:, :places] = mask
        return {"attention_mask": slots, "write_indices": np.full(batch, places - length)}

    def _empty_cache(self, batch: int) -> DeviceCache:
        buffers: dict[str, Memory] = {}
        shapes: dict[str, Shape] = {}
        for name in self._past:
            declared = tuple(self._engine.get_tensor_shape(name))
            shapes[name] = (batch, *(max(size, 0) for size in declared[1:]))  # -1 counts places
            buffers[name] = self._gpu.allocate(self._nbytes(name, shapes[name]))
            # a masked slot counts nothing, unless it holds a NaN; a state begins with zeros
            self._gpu.clear(buffers[name])
        return DeviceCache(buffers, {}, shapes, 0)

    def _present(self, past: DeviceCache, places: int) -> DeviceCache:
        """Binds memory for the cache after this step."""
        if self._capacity is not None:
            for name in self._past:
                self._bind(_PRESENT + name.removeprefix(_PAST), past.buffers[name])
            return DeviceCache(past.buffers, {}, past.shapes, places)
        buffers, shapes = {}, {}
        for name in self._past:
            output = _PRESENT + name.removeprefix(_PAST)
            shapes[name] = tuple(self._context.get_tensor_shape(output))
            buffers[name] = self._grown(past.spare.get(name), self._nbytes(output, shapes[name]))
            self._bind(output, buffers[name])
        return DeviceCache(buffers, past.buffers, shapes, places)

    def _grown(self, memory: Memory | None, nbytes: int) -> Memory:
        """Likewise, with room to grow by half, so that few steps need more."""
        room = nbytes + nbytes // 2
        return memory if memory and memory.nbytes >= nbytes else self._gpu.allocate(room)

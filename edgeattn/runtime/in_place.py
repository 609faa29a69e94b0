"""Runs graphs that write their KV cache in place, in ONNX Runtime.

Two kinds of graph do: those with GroupQueryAttention (lowering `kv_cache = "shared-buffer"`), and
those with a static cache, which TensorScatter writes (`kv_cache = "static"`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeattn.runtime.arrays import of_value
from edgeattn.runtime.kv_buffer import (
    NUMPY_DTYPES,
    PAST,
    PRESENT,
    Buffer,
    Buffers,
    DecodeStep,
    Prefix,
    Results,
)
from edgeattn.runtime.layout import Layout

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

TOKENS = ("input_ids", "position_ids")
# Room beyond what GroupQueryAttention needs at once, and what capacities are multiples of.
_ROOM, _ROUND = 64, 16
# Slots that a static cache grows by.
_BUCKET = 128


class InPlaceRunner(ABC):
    """Feeds a session and hands its cache on.

    Args:
        session: of a graph that writes its cache in place.
        context: most places a row can need.
        others: outputs to return beside the logits.
    """

    _committed = False

    def __init__(self, session: InferenceSession, context: int, others: Sequence[str] = ()) -> None:
        self._session, self._context, self._others = session, context, list(others)
        self._buffers = Buffers(session, self._capacity_for, committed=self._committed)
        self._logits = next(o for o in session.get_outputs() if o.name == "logits")

    def run(
        self,
        input_ids: NDArray[np.int64],
        cache: Prefix | None,
        layout: Layout | None = None,
    ) -> tuple[dict[str, NDArray[Any]], Prefix]:
        """One step.

        Args:
            input_ids: `[B, T]`.
            cache: what the step before returned, None for an empty one.
            layout: of the tokens; None where no padding is among them or those before.

        Returns:
            The outputs by name, and the cache to go on with.
        """
        batch, length = input_ids.shape
        places = length if cache is None else cache.places + length
        claimed = self._buffers.claim(cache, batch, places)
        buffer = claimed.buffer
        for name in self._others:
            buffer.binding.bind_output(name)
        if length > 1:
            buffer.step = None
            inputs: Mapping[str, NDArray[Any]] = self._bind_inputs(buffer, batch, length, places)
            # Memory of ONNX Runtime, which it uses again: in fresh memory of ours each page would
            # cost a fault, a tenth of a prefill.
            buffer.binding.bind_output("logits")
        else:
            if buffer.step is None:
                buffer.step = self._bind_step(buffer, batch)
            inputs = buffer.step.inputs
            buffer.step.logits.bind()
        self._fill(inputs, input_ids, places, layout)
        self._session.run_with_iobinding(buffer.binding)
        return self._outputs(buffer), claimed

    @abstractmethod
    def _capacity_for(self, places: int) -> int:
        """The capacity of a new buffer that must hold `places`."""

    @abstractmethod
    def _shapes(
        self, batch: int, length: int, places: int, capacity: int
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of the inputs that say where keys lie, for T = `length` new tokens.

        Those of one token hold for every later one: its inputs are bound once.
        """

    def _fill(
        self,
        inputs: Mapping[str, NDArray[Any]],
        input_ids: NDArray[np.int64],
        places: int,
        layout: Layout | None,
    ) -> None:
        """Writes into the bound inputs, of which the mask behind `places` stays 0."""
        length = input_ids.shape[1]
        inputs["input_ids"][...] = input_ids
        mask = inputs["attention_mask"][:, :places]
        if layout is None:
            mask.fill(1)
            if length == 1:
                inputs["position_ids"].fill(places - 1)
            else:
                inputs["position_ids"][...] = np.arange(places - length, places)
        else:
            inputs["position_ids"][...] = layout.position_ids
            mask[...] = layout.attention_mask

    def _bind_inputs(
        self, buffer: Buffer, batch: int, length: int, places: int
    ) -> dict[str, NDArray[Any]]:
        """Binds arrays of zeros, which the binding keeps alive."""
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(TOKENS, (batch, length))
        shapes |= self._shapes(batch, length, places, buffer.capacity)
        inputs = {name: np.zeros(shape, np.int64) for name, shape in shapes.items()}
        for name, array in inputs.items():
            buffer.binding.bind_cpu_input(name, array)
        return inputs

    def _bind_step(self, buffer: Buffer, batch: int) -> DecodeStep:
        """Binds arrays that all decode steps fill and read."""
        size, dtype = (batch, 1, self._logits.shape[2]), NUMPY_DTYPES[self._logits.type]
        logits = Results(buffer.binding, "logits", size, dtype)
        return DecodeStep(self._bind_inputs(buffer, batch, 1, 1), logits)

    def _outputs(self, buffer: Buffer) -> dict[str, NDArray[Any]]:
        outputs = {"logits": buffer.step.logits.take()} if buffer.step else {}
        names = self._others if buffer.step else [*self._others, "logits"]
        if names:
            # They come in the order they were bound first: the cache, the others, the logits.
            values = buffer.binding.get_outputs_as_ortvaluevector()
            for place, name in enumerate(names, start=len(buffer.arrays)):
                outputs[name] = of_value(values[place])
        return outputs


class GroupQueryRunner(InPlaceRunner):
    """For a graph with GroupQueryAttention, whose rows' valid keys lie at the front."""

    def run(
        self,
        input_ids: NDArray[np.int64],
        cache: Prefix | None,
        layout: Layout | None = None,
    ) -> tuple[dict[str, NDArray[Any]], Prefix]:
        """As `InPlaceRunner.run`.

        Several rows that have a past take their tokens one by one, as the operator demands.
        """
        batch, length = input_ids.shape
        if cache is None or batch == 1 or length == 1:
            return super().run(input_ids, cache, layout)
        steps, one = [], layout
        for i in range(length):
            new, seen = slice(i, i + 1), cache.places + 1
            if layout is not None:
                one = Layout(layout.attention_mask[:, :seen], layout.position_ids[:, new])
            outputs, cache = super().run(input_ids[:, new], cache, one)
            steps.append(outputs)
        joined = {name: np.concatenate([s[name] for s in steps], axis=1) for name in steps[0]}
        return joined, cache

    def _capacity_for(self, places: int) -> int:
        """Room to grow by half, so that copying stays a small part.

        Not by doubling: heads that lie a power of two apart compete for the same cache lines.
        """
        roomy = -(-(places * 3 // 2 + _ROOM) // _ROUND) * _ROUND
        return max(places, min(roomy, self._context))

    def _shapes(
        self, batch: int, length: int, places: int, capacity: int
    ) -> dict[str, tuple[int, ...]]:
        # The operator counts a row's ones. The width it only compares with `length`, to tell a
        # prompt without a past.
        return {"attention_mask": (batch, capacity if length == 1 else places)}

    def _fill(
        self,
        inputs: Mapping[str, NDArray[Any]],
        input_ids: NDArray[np.int64],
        places: int,
        layout: Layout | None,
    ) -> None:
        super()._fill(inputs, input_ids, places, layout)
        length = input_ids.shape[1]
        if layout is not None and places > length:
            # The operator takes every new place for a token. A row's next token overwrites what is
            # padding here, whose place it would else seek among the row's own.
            inputs["attention_mask"][:, places - length : places] = 1


class StaticCacheRunner(InPlaceRunner):
    """For a graph with a static cache, of a capacity that `free_capacity` made a symbol.

    ONNX Runtime's attention reads every slot, valid or not, so that a step costs what the capacity
    costs: buffers are as large as the text needs, in steps of `_BUCKET`, up to the context. Their
    memory is taken at once: no step in between takes more.
    """

    _committed = True

    def _capacity_for(self, places: int) -> int:
        return max(places, min(-(-places // _BUCKET) * _BUCKET, self._context))

    def _shapes(
        self, batch: int, length: int, places: int, capacity: int
    ) -> dict[str, tuple[int, ...]]:
        return {"attention_mask": (batch, capacity), "write_indices": (batch,)}

    def _fill(
        self,
        inputs: Mapping[str, NDArray[Any]],
        input_ids: NDArray[np.int64],
        places: int,
        layout: Layout | None,
    ) -> None:
        super()._fill(inputs, input_ids, places, layout)
        inputs["write_indices"][:] = places - input_ids.shape[1]


def runner_for(kv_cache: object) -> type[InPlaceRunner] | None:
    """What runs a graph of this cache (`Lowering.kv_cache`) in place, None where nothing does."""
    if kv_cache == "static":
        return StaticCacheRunner
    return GroupQueryRunner if kv_cache == "shared-buffer" else None


def free_capacity(proto: ModelProto) -> None:
    """Makes the capacity of a static cache a symbol, so that a buffer may have any.

    Only inputs and outputs name the number; inside, the graph reads it from them.
    """
    for value in (*proto.graph.input, *proto.graph.output):
        dimensions = value.type.tensor_type.shape.dim
        if value.name == "attention_mask":
            dimensions[1].dim_param = "capacity"
        elif value.name.startswith((PAST, PRESENT)):
            dimensions[2].dim_param = "capacity"

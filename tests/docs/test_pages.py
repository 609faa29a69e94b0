"""Every target, operator, error and command has its place on a page, and what pages show exists."""

from __future__ import annotations

import ast
import importlib
import platform
import re
import subprocess
from pathlib import Path
from types import ModuleType

import click
import pytest
from command_lines import calls, dry_run, shell_blocks

from edgeattn import errors
from edgeattn.cli import VERBS, main
from edgeattn.devices.registry import all_devices, device_names, load_registry, parse_target
from edgeattn.engine.toolchain import find_compiler
from edgeattn.errors import MissingDependencyError, UsageError
from edgeattn.ops import ALL_OPS
from edgeattn.planner.lowering import plan_lowering
from edgeattn.recipe import Recipe

HAND = ("tour", "concepts", "embedding")


@pytest.fixture(scope="module")
def all_pages(pages: dict[str, str], repository: Path) -> dict[str, str]:
    """Generated pages, and those written by hand."""
    hand = {f"{name}.md": (repository / "docs" / f"{name}.md").read_text("utf-8") for name in HAND}
    assert {file.name for file in (repository / "docs").glob("*.md")} == set(hand)
    return pages | hand


def section(page: str, title: str) -> str:
    """What stands under a heading of level two."""
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def test_the_commands_of_all_pages_exist(all_pages: dict[str, str]) -> None:
    count = 0
    for text in all_pages.values():
        for words in calls(shell_blocks(text)):
            dry_run(words)
            count += 1
    assert count > 200


def test_a_page_that_rots_is_found() -> None:
    page = "```sh\npip install edgeattn\nedgeattn build bundle --onn user@device\n```"
    (words,) = calls(shell_blocks(page))
    with pytest.raises(click.UsageError):
        dry_run(words)
    with pytest.raises(UsageError):
        dry_run(["export", "m", "--target", "t4@jetpack6.2"])


def test_every_target_has_its_page(pages: dict[str, str]) -> None:
    paths = {path for path in pages if path.startswith("targets/") and path != "targets/index.md"}
    assert paths == {f"targets/{name}.md" for name in device_names()}
    for device in all_devices():
        page = pages[f"targets/{device.name}.md"]
        assert f"({device.name}.md)" in pages["targets/index.md"]
        assert all(f"`{alias}`" in page for alias in device.aliases)
        assert device.memory is None or f"bandwidth_gb_s {device.memory.bandwidth_gb_s:g}" in page
        assert device.software.source in page
        assert all(software in page for software in device.software.allowed)


@pytest.mark.parametrize("name", device_names())
def test_what_a_target_page_exports_can_run_there(pages: dict[str, str], name: str) -> None:
    lowered = 0
    for words in calls(shell_blocks(pages[f"targets/{name}.md"])):
        given = dry_run(words).params
        if words[0] == "export":
            target = parse_target(given["target"])
            plan_lowering(Recipe(given["target"], quant=given["quant"] or "none"), target)
            lowered += 1
    assert lowered == 2 + len(parse_target(name).device.software.allowed)


def test_a_target_page_builds_as_the_builder_allows(pages: dict[str, str]) -> None:
    # by hand, from the README: what TensorRT-RTX builds for, though TensorRT is the device's own
    elsewhere = {"t4", "a100", "a10", "l4", "l40s", "dgx-spark"}
    for name in device_names():
        built = [line for line in calls(shell_blocks(pages[f"targets/{name}.md"]))
                 if line[0] == "build"]  # fmt: skip
        assert any("tensorrt-rtx" in words for words in built) == (name in elsewhere), name
        assert any("--on" in words for words in built) == (
            parse_target(name).flavour == "tensorrt"
        ), name


def test_a_new_target_is_one_file(generator: ModuleType, repository: Path, tmp_path: Path) -> None:
    text = (repository / "devices" / "l4.toml").read_text("utf-8")
    text = text.replace('name = "l4"', 'name = "l5"').replace('"sm89"', '"sm89x"')
    (tmp_path / "l5.toml").write_text(text.replace("bandwidth_gb_s = 300", "bandwidth_gb_s = 311"))
    page = generator.docs_targets.page(load_registry(tmp_path).parse_target("l5"))
    assert "# l5\n" in page
    assert "bandwidth_gb_s 311" in page
    assert "edgeattn export ./SmolLM2-135M --target l5 -o bundle\n" in page


@pytest.mark.parametrize("spec", ALL_OPS, ids=lambda spec: spec.name)
def test_every_operator_is_there(pages: dict[str, str], spec) -> None:
    text = section(pages["operators.md"], spec.name)
    for tensor in (*spec.inputs, *spec.outputs):
        assert f"<code>{tensor.name}</code> | <code>[{', '.join(map(str, tensor.shape))}]" in text
    for attribute in spec.attributes:
        assert f"<code>{attribute.name}</code> | {attribute.type}" in text
    formula = next(line for line in spec.meaning.splitlines() if line.startswith("    "))
    assert formula in text
    assert "https://arxiv.org/abs/" in text.partition("**Sources**")[2]


def error_classes_in_code(repository: Path) -> set[str]:
    """By the source: every class of the package below EdgeattnError, wherever it stands."""
    bases: dict[str, list[str]] = {}
    for folder in ("edgeattn", "exporters", "kernels", "devices"):
        for file in (repository / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.ClassDef):
                    bases[node.name] = [ast.unparse(base).split(".")[-1] for base in node.bases]
    found = {"EdgeattnError"}
    while more := {name for name, below in bases.items() if found & set(below)} - found:
        found |= more
    return found


def test_every_error_is_in_the_catalogue(pages: dict[str, str], repository: Path) -> None:
    names = error_classes_in_code(repository)
    assert len(names) >= 9
    assert set(re.findall(r"^## (\w+Error)$", pages["errors.md"], re.MULTILINE)) == names
    for name in names - {"EdgeattnError"}:
        text = section(pages["errors.md"], name)
        assert f"**Exit code** {getattr(errors, name).exit_code}." in text
        advice = text.partition("**What to do** ")[2].partition("\n")[0]
        assert len(advice) > 30
        assert advice.endswith(".")


def test_python_c_and_cpp_agree(
    generator: ModuleType, pages: dict[str, str], repository: Path
) -> None:
    include = repository / "plugins" / "include" / "edgeattn"
    codes = generator.docs_reference.cpp_codes((include / "error.hpp").read_text("utf-8"))
    (enum,) = re.findall(
        r"enum edgeattn_code\n\{(.*?)\}", (include / "edgeattn.h").read_text(), re.S
    )
    in_c = re.findall(r"EDGEATTN_([A-Z_]+) = (\d+)", enum)
    in_cpp = [("OK", "0")]
    in_cpp += [(re.sub(r"(?<!^)(?=[A-Z])", "_", k).upper(), str(n)) for k, (n, _) in codes.items()]
    assert in_c == in_cpp
    # Each but the internal one is an error of Python, and the catalogue says so.
    for name, (number, told) in codes.items():
        if name != "Internal":
            kind = told.partition(":")[0]
            assert kind.startswith(name)
            assert issubclass(getattr(errors, kind), errors.EdgeattnError)
            assert f"**In C++** `k{name}` ({number})" in section(pages["errors.md"], kind)
    assert "**In C++** –" in section(pages["errors.md"], "ProofError")


def test_every_command_and_option_is_there(pages: dict[str, str]) -> None:
    assert set(VERBS) <= set(re.findall(r"^## edgeattn ([a-z]+)", pages["commands.md"], re.M))
    for verb in VERBS:
        command = main.get_command(click.Context(main), verb)
        assert command is not None
        text = section(pages["commands.md"], f"edgeattn {verb}")
        for option in command.params:
            if isinstance(option, click.Option):
                assert f"<code>{', '.join(sorted(option.opts, key=len))}" in text, option.name
        assert "edgeattn " in text.rpartition("```sh\n")[2]


def test_the_table_of_names_is_the_one_of_contributing(generator: ModuleType) -> None:
    rows = generator.names().splitlines()
    assert rows[0] == "| word | meaning | not |"
    assert any("`group_size`" in row for row in rows)
    assert all(row.startswith("|") for row in rows)


def test_python_on_the_pages_compiles_and_imports_what_exists(all_pages: dict[str, str]) -> None:
    for name in (*(f"{page}.md" for page in HAND), "index.md"):
        for block in re.findall(r"```python\n(.*?)```", all_pages[name], re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("edgeattn"):
                    module = importlib.import_module(str(node.module))
                    assert [one.name for one in node.names if not hasattr(module, one.name)] == []


def test_the_cpp_program_compiles(
    all_pages: dict[str, str], repository: Path, tmp_path: Path
) -> None:
    try:
        compiler = find_compiler(platform.machine())
    except MissingDependencyError as error:
        pytest.skip(str(error))
    blocks = re.findall(r"```cpp\n(.*?)```", all_pages["embedding.md"], re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "app.cpp").write_text(block)
        options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        include = repository / "plugins" / "include"
        done = subprocess.run(
            [*compiler, *options, "-I", include, tmp_path / "app.cpp"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

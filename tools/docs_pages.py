"""The generated pages of the documentation, as a hook of mkdocs (`hooks:` in mkdocs.yml).

Nothing it writes is committed: references come from the code, targets from their files, figures
from `benchmarks/results`, and README, CONTRIBUTING and CHANGELOG are pages as they stand. What they
link to in the repository is put into the site, so that a link which leads nowhere fails the build.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import docs_reference
import docs_targets
from readme_tables import RESULTS, lion, minilm, table
from readme_tables import schemes as measured_schemes
from readme_tables import variants as measured_variants

from edgeattn.devices.registry import parse_target

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"

# Files of the repository that are pages of the site.
INCLUDED: Mapping[str, str] = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "plugins/README.md": "plugins.md",
}
# Where the site has the other files that these link to.
SOURCE = "source"

# What stands for a generated part in a page that is written by hand, by its name.
MARK = re.compile(r"<!-- generated: ([a-z-]+) -->")
LINK = re.compile(r"\[([^\]\n]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")


def pages() -> dict[str, str]:
    """Every generated page: its path in the site's sources and its Markdown."""
    own = {
        "commands.md": docs_reference.commands(),
        "operators.md": docs_reference.operators(),
        "errors.md": docs_reference.error_catalogue(),
        "benchmarks.md": benchmarks(),
        "targets/index.md": docs_targets.overview(),
    }
    for device in docs_targets.ordered():
        own[f"targets/{device.name}.md"] = docs_targets.page(parse_target(device.name))
    read = {page: included(name)[0] for name, page in INCLUDED.items()}
    return {**own, **read}


def assets() -> dict[str, Path]:
    """Every file of the repository that a page links to: its path in the site, and where it is."""
    linked = {file for name in INCLUDED for file in included(name)[1]}
    for page in DOCS.glob("*.md"):
        found = re.findall(rf"\]\({SOURCE}/([^)#]+)", page.read_text(encoding="utf-8"))
        linked |= {REPOSITORY / path for path in found}
    linked |= {one for one in RESULTS.iterdir() if one.suffix in (".json", ".svg")}
    linked |= {script for script in map(script_of, RESULTS.glob("*.json")) if script.exists()}
    # One that is not there is left to mkdocs, which names the page that links to it.
    there = (file for file in linked if file.is_file())
    return {f"{SOURCE}/{file.relative_to(REPOSITORY).as_posix()}": file for file in there}


def included(name: str) -> tuple[str, set[Path]]:
    """A file of the repository as a page, and the other files that it links to."""
    linked: set[Path] = set()
    place = PurePosixPath(name).parent

    def led(found: re.Match[str]) -> str:
        text, link, anchor = found[1], found[2], found[3] or ""
        path = posixpath.normpath(place / link)
        if path in INCLUDED:
            return f"[{text}]({INCLUDED[path]}{anchor})"
        if path.startswith("docs/"):  # a page already
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        file = REPOSITORY / path
        if file.is_dir():  # nothing that a browser could show
            return text if text.startswith("`") else f"`{text}`"
        linked.add(file)
        return f"[{text}]({SOURCE}/{path}{anchor})"

    text = (REPOSITORY / name).read_text(encoding="utf-8")
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    # Comments are marks of `make readme`; a table behind one would not be seen as a table.
    parts[::2] = [LINK.sub(led, re.sub(r"<!--.*?-->\n", "\n", part)) for part in parts[::2]]
    return "".join(parts), linked


def names() -> str:
    """The table of names, from CONTRIBUTING."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.search(r"^## Names$.*?(^\|.*?)\n\n", text, re.DOTALL | re.MULTILINE)[1]  # type: ignore[index]


def script_of(result: Path) -> Path:
    """The script that wrote a result."""
    name = str(json.loads(result.read_text(encoding="utf-8"))["benchmark"])
    script = RESULTS.parent / f"{name}.py"
    return script if script.exists() else RESULTS.parent / f"{name.partition('_')[0]}.py"


def benchmarks() -> str:
    """The figures of benchmarks/results: the README's tables, and every file with its machine."""
    parts = [
        "# Benchmarks",
        "Each figure was measured by a script in `benchmarks/`, on the machine its file names; "
        "none is shown for another device. What stands here is read from these files when the page "
        "is made; [the README](index.md#measured) says more of how.",
        "## Attention variants",
        measured_variants(),
        "## Schemes",
        measured_schemes(),
        "## Sentence embeddings",
        minilm(),
        "## Linear attention for encoders",
        lion(),
        "## Every result",
        table(("result", "what it measures", "on", "machine"), map(result_row, result_files())),
        "## Plots",
    ]
    for plot in sorted(RESULTS.glob("*.svg")):
        where = f"{SOURCE}/{plot.relative_to(REPOSITORY).as_posix()}"
        parts += [f"### {plot.stem}", f"![{plot.stem}]({where})"]
    return "\n\n".join(parts) + "\n"


def result_files() -> list[Path]:
    """The results, by name."""
    return sorted(RESULTS.glob("*.json"))


def result_row(file: Path) -> tuple[str, ...]:
    """One line of the table of results."""
    content, script = json.loads(file.read_text(encoding="utf-8")), script_of(file)
    machine: Mapping[str, Any] = content["machine"]
    told = (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").splitlines()[0]
    links = (
        f"[{one.name}]({SOURCE}/{one.relative_to(REPOSITORY).as_posix()})" for one in (file, script)
    )
    where = f"{machine['cpu']}, {machine['cores']} cores"
    return " by ".join(links), docs_reference.cell(told), str(content["date"]), where


PARTS: Mapping[str, Callable[[], str]] = {
    "names": names,
    "schemes": docs_reference.schemes,
    "variants": docs_reference.variants,
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the targets' pages in the navigation, below the page that leads to them."""
    found: list[Any] = [f"targets/{device.name}.md" for device in docs_targets.ordered()]
    for entry in config.nav or []:
        if "Targets" in entry:
            entry["Targets"] = ["targets/index.md", *found]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the generated pages and the files they link to."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    for path, file in assets().items():
        files.append(File.generated(config, path, abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Puts the generated parts into a page that is written by hand."""
    return MARK.sub(lambda found: PARTS[found[1]](), markdown)

"""The page: its structure, its colours, what a browser makes of it; it asks for nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2")

from edgeattn.verify.report import report_html

TEMPLATES = Path(__file__).resolve().parents[3] / "edgeattn" / "verify" / "report"
# WCAG 2.1 AA: of text, and of what a picture's parts need against their ground.
TEXT_CONTRAST, GRAPHICS_CONTRAST = 4.5, 3.0


def test_it_needs_no_script_and_no_network(
    content: dict[str, Any], read: Callable[..., Any]
) -> None:
    written = report_html(content)
    page = read(written)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "audio",
        "video",
        "use",
    }
    for _, attributes in page.elements:
        assert not {"src", "href", "srcset", "data", "action", "style"} & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import|//[a-z]", written)


def test_headings_are_in_order(content: dict[str, Any], render: Callable[..., Any]) -> None:
    page = render(content)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    found = [text for _, text in page.all("h2")]
    assert found == [
        "Asked for",
        "Done",
        "Layer by layer, head by head",
        "Quality",
        "Proof",
        "Size and cost",
        "Notes",
    ]


def test_what_a_screen_reader_needs(content: dict[str, Any], render: Callable[..., Any]) -> None:
    page = render(content)
    (html, _), (_, title) = page.all("html")[0], page.all("title")[0]
    assert html["lang"] == "en"
    assert title == "tiny for jetson-orin@jetpack7.2"
    assert len(page.all("main")) == 1
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(text for _, text in page.all("caption"))
    assert {attributes.get("scope") for attributes, _ in page.all("th")} == {"col", "row"}
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        assert set(attributes.get("aria-labelledby", "").split()) <= set(ids)
        if attributes.get("role") == "region":
            assert attributes["aria-label"]
            assert attributes["tabindex"] == "0", "the keyboard must reach what scrolls"
    for attributes, text in page.all("svg"):
        hidden = attributes.get("aria-hidden") == "true"
        named = attributes.get("aria-label") or attributes.get("aria-labelledby")
        assert hidden or (attributes.get("role") == "img" and named and text)


def test_everything_is_escaped(
    content: dict[str, Any], render: Callable[..., Any], read: Callable[..., Any]
) -> None:
    """Each text of the report, one after the other, and each key that a user or a model chose."""
    evil = '<script>alert("1")</script>'
    tags = {tag for tag, _ in render(content).elements}

    def poisoned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: poisoned(child) for key, child in value.items()}
        if isinstance(value, list):
            return [poisoned(child) for child in value]
        return f"{value}{evil}" if isinstance(value, str) else value

    bad = poisoned(content)
    bad["recipe"]["max_ppl_increase"] = "10%"
    worst = bad["verification"]["agreements"][0]
    worst["worst"] = {f"keys{evil}": worst["comparisons"][0]["tensor"]}
    bad["transforms"][f"note{evil}"] = {f"key{evil}": evil}
    bad["seconds"][evil] = 1.0
    written = report_html(bad)
    assert written.count("&lt;script&gt;") > 20
    page = read(written)
    assert {tag for tag, _ in page.elements} == tags
    for _, attributes in page.elements:
        assert not [name for name in attributes if "alert" in name or "script" in name]


def test_a_page_and_a_report_of_270_heads_are_small(content: dict[str, Any]) -> None:
    assert len(json.dumps(content, indent=2)) < 300_000
    assert len(report_html(content)) < 300_000


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_contrast(mode: str) -> None:
    colours = _colours(mode)
    for ink in ("ink", "muted", "good", "bad", "warn"):
        for ground in ("paper", "panel"):
            assert _contrast(colours[ink], colours[ground]) >= TEXT_CONTRAST, (ink, ground)
    for shade in range(7):
        pair = colours[f"h{shade}"], colours[f"h{shade}-ink"]
        assert _contrast(*pair) >= TEXT_CONTRAST, shade
    for line in ("c0", "c1", "c2", "c3", "rule"):
        assert _contrast(colours[line], colours["paper"]) >= GRAPHICS_CONTRAST, line
    lights = [_luminance(colours[f"h{shade}"]) for shade in range(7)]
    assert lights == sorted(lights, reverse=mode == "light"), "told apart without colour"


def _colours(mode: str) -> dict[str, str]:
    """Custom properties of the style sheet; the dark ones override the light ones."""
    style = (TEMPLATES / "style.css.j2").read_text()
    light, _, rest = style.partition("@media (prefers-color-scheme: dark)")
    dark = rest.partition("\n}\n")[0]
    pattern = re.compile(r"--([\w-]+): (#[0-9a-f]{6});")
    found = dict(pattern.findall(light))
    return found | dict(pattern.findall(dark)) if mode == "dark" else found


def _luminance(colour: str) -> float:
    """Relative luminance of sRGB, WCAG 2.1."""
    channels = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.fixture
def chromium(tmp_path: Path) -> Callable[..., str]:
    """A function from a page and options to what a real browser prints."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")

    def run(page: Path, *options: str) -> str:
        fixed = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path}/user",
        ]
        command = [program, *fixed, *options, page.as_uri()]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=True
        ).stdout

    return run


@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_lays_it_out_without_scrolling_sideways(
    content: dict[str, Any],
    chromium: Callable[..., str],
    tmp_path: Path,
    width: int,
    render: Callable[..., Any],
) -> None:
    """A frame as wide as the device; the script is the test's, around the page."""
    (tmp_path / "index.html").write_text(report_html(content))
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="index.html" style="border:0;width:{width}px;height:900px"></iframe>'
        "<script>onload=()=>{const d=f.contentDocument,e=d.documentElement;"
        "document.title=[e.scrollWidth,e.clientWidth,d.styleSheets[0].cssRules.length,"
        "d.querySelectorAll('svg').length,d.compatMode].join(' ')}</script>"
    )
    printed = chromium(frame, "--dump-dom", "--allow-file-access-from-files")
    found = re.search(r"<title>(.*)</title>", printed)
    assert found, printed[-500:]
    scroll, client, rules, pictures, mode = found[1].split()
    assert int(scroll) == int(client) == width
    assert int(rules) > 50
    assert int(pictures) == len(render(content).all("svg"))
    assert mode == "CSS1Compat"

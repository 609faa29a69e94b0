"""`edgeattn export` and `verify` through the command line's own group."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

VOID = {"meta", "br", "hr", "img", "link", "input"}


@pytest.fixture
def run(edgeattn: Callable[..., Any], shared_traces: None) -> Callable[..., Any]:
    return edgeattn


@pytest.fixture(scope="module")
def bundle(export_tiny: Callable[..., Path]) -> Path:
    return export_tiny("cpu", "w8-rtn")


def sentence(done: Any, exit_code: int) -> str:
    """The one sentence of a refusal."""
    assert done.exit_code == exit_code, done.output
    assert "Traceback" not in done.output
    assert "internal error" not in done.stderr
    line: str = done.stderr.strip().splitlines()[-1]
    assert line.startswith("edgeattn: expected ")
    return line


def test_dry_run_writes_nothing(
    run: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--target", "jetson-orin", "--quant", "w4-rtn", "--dry-run")
    plain = run("export", tiny_checkpoint, *options)
    assert plain.exit_code == 0, plain.output
    words = ("w4-rtn", "per token", "at 256 tokens in 1 row", "estimated, on a 2-core server")
    assert all(word in plain.stdout for word in words), plain.stdout
    done = run("export", tiny_checkpoint, *options, "--json")
    plan = json.loads(done.stdout)
    assert plan["lowering"]["target"] == "jetson-orin-agx-64gb@jetpack7.2"
    assert plan["lowering"]["scheme"]["label"].startswith("w4-rtn")
    assert plan["weight_bytes"] > 0
    assert plan["free_bytes"] > plan["disk_bytes"]
    assert {"trace", "weights", "torch reference", "ONNX Runtime"} <= set(plan["seconds"])
    done = run("export", tiny_checkpoint, *options, "--json", "--no-verify")
    assert set(json.loads(done.stdout)["seconds"]) == {"start", "trace", "weights"}
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_a_static_cache(run: Callable[..., Any], tiny_checkpoint: Path) -> None:
    options = ("--target", "jetson-orin", "--kv-cache", "static", "--dry-run")
    plain = run("export", tiny_checkpoint, *options, "--context", 64, "--batch", 2)
    assert plain.exit_code == 0, plain.output
    assert "kv_cache         static" in plain.stdout
    assert "at 64 tokens in 2 rows" in plain.stdout
    older = ("--target", "jetson-orin@jetpack6.2", *options[2:])
    assert "has tensorrt 10.3" in sentence(run("export", tiny_checkpoint, *older), 1)
    wrong = (*options[:3], "statik", "--dry-run")
    assert "did you mean static" in sentence(run("export", tiny_checkpoint, *wrong), 2)


def test_dry_run_knows_the_size(
    run: Callable[..., Any], tiny_checkpoint: Path, export_tiny: Callable[..., Path]
) -> None:
    done = run("export", tiny_checkpoint, "--target", "cpu", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    files = [file for file in export_tiny("cpu").rglob("*") if file.is_file()]
    weights = next(file for file in files if file.name == "model.onnx.data")
    assert plan["weight_bytes"] == pytest.approx(weights.stat().st_size, abs=4096)
    assert plan["disk_bytes"] == pytest.approx(sum(f.stat().st_size for f in files), rel=0.03)


def test_dry_run_of_a_gguf(run: Callable[..., Any], smollm2_gguf: Path) -> None:
    done = run("export", smollm2_gguf, "--target", "cpu", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert plan["context"] == 8192
    assert plan["weight_bytes"] == pytest.approx(540.3e6, rel=0.001)


def test_dry_run_needs_no_heavy_package(tiny_checkpoint: Path) -> None:
    program = """
import sys
sys.modules.update(dict.fromkeys(("torch", "onnxscript", "onnxruntime", "huggingface_hub")))
from edgeattn.cli import main
main(["export", sys.argv[1], "--target", "cpu", "--dry-run"])
"""
    command = [sys.executable, "-c", program, str(tiny_checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_disk_that_is_too_small(
    run: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=123_456)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    options = ("--target", "cpu", "-o", tmp_path / "new" / "bundle")
    plain = run("export", tiny_checkpoint, *options, "--dry-run")
    assert plain.exit_code == 0, plain.output
    assert "123.5 kB are free: TOO LITTLE" in plain.stdout
    line = sentence(run("export", tiny_checkpoint, *options), 1)
    assert "MB of free disk for" in line
    assert "but 0.1 MB are free: free some space or choose another folder with -o" in line
    assert not list(tmp_path.rglob("*bundle*"))


def test_a_recipe_with_flags_that_win(
    run: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('target = "l4"\nquant = "w8-rtn"\ncontext = 64\n')
    options = ("--recipe", recipe, "--target", "cpu", "--dtype", "fp32")
    output = tmp_path / "bundle"
    done = run("export", tiny_checkpoint, *options, "-o", output, "--json")
    assert done.exit_code == 0, done.output
    manifest = json.loads((output / "manifest.json").read_text())
    asked = {"target": "cpu", "quant": "w8-rtn", "context": 64, "dtype": "fp32"}
    assert asked.items() <= manifest["recipe"].items()
    assert json.loads((output / "genai_config.json").read_text())["search"]["max_length"] == 64


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("a TOML recipe at", "cannot be read")),
        (b"target = ", ("a TOML recipe at", "cannot be read")),
        (b"\xff", ("a TOML recipe at", "cannot be read")),
        (b"", ("expected a target", "--target NAME")),
        (b'target = "cpu"\nquantt = "none"', ("a known field of a recipe", "did you mean quant")),
        (b'target = "cpu"\nbatch = "two"', ("batch as a whole number", "'two'")),
        (b'target = "cpu"\nbatch = 0', ("a positive batch",)),
        (b'target = ["cpu"]', ("target as a text",)),
    ],
)
def test_a_recipe_that_is_none(
    run: Callable[..., Any],
    tiny_checkpoint: Path,
    tmp_path: Path,
    content: bytes | None,
    words: tuple[str, ...],
) -> None:
    recipe = tmp_path / "recipe.toml"
    if content is not None:
        recipe.write_bytes(content)
    line = sentence(run("export", tiny_checkpoint, "--recipe", recipe), 2)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--target", "jetson-orn"), ("a known target", "did you mean jetson-orin")),
        (("--target", "jetson-orin@jetpack6.3"), ("jetpack6.2",)),
        (("--target", "cpu", "--quant", "w4-rnt"), ("did you mean w4-rtn",)),
        (("--target", "cpu", "--quant", "w4-rtn:group=48"), ("48",)),
        (("--target", "cpu", "--quant", "w4-rtn:grup=64"), ("it has: group", "'grup'")),
        (("--target", "cpu", "--dtype", "fp15"), ("a known dtype", "did you mean")),
        (("--target", "cpu", "--logits", "lats"), ("did you mean last",)),
        (("--target", "cpu", "--context", "0"), ("a positive context",)),
        ((), ("expected a target",)),
    ],
)
def test_unknown_names(
    run: Callable[..., Any], tiny_checkpoint: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    line = sentence(run("export", tiny_checkpoint, *options), 2)
    assert all(word in line for word in words), line


def test_an_unknown_verb(run: Callable[..., Any]) -> None:
    line = sentence(run("exprot", "model"), 2)
    assert "a known verb, but 'exprot' is none: did you mean export" in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--target", "t4", "--quant", "w4-rtn"), ("SM75", "int4")),
        (
            ("--target", "jetson-orin@jetpack7.2", "--dtype", "fp32"),
            ("a dtype among fp16, bf16", "fp32"),
        ),
        (("--target", "cpu", "--context", "100000"), ("at most 256 tokens", "100000")),
        (("--target", "cpu", "--quant", "w4-rtn:group=128"), ("divides the 64 inputs", "128")),
        (("--target", "jetson-orin", "--quant", "w4-rtn:group=32"), ("64 or 128", "32")),
    ],
)
def test_what_a_target_or_model_cannot_do(
    run: Callable[..., Any],
    tiny_checkpoint: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    words: tuple[str, ...],
) -> None:
    line = sentence(run("export", tiny_checkpoint, *options, "-o", tmp_path / "bundle"), 1)
    assert all(word in line for word in words), line
    assert list(tmp_path.iterdir()) == []


def test_int4_on_sm75_is_refused_before_the_model_is_opened(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    done = run("export", tmp_path / "no-model", "--target", "t4", "--quant", "w4-rtn")
    assert "SM75" in sentence(done, 1)


def test_default_output(
    run: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("export", tiny_checkpoint, "--target", "cpu", "--no-verify")
    assert done.exit_code == 0, done.output
    assert [p.name for p in tmp_path.iterdir()] == ["tiny-cpu-none"]
    assert "not verified (--no-verify)" in done.stdout
    line = sentence(run("export", tiny_checkpoint, "--target", "cpu"), 1)
    assert "a bundle is already there" in line
    assert "--force" in line
    again = run("export", tiny_checkpoint, "--target", "cpu", "--force", "--json")
    assert again.exit_code == 0
    manifest = json.loads((tmp_path / "tiny-cpu-none" / "manifest.json").read_text())
    assert manifest["verification"]["status"] == "passed"


def test_default_output_of_a_static_cache() -> None:
    from edgeattn.pipeline import default_output
    from edgeattn.recipe import Recipe

    place = default_output("models/tiny", Recipe("cpu", dtype="fp16", kv_cache="static"))
    assert place.name == "tiny-cpu-none-fp16-static-cache"


def test_a_folder_in_use(run: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    options = ("--target", "cpu", "-o", tmp_path, "--force")
    assert "no bundle is there" in sentence(run("export", tiny_checkpoint, *options), 1)
    assert (tmp_path / "mine").read_text() == "mine"


def test_errors_as_json(run: Callable[..., Any], tiny_checkpoint: Path) -> None:
    done = run("export", tiny_checkpoint, "--target", "cpuu", "--json")
    error = json.loads(done.stdout)
    assert error["exit_code"] == done.exit_code == 2
    assert error["error"].startswith("expected a known target")


def test_debug_shows_the_traceback(run: Callable[..., Any], tmp_path: Path) -> None:
    done = run("verify", tmp_path / "absent", "--debug")
    assert done.exit_code == 1
    assert "Traceback" in done.stderr
    assert "BundleError" in done.stderr


def test_an_internal_error_is_one_sentence(
    run: Callable[..., Any], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("edgeattn.models.hub.open_checkpoint", fail)
    options = ("--target", "cpu", "-o", tmp_path / "bundle")
    done = run("export", tiny_checkpoint, *options)
    assert done.exit_code == 1
    assert "internal error: ZeroDivisionError: by zero (run again with --debug" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in run("export", tiny_checkpoint, *options, "--debug").stderr
    assert list(tmp_path.iterdir()) == []


def test_interrupted(
    run: Callable[..., Any], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgeattn.models.hub.open_checkpoint", interrupt)
    done = run("export", tiny_checkpoint, "--target", "cpu", "-o", tmp_path / "bundle")
    assert done.exit_code == 130
    assert "interrupted; nothing half-written was left behind" in done.stderr
    assert list(tmp_path.iterdir()) == []


class Page(HTMLParser):
    """Collects text and addresses; refuses tags that do not close."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize("verify", [True, False])
def test_the_report(export_tiny: Callable[..., Path], verify: bool) -> None:
    """The page is whole, needs no network and shows the figures of report.json."""
    bundle = export_tiny("cpu", "w8-rtn", verify=verify)
    report = json.loads((bundle / "report.json").read_text())
    content = (bundle / "report" / "index.html").read_text()
    page = Page(content)
    assert page.addresses == []
    assert not {"script", "link", "img", "iframe"} & page.tags
    assert "http" not in content
    assert "@import" not in content
    text = " ".join(page.text)
    assert report["model"] == "tiny"
    assert f"{report['nodes']:,}" in text
    assert f"{report['weight_bytes']:,}" in text
    assert report["weight_bytes"] == (bundle / "model.onnx.data").stat().st_size
    assert report["bundle"] == "bundle"
    if not verify:
        assert report["verification"] is None
        assert "Not verified" in text
        return
    (agreement,) = report["verification"]["agreements"]
    assert agreement["passed"]
    assert "Proven" in text
    assert "FAILED" not in text
    worst = max(agreement["comparisons"], key=lambda row: row["error"] / row["allowed"])
    assert worst["tensor"] in text
    assert f"{worst['error']:.3g}" in text
    assert f"{worst['allowed']:.3g}" in text


def test_the_report_escapes_what_it_shows(
    tiny_checkpoint: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    model = tmp_path / "<script>alert(1)<"
    shutil.copytree(tiny_checkpoint, model)
    output = tmp_path / "bundle"
    done = run("export", model, "--target", "cpu", "--no-verify", "-o", output)
    assert done.exit_code == 0, done.output
    assert "script" not in Page((output / "report" / "index.html").read_text()).tags


def test_export_json(run: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    done = run("export", tiny_checkpoint, "--target", "cpu", "-o", output, "--json")
    report = json.loads(done.stdout)
    written = json.loads((output / "report.json").read_text())
    assert report["bundle"] == str(output)
    assert report["verification"] == written["verification"]
    assert report["nodes"] == written["nodes"]
    assert "proving the bundle" in report["seconds"]


def test_verify(run: Callable[..., Any], bundle: Path) -> None:
    done = run("verify", bundle)
    assert done.exit_code == 0, done.output
    assert "TensorRT: no part in this target" in done.stdout
    found = json.loads(run("verify", bundle, "--json").stdout)
    assert found["passed"] is True
    assert found["tensorrt"] is None
    assert found["agreements"][0]["comparisons"]


def test_verify_with_the_checkpoint(
    run: Callable[..., Any],
    bundle: Path,
    tiny_checkpoint: Path,
    random_checkpoint: Callable[..., Path],
) -> None:
    done = run("verify", bundle, "--checkpoint", tiny_checkpoint, "--json")
    assert json.loads(done.stdout)["passed"] is True
    other = random_checkpoint(vocab_size=300)
    line = sentence(run("verify", bundle, "--checkpoint", other), 1)
    assert "is another one" in line
    assert "pass the checkpoint named tiny" in line


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_verify_fails(
    run: Callable[..., Any], changed: Callable[..., Path], bundle: Path, options: tuple[str, ...]
) -> None:
    """Golden vectors of another model: hashes are true, numbers are not."""
    import numpy as np

    from edgeattn.bundle.bundle import GOLDEN
    from edgeattn.verify.golden import Golden

    golden = Golden.load(bundle / GOLDEN)
    golden.expected["ragged.present.1.key"] *= np.float32(-1)
    copy = changed(bundle)
    golden.save(copy / GOLDEN)
    damaged = changed(bundle, {GOLDEN: (copy / GOLDEN).read_bytes()})
    done = run("verify", damaged, *options)
    assert "the first error is in layer 1" in sentence(done, 1)
    if options:
        assert "layer 1" in json.loads(done.stdout)["error"]
    else:
        assert "FAILED" in done.stdout


def test_one_changed_byte(run: Callable[..., Any], bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    content = bytearray((copy / "model.onnx.data").read_bytes())
    content[-1] ^= 1
    (copy / "model.onnx.data").write_bytes(content)
    for verb in ("verify", copy), ("run", copy, "-p", "Hello"):
        assert "its content was changed" in sentence(run(*verb), 1)

"""Engines and providers on the GPU of this machine, where it has one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from edgeattn.bundle.bundle import GOLDEN, Bundle, hash_file
from edgeattn.devices.probe import Probe, probe
from edgeattn.devices.registry import all_devices
from edgeattn.engine.build import BuildOptions, build_engine
from edgeattn.engine.flavours import TENSORRT_RTX
from edgeattn.engine.profiles import decoder_profiles, input_shapes
from edgeattn.engine.record import ENGINES, Engine, EngineRecord
from edgeattn.pipeline.build import build_bundle
from edgeattn.pipeline.build_plan import BuildRequest
from edgeattn.verify.golden import Golden
from edgeattn.verify.tensorrt_backend import check_engine

pytestmark = pytest.mark.gpu
needs_rtx = pytest.mark.skipif(
    not TENSORRT_RTX.is_available(), reason="needs TensorRT-RTX: install edgeattn[rtx]"
)
CONTEXT, BATCH = 128, 2


@pytest.fixture(scope="module")
def here() -> Probe:
    found = probe()
    assert found.gpu is not None, found.gpu_problem
    return found


@pytest.fixture(params=["growing", "static"])
def bundle(request: Any, export_tiny: Callable[..., Path], tmp_path: Path) -> Path:
    fields = {"kv_cache": "static"} if request.param == "static" else {}
    exported = export_tiny("a10", batch=BATCH, context=CONTEXT, **fields)
    return shutil.copytree(exported, tmp_path / "bundle")


@needs_rtx
def test_an_engine_built_here_passes_its_self_test(
    bundle: Path, here: Probe, edgeattn: Callable[..., Any]
) -> None:
    fitting = [d.name for d in all_devices() if d.gpu and d.gpu.sm == d.gpu.nearest_rtx_sm]
    named = [d.name for d in all_devices() if d.name in fitting and d.sm == here.gpu.sm]
    if not named:
        pytest.skip(f"TensorRT-RTX does not know SM {here.gpu.sm}")
    request = BuildRequest(targets=(named[0],), flavour="tensorrt-rtx")
    built = build_bundle(bundle, request)
    assert built.selftest is not None
    assert built.selftest.passed
    assert built.selftest.left_out == ()
    assert built.engine.record.gpu == here.gpu.name
    verified = edgeattn("verify", bundle, "--backend", "tensorrt", "--json")
    assert verified.exit_code == 0, verified.output
    assert here.gpu.name in json.loads(verified.stdout)["agreements"][0]["backend"]


@needs_rtx
def test_what_tensorrt_rtx_does_on_this_gpu(
    bundle: Path, here: Probe, record_property: Callable[[str, object], None]
) -> None:
    """Built for whatever GPU is here, also one it does not name: it runs and is right, or refuses.

    What it did is in the report of the test (--junit-xml).
    """
    opened = Bundle.open(bundle)
    path = bundle / ENGINES / "here.engine"
    path.parent.mkdir()
    (profile,) = decoder_profiles(CONTEXT, BATCH, separate=False)
    report = build_engine(
        opened.model_file,
        path,
        flavour=TENSORRT_RTX,
        sms=(),
        profiles=[input_shapes(opened.model_file, profile)],
        options=BuildOptions(),
        timeout_s=300,
    )
    record_property("gpu", f"{here.gpu.name}, SM {here.gpu.sm}")
    record_property("build", f"{report.status} {report.reason}".strip())
    if report.status != "built":
        assert report.reason
        return
    engine = Engine(path, _record(opened, path, here, report.version, profile.to_dict()))
    path.with_name(f"{path.name}.json").write_text(engine.record.to_json())
    checked = check_engine(engine, opened, Golden.load(bundle / GOLDEN), gpu=here.gpu.name)
    worst = checked.agreement.worst_per_group()
    record_property("errors", {group: (c.error, c.allowed) for group, c in worst.items()})
    assert checked.agreement.passed, worst


def _record(
    bundle: Bundle, path: Path, here: Probe, version: str | None, profile: dict[str, str]
) -> EngineRecord:
    return EngineRecord(
        schema_version=1,
        edgeattn="test",
        engine=path.name,
        bytes=path.stat().st_size,
        sha256=hash_file(path),
        model_sha256=bundle.manifest.files["model.onnx"].sha256,
        targets=(),
        flavour="tensorrt-rtx",
        tensorrt=str(version),
        sms=(here.gpu.sm,),
        arch=here.arch,
        gpu=here.gpu.name,
        driver=here.driver,
        plugins=None,
        profiles={"any": profile},
        stripped=False,
        layers=0,
        layer_source="engine inspector",
        layer_list=(),
        seconds={},
        peak_rss_mb=None,
    )


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
@pytest.mark.parametrize("target", ["a10", "cpu"])
def test_a_provider_agrees_with_the_golden_vectors(
    provider: str, target: str, export_tiny: Callable[..., Path], edgeattn: Callable[..., Any]
) -> None:
    from onnxruntime import get_available_providers

    from edgeattn.runtime.providers import PROVIDERS

    if PROVIDERS[provider] not in get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    path = export_tiny(target, batch=BATCH, context=CONTEXT)
    verified = edgeattn("verify", path, "--provider", provider, "--no-tensorrt")
    assert verified.exit_code == 0, verified.output
    run = edgeattn("run", path, "-p", "abc", "-n", "8", "--provider", provider, "--json")
    assert run.exit_code == 0, run.output

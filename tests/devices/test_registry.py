"""Every target file is whole, sourced and found by each of its names; wrong names are refused."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from edgeattn.devices.registry import (
    Registry,
    Target,
    all_devices,
    all_targets,
    device_names,
    load_registry,
    parse_target,
)
from edgeattn.devices.schema import Device, Sourced
from edgeattn.errors import EdgeattnError, UsageError

NAMES = [*device_names(), *(alias for device in all_devices() for alias in device.aliases)]
SOFTWARE = sorted({target.software.name for target in all_targets()})


def shipped(name: str) -> str:
    return (files("edgeattn.devices") / name).read_text(encoding="utf-8")


def groups(record: BaseModel) -> list[BaseModel]:
    return [v for _, v in record if isinstance(v, BaseModel)]


def with_file(folder: Path, name: str, text: str) -> Registry:
    (folder / name).write_text(text, encoding="utf-8")
    return load_registry(folder)


def test_every_target_file_is_a_device() -> None:
    stems = {f.name[:-5] for f in files("edgeattn.devices").iterdir() if f.name.endswith(".toml")}
    assert stems - {"software"} == set(device_names())
    assert len(stems) == 22


def test_names_and_aliases_are_unique() -> None:
    assert len(NAMES) == len(set(NAMES))


def test_each_compute_capability_is_an_alias_of_a_target_that_has_it() -> None:
    sms = {device.sm for device in all_devices() if device.gpu}
    assert {name for name in NAMES if name.startswith("sm")} == {f"sm{sm}" for sm in sms}
    assert all(parse_target(f"sm{sm}").device.sm == sm for sm in sms)


@pytest.mark.parametrize("target", all_targets(), ids=lambda target: target.name)
def test_every_group_of_figures_has_a_source(target: Target) -> None:
    found = [*groups(target.device), *groups(target.software)]
    assert len(found) >= 5
    for group in found:
        assert isinstance(group, Sourced)
        assert len(group.source) >= 8


@pytest.mark.parametrize("target", all_targets(), ids=lambda target: target.name)
def test_target_is_consistent(target: Target) -> None:
    assert parse_target(target.name) == target
    assert target.preferred_dtype in target.dtypes
    assert target.flavour == target.software.stack.engine
    assert target.opset(int4=True) >= 21
    # a parser that knows the standard ops reads at least opset 23, an older one must not get them
    primitive = target.software.graph.operators == "primitive"
    assert primitive == (target.opset(int4=False) < 23)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cpu", "cpu@onnxruntime"),
        ("jetson-orin", "jetson-orin-agx-64gb@jetpack7.2"),
        ("jetson-orin@jetpack6.2", "jetson-orin-agx-64gb@jetpack6.2"),
        (" SM87 ", "jetson-orin-agx-64gb@jetpack7.2"),
        ("l4", "l4@trt11"),
        ("sm75@trt10.13", "t4@trt10.13"),
        ("sm80", "a100@trt11"),
        ("sm86", "a10@trt11"),
        ("sm89", "l4@trt11"),
        ("sm90", "h100@trt11"),
        ("sm100", "b200@trt11"),
        ("sm110", "jetson-thor-t5000@jetpack7.2"),
        ("sm120", "rtx-5090@rtx1.7"),
        ("sm121", "dgx-spark@trt11"),
        ("RTX4090", "rtx-4090@rtx1.7"),
        ("rtx-4090@trt11", "rtx-4090@trt11"),
        ("jetson-thor", "jetson-thor-t5000@jetpack7.2"),
        ("thor", "jetson-thor-t5000@jetpack7.2"),
        ("jetson-orin-nx@jetpack6.2", "jetson-orin-nx-16gb@jetpack6.2"),
        ("orin-nano", "jetson-orin-nano-8gb@jetpack7.2"),
        ("jetson-orin-nano", "jetson-orin-nano-8gb@jetpack7.2"),
        ("orin-agx", "jetson-orin-agx-64gb@jetpack7.2"),
        ("spark", "dgx-spark@trt11"),
    ],
)
def test_parse_target(text: str, name: str) -> None:
    assert parse_target(text).name == name


def test_facts_the_planner_relies_on() -> None:
    t4, orin, cpu = map(parse_target, ("t4", "jetson-orin@jetpack6.2", "cpu"))
    assert (t4.weight_bits, t4.int4_group_sizes, t4.dtypes) == ((8,), (), ("fp16",))
    assert (orin.int4_group_sizes, orin.opset(int4=False), orin.opset(int4=True)) == (
        (64, 128),
        20,
        21,
    )
    assert orin.software.graph.strip_functions
    assert (orin.device.sm, orin.device.nearest_rtx_sm) == (87, 86)
    assert 32 in cpu.int4_group_sizes
    assert (cpu.device.sm, cpu.device.nearest_rtx_sm, cpu.flavour) == (None, None, "onnxruntime")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("jetson-orn", "jetson-orin"),
        ("l4@jetpack6.2", "trt11"),
        ("l4@trt12", "trt11"),
        ("orin-nono", "orin-nano"),
        ("jetson-thor@jetpack6.2", "choose jetpack7.2"),
        ("dgx-spark@trt10.13", "choose trt10.14"),
        ("h100@rtx1.7", "made for other devices"),
        ("zzz", "known are"),
        ("", "NAME@SOFTWARE"),
        ("@trt11", "NAME@SOFTWARE"),
        ("l4@", "NAME@SOFTWARE"),
        ("l4@trt11@x", "NAME@SOFTWARE"),
    ],
)
def test_wrong_name_is_refused_with_a_hint(text: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_target(text)
    assert hint in str(caught.value)


@given(
    st.one_of(
        st.text(),
        st.builds(
            "{}@{}".format,
            st.one_of(st.text(), st.sampled_from(NAMES)),
            st.one_of(st.text(), st.sampled_from(SOFTWARE)),
        ),
        st.sampled_from(NAMES),
    )
)
def test_any_text_gives_a_target_or_a_usage_error(text: str) -> None:
    try:
        target = parse_target(text)
    except UsageError:
        return
    assert parse_target(target.name) == target


def test_a_new_target_is_one_file(tmp_path: Path) -> None:
    text = shipped("l4.toml").replace('"l4"', '"l4-twin"').replace('["sm89"]', '["twin"]')
    registry = with_file(tmp_path, "l4-twin.toml", text)
    assert registry.parse_target("twin@trt10.16").name == "l4-twin@trt10.16"
    assert set(registry.devices) == {*device_names(), "l4-twin"}


def test_new_software_comes_with_the_folder(tmp_path: Path) -> None:
    tables = shipped("software.toml").split('["jetpack6.2"]')[1].split('["jetpack7.2"]')[0]
    text = '["jetpack6.2"]' + tables
    (tmp_path / "software.toml").write_text(text.replace("jetpack6.2", "jetpack6.3"))
    board = shipped("jetson-orin-agx-64gb.toml").replace("jetpack6.2", "jetpack6.3")
    registry = with_file(tmp_path, "jetson-orin-agx-64gb.toml", board)
    assert registry.parse_target("jetson-orin@jetpack6.3").software.stack.version == "10.3"


def inherited(folder: Path, rules: str) -> Registry:
    stack = '[trt12]\ndescription = "new"\n[trt12.stack]\nengine = "tensorrt"\nversion = "12"\n'
    text = f'{stack}source = "https://example.org"\n[trt12.graph]\n{rules}\n'
    return with_file(folder, "software.toml", text)


def test_graph_rules_can_be_like_those_of_another_stack(tmp_path: Path) -> None:
    ours = parse_target("l4@trt11").software.graph
    rules = 'like = "trt11"\nopset = 24\nsource = "the guide of TensorRT 12"'
    graph = inherited(tmp_path, rules).software["trt12"].graph
    assert graph.model_dump(exclude={"source"}) == {
        **ours.model_dump(exclude={"source"}),
        "opset": 24,
    }
    assert graph.source == f"the guide of TensorRT 12; the rest as trt11: {ours.source}"


@pytest.mark.parametrize(
    ("rules", "field"),
    [
        ('like = "trt12"\nsource = "the guide"', "trt12.graph.like"),
        ('like = "trt13"\nsource = "the guide"', "trt12.graph.like"),
        ('like = ["trt11"]\nsource = "the guide"', "trt12.graph.like"),
        ('like = "trt11"', "trt12.graph.source"),
        ('like = "trt11"\nsource = " "', "trt12.graph.source"),
        ('like = "trt11"\nsource = "the guide"\nopset = 99', "trt12.graph.opset"),
        ('like = "trt11"\nsource = "the guide"\nopsets = 23', "trt12.graph.opsets"),
    ],
)
def test_wrong_inheritance_is_refused(tmp_path: Path, rules: str, field: str) -> None:
    with pytest.raises(EdgeattnError, match=rf"software\.toml, {field}"):
        inherited(tmp_path, rules)


@pytest.mark.parametrize(
    ("old", "new"),
    [("total_gb = 24", 'total_gb = 24\nmode = "MAXN"'), ("fp32 = 30.3", 'mode = "MAXN"')],
)
def test_a_power_mode_that_cannot_be_chosen_is_refused(tmp_path: Path, old: str, new: str) -> None:
    with pytest.raises(EdgeattnError, match="'MAXN' is not among the power modes"):
        with_file(tmp_path, "l4.toml", shipped("l4.toml").replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("\nsm = 89\n", '\nsm = "89"\n', "gpu.sm"),
        ("\nsm = 89\n", "\n", "gpu.sm"),
        ("bandwidth_gb_s = 300", "bandwidth_gb_s = -300", "memory.bandwidth_gb_s"),
        ("bandwidth_gb_s = 300", "bandwidth_gb_s = inf", "memory.bandwidth_gb_s"),
        ("shared_with_cpu = false", "shared = false", "memory.shared"),
        ("fp8 = 242.5", "fp7 = 242.5", "peak.fp7"),
        ("bits = [4, 8]", "bits = [4, 5]", "weights.bits.1"),
        ("bits = [4, 8]", "bits = []", "weights.bits"),
        ('preferred = "fp16"', 'preferred = "fp8"', "dtypes.preferred"),
        ('preferred = "fp16"', 'preferred = "fp32"', "dtypes.preferred"),
        ('kind = "datacenter"', 'kind = "toaster"', "kind"),
        ('default = "trt11"', 'default = "trt9"', "software"),
        ('"trt10.13"', '"trt9"', "software.allowed"),
        ('flavour = "tensorrt"', 'flavour = "onnxruntime"', "software.flavour"),
        ('name = "l4"', 'name = "l5"', "name"),
        ("[gpu]", "[gpux]", "gpux"),
        ("[gpu]", "[gpu", "does not parse"),
    ],
)
def test_broken_file_names_file_and_field(tmp_path: Path, old: str, new: str, field: str) -> None:
    text = shipped("l4.toml")
    assert old in text
    with pytest.raises(EdgeattnError) as caught:
        with_file(tmp_path, "l4.toml", text.replace(old, new))
    assert "l4.toml" in str(caught.value)
    assert field in str(caught.value)


@pytest.mark.parametrize("group", ["gpu", "memory", "peak", "power", "dtypes", "weights"])
@pytest.mark.parametrize("source", ["", 'source = ""', 'source = "   "', 'source = "        "'])
def test_figures_without_a_source_are_refused(tmp_path: Path, group: str, source: str) -> None:
    head, _, tail = shipped("l4.toml").partition(f"[{group}]")
    lines = tail.split("\n")
    index = next(i for i, line in enumerate(lines) if line.startswith("source"))
    lines[index] = source
    with pytest.raises(EdgeattnError, match=rf"l4\.toml, {group}\.source"):
        with_file(tmp_path, "l4.toml", f"{head}[{group}]" + "\n".join(lines))


def test_broken_software_names_file_and_field(tmp_path: Path) -> None:
    text = shipped("software.toml").replace("opset = 20", "opset = 99")
    with pytest.raises(EdgeattnError, match=r"software\.toml, jetpack6\.2\.graph\.opset"):
        with_file(tmp_path, "software.toml", text)
    with pytest.raises(EdgeattnError, match=r"software\.toml, x\."):
        with_file(tmp_path, "software.toml", "x = 1")


@pytest.mark.parametrize("alias", ["sm89", "t4"])
def test_alias_of_two_targets_is_refused(tmp_path: Path, alias: str) -> None:
    text = shipped("l4.toml").replace('"l4"', '"twin"').replace('"sm89"', f'"{alias}"')
    with pytest.raises(EdgeattnError, match=f"'{alias}' of"):
        with_file(tmp_path, "twin.toml", text)


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "l4.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EdgeattnError, match=r"l4\.toml does not parse"):
        load_registry(tmp_path)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        load_registry(tmp_path / "none")


def test_records_are_frozen() -> None:
    device: Device = parse_target("l4").device
    with pytest.raises(ValueError, match="frozen"):
        device.name = "l5"  # type: ignore[misc]  # that is what is tested

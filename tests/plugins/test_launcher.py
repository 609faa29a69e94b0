"""Which kernels the plugin loads and launches, and with what: a libcuda that takes notes tells."""

from __future__ import annotations

import itertools
import math
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edgeattn.engine.toolchain import find_toolchain
from edgeattn.ops.recurrent_linear_attention import SPEC

CREATE = "create RecurrentLinearAttention"
RUN = ("shape", "enqueue")


def tensors(
    *,
    b: int = 2,
    h: int = 4,
    kv: int = 2,
    t: int = 40,
    dk: int = 64,
    dv: int = 64,
    dg: int = 1,
    dtype: str = "fp16",
    in_place: bool = True,
    **shapes: str,
) -> list[str]:
    """Commands that describe inputs and outputs; `shapes` replace those of inputs."""
    sizes = {"B": b, "H": h, "Hkv": kv, "T": t, "Dk": dk, "Dv": dv, "Dg": dg}
    commands = []
    for tensor in (*SPEC.inputs, *SPEC.outputs):
        shape = "x".join(str(sizes[str(symbol)]) for symbol in tensor.shape)
        kind = "input" if tensor in SPEC.inputs else "output"
        words = [kind, tensor.name, dtype if tensor.variable == "T" else "fp32"]
        words.append(shapes.get(tensor.name, shape))
        if in_place and tensor.updates:
            words.append(tensor.updates)
        commands.append(" ".join(words))
    return commands


def run(library: Any, *attributes: str, **sizes: Any) -> Any:
    """One launch of the plugin in a new process."""
    create = " ".join((CREATE, *attributes))
    return library.drive(create, "device", *tensors(**sizes), "workspace", *RUN)


def test_decoding_is_one_kernel_with_every_argument_in_its_place(library: Any) -> None:
    answers = run(library, "normalise=int:1", "scale=float:0.5", "epsilon=float:0.25", t=1)
    assert (answers["shape"], answers["enqueue"], answers["workspace"]) == ("0", "0", "0")
    (launch,) = answers.launches
    assert launch.stream == "0x2"
    assert launch.label == "recurrent_linear_attention.decode-fp16-BLOCK64-BLOCK_V64-sm87"
    assert (launch.kernel, launch.threads) == ("decode", 256)
    assert launch.shared == 1024
    places = answers.addresses
    names = [tensor.name for tensor in (*SPEC.inputs, *SPEC.outputs)]
    assert {name: launch.arguments[name] for name in names} == {n: places[n] for n in names}
    integers = {"T": 1, "H": 4, "HKV": 2, "DK": 64, "DV": 64, "DG": 1, "delta": 0, "normalise": 1}
    assert {name: launch.arguments[name] for name in integers} == integers
    assert (launch.arguments["scale"], launch.arguments["epsilon"]) == (0.5, 0.25)
    assert launch.arguments["global_scratch"] == launch.arguments["profile_scratch"] == 0


def test_decoding_takes_values_apart_where_no_normaliser_joins_them(library: Any) -> None:
    (launch,) = run(library, t=1, dk=128, dv=128).launches
    assert "-BLOCK128-BLOCK_V32-" in launch.label
    (launch,) = run(library, "normalise=int:1", t=1, dk=128, dv=128).launches
    assert "-BLOCK128-BLOCK_V128-" in launch.label


@pytest.mark.parametrize("delta", [0, 1])
@pytest.mark.parametrize("channels", [0, 1])
@pytest.mark.parametrize(("device", "span"), [(87, 64), (110, 128)])
def test_many_rows_take_kernels_that_share_a_workspace(
    library: Any, delta: int, channels: int, device: int, span: int
) -> None:
    b, h, kv, t, dk, dv, dg = 3, 6, 2, 130, 40, 24, 40 if channels else 1
    shapes = tensors(b=b, h=h, kv=kv, t=t, dk=dk, dv=dv, dg=dg)
    create = f"{CREATE} delta=int:{delta}"
    answers = library.drive(create, "device", *shapes, "workspace", *RUN, sm=device)
    assert answers["enqueue"] == "0"
    launches = answers.launches
    kernels = ["prepare", "states", "outputs"] if delta else ["states", "outputs"]
    assert [launch.kernel for launch in launches] == kernels
    chosen = f"CHANNELS{channels}-CHUNK{(64, 16)[channels]}-SPAN{span}-sm{device}"
    assert all(launch.label.endswith(chosen) for launch in launches)
    assert all(launch.threads == 128 for launch in launches)
    spans = math.ceil(t / span)
    sizes = {
        "u": delta * b * kv * t * dv,
        "w": delta * b * kv * t * dk,
        "states": b * kv * spans * dk * dv,
        "normalisers": b * kv * spans * dk,
    }
    states, outputs = launches[-2].arguments, launches[-1].arguments
    start = answers.addresses["workspace"]
    places = {name: int(states[name]) - start for name in sizes}
    assert all(place % 16 == 0 for place in places.values())
    ends = {name: places[name] + 4 * sizes[name] for name in sizes}
    # The device was not known when the size was asked for: the most that one could need.
    enough = max(ends.values()) <= int(answers["workspace"])
    assert enough
    assert (device == 87) == (int(answers["workspace"]) - max(ends.values()) < 256)
    ordered = sorted((n for n in sizes if sizes[n]), key=places.__getitem__)
    for first, second in itertools.pairwise(ordered):
        assert ends[first] <= places[second]
    for arguments in (launch.arguments for launch in launches):
        common = sizes.keys() & arguments.keys()
        assert {name: arguments[name] for name in common} == {name: states[name] for name in common}
    assert outputs["scale"] == pytest.approx(dk**-0.5)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("t", [1, 16])
def test_states_lie_where_tensorrt_puts_them(library: Any, in_place: bool, t: int) -> None:
    answers = run(library, t=t, in_place=in_place)
    places, arguments = answers.addresses, answers.launches[0].arguments
    for name in ("state", "normaliser"):
        assert arguments[f"past_{name}"] == places[f"past_{name}"]
        assert arguments[f"present_{name}"] == places[f"present_{name}"]
        assert (places[f"past_{name}"] == places[f"present_{name}"]) is in_place


@pytest.mark.parametrize(("t", "kernels"), [(0, ["decode"]), (15, ["decode"]), (16, ["states"])])
def test_the_number_of_rows_decides(library: Any, t: int, kernels: list[str]) -> None:
    assert [launch.kernel for launch in run(library, t=t).launches][:1] == kernels


def test_an_empty_batch_launches_nothing(library: Any) -> None:
    answers = run(library, b=0)
    assert (answers["enqueue"], answers.launches) == ("0", [])


@pytest.mark.parametrize("t", [1, 15, 16, 60])  # one span
@pytest.mark.parametrize(("dk", "dv", "dg"), [(8, 8, 1), (24, 32, 24), (64, 40, 1), (128, 128, 1)])
@pytest.mark.parametrize("rule", ["delta", "normalise"])
def test_launches_are_those_from_pytorch(
    library: Any, t: int, dk: int, dv: int, dg: int, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    expected = launches_of_pytorch(monkeypatch, {rule: 1}, b=2, h=4, kv=2, t=t, dk=dk, dv=dv, dg=dg)
    answers = run(library, f"{rule}=int:1", t=t, dk=dk, dv=dv, dg=dg)
    shared = 0
    for launch, (kernel, values) in zip(answers.launches, expected, strict=True):
        assert f"recurrent_linear_attention.{launch.kernel}" == kernel.name
        chosen = {n: int(v) for n, v in re.findall(r"-([A-Z_]+?)(\d+)(?=-)", launch.label)}
        for name in {"BLOCK", "CHANNELS"} & chosen.keys():
            assert chosen[name] == values[name]
        assert launch.grid == kernel.blocks({**values, **chosen})
        numbers = {n: v for n, v in launch.arguments.items() if isinstance(values.get(n), int)}
        assert numbers == {name: values[name] for name in numbers}
        assert launch.arguments.get("scale", 0) == pytest.approx(
            values["scale"] if "scale" in launch.arguments else 0, rel=1e-5
        )
        between = [values[n] for n in ("u", "w", "states", "normalisers") if n in values]
        shared = sum(256 * math.ceil(x.numel() * x.element_size() / 256) for x in between)
    assert int(answers["workspace"]) == shared


def launches_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, attributes: dict[str, int], **sizes: int
) -> list[tuple[Any, dict[str, Any]]]:
    """Kernels and values that PyTorch would launch them with."""
    import torch

    from edgeattn.kernels import recurrent_linear_attention as kernels
    from edgeattn.kernels.kernel import Kernel

    launched: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(Kernel, "launch", lambda kernel, values: launched.append((kernel, values)))
    symbols = dict(zip(("B", "H", "Hkv", "T", "Dk", "Dv", "Dg"), sizes.values(), strict=True))
    tensors = {
        tensor.name: torch.empty([symbols[str(s)] for s in tensor.shape])
        for tensor in (*SPEC.inputs, *SPEC.outputs)
    }
    kernels.launch(tensors, SPEC.complete_attributes(attributes))
    return launched


@pytest.mark.parametrize(("device", "used"), [(80, 80), (86, 80), (89, 80), (87, 87), (110, 110)])
def test_a_device_gets_its_own_code_or_what_it_can_run(
    library: Any, device: int, used: int
) -> None:
    answers = library.drive(CREATE, "device", *tensors(t=1), *RUN, sm=device)
    assert answers["enqueue"] == "0"
    assert answers.launches[0].label.endswith(f"-sm{used}")


@pytest.mark.parametrize("device", [75, 90, 100, 121])
def test_a_device_without_code_is_refused_by_name(library: Any, device: int) -> None:
    answers = library.drive(CREATE, "device", *tensors(), "shape", sm=device)
    assert answers["shape"] == "1"
    assert f"BLOCK=64 CHANNELS=0 on SM {device} in the plugin library" in answers.logged
    assert "it holds this one for SM 110, SM 120, SM 80, SM 87" in answers.logged


def test_a_missing_variant_is_refused_by_name(library: Any) -> None:
    shapes = tensors(dtype="bf16", dk=128, t=1)
    answers = library.drive(CREATE, "device", *shapes, "configure", "shape")
    assert (answers["configure"], answers["shape"]) == ("1", "1")
    assert "kernel recurrent_linear_attention.decode for bf16 BLOCK=128 in the" in answers.logged
    assert "fp16 BLOCK=16 BLOCK_V=16" in answers.logged


def test_modules_are_loaded_once_per_context_and_never_by_enqueue(library: Any) -> None:
    used = 2  # of states and outputs
    prepared = (CREATE, "device", *tensors())
    answers = library.drive(*prepared, "shape", "shape", "attach", "shape", "enqueue")
    assert len(answers.loaded) == len(set(answers.loaded)) == used
    first = next(i for i, call in enumerate(answers.calls) if call.startswith("cuLaunch"))
    assert all(call.startswith("cuLaunch") for call in answers.calls[first:])

    answers = library.drive(*prepared, "shape 8", "shape 8")
    assert answers["shape"] == "0"
    assert len(answers.loaded) == used

    for change in ("context 2", "reset"):
        answers = library.drive(*prepared, "shape", change, *RUN)
        assert answers["enqueue"] == "0"
        assert len(answers.loaded) == 2 * used


def test_shared_memory_is_asked_for_where_it_must_be(library: Any) -> None:
    answers = run(library)
    attributes = [c.split()[1:] for c in answers.calls if c.startswith("cuFuncSetAttribute")]
    assert [(name.split("-")[0].split(".")[1], *rest) for name, *rest in attributes] == [
        ("states", "8", "50000"),
        ("outputs", "8", "50000"),
    ]
    answers = library.drive(CREATE, "device", *tensors(), "shape", shared=49152)
    assert answers["shape"] == "1"
    assert "50000 bytes of shared memory per block" in answers.logged
    assert "this one has 49152" in answers.logged


@pytest.mark.parametrize(
    "function",
    [
        *("cuCtxGetCurrent", "cuCtxGetId", "cuCtxGetDevice", "cuDeviceGetAttribute"),
        *("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"),
    ],
)
def test_every_failure_while_loading_is_told(library: Any, function: str) -> None:
    for code in (*failure_codes(), 123456):
        answers = library.drive(CREATE, "device", *tensors(), *RUN, fail=f"{function}={code}")
        assert (answers["shape"], answers["enqueue"]) == ("1", "1")
        assert f"RecurrentLinearAttention: onShapeChange: expected {function} to" in answers.logged
        assert f"({code})" in answers.logged
        assert answers.launches == []
        assert answers.logged.startswith("1 edgeattn: ")


def failure_codes() -> list[int]:
    """Every failure that CUDA's header knows."""
    text = (find_toolchain(platform.machine()).cuda / "cuda.h").read_text("utf-8", "replace")
    codes = [int(code) for code in re.findall(r"CUDA_ERROR_\w+\s*=\s*(\d+)", text)]
    assert len(codes) > 80
    return codes


@pytest.mark.parametrize("function", ["cuModuleGetFunction", "cuFuncSetAttribute"])
def test_a_kernel_that_cannot_be_used_is_unloaded(library: Any, function: str) -> None:
    answers = library.drive(CREATE, "device", *tensors(), *RUN, fail=f"{function}=1")
    unloaded = [call.split()[1] for call in answers.calls if call.startswith("cuModuleUnload")]
    assert unloaded == answers.loaded != []


@pytest.mark.parametrize("nth", [1, 2])
def test_a_failed_launch_ends_the_others(library: Any, nth: int) -> None:
    kernel = ("states", "outputs")[nth - 1]
    sentence = f"cuLaunchKernel to start kernel recurrent_linear_attention.{kernel}"
    for code in failure_codes():
        fail = f"cuLaunchKernel={code}@{nth}"
        answers = library.drive(CREATE, "device", *tensors(), *RUN, fail=fail)
        assert (answers["shape"], answers["enqueue"]) == ("0", "1")
        assert len(answers.launches) == nth
        assert sentence in answers.logged
        assert f"({code})" in answers.logged


def test_a_failed_load_is_tried_again(library: Any) -> None:
    answers = library.drive(
        CREATE, "device", *tensors(), "shape", *RUN, fail="cuModuleLoadData=2@1"
    )
    assert answers.lines["shape"] == ["1", "0"]
    assert answers["enqueue"] == "0"


def test_a_grid_beyond_the_hardware_is_refused(library: Any) -> None:
    answers = library.drive(CREATE, *tensors(b=2**30, h=2, kv=2, t=1), "device", *RUN)
    assert (answers["shape"], answers["enqueue"]) == ("0", "1")
    assert "the shapes need 4294967296 x 1 x 1" in answers.logged


def test_the_driver_moves_memory(library: Any, tmp_path: Path) -> None:
    given, kept = tmp_path / "given", tmp_path / "kept"
    given.write_bytes(bytes(range(256)) * 256)
    shapes = [
        f"{command} {given}" if command.startswith("input past_state") else command
        for command in tensors(t=1)
    ]
    answers = library.drive(CREATE, "device", *shapes, *RUN, f"save present_state {kept}")
    assert answers["save"] == "ok"
    assert kept.read_bytes() == given.read_bytes()  # in place, and nothing was computed


def test_enqueue_without_shapes_is_refused(library: Any) -> None:
    answers = library.drive(CREATE, "device", *tensors(), "enqueue")
    assert answers["enqueue"] == "1"
    assert "call onShapeChange before enqueue" in answers.logged


def test_without_a_driver_or_context_there_is_a_sentence(library: Any, tmp_path: Path) -> None:
    answers = library.drive(CREATE, *tensors(), *RUN, cuda=tmp_path)
    assert (answers["shape"], answers["enqueue"]) == ("1", "1")
    assert "expected NVIDIA's driver library libcuda.so.1, but" in answers.logged

    answers = library.drive(CREATE, *tensors(), "shape")
    assert answers["shape"] == "1"
    assert "expected a CUDA context that is current in this thread" in answers.logged

    lacking = ["g++", "-shared", "-x", "c++", "/dev/null", "-o", str(tmp_path / "libcuda.so.1")]
    subprocess.run(lacking, check=True)
    answers = library.drive(CREATE, *tensors(), "shape", cuda=tmp_path)
    assert answers["shape"] == "1"
    assert "libcuda.so.1 with the function cuCtxGetCurrent" in answers.logged


BAD_SHAPES: Sequence[tuple[dict[str, Any], str]] = (
    ({"q": "2x4x40"}, "expected q [B, H, T, Dk], but its shape is [2, 4, 40]"),
    ({"k": "2x2x40x32"}, "expected k [B, Hkv, T, Dk] with Dk = 64, but its shape is"),
    ({"past_state": "2x2x32x64"}, "expected past_state [B, Hkv, Dk, Dv] with Dk = 64, but its"),
    ({"h": 3}, "query heads in groups of one size per key head, but 3 for 2 came"),
    ({"kv": 0}, "query heads in groups of one size per key head, but 4 for 0 came"),
    ({"dg": 2}, "one log-decay per row or one per each of 64 channels, but 2 came"),
    ({"dk": 20}, "head dimensions that are multiples of 8 up to 128, but 20 came"),
    ({"dv": 256}, "head dimensions that are multiples of 8 up to 128, but 256 came"),
    ({"t": 2**31}, "expected q [B, H, T, Dk] with sizes below 2^31"),
    ({"t": 2**23 + 1}, "expected at most 8388608 rows of 64 numbers, but 8388609 came"),
    ({"dtype": "fp32"}, "states for fp32 BLOCK=64 CHANNELS=0 in the plugin library"),
    ({"dtype": "int8"}, "expected q in a dtype of the operator, but it has TensorRT's type 2"),
)


@pytest.mark.parametrize(("change", "sentence"), BAD_SHAPES, ids=[str(c) for c, _ in BAD_SHAPES])
def test_bad_shapes_are_refused_before_a_launch(
    library: Any, change: dict[str, Any], sentence: str
) -> None:
    answers = library.drive(CREATE, *tensors(**change), "device", "shape")
    assert answers["shape"] == "1"
    assert sentence in answers.logged
    assert answers.calls == []

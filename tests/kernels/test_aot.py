"""Kernels compile for GPUs that are not here; what a compiler does wrong costs a sentence."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import is_alive, wait_for_pid, wait_until

from edgeattn.errors import BundleError, EdgeattnError, LoweringError, UsageError
from edgeattn.kernels import aot, compilers, cubin_cache
from edgeattn.kernels import manifest as manifest_module
from edgeattn.kernels.aot import SMS, compile_variants
from edgeattn.kernels.kernel import TYPES, Kernel
from edgeattn.kernels.manifest import Cubin, Manifest, make_manifest, read
from edgeattn.kernels.variants import Variant, load_variants

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton: install edgeattn[kernels]"
)
JETSON, DESKTOP = 87, 86

# Not in this file, because compilers import it by its name.
TOYS = """
    import os
    import time

    import triton
    import triton.language as tl

    from edgeattn.kernels.kernel import Kernel

    @triton.jit
    def times(a, b):
        return a * b

    @triton.jit
    def scale(x, y, n, factor, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        row = times(tl.load(x + i, mask=i < n, other=0.0), factor)
        tl.store(y + i, row.to(y.dtype.element_ty), mask=i < n)

    @triton.jit
    def product(x, y, BLOCK: tl.constexpr):
        rows, columns = tl.arange(0, 16), tl.arange(0, BLOCK)
        a = tl.load(x + rows[:, None] * BLOCK + columns[None, :])
        b = tl.load(x + columns[:, None] * 16 + rows[None, :])
        tl.store(y + rows[:, None] * 16 + rows[None, :], tl.dot(a, b))

    @triton.jit
    def described(x, y, n, BLOCK: tl.constexpr):
        block = tl.make_tensor_descriptor(x, shape=[n], strides=[1], block_shape=[BLOCK])
        tl.store(y + tl.arange(0, BLOCK), block.load([0]))

    @triton.jit
    def misspelt(x, y, BLOCK: tl.constexpr):
        tl.store(y, tl.laod(x) + BLOCK)

    # The compiler asks for a kernel's name: here it meets its end.
    def abort(specialization):
        os.write(2, b"LLVM ERROR: nothing works")
        os.abort()

    def hang(specialization):
        with open(os.environ["EDGEATTN_TEST_PID"], "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)

    @triton.jit(repr=abort)
    def aborts(x, y, BLOCK: tl.constexpr):
        tl.store(y, tl.load(x) + BLOCK)

    @triton.jit(repr=hang)
    def hangs(x, y, BLOCK: tl.constexpr):
        tl.store(y, tl.load(x) + BLOCK)

    def describe(function, **numbers):
        arguments = {"x": "*T", "y": "*fp32", **numbers}
        grid = ("cdiv(n, BLOCK)" if "n" in numbers else "1", "1", "1")
        return Kernel(f"toy.{function.__name__}", function, arguments, ("BLOCK",), grid)

    KERNELS = (
        describe(scale, n="i32", factor="fp32"),
        describe(product),
        describe(described, n="i32"),
        *map(describe, (misspelt, aborts, hangs)),
    )
"""


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """A module of kernels that compilers can import."""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toy_kernels.py").write_text(textwrap.dedent(TOYS))
    sys.path.insert(0, str(folder))
    yield importlib.import_module("toy_kernels")
    sys.path.remove(str(folder))


def toy(toys: ModuleType, name: str, dtype: str = "fp16", block: int = 64) -> Variant:
    kernel = next(k for k in toys.KERNELS if k.name == f"toy.{name}")
    return Variant(kernel, dtype, {"BLOCK": block}, 80 if dtype == "bf16" else 75)


def compiled(cache: Path, *variants: Variant, sms: tuple[int, ...] = (JETSON,)) -> Manifest:
    return compile_variants(variants, sms, cache=cache, jobs=1, timeout_s=60)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each compiler that is started."""
    started: list[Any] = []
    start = subprocess.Popen

    def counted(*args: Any, **kwargs: Any) -> Any:
        started.append(args)
        return start(*args, **kwargs)

    monkeypatch.setattr(compilers.subprocess, "Popen", counted)
    return started


@needs_triton
def test_cubins_for_gpus_that_are_not_here(toys, tmp_path: Path, starts: list) -> None:
    variants = [toy(toys, "scale"), toy(toys, "scale", "bf16"), toy(toys, "product")]
    sms, steps = (75, 87, 90, 110, 120), []
    told: dict[str, Any] = {"cache": tmp_path / "cache", "jobs": 1, "timeout_s": 60}
    manifest = compile_variants(variants, sms, **told, progress=lambda *s: steps.append(s))
    # fp16 on all, bf16 from SM 80.
    assert [(c.kernel, c.dtype, c.sm) for c in manifest.cubins] == [
        *(("toy.product", "fp16", sm) for sm in sms),
        *(("toy.scale", "bf16", sm) for sm in sms[1:]),
        *(("toy.scale", "fp16", sm) for sm in sms),
    ]
    assert steps == [(done, 14) for done in range(15)]
    assert len(starts) == 1
    scale = manifest.cubins[-1]
    assert (scale.entry, scale.shared, scale.warps) == ("scale", 0, 4)
    assert scale.arguments == (("x", "*T"), ("y", "*fp32"), ("n", "i32"), ("factor", "fp32"))
    assert scale.grid == ("cdiv(n, BLOCK)", "1", "1")
    assert scale.file == "toy.scale-fp16-BLOCK64-sm120.cubin"
    # In another order, twice, and from the cache: the same text.
    again = compile_variants([*variants[::-1], variants[0]], (*sms[::-1], 75), **told)
    assert again.to_json() == manifest.to_json()
    assert len(starts) == 1


@needs_triton
def test_written_folder_is_read_back(toys, tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "out"
    manifest = compiled(cache, toy(toys, "scale"))
    for _ in range(2):
        aot.write(manifest, folder, cache=cache)
        assert read(folder) == manifest
    (cubin,) = manifest.cubins
    assert {f.name for f in folder.iterdir()} == {"manifest.json", cubin.file}
    assert (folder / cubin.file).read_bytes()[:4] == b"\x7fELF"
    (folder / cubin.file).write_bytes(b"other")
    with pytest.raises(BundleError, match=r"sm87\.cubin is missing or changed"):
        read(folder)
    next(cache.glob("*.cubin")).unlink()
    with pytest.raises(BundleError, match="removed or changed since it was compiled"):
        aot.write(manifest, folder, cache=cache)
    # No manifest describes the half-written folder.
    with pytest.raises(BundleError, match=r"manifest\.json cannot be read"):
        read(folder)


@needs_triton
def test_same_cubins_from_any_place_and_environment(
    toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = toy(toys, "scale"), toy(toys, "product")
    first = compiled(tmp_path / "one", *variants, sms=(JETSON, 110))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    monkeypatch.setenv("DISABLE_PTXAS_OPT", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.chdir(tmp_path)
    second = compiled(tmp_path / "two", *variants, sms=(JETSON, 110))
    assert second.to_json() == first.to_json()


@needs_triton
def test_each_input_of_the_compiler_is_in_the_key(toys, tmp_path: Path, starts: list) -> None:
    scale = toy(toys, "scale")
    more = Kernel(**{**vars(scale.kernel), "num_warps": 8})
    for variant in (scale, toy(toys, "scale", block=128), Variant(more, "fp16", {"BLOCK": 64}, 75)):
        compiled(tmp_path, variant)
    assert len(starts) == 3


@needs_triton
def test_damaged_cache_is_compiled_again(toys, tmp_path: Path, starts: list) -> None:
    manifest = compiled(tmp_path, toy(toys, "scale"))
    damages = [("cubin", b"{}"), ("cubin", None), ("json", b"{}")]
    for suffix, damage in damages:
        (file,) = tmp_path.glob(f"*.{suffix}")
        content = file.read_bytes()
        if damage is None:
            file.unlink()
        else:
            file.write_bytes(damage)
        assert compiled(tmp_path, toy(toys, "scale")) == manifest
        assert file.read_bytes() == content
    assert len(starts) == 1 + len(damages)


@needs_triton
def test_two_processes_share_a_cache(toys, tmp_path: Path) -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(toys.__file__).parent)!r})
        from pathlib import Path
        import toy_kernels
        from edgeattn.kernels.aot import compile_variants
        from edgeattn.kernels.variants import Variant
        variants = [Variant(k, "fp16", {{"BLOCK": 64}}, 75) for k in toy_kernels.KERNELS[:2]]
        cache = Path({str(tmp_path)!r}, "cache")
        print(compile_variants(variants, (86, 87), cache=cache, jobs=1).kernels_sha256)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate(timeout=60)[0] for process in started}
    assert len(printed) == 1
    assert len(printed.pop().strip()) == 64
    assert not list((tmp_path / "cache").glob("*.draft"))


@needs_triton
def test_too_much_shared_memory(toys, tmp_path: Path) -> None:
    wide = toy(toys, "product", block=2048)
    assert compiled(tmp_path, wide, sms=(JETSON,)).cubins[0].shared == 128 * 1024
    message = (
        r"at most 101376 bytes of shared memory per block on SM 86, but toy\.product fp16"
        r" BLOCK=2048 for SM 86 takes 131072: change the kernel or its entry in variants\.toml"
    )
    with pytest.raises(LoweringError, match=message):
        compiled(tmp_path, wide, sms=(DESKTOP, JETSON))


@needs_triton
def test_global_scratch_memory(toys, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"toy\.described .* for SM 90 takes 128 bytes"):
        compiled(tmp_path, toy(toys, "described"), sms=(90,))


@needs_triton
def test_cubin_that_is_not_what_was_asked_for(toys, tmp_path: Path) -> None:
    scale = toy(toys, "scale")
    (task,) = aot._tasks([scale], [JETSON], "3.7.1")
    (file,) = (compiled(tmp_path, scale), tmp_path.glob("*.json"))[1]
    good = cubin_cache.Compiled.model_validate_json(file.read_bytes())
    assert good.parameters == ("u64", "u64", "u32", "f32", "u64", "u64")
    for change, message in (
        ({"sm": 80}, "Triton gave one for SM 80"),
        ({"parameters": good.parameters[:-1]}, "but they are u64 u64 u32 f32 u64"),
        ({"tensor_memory": 513}, "at most 512 columns of tensor memory"),
    ):
        assert message in str(aot._refusal(task, good.model_copy(update=change)))


@needs_triton
def test_failures_name_the_variant_and_keep_the_rest(toys, tmp_path: Path, starts: list) -> None:
    variants = [toy(toys, name) for name in ("scale", "misspelt", "aborts")]
    with pytest.raises(LoweringError) as caught:
        compiled(tmp_path, *variants)
    first, second = caught.value.details["failures"]
    name = "expected toy.{} fp16 BLOCK=64 for SM 87 to compile, but"
    assert name.format("aborts") + " the compiler died of SIGABRT (LLVM ERROR: nothing" in first
    assert name.format("misspelt") + " CompilationError: AttributeError" in second
    assert "(1 more failed)" in str(caught.value)
    # One that died and one that went on.
    assert len(starts) == 2
    compiled(tmp_path, toy(toys, "scale"))
    assert len(starts) == 2


@needs_triton
def test_time_limit(toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEATTN_TEST_PID", str(tmp_path / "pid"))
    with pytest.raises(LoweringError, match=r"toy\.hangs .* gave no result in 3 s and was killed"):
        compile_variants([toy(toys, "hangs")], [JETSON], cache=tmp_path, jobs=1, timeout_s=3)
    assert not is_alive(int((tmp_path / "pid").read_text()))


@needs_triton
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_compilers_end_with_their_parent(toys, tmp_path: Path, how: signal.Signals) -> None:
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(toys.__file__).parent)!r})
        from pathlib import Path
        import toy_kernels
        from edgeattn.kernels.aot import compile_variants
        from edgeattn.kernels.variants import Variant
        kernels = [k for k in toy_kernels.KERNELS if k.name in ("toy.scale", "toy.hangs")]
        variants = [Variant(k, "fp16", {{"BLOCK": 64}}, 75) for k in kernels]
        compile_variants(variants, (87,), cache=Path({str(tmp_path)!r}, "cache"), jobs=2)
    """
    environment = {**os.environ, "EDGEATTN_TEST_PID": str(tmp_path / "pid")}
    # A session of its own: the signal reaches the parent alone, as from a supervisor.
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=environment,
    ) as parent:
        pid = wait_for_pid(tmp_path / "pid")
        parent.send_signal(how)
        _, stderr = parent.communicate(timeout=20)
    assert (how == signal.SIGKILL) != (b"KeyboardInterrupt" in stderr)
    wait_until(lambda: not is_alive(pid), 10)
    for file in (tmp_path / "cache").glob("*.json"):
        assert cubin_cache.CubinCache(tmp_path / "cache").load(file.stem)


@needs_triton
def test_source_that_changes_under_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "changing_kernels.py"
    file.write_text(textwrap.dedent(TOYS))
    monkeypatch.syspath_prepend(tmp_path)
    changing = importlib.import_module("changing_kernels")
    scale = toy(changing, "scale")
    file.write_text(file.read_text().replace("a * b", "a + b"))
    with pytest.raises(LoweringError, match="its source was changed meanwhile"):
        compiled(tmp_path / "cache", scale)


@needs_triton
def test_compiler_that_does_not_start(
    toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilers, "_CHILD_MODULE", "edgeattn.no_such_module")
    with pytest.raises(EdgeattnError, match=r"it ended with exit code 1 \(.*No module named"):
        compiled(tmp_path, toy(toys, "scale"))


@needs_triton
def test_unknown_sm_and_interpreter(toys, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"an SM among 75, 80, .*, but 88 was given"):
        compiled(tmp_path, toy(toys, "scale"), sms=(88,))
    scale = toy(toys, "scale")
    python = Kernel(**{**vars(scale.kernel), "function": Interpreted(scale.kernel.function)})
    with pytest.raises(UsageError, match="unset TRITON_INTERPRET"):
        compiled(tmp_path, Variant(python, "fp16", {"BLOCK": 64}, 75))


class Interpreted:
    """As Triton's interpreter makes of a function."""

    def __init__(self, function: Any) -> None:
        self.arg_names = function.arg_names


names = st.text("abcxyz_", min_size=1, max_size=8)
cubins = st.builds(
    Cubin,
    kernel=names,
    dtype=st.sampled_from(["fp16", "bf16"]),
    constants=st.dictionaries(names, st.integers() | names, max_size=3),
    sm=st.sampled_from(SMS),
    file=names.map(lambda name: f"{name}.cubin"),
    entry=names,
    shared=st.integers(0, 2**20),
    warps=st.sampled_from([1, 4, 8]),
    arguments=st.lists(st.tuples(names, st.sampled_from(TYPES)), max_size=5).map(tuple),
    grid=st.tuples(names, names, names),
    sizes=st.lists(names, max_size=2).map(tuple),
    sha256=st.binary(min_size=32, max_size=32).map(bytes.hex),
)


@given(st.lists(cubins, max_size=3, unique_by=lambda cubin: cubin.file))
def test_manifest_survives_its_json(written: list[Cubin]) -> None:
    manifest = make_manifest(written, "3.7.1")
    text = manifest.to_json()
    assert Manifest.model_validate_json(text) == manifest
    assert Manifest.model_validate_json(text).to_json() == text
    content = json.loads(text)
    assert list(content) == ["version", "triton", "fp_fusion", "kernels_sha256", "cubins"]


@given(st.lists(cubins, min_size=1, max_size=2, unique_by=lambda cubin: cubin.file), st.data())
def test_manifest_hash_changes_with_any_cubin(written: list[Cubin], data: st.DataObject) -> None:
    changed = list(written)
    index = data.draw(st.integers(0, len(written) - 1))
    changed[index] = written[index].model_copy(update={"sha256": "0" * 63 + "g"})
    assert manifest_module._hash_of(changed) != manifest_module._hash_of(written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version is wrong: Input should be 1"),
        ({"fp_fusion": False, "surprise": 1}, "surprise is wrong: Extra inputs"),
        ({"kernels_sha256": "0" * 64}, "kernels_sha256 is not that of the cubins"),
        ({"triton": None}, "triton is wrong"),
    ],
)
def test_manifest_that_does_not_fit(tmp_path: Path, change: dict, message: str) -> None:
    content = {**json.loads(make_manifest([], "3.7.1").to_json()), **change}
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match=message):
        read(tmp_path)


def test_what_is_no_cubin_is_for_no_gpu() -> None:
    assert cubin_cache.sm_of(b"") == cubin_cache.sm_of(b"\x7fELF" + bytes(60)) == 0


@needs_triton
def test_smoke_subset_for_a_jetson(tmp_path: Path) -> None:
    variants = load_variants("smoke")
    manifest = compile_variants(variants, [JETSON], cache=tmp_path, jobs=1)
    assert len(manifest.cubins) == len(variants)


@needs_triton
@pytest.mark.slow
def test_whole_table_for_all_gpus(tmp_path: Path) -> None:
    variants = load_variants()
    manifest = compile_variants(variants, SMS, cache=tmp_path / "cache")
    expected = sum(sm >= variant.minimum_sm for variant in variants for sm in SMS)
    assert len(manifest.cubins) == expected
    aot.write(manifest, tmp_path / "out", cache=tmp_path / "cache")
    assert read(tmp_path / "out") == manifest

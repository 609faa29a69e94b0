"""variants.toml fits the kernels, stays small, and a wrong table is refused in a sentence."""

from __future__ import annotations

import importlib
import itertools
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.errors import EdgeattnError, MissingDependencyError, UsageError
from edgeattn.kernels import variants
from edgeattn.kernels.kernel import Kernel
from edgeattn.kernels.variants import all_kernels, load_variants

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton: install edgeattn[kernels]"
)

# All operators together may have this many per SM: compile time and size of the plugin library.
MOST_PER_SM = 150
PER_SM = {
    "recurrent_linear_attention": 60,
    "bidirectional_linear_attention": 16,
    "hadamard_transform": 18,
    "head_sparse_attention": 26,
    "fft_rope_attention": 20,
}

TABLE = """
    [minimum_sm]
    fp16 = 75
    bf16 = 80
    [subsets.few]
    dtypes = ["fp16"]
    constants = { A = [1] }
    [kernels."toy.sum"]
    dtypes = ["fp16", "bf16"]
    constants."A, B" = [[1, 10], [2, 20]]
    constants.C = ["x", "y"]
    restrictions = [{ constants = { A = 2, C = "y" }, minimum_sm = 90 }]
    [kernels."toy.copy"]
    dtypes = ["fp16"]
    constants = {}
"""


def toy(name: str, *constants: str) -> Kernel:
    function = SimpleNamespace(arg_names=["x", *constants])
    return Kernel(name, function, {"x": "*T"}, constants, ("1", "1", "1"))


TOYS = {kernel.name: kernel for kernel in (toy("toy.sum", "A", "B", "C"), toy("toy.copy"))}


@needs_triton
def test_table_compiles_every_kernel_with_its_constants() -> None:
    loaded = load_variants()
    assert {v.kernel.name for v in loaded} == set(all_kernels())
    for variant in loaded:
        assert tuple(variant.constants) == variant.kernel.constants, variant.name
    names = [variant.name for variant in loaded]
    assert len(set(names)) == len(names)


@needs_triton
def test_number_of_variants_per_sm() -> None:
    per_operator = Counter(v.kernel.name.partition(".")[0] for v in load_variants())
    assert per_operator == PER_SM
    assert sum(PER_SM.values()) <= MOST_PER_SM


@needs_triton
def test_smoke_is_a_handful_of_every_kernel() -> None:
    smoke = load_variants("smoke")
    assert {v.kernel.name for v in smoke} == set(all_kernels())
    assert {v.dtype for v in smoke} == {"fp16"}
    assert {v.constants["BLOCK"] for v in smoke if "BLOCK" in v.constants} == {64}
    assert len(smoke) <= 24


# Of each operator: dimensions besides the widths, and attributes, that all its kernels are for.
USES = {
    "recurrent_linear_attention": [
        ({"Dg": dg}, rule)
        for dg, rule in itertools.product((1, 8), ({}, {"delta": 1}, {"normalise": 1}))
    ],
    "bidirectional_linear_attention": [({}, {})],
    "head_sparse_attention": [({"S": None, "C": c}, {}) for c in ("fp16", "int8")],
    "fft_rope_attention": [({"Tq": None, "S": None, "N": None}, {})],
}


@needs_triton
@pytest.mark.parametrize("name", USES)
def test_what_an_operator_launches_is_what_is_compiled(name: str) -> None:
    operator = importlib.import_module(f"edgeattn.kernels.{name}")
    kernels = {kernel.name: kernel for kernel in operator.KERNELS}
    launched = set()
    for width, (dims, rule) in itertools.product((16, 32, 64, 128), USES[name]):
        dims = {"T": None, "D": width, "Dk": width, "Dv": width, **dims}
        for kernel, chosen in operator.variants(dims, operator.SPEC.complete_attributes(rule)):
            constants = operator.complete_constants(kernels[kernel], chosen)
            launched.add((kernel, *sorted(constants.items())))
    loaded = [v for v in load_variants() if v.kernel in operator.KERNELS]
    assert launched == {(v.kernel.name, *sorted(v.constants.items())) for v in loaded}


def test_constants_that_belong_together_and_dtypes() -> None:
    loaded = load_variants(table=TABLE, kernels=TOYS)
    assert [v.name for v in loaded] == [
        "toy.sum fp16 A=1 B=10 C=x",
        "toy.sum fp16 A=1 B=10 C=y",
        "toy.sum fp16 A=2 B=20 C=x",
        "toy.sum fp16 A=2 B=20 C=y",
        "toy.sum bf16 A=1 B=10 C=x",
        "toy.sum bf16 A=1 B=10 C=y",
        "toy.sum bf16 A=2 B=20 C=x",
        "toy.sum bf16 A=2 B=20 C=y",
        "toy.copy fp16",
    ]
    assert [v.minimum_sm for v in loaded] == [75, 75, 75, 90, 80, 80, 80, 90, 75]


def test_subset_ignores_constants_that_a_kernel_has_not() -> None:
    few = load_variants("few", table=TABLE, kernels=TOYS)
    names = ["toy.sum fp16 A=1 B=10 C=x", "toy.sum fp16 A=1 B=10 C=y", "toy.copy fp16"]
    assert [v.name for v in few] == names


values = st.lists(st.integers(-4, 200), min_size=1, max_size=4, unique=True)


@given(st.lists(values, min_size=0, max_size=4))
def test_expansion_is_the_product(axes: list[list[int]]) -> None:
    names = [f"C{i}" for i in range(len(axes))]
    constants = "".join(
        f"constants.{name} = {axis}\n" for name, axis in zip(names, axes, strict=True)
    )
    table = f"""
        subsets = {{}}
        minimum_sm = {{ fp32 = 75 }}
        [kernels."toy.any"]
        dtypes = ["fp32"]
        {constants or "constants = {}"}
    """
    loaded = load_variants(table=table, kernels={"toy.any": toy("toy.any", *names)})
    product = [dict(zip(names, row, strict=True)) for row in itertools.product(*axes)]
    assert [dict(v.constants) for v in loaded] == product


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("toy.copy", "toy.cpy", "'toy.cpy' is none: did you mean toy.copy"),
        ('dtypes = ["fp16"]\n    constants = {}', 'dtypes = ["fp16"]', "constants is wrong: Field"),
        ('["fp16", "bf16"]', '["fp16", "fp8"]', "dtypes is wrong: fp8 is none of fp16, bf16"),
        ('["fp16", "bf16"]', '["fp16", "fp16"]', "a dtype is there twice"),
        ('["fp16", "bf16"]', "[]", "dtypes is wrong: there are none"),
        ("bf16 = 80", "fp8 = 89", "minimum_sm is wrong: fp8 is none of fp32, fp16, bf16"),
        ("bf16 = 80", 'bf16 = "80"', r"minimum_sm\.bf16 is wrong"),
        ("constants.C", "constants.D", r"\['A', 'B', 'D'\] are given, the kernel has"),
        ('constants."A, B"', 'constants."A, A"', r"\['A', 'A', 'C'\] are given"),
        ("constants = {}", "constants = { E = [1] }", r"\['E'\] are given, the kernel has \[\]"),
        ("[[1, 10], [2, 20]]", "[[1, 10], [2]]", r"\[2\] are not 2 values"),
        ("[[1, 10], [2, 20]]", "[[1, 10], [1, 10]]", "a value is there twice"),
        ("[[1, 10], [2, 20]]", "[]", "it has no values"),
        ('["x", "y"]', '["x", "../y"]', "'../y' is neither a number nor a word"),
        ('["x", "y"]', "[1.5]", "is wrong: Input should be"),
        ('["x", "y"]', "[true]", "is wrong: Input should be"),
        ("{ A = 2, C", "{ A = 2, D", "restrictions is wrong: the kernel has no D"),
        ("{ A = [1] }", "{ Z = [1] }", "no kernel has Z"),
        ("[minimum_sm]", "surprise = 1\n[minimum_sm]", "surprise is wrong: Extra"),
        ("[minimum_sm]", "[minimum_sm", "the file is wrong: it does not parse"),
    ],
)
def test_wrong_tables_are_refused(old: str, new: str, message: str) -> None:
    assert old in TABLE
    with pytest.raises(EdgeattnError, match=message):
        load_variants(table=TABLE.replace(old, new), kernels=TOYS)


def test_unknown_subset() -> None:
    with pytest.raises(UsageError, match="'fwe' is none: did you mean few"):
        load_variants("fwe", table=TABLE, kernels=TOYS)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"install edgeattn\[kernels\]"):
        load_variants()


def test_importing_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import edgeattn.kernels.aot;"
        " assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

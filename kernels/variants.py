"""Which kernels are compiled ahead of time, and for which dtypes and constants: variants.toml.

Reading the table imports the kernels, and with them Triton.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from typing import TypeAlias

from pydantic import BaseModel, ConfigDict, ValidationError

from edgeattn.errors import EdgeattnError, MissingDependencyError, unknown_name
from edgeattn.kernels.kernel import Kernel
from edgeattn.ops.spec import FLOATS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Constant: TypeAlias = int | str

_TABLE = "variants.toml"


@dataclass(frozen=True)
class Variant:
    """One kernel with all that is fixed before it meets a GPU.

    Attributes:
        kernel: its description.
        dtype: of its "*T" pointers.
        constants: in the order of the kernel's.
        minimum_sm: lowest SM whose hardware has the dtype, and the memory where that is known.
    """

    kernel: Kernel
    dtype: str
    constants: Mapping[str, Constant]
    minimum_sm: int

    @property
    def name(self) -> str:
        """For people: "operator.kernel fp16 BLOCK=64"."""
        constants = (f"{name}={value}" for name, value in self.constants.items())
        return " ".join((self.kernel.name, self.dtype, *constants))


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class _Restriction(_Record):
    constants: dict[str, Constant]
    minimum_sm: int


class _Entry(_Record):
    dtypes: list[str]
    # "NAME" -> its values, or "NAME, OTHER" -> rows of values that belong together.
    constants: dict[str, list[Constant | list[Constant]]]
    # Variants with such constants are for later SMs only.
    restrictions: list[_Restriction] = []


class _Subset(_Record):
    dtypes: list[str]
    constants: dict[str, list[Constant]]


class _Table(_Record):
    minimum_sm: dict[str, int]
    subsets: dict[str, _Subset]
    kernels: dict[str, _Entry]


def all_kernels() -> dict[str, Kernel]:
    """The kernels of every module in this package, by name.

    Raises:
        MissingDependencyError: Triton is not installed.
    """
    require_triton()
    package = importlib.import_module("edgeattn.kernels")
    modules = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    imported = (importlib.import_module(f"{package.__name__}.{name}") for name in modules)
    return {k.name: k for module in imported for k in getattr(module, "KERNELS", ())}


def require_triton() -> None:
    """Raises MissingDependencyError where Triton is not installed; does not load it."""
    if find_spec("triton") is None:
        raise MissingDependencyError(
            expected="Triton, which compiles the kernels",
            came="it is not installed",
            todo="install edgeattn[kernels]",
        )


def load_variants(
    subset: str | None = None,
    *,
    table: str | None = None,
    kernels: Mapping[str, Kernel] | None = None,
) -> tuple[Variant, ...]:
    """The variants of the table, in its order.

    Args:
        subset: name of a subset of the table; None for all variants.
        table: text of another table than ours.
        kernels: by name; None for ours.

    Raises:
        EdgeattnError: the table does not parse, or does not fit the kernels.
        UsageError: it names an unknown kernel, or there is no such subset.
        MissingDependencyError: Triton is needed and not installed.
    """
    if kernels is None:
        kernels = all_kernels()
    if table is None:
        table = files("edgeattn.kernels").joinpath(_TABLE).read_text("utf-8")
    content = _parse(table)
    known = {constant for kernel in kernels.values() for constant in kernel.constants}
    for name, part in content.subsets.items():
        _check_dtypes(f"subsets.{name}.dtypes", part.dtypes, content)
        if unknown := sorted(set(part.constants) - known):
            raise _broken(f"subsets.{name}.constants", f"no kernel has {unknown[0]}")
    variants = tuple(
        variant
        for name, entry in content.kernels.items()
        for variant in _expand(_find(name, kernels), entry, content)
    )
    if subset is None:
        return variants
    if subset not in content.subsets:
        raise unknown_name("subset of the variants", subset, content.subsets)
    return tuple(v for v in variants if _belongs(v, content.subsets[subset]))


def _parse(text: str) -> _Table:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _broken("the file", f"it does not parse ({error})") from error
    try:
        table = _Table.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise _broken(field or "the file", first["msg"]) from error
    for dtype in table.minimum_sm:
        if dtype not in FLOATS:
            raise _broken("minimum_sm", f"{dtype} is none of {', '.join(FLOATS)}")
    return table


def _find(name: str, kernels: Mapping[str, Kernel]) -> Kernel:
    if name not in kernels:
        raise unknown_name(f"kernel in {_TABLE}", name, kernels)
    return kernels[name]


def _expand(kernel: Kernel, entry: _Entry, table: _Table) -> Iterator[Variant]:
    """The product of the entry's dtypes and constants."""
    where = f"kernels.{kernel.name}"
    _check_dtypes(f"{where}.dtypes", entry.dtypes, table)
    given = [name for key in entry.constants for name in _names(key)]
    if sorted(given) != sorted(kernel.constants):
        problem = f"{given} are given, the kernel has {list(kernel.constants)}"
        raise _broken(f"{where}.constants", problem)
    for restriction in entry.restrictions:
        if unknown := sorted(set(restriction.constants) - set(given)):
            raise _broken(f"{where}.restrictions", f"the kernel has no {unknown[0]}")
    axes = [_axis(where, key, values) for key, values in entry.constants.items()]
    for dtype in entry.dtypes:
        for rows in itertools.product(*axes):
            values = {name: value for row in rows for name, value in row.items()}
            constants = {name: values[name] for name in kernel.constants}
            restrictions = (r for r in entry.restrictions if r.constants.items() <= values.items())
            lowest = (table.minimum_sm[dtype], *(r.minimum_sm for r in restrictions))
            yield Variant(kernel, dtype, constants, max(lowest))


def _names(key: str) -> list[str]:
    return [name.strip() for name in key.split(",")]


def _axis(
    where: str, key: str, values: Sequence[Constant | Sequence[Constant]]
) -> list[dict[str, Constant]]:
    """One factor of the product: assignments of the constants in `key`."""
    where = f"{where}.constants.{key!r}"
    names = _names(key)
    rows = [[row] if isinstance(row, (int, str)) else list(row) for row in values]
    if not rows:
        raise _broken(where, "it has no values")
    for row in rows:
        if len(row) != len(names):
            raise _broken(where, f"{row} are not {len(names)} values")
        for value in row:
            # The names of cubins are made of them.
            if isinstance(value, str) and not re.fullmatch(r"\w+", value):
                raise _broken(where, f"{value!r} is neither a number nor a word")
    if len({tuple(row) for row in rows}) < len(rows):
        raise _broken(where, "a value is there twice")
    return [dict(zip(names, row, strict=True)) for row in rows]


def _check_dtypes(where: str, dtypes: Sequence[str], table: _Table) -> None:
    if not dtypes:
        raise _broken(where, "there are none")
    for dtype in dtypes:
        if dtype not in table.minimum_sm:
            raise _broken(where, f"{dtype} is none of {', '.join(table.minimum_sm)}")
    if len(set(dtypes)) < len(dtypes):
        raise _broken(where, "a dtype is there twice")


def _belongs(variant: Variant, subset: _Subset) -> bool:
    return variant.dtype in subset.dtypes and all(
        name not in variant.constants or variant.constants[name] in values
        for name, values in subset.constants.items()
    )


def _broken(field: str, problem: str) -> EdgeattnError:
    return EdgeattnError(
        expected="a table of variants that fits the kernels",
        came=f"in {_TABLE}, {field} is wrong: {problem}",
        todo="correct that entry",
    )

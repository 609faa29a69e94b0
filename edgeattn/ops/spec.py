"""What an operator is, as one frozen value: everything else is derived from it or checked by it.

Importing this, or any operator's SPEC, loads no torch and no onnx.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from edgeattn.errors import MissingDependencyError, RuntimeInputError

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "edgeattn"
OP_VERSION = 1

# By these TensorRT's parser finds the plugin of a node; every node of every operator carries them.
PLUGIN_ATTRIBUTES: Mapping[str, str] = MappingProxyType(
    {"plugin_namespace": DOMAIN, "plugin_version": str(OP_VERSION)}
)

# In a symbolic shape, and only at its front: any number of dimensions.
LEADING = "..."

FLOATS = ("fp32", "fp16", "bf16")
DTYPES = (*FLOATS, "int32", "int8", "bool")

# Which numbers an input may hold: "unit" ones lie between 0 and 1, "unit-norm" rows have length 1,
# "truth" is 0 or 1, "positive" ones are at least 1, "large" ones at least 0 and about 100,
# "series" rows are about 1, 1, 1/2, 1/6, …
VALUES = (
    *("any", "zero", "positive", "non-negative", "non-positive"),
    *("unit", "unit-norm", "truth", "series", "large"),
)
# Besides: integers between two, both among them; a symbol stands for its size: "1..S".
RANGE = re.compile(r"(\w+)\.\.(\w+)")

# A number, a name, or a framework's symbolic dimension.
Dim: TypeAlias = Any
Shape: TypeAlias = tuple[Dim, ...]
AttributeType = Literal["int", "float", "string"]
ShapeRule: TypeAlias = Callable[[Sequence[Shape], Mapping[str, Any]], tuple[Shape, ...]]
VariantRule: TypeAlias = Callable[
    [Mapping[str, Dim], Mapping[str, Any]], Iterable[tuple[str, Mapping[str, int]]]
]

PYTHON_TYPES = {"int": int, "float": float, "string": str}


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: unique within the operator.
        shape: symbols and fixed sizes, ("B", "T", "N"); `LEADING` may stand first.
        dtypes: allowed ones, of `DTYPES`.
        variable: tensors of one type variable have the same dtype in a node, and list the same. A
            variable with a choice, part of which is that of "T", has the dtype of "T" or another.
        updates: of an output, the input whose next value it is (a state); a runtime may keep both
            in one buffer.
        values: of an input, which numbers it may hold, of `VALUES` or as "1..S".
    """

    name: str
    shape: tuple[str | int, ...]
    dtypes: tuple[str, ...] = FLOATS
    variable: str = "T"
    updates: str | None = None
    values: str = "any"


@dataclass(frozen=True)
class AttributeSpec:
    """One attribute of the node.

    Attributes:
        name: unique within the operator.
        type: as ONNX names it.
        default: of a node without it; None if every node must have it.
    """

    name: str
    type: AttributeType
    default: int | float | str | None = None


@dataclass(frozen=True)
class Case:
    """One awkward use of the operator, for the tests of all its implementations.

    Attributes:
        name: unique within the operator, and readable in a test's name.
        dims: of every symbol in the shapes of the inputs; `LEADING` has a tuple.
        dtype: of the type variable "T".
        attributes: those that differ from the defaults.
        values: of inputs that must be narrower here than the dossier says, by name; as there.
        dtypes: of other type variables with a choice, where they have not that of "T".
    """

    name: str
    dims: Mapping[str, int | tuple[int, ...]]
    dtype: str = "fp32"
    attributes: Mapping[str, Any] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Tolerance:
    """How inexact an implementation may be, as in `verify.tolerance`.

    Its error against the reference in fp32, relative to the reference's root mean square, is at
    most twice that of the reference's formula computed in the low dtype, plus `floor`.

    Attributes:
        floor: what the plain computation may get exactly right by luck.
        reason: why this number.
    """

    floor: float
    reason: str


STANDARD_TOLERANCE: Mapping[str, Tolerance] = MappingProxyType(
    {
        "fp32": Tolerance(1e-5, "sums of a few thousand terms, in another order"),
        "fp16": Tolerance(2e-3, "two roundings of 2^-10 where plain torch may round once"),
        "bf16": Tolerance(1.6e-2, "two roundings of 2^-7 where plain torch may round once"),
    }
)


@dataclass(frozen=True)
class OpSpec:
    """The dossier of one operator of domain `DOMAIN`, version `OP_VERSION`.

    Attributes:
        name: in ONNX and TensorRT, whose parser minds no domain: no built-in may be called so.
        inputs: all mandatory; what is not used is given as a neutral tensor.
        outputs: all present.
        attributes: besides `PLUGIN_ATTRIBUTES`.
        infer_shapes: (shapes of the inputs, all attributes) -> shapes of the outputs. Takes
            symbolic dimensions; raises RuntimeInputError for shapes that do not fit.
        reference: (*inputs, **attributes) -> output or tuple of outputs, in readable torch. It
            computes in fp32 and is what the operator means.
        function_body: opset of the model -> the operator in standard ONNX operators.
        triton: "module:function" of the kernel, called like `reference`; None without one.
        plugin: whether `plugins/` holds a TensorRT plugin.
        variants: (dimensions by symbol and dtypes of `choices`, all attributes) -> kernels,
            "operator.kernel", that must be compiled for a node, with the constants that must fit;
            nothing while a dimension is not known. Raises RuntimeInputError where none can be. None
            without kernels.
        cases: for tests.
        tolerance: by dtype, one for every floating dtype of the first output.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    infer_shapes: ShapeRule
    reference: Callable[..., Any]
    function_body: Callable[[int], ir.Function]
    cases: tuple[Case, ...]
    tolerance: Mapping[str, Tolerance]
    attributes: tuple[AttributeSpec, ...] = ()
    triton: str | None = None
    plugin: bool = False
    variants: VariantRule | None = None

    def __post_init__(self) -> None:
        """Refuses a dossier that contradicts itself.

        Raises:
            ValueError: naming the operator and the first contradiction.
        """
        from edgeattn.ops.spec_problems import problems

        for problem in problems(self):
            raise ValueError(f"operator {self.name}: {problem}")

    def complete_attributes(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All attributes in the order of the dossier, defaults where none is given.

        Raises:
            RuntimeInputError: one is unknown, missing or of another type.
        """
        known = {a.name: a for a in self.attributes}
        for name in given:
            if name not in known:
                raise self._refused(f"attributes among {sorted(known)}", f"'{name}' was given")
        complete = {a.name: given.get(a.name, a.default) for a in self.attributes}
        for name, value in complete.items():
            if not has_type(value, known[name].type):
                raise self._refused(
                    f"{known[name].type} as its attribute {name}", f"{value!r} was given"
                )
        return complete

    def output_shapes(self, *inputs: Shape, **attributes: Any) -> tuple[Shape, ...]:
        """Shapes of the outputs; attributes that are not given have their defaults.

        Raises:
            RuntimeInputError: shapes or attributes do not fit the operator.
        """
        return self.infer_shapes(inputs, self.complete_attributes(attributes))

    def input_shapes(self, case: Case) -> tuple[tuple[int, ...], ...]:
        """Concrete shapes of the inputs of a test case."""

        def flat(symbol: str | int) -> tuple[int, ...]:
            size = symbol if isinstance(symbol, int) else case.dims[symbol]
            return size if isinstance(size, tuple) else (size,)

        return tuple(
            tuple(size for symbol in tensor.shape for size in flat(symbol))
            for tensor in self.inputs
        )

    @property
    def choices(self) -> tuple[str, ...]:
        """Type variables of inputs with a choice of dtypes, but "T"."""
        found = (t.variable for t in self.inputs if t.variable != "T" and len(t.dtypes) > 1)
        return tuple(dict.fromkeys(found))

    def allowed_dtypes(self, tensor: TensorSpec, dtype: str) -> tuple[str, ...]:
        """What an input or output may have where type variable "T" is `dtype`."""
        kernels = {d for t in self.inputs if t.variable == "T" for d in t.dtypes}
        if tensor.variable == "T":
            return (dtype,)
        if len(tensor.dtypes) == 1:
            return tensor.dtypes
        return tuple(d for d in tensor.dtypes if d == dtype or d not in kernels)

    @property
    def snake_name(self) -> str:
        """As torch, kernels and C++ files have it: "recurrent_linear_attention"."""
        return re.sub(r"(?<=.)(?=[A-Z])", "_", self.name).lower()

    @property
    def meaning(self) -> str:
        """The formula in words: the text at the head of the operator's file."""
        text = importlib.import_module(self.reference.__module__).__doc__ or ""
        return text.partition(": ")[2].strip()

    def to_dict(self) -> dict[str, Any]:
        """The facts of the dossier, JSON-ready; not its functions and cases."""
        return {
            "name": self.name,
            "domain": DOMAIN,
            "version": OP_VERSION,
            "inputs": [asdict(tensor) for tensor in self.inputs],
            "outputs": [asdict(tensor) for tensor in self.outputs],
            "attributes": [asdict(attribute) for attribute in self.attributes],
            "implementations": [
                "reference",
                "function body",
                *(["triton"] if self.triton else []),
                *(["plugin"] if self.plugin else []),
            ],
            "tolerance": {dtype: asdict(allowed) for dtype, allowed in self.tolerance.items()},
        }

    def kernel(self) -> Callable[..., Any] | None:
        """The Triton kernel, imported now; None without one.

        Raises:
            MissingDependencyError: Triton is not installed.
        """
        if self.triton is None:
            return None
        module, _, function = self.triton.partition(":")
        try:
            kernel: Callable[..., Any] = getattr(importlib.import_module(module), function)
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                expected=f"Triton, for the kernels of {self.name}",
                came=f"{error.name} is not installed",
                todo="install edgeattn[kernels]",
            ) from error
        return kernel

    def _refused(self, expected: str, came: str) -> RuntimeInputError:
        return RuntimeInputError(
            expected=f"operator {self.name} with {expected}",
            came=came,
            todo=f"see edgeattn.ops for what {self.name} takes",
        )


def bind(tensors: Sequence[TensorSpec], shapes: Sequence[Shape]) -> dict[str, Dim]:
    """The dimension behind every symbol; that of `LEADING` is a tuple.

    Two known numbers of one symbol must agree; symbolic dimensions are taken on trust, and a number
    is preferred to them.

    Raises:
        RuntimeInputError: number of tensors, rank or dimensions do not fit.
    """
    if len(shapes) != len(tensors):
        raise _misfit(f"{len(tensors)} inputs", f"{len(shapes)} were given")
    dims: dict[str, Dim] = {}
    for tensor, shape in zip(tensors, shapes, strict=True):
        symbols, sizes = tensor.shape, tuple(shape)
        if symbols[:1] == (LEADING,):
            symbols = symbols[1:]
            leading = len(sizes) - len(symbols)
            dims[LEADING], sizes = sizes[: max(leading, 0)], sizes[max(leading, 0) :]
        if len(sizes) != len(symbols):
            raise _misfit(f"{tensor.name} {_text(tensor.shape)}", f"its shape is {_text(shape)}")
        for symbol, size in zip(symbols, sizes, strict=True):
            known = symbol if isinstance(symbol, int) else dims.get(symbol, size)
            if isinstance(known, int) and isinstance(size, int) and known != size:
                raise _misfit(
                    f"{tensor.name} {_text(tensor.shape)} with {symbol} = {known}",
                    f"its shape is {_text(shape)}",
                )
            if isinstance(symbol, str):
                dims[symbol] = known if isinstance(known, int) else size
    return dims


def refused(operator: str, expected: str, came: str) -> RuntimeInputError:
    """The error of inputs that an operator does not take, for its file to raise."""
    return RuntimeInputError(
        expected=expected, came=f"{came} came", todo=f"see {operator} in edgeattn.ops"
    )


def _misfit(expected: str, came: str) -> RuntimeInputError:
    return RuntimeInputError(
        expected=expected, came=came, todo="give tensors of the operator's shapes"
    )


def _text(shape: Iterable[Dim]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def value_range(values: str, case: Case) -> tuple[int, int] | None:
    """The least and the largest of integers "a..b" in a case; None of other numbers."""
    range_ = RANGE.fullmatch(values)
    if range_ is None:
        return None
    least, largest = (int(e) if e.isdigit() else case.dims[e] for e in range_.groups())
    if not (isinstance(least, int) and isinstance(largest, int)):
        raise ValueError(f"case {case.name}: {values} are no integers")
    return least, largest


def has_type(value: Any, type: AttributeType) -> bool:
    """Whether an attribute of a type may be `value`."""
    return isinstance(value, PYTHON_TYPES[type]) and not isinstance(value, bool)

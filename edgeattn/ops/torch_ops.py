"""The operators in torch: `torch.ops.edgeattn.<operator>`, derived from their dossiers.

Importing this registers all of them. They take the inputs in order, the attributes by name, and
`impl`: "reference" or "triton". Nothing chooses for the caller and nothing falls back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, library

from edgeattn.errors import RuntimeInputError, unknown_name
from edgeattn.ops import ALL_OPS
from edgeattn.ops.spec import DOMAIN, AttributeSpec, OpSpec

IMPLEMENTATIONS = ("reference", "triton")
_SCHEMA_TYPES = {"int": "int", "float": "float", "string": "str"}
DTYPES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.int32: "int32",
        torch.int8: "int8",
        torch.bool: "bool",
    }
)


def schema(spec: OpSpec) -> str:
    """The signature in torch's language."""
    inputs = [f"Tensor {tensor.name}" for tensor in spec.inputs]
    keywords = [_keyword(attribute) for attribute in spec.attributes]
    keywords.append('str impl="reference"')
    outputs = ", ".join(["Tensor"] * len(spec.outputs))
    result = outputs if len(spec.outputs) == 1 else f"({outputs})"
    return f"({', '.join([*inputs, '*', *keywords])}) -> {result}"


def _keyword(attribute: AttributeSpec) -> str:
    default = attribute.default
    if default is None:
        return f"{_SCHEMA_TYPES[attribute.type]} {attribute.name}"
    shown = f'"{default}"' if isinstance(default, str) else repr(default)
    return f"{_SCHEMA_TYPES[attribute.type]} {attribute.name}={shown}"


def check_inputs(
    spec: OpSpec, inputs: Sequence[Tensor], attributes: Mapping[str, Any]
) -> tuple[tuple[Any, ...], ...]:
    """Refuses inputs that the dossier does not allow; the shapes of the outputs.

    Raises:
        RuntimeInputError: shapes, dtypes, devices or attributes do not fit.
    """
    shapes = spec.output_shapes(*(tuple(x.shape) for x in inputs), **attributes)
    variables: dict[str, tuple[str, str]] = {}
    for tensor, value in zip(spec.inputs, inputs, strict=True):
        found = DTYPES.get(value.dtype, str(value.dtype))
        if found not in tensor.dtypes:
            raise _refused(spec, f"{tensor.name} in {' or '.join(tensor.dtypes)}", f"it is {found}")
        first, dtype = variables.setdefault(tensor.variable, (tensor.name, found))
        if dtype != found:
            raise _refused(spec, f"{tensor.name} in {dtype} like {first}", f"it is {found}")
    kernels, dtype = variables["T"]
    for tensor in spec.inputs:
        found, choices = variables[tensor.variable][1], spec.allowed_dtypes(tensor, dtype)
        if found not in choices:
            allowed = f"{tensor.name} in {' or '.join(choices)}, like {kernels}"
            raise _refused(spec, allowed, f"it is {found}")
    places = {value.device for value in inputs}
    if len(places) > 1:
        raise _refused(spec, "inputs on one device", f"they are on {sorted(map(str, places))}")
    return shapes


def implementation(spec: OpSpec, impl: str) -> Callable[..., Any]:
    """The function that computes the operator.

    Raises:
        UsageError: no such implementation.
        RuntimeInputError: the operator has no kernel.
    """
    if impl not in IMPLEMENTATIONS:
        raise unknown_name("implementation", impl, IMPLEMENTATIONS)
    if impl == "reference":
        return spec.reference
    kernel = spec.kernel()
    if kernel is None:
        raise _refused(spec, "a Triton kernel", "there is none yet")
    return kernel


def _register(spec: OpSpec) -> Callable[..., Any]:

    def run(*inputs: Tensor, impl: str = "reference", **attributes: Any) -> Any:
        check_inputs(spec, inputs, attributes)
        return implementation(spec, impl)(*inputs, **attributes)

    def fake(*inputs: Tensor, impl: str = "reference", **attributes: Any) -> Any:
        shapes = check_inputs(spec, inputs, attributes)
        dtypes = {t.variable: x.dtype for t, x in zip(spec.inputs, inputs, strict=True)}
        outputs = tuple(
            inputs[0].new_empty(shape, dtype=dtypes[tensor.variable])
            for tensor, shape in zip(spec.outputs, shapes, strict=True)
        )
        return outputs if len(outputs) > 1 else outputs[0]

    operator = library.custom_op(
        f"{DOMAIN}::{spec.snake_name}", run, mutates_args=(), schema=schema(spec)
    )
    operator.register_fake(fake)
    return operator


def _refused(spec: OpSpec, expected: str, came: str) -> RuntimeInputError:
    return RuntimeInputError(
        expected=f"{expected} for operator {spec.name}",
        came=came,
        todo=f"see edgeattn ops {spec.name}",
    )


TORCH_OPS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {spec.name: _register(spec) for spec in ALL_OPS}
)

"""What is wrong with an operator's dossier: the checks of `edgeattn.ops.spec.OpSpec`."""

from __future__ import annotations

import re
from collections.abc import Iterable

from edgeattn.errors import RuntimeInputError
from edgeattn.ops.spec import (
    DTYPES,
    FLOATS,
    LEADING,
    PLUGIN_ATTRIBUTES,
    RANGE,
    VALUES,
    Case,
    OpSpec,
    has_type,
)


def problems(spec: OpSpec) -> Iterable[str]:
    """What contradicts itself, as clauses.

    Args:
        spec: of an operator.
    """
    if not re.fullmatch(r"([A-Z][a-z0-9]*)+", spec.name):
        yield "its name is not in PascalCase"
    if not (spec.inputs and spec.outputs and spec.cases):
        yield "it needs inputs, outputs and cases"
        return
    tensors = (*spec.inputs, *spec.outputs)
    names = (*(t.name for t in tensors), *(a.name for a in spec.attributes), *PLUGIN_ATTRIBUTES)
    yield from _name_problems(names, r"[a-z]\w*")
    yield from _name_problems((c.name for c in spec.cases), r"[\w-]+")
    yield from _tensor_problems(spec)
    symbols = {symbol for tensor in spec.inputs for symbol in tensor.shape}
    for name in symbols & set(spec.choices):  # `variants` are given both by their names
        yield f"{name} is a size and a type variable with a choice"
    for attribute in spec.attributes:
        if attribute.default is not None and not has_type(attribute.default, attribute.type):
            yield f"attribute {attribute.name} is no {attribute.type} by default"
    for case in spec.cases:
        yield from _case_problems(spec, case)
    if spec.variants is not None and spec.triton is None:
        yield "it has variants of a kernel, and no kernel"
    if spec.plugin and spec.variants is None:
        yield "it has a plugin, and no variants of a kernel for it"
    if spec.triton is not None and not re.fullmatch(r"[\w.]+:\w+", spec.triton):
        yield f"triton is {spec.triton!r}, not 'module:function'"
    floats = {d for d in spec.outputs[0].dtypes if d in FLOATS}
    if set(spec.tolerance) != floats:
        yield f"tolerances are given for {sorted(spec.tolerance)}, needed for {sorted(floats)}"
    for dtype, tolerance in spec.tolerance.items():
        if not 0 < tolerance.floor < 1 or not tolerance.reason.strip():
            yield f"the tolerance of {dtype} needs a floor between 0 and 1 and a reason"


def _name_problems(names: Iterable[str], pattern: str) -> Iterable[str]:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            yield f"the name {name} is there twice"
        if not re.fullmatch(pattern, name):
            yield f"the name {name!r} does not match {pattern}"
        seen.add(name)


def _tensor_problems(spec: OpSpec) -> Iterable[str]:
    inputs = {t.name: t for t in spec.inputs}
    if sum(LEADING in t.shape for t in spec.inputs) > 1:
        yield f"more than one input has {LEADING}"
    variables: dict[str, tuple[str, ...]] = {}
    for tensor in (*spec.inputs, *spec.outputs):
        if not tensor.dtypes or not set(tensor.dtypes) <= set(DTYPES):
            yield f"{tensor.name} has dtypes {tensor.dtypes}, not of {DTYPES}"
        if variables.setdefault(tensor.variable, tensor.dtypes) != tensor.dtypes:
            yield f"{tensor.name} has other dtypes than type variable {tensor.variable} elsewhere"
        if not _are_values(tensor.values, spec):
            yield f"{tensor.name} has values {tensor.values!r}, not of {VALUES}"
        if LEADING in tensor.shape[1:]:
            yield f"{tensor.name} has {LEADING} behind other dimensions"
        if tensor.updates is None:
            continue
        state = inputs.get(tensor.updates)
        if state is None or (state.shape, state.variable) != (tensor.shape, tensor.variable):
            yield f"{tensor.name} updates {tensor.updates}, which is no input of its kind"
        if tensor.name in inputs:
            yield f"{tensor.name} is an input and updates {tensor.updates}"


def _are_values(values: str, spec: OpSpec) -> bool:
    """Whether inputs may be said to hold such numbers."""
    range_ = RANGE.fullmatch(values)
    symbols = {s for t in spec.inputs for s in t.shape if isinstance(s, str)}
    ends = range_.groups() if range_ else ()
    return values in VALUES or (bool(ends) and all(end.isdigit() or end in symbols for end in ends))


def _case_problems(spec: OpSpec, case: Case) -> Iterable[str]:
    symbols = {s for t in spec.inputs for s in t.shape if isinstance(s, str)}
    if set(case.dims) != symbols:
        yield f"case {case.name} sizes {sorted(case.dims)} instead of {sorted(symbols)}"
        return
    inputs = {t.name for t in spec.inputs}
    known = all(_are_values(values, spec) for values in case.values.values())
    if not (set(case.values) <= inputs and known):
        yield f"case {case.name} has values {dict(case.values)}, not of inputs and of {VALUES}"
    if case.dtype not in {d for t in spec.inputs if t.variable == "T" for d in t.dtypes}:
        yield f"case {case.name} has dtype {case.dtype}"
    for tensor in spec.inputs:
        dtype = case.dtypes.get(tensor.variable)
        if dtype is not None and dtype not in spec.allowed_dtypes(tensor, case.dtype):
            yield f"case {case.name} has {tensor.name} in {dtype}"
    try:
        spec.output_shapes(*spec.input_shapes(case), **case.attributes)
    except RuntimeInputError as error:
        yield f"case {case.name}: {error}"

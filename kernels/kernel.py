"""What a Triton kernel is besides its code: its arguments, its grid, its variants.

One description serves the launch from PyTorch, the cross-compiler (`aot`) and the C++ launcher, for
which `aot` writes it down as a header.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Of pointers: to the variant's dtype or to what is named; else numbers passed by value.
ArgumentType = Literal["*T", "*fp32", "*i32", "*i8", "i32", "fp32"]
TYPES: tuple[ArgumentType, ...] = ("*T", "*fp32", "*i32", "*i8", "i32", "fp32")


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel of an operator.

    Attributes:
        name: "operator.kernel", in snake_case.
        function: the `triton.jit` function.
        arguments: in order, without the constants: name -> type.
        constants: names of its `tl.constexpr` arguments, which follow the others.
        grid: blocks along x, y and z as integer expressions that are C++ and Python alike, of +, *,
            parentheses and cdiv(a, b), over i32 arguments, constants and `sizes`.
        sizes: further integers the grid needs.
        num_warps: per block.
        num_stages: of software pipelining.
    """

    name: str
    function: Any
    arguments: Mapping[str, ArgumentType]
    constants: tuple[str, ...]
    grid: tuple[str, str, str]
    sizes: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        """Refuses a description that is not that of the function.

        Raises:
            ValueError: naming the kernel and what differs.
        """
        declared = tuple(self.function.arg_names)
        if (given := (*self.arguments, *self.constants)) != declared:
            raise ValueError(f"kernel {self.name} takes {declared}, its description says {given}")
        integers = {name for name, kind in self.arguments.items() if kind == "i32"}
        known = {*integers, *self.constants, *self.sizes, "cdiv"}
        for expression in self.grid:
            names = {n.id for n in ast.walk(ast.parse(expression)) if isinstance(n, ast.Name)}
            if names - known:
                raise ValueError(f"the grid of {self.name} uses unknown {sorted(names - known)}")

    def blocks(self, values: Mapping[str, int]) -> tuple[int, int, int]:
        """The grid for given integers: arguments, constants and sizes."""
        x, y, z = (_evaluate(ast.parse(e, mode="eval").body, values) for e in self.grid)
        return x, y, z

    def launch(self, values: Mapping[str, Any]) -> None:
        """Runs the kernel from PyTorch, compiled for the GPU of its tensors or interpreted.

        Args:
            values: arguments, constants and sizes by name; tensors are contiguous.
        """
        integers = {name: value for name, value in values.items() if isinstance(value, int)}
        given = {name: values[name] for name in (*self.arguments, *self.constants)}
        self.function[self.blocks(integers)](
            **given, num_warps=self.num_warps, num_stages=self.num_stages
        )


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def _evaluate(node: ast.expr, values: Mapping[str, int]) -> int:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return values[name]
        case ast.BinOp(left, ast.Add(), right):
            return _evaluate(left, values) + _evaluate(right, values)
        case ast.BinOp(left, ast.Mult(), right):
            return _evaluate(left, values) * _evaluate(right, values)
        case ast.Call(func=ast.Name(id="cdiv"), args=[left, right]):
            return cdiv(_evaluate(left, values), _evaluate(right, values))
    raise ValueError(f"no expression of a grid: {ast.unparse(node)}")

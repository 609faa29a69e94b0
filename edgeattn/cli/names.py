"""Types of options whose values have names: what a shell offers for them.

They check nothing: what reads a value refuses it, in the same sentence for a recipe's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import click
from click.shell_completion import CompletionItem


class Names(click.types.StringParamType):
    """A text of which some values are known.

    Args:
        known: (what was typed so far) -> values, of which those that continue it are offered.
    """

    def __init__(self, known: Callable[[str], Iterable[str]]) -> None:
        self._known = known

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        """The known values that begin with `incomplete`."""
        return [CompletionItem(v) for v in self._known(incomplete) if v.startswith(incomplete)]


class _Paths(click.types.StringParamType):
    """A file, a folder, or what is named like one: a shell offers its own."""

    name = "path"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem[str]]:
        """Asks the shell."""
        return [CompletionItem(incomplete, type="file")]


def one_of(*values: str) -> Names:
    """The type of an option with a handful of values."""
    return Names(lambda incomplete: values)


def _targets(incomplete: str) -> Iterable[str]:
    # not at the top: `edgeattn --help` must not wait for pydantic
    from edgeattn.devices.registry import all_devices

    name, at, _ = incomplete.partition("@")
    for device in all_devices():
        names = (device.name, *device.aliases)
        if at and name in names:
            yield from (f"{name}@{software}" for software in device.software.allowed)
        elif not at:
            yield from names


def _options(incomplete: str, options: Mapping[str, Iterable[str]]) -> Iterable[str]:
    """Of `NAME[:key=value,…]`: names, and behind a colon or comma the keys of that name."""
    name, colon, rest = incomplete.partition(":")
    if not colon:
        return options
    given, comma, _ = rest.rpartition(",")
    used = {item.partition("=")[0] for item in given.split(",")}
    front = f"{name}:{given}{comma}"
    return (f"{front}{key}=" for key in options.get(name, ()) if key not in used)


def _schemes(incomplete: str) -> Iterable[str]:
    from edgeattn.quant.scheme import SCHEMES

    return _options(incomplete, {name: scheme.options for name, scheme in SCHEMES.items()})


def _variants(incomplete: str) -> Iterable[str]:
    from dataclasses import fields

    from edgeattn.attention import REQUESTS

    keys = {name: [field.name for field in fields(kind)] for name, kind in REQUESTS.items()}
    return _options(incomplete, keys)


def _operators(incomplete: str) -> Iterable[str]:
    from edgeattn.ops import ALL_OPS

    return (spec.name for spec in ALL_OPS)


PATH = _Paths()
TARGET = Names(_targets)
SCHEME = Names(_schemes)
VARIANT = Names(_variants)
OPERATOR = Names(_operators)
DTYPE = one_of("fp32", "fp16", "bf16")
PROVIDER = one_of("cpu", "cuda", "tensorrt")
BACKEND = one_of("onnxruntime", "tensorrt")
FLAVOUR = one_of("tensorrt", "tensorrt-rtx")

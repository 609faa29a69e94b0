"""Schemes are values: parsing, options, refusals."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.errors import UsageError
from edgeattn.quant.scheme import SCHEMES, parse_scheme


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_parses_to_itself(name: str) -> None:
    assert parse_scheme(name) == SCHEMES[name]
    assert parse_scheme(name).label == name


@pytest.mark.parametrize("group", [32, 64, 128])
def test_group_is_an_option_of_w4(group: int) -> None:
    scheme = parse_scheme(f"w4-rtn:group={group}")
    assert scheme.linear is not None
    assert scheme.linear.group_size == group
    assert parse_scheme(scheme.label) == scheme


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("w4-rt", "did you mean w4-rtn"),
        ("w8-rtn:group=64", "an option of scheme w8-rtn"),
        ("w4-rtn:group=48", "group=32 or 64 or 128"),
        ("w4-rtn:group=", "group=32 or 64 or 128"),
        ("w4-rtn:groups=64", "'groups' was given"),
        ("", "known"),
    ],
)
def test_refusals_say_what_is_allowed(text: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        parse_scheme(text)


@given(st.text())
def test_any_text_parses_or_is_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        parse_scheme(text)

"""What `--attention` takes."""

from __future__ import annotations

from dataclasses import asdict
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeattn.attention import (
    FftRope,
    FftRopeRequest,
    GroupQueryRequest,
    HeadSparse,
    HeadSparseRequest,
    Lion,
    LionRequest,
    layer_attention,
    parse_attention,
)
from edgeattn.errors import UsageError


def test_defaults_and_options() -> None:
    assert parse_attention("fft-rope") == FftRopeRequest()
    found = parse_attention("fft-rope:degree=1,sink=0,window=128,tolerance=2.5%")
    assert found == FftRopeRequest(1, 0, 128, 0.025)
    found = parse_attention("fft-rope:heads=a/b.json")
    assert found == FftRopeRequest(heads="a/b.json")
    assert not found.needs_calibration
    found = parse_attention("head-sparse:density=7/9,unit=groups,layers=importance")
    assert found == HeadSparseRequest(Fraction(7, 9), "groups", "importance")
    assert found.needs_calibration
    found = parse_attention("gqa:kv_heads=2,heads=8")
    assert found == GroupQueryRequest(2, 8)
    assert found.label == "gqa:kv_heads=2,heads=8"
    assert parse_attention("gqa:heads=4") == GroupQueryRequest(heads=4)
    for variant, feature_map in (("lit", "elu"), ("d", "silu"), ("s", "silu")):
        found = parse_attention(f"lion:variant={variant}")
        assert isinstance(found, LionRequest)
        assert found.label == f"lion:variant={variant}"
        assert found.layer == Lion(variant, feature_map)
        assert layer_attention(asdict(found.layer)) == found.layer


@pytest.mark.parametrize(
    ("text", "density"),
    [("0.75", "3/4"), ("75%", "3/4"), (".5", "1/2"), ("1", "1"), ("100%", "1"), ("7/9", "7/9")],
)
def test_densities(text: str, density: str) -> None:
    found = parse_attention(f"head-sparse:density={text}")
    assert isinstance(found, HeadSparseRequest)
    assert found.density == Fraction(density)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "a known attention variant"),
        ("fft_rope", "did you mean fft-rope"),
        ("head-sparse", "no density was given"),
        ("lion", "no variant was given"),
        ("lion:variant=x", "lit or d or s"),
        ("lion:density=1/2", "option of lion"),
        ("head-sparse:density=0", "above 0 up to 1"),
        ("head-sparse:density=9/7", "above 0 up to 1"),
        ("head-sparse:density=1/0", "above 0 up to 1"),
        ("head-sparse:density=1e-3", "above 0 up to 1"),
        ("head-sparse:density=nan", "above 0 up to 1"),
        ("head-sparse:density=-0.5", "above 0 up to 1"),
        ("head-sparse:density=0.5,unit=layers", "heads or groups"),
        ("head-sparse:density=0.5,density=0.6", "given twice"),
        ("head-sparse:density=0.5,routers=", "routers=FILE"),
        ("gqa", "neither was given"),
        ("gqa:kv_heads=0", "whole number from 1"),
        ("gqa:kv_heads=two", "whole number from 1"),
        ("gqa:kv_heads=2,kv_heads=1", "given twice"),
        ("gqa:kv-heads=2", "did you mean kv_heads"),
        ("head-sparse:densty=0.5", "did you mean density"),
        ("fft-rope:degree=5", "from 0 to 4"),
        ("fft-rope:degree=-1", "from 0 to 4"),
        ("fft-rope:degree=²", "from 0 to 4"),
        ("fft-rope:window=0", "from 1 to"),
        ("fft-rope:tolerance=0", "between 0 and 1"),
        ("fft-rope:tolerance=inf", "between 0 and 1"),
        ("fft-rope:tolerance", "between 0 and 1"),
        ("fft-rope:heads=a,window=128", "heads=FILE alone"),
        ("fft-rope:density=0.5", "a known option of fft-rope"),
    ],
)
def test_refusals(text: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        parse_attention(text)


DENSITIES = st.from_regex(r"[0-9]{0,2}[./]?[0-9]{1,10}%?", fullmatch=True)


@given(DENSITIES.map("head-sparse:density={}".format) | st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse_attention(text)
    except UsageError:
        return
    assert parse_attention(found.label) == found


@pytest.mark.parametrize("attention", [None, FftRope(2, 4, 64), HeadSparse(7, groups=True)])
def test_layers_survive_json(attention: FftRope | HeadSparse | None) -> None:
    assert layer_attention(attention and asdict(attention)) == attention

"""Schemes are values: parsing, options, refusals."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from edgeattn.errors import UsageError
from edgeattn.quant.scheme import SCHEMES, WeightFormat, parse_scheme


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


# What the options of each scheme may be, and by hand what they then mean.
MEANINGS: dict[str, dict[str, object]] = {
    "group=32": {"linear": WeightFormat(4, 32)},
    "group=64": {"linear": WeightFormat(4, 64)},
    "group=128": {"linear": WeightFormat(4, 128)},
    "down_proj=w4": {"down_proj": None},
    "down_proj=w8": {"down_proj": WeightFormat(8)},
    "order=act": {"act_order": True},
    "order=natural": {"act_order": False},
    "rotation=hadamard": {"rotation": "hadamard"},
    "rotation=auto": {"rotation": "auto"},
    "rotation=none": {"rotation": "none", "online": False},
    "online=on": {"online": True},
    "online=off": {"online": False},
    "keep=0": {"keep": 0.0},
    "keep=0.05": {"keep": 0.05},
    "keep=12.5%": {"keep": 0.125},
    "keep=100%": {"keep": 1.0},
    "head=w4": {"small_head": True},
    "head=w8": {"small_head": False},
    "refit=on": {"refit": True},
    "refit=off": {"refit": False},
    "objective=kl": {"objective": "kl"},
    "objective=cross-entropy": {"objective": "cross-entropy"},
    "range=max": {"range": "max"},
    "range=mse": {"range": "mse"},
    "kv=int8": {"kv_bits": 8},
    "kv=float": {"kv_bits": None},
    "steps=1": {"steps": 1},
    "steps=100000": {"steps": 100_000},
}
GPTQ = {"group", "down_proj", "order", "refit", "keep", "kv"}
OPTIONS = {
    "none": set(),
    "w8-rtn": set(),
    "w4-rtn": {"group", "down_proj"},
    "w4a16-gptq": GPTQ,
    "w4a16-spinquant": GPTQ | {"head", "rotation"},
    "w4a16-spinquant-learned": GPTQ | {"head", "steps", "objective"},
    "w8a8": {"refit", "keep", "range", "kv"},
    "w8a8-spinquant": {"refit", "keep", "range", "kv", "rotation", "online"},
}
PAIRS = [
    (name, item)
    for name, keys in OPTIONS.items()
    for item in MEANINGS
    if item.partition("=")[0] in keys
]


def test_the_options_are_those() -> None:
    assert {name: set(scheme.options) for name, scheme in SCHEMES.items()} == OPTIONS


@pytest.mark.parametrize(("name", "item"), PAIRS)
def test_an_option_means_what_it_says(name: str, item: str) -> None:
    scheme, expected = parse_scheme(f"{name}:{item}"), replace(SCHEMES[name], **MEANINGS[item])
    assert replace(scheme, settings=()) == expected
    changes = expected != SCHEMES[name]
    assert scheme.label == (f"{name}:{item}" if changes else name)


@pytest.mark.parametrize("key", sorted({key for keys in OPTIONS.values() for key in keys}))
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_of_another_scheme_is_refused(name: str, key: str) -> None:
    item = next(item for item in MEANINGS if item.startswith(f"{key}="))
    if key in OPTIONS[name]:
        parse_scheme(f"{name}:{item}")
        return
    with pytest.raises(UsageError, match=f"an option of scheme {name}") as caught:
        parse_scheme(f"{name}:{item}")
    for known in OPTIONS[name]:
        assert known in str(caught.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("w4a16-gptq:group=0", "group=32 or 64 or 128"),
        ("w4a16-gptq:group=-32", "group=32 or 64 or 128"),
        ("w4a16-gptq:group=32.0", "group=32 or 64 or 128"),
        ("w4a16-gptq:group=\u0663\u0662", "group=32 or 64 or 128"),  # Arabic digits
        ("w4a16-gptq:down_proj=w16", "down_proj=w4 or w8"),
        ("w4a16-gptq:down_proj", "down_proj=w4 or w8"),
        ("w4a16-gptq:order=random", "order=act or natural"),
        ("w4a16-spinquant:rotation=learned", "rotation=hadamard or auto or none"),
        ("w8a8-spinquant:online=yes", "online=on or off"),
        ("w8a8:keep=1.01", "keep=a share from 0 to 1"),
        ("w8a8:keep=101%", "keep=a share from 0 to 1"),
        ("w8a8:keep=-1%", "keep=a share from 0 to 1"),
        ("w8a8:keep=5%%", "keep=a share from 0 to 1"),
        ("w8a8:keep=nan", "keep=a share from 0 to 1"),
        ("w8a8:keep=inf", "keep=a share from 0 to 1"),
        ("w8a8:keep=", "keep=a share from 0 to 1"),
        ("w8a8:keep=some", "keep=a share from 0 to 1"),
        ("w4a16-spinquant-learned:steps=0", "steps=a number from 1 to 100000"),
        ("w4a16-spinquant-learned:steps=100001", "steps=a number from 1 to 100000"),
        ("w4a16-spinquant-learned:steps=1e3", "steps=a number from 1 to 100000"),
        ("w4a16-spinquant-learned:steps=", "steps=a number from 1 to 100000"),
        ("w8a8:", None),
        ("w8a8:,,", None),
        ("w8a8:=5%", "'' was given"),
        ("W8A8", "did you mean w8a8"),
        ("w8a8 ", "did you mean w8a8"),
        ("w4a16-spinquant:learned", "'learned' was given"),
        ("w4-rtn:kv=int8", "'kv' was given, whose scales are measured on a calibration text"),
        ("w8-rtn:kv=int8", "'kv' was given, whose scales are measured on a calibration text"),
        ("w8a8-spinquant:rotation=none,online=on", "rotates its weights, for online=on"),
        ("w8a8-spinquant:online=on,rotation=none", "rotates its weights, for online=on"),
        ("w8a8-spinquant:online=off,rotation=none,online=on", "rotation=none was given"),
    ],
)
def test_values_that_are_not_allowed(text: str, part: str | None) -> None:
    if part is None:
        assert parse_scheme(text).label == "w8a8"
        return
    with pytest.raises(UsageError, match=re.escape(part)) as caught:
        parse_scheme(text)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@given(st.data())
def test_any_combination_of_options_round_trips(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(OPTIONS)))
    items = [
        data.draw(st.sampled_from([i for i in MEANINGS if i.partition("=")[0] == key]))
        for key in data.draw(st.permutations(sorted(OPTIONS[name])))
        if data.draw(st.booleans())
    ]
    assume(not {"rotation=none", "online=on"} <= set(items))  # refused: they contradict each other
    scheme = parse_scheme(f"{name}:{','.join(items)}")
    expected = SCHEMES[name]
    for item in items:
        expected = replace(expected, **MEANINGS[item])
    assert replace(scheme, settings=()) == expected
    assert parse_scheme(scheme.label) == scheme
    assert parse_scheme(f"{name}:{','.join(reversed(items))}") == scheme, "in any order"
    values = json.loads(json.dumps(scheme.to_dict()))
    assert parse_scheme(values["label"]) == scheme
    assert values["keep"] == scheme.keep


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("w4-rtn:group=32,group=128", "w4-rtn:group=128"),
        ("w4-rtn:group=32,group=64", "w4-rtn"),
        ("w8a8:keep=0.1,keep=0.05", "w8a8"),
        ("w8a8-spinquant:online=off,keep=0,online=on", "w8a8-spinquant:keep=0"),
    ],
)
def test_of_an_option_given_twice_the_last_counts(text: str, label: str) -> None:
    scheme = parse_scheme(text)
    assert scheme.label == label
    assert parse_scheme(label) == scheme


def test_values_are_json_ready() -> None:
    values = json.loads(json.dumps(parse_scheme("w4a16-spinquant:down_proj=w8,keep=5%").to_dict()))
    assert values["label"] == "w4a16-spinquant:down_proj=w8,keep=5%"
    assert values["linear"] == {"bits": 4, "group_size": 64}
    assert values["down_proj"] == {"bits": 8, "group_size": None}
    assert (values["method"], values["rotation"], values["keep"]) == ("gptq", "hadamard", 0.05)


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("none", False),
        ("w8-rtn", False),
        ("w4-rtn", False),
        ("w4-rtn:group=32,down_proj=w8", False),
        ("w4a16-gptq", True),
        ("w4a16-gptq:keep=0", True),
        ("w4a16-spinquant", True),
        ("w4a16-spinquant:rotation=none", True),
        ("w4a16-spinquant-learned", True),
        ("w8a8", True),
        ("w8a8:keep=0", True),
        ("w8a8-spinquant", True),
    ],
)
def test_which_schemes_need_a_text(text: str, needed: bool) -> None:
    assert parse_scheme(text).needs_calibration == needed


def test_keeping_layers_alone_needs_a_text_too() -> None:
    assert replace(SCHEMES["w4-rtn"], keep=0.1).needs_calibration


@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("prefix", ["", "layers.11."])
def test_formats_by_the_name_of_a_layer(prefix: str, suffix: str) -> None:
    def formats(text: str) -> list[WeightFormat | None]:
        names = ("self_attn.q_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")
        return [parse_scheme(text).format_of(f"{prefix}{name}{suffix}") for name in names]

    int4, int8 = WeightFormat(4, 64), WeightFormat(8)
    assert formats("none") == [None] * 4
    assert formats("w8a8") == [int8] * 4
    assert formats("w4-rtn") == [int4] * 4
    assert formats("w4-rtn:down_proj=w8") == [int4, int4, int4, int8]
    assert formats("w4a16-spinquant:group=128,down_proj=w8")[0] == WeightFormat(4, 128)


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("none", set()),
        ("w8-rtn", {8}),
        ("w4-rtn", {4, 8}),
        ("w4-rtn:down_proj=w8", {4, 8}),
        ("w8a8-spinquant", {8}),
    ],
)
def test_the_widths_a_scheme_stores(text: str, bits: set[int]) -> None:
    assert parse_scheme(text).weight_bits == bits


def test_ranges_of_the_integers() -> None:
    assert (WeightFormat(8).low, WeightFormat(8).high) == (-127, 127)
    assert (WeightFormat(4).low, WeightFormat(4).high) == (-8, 7)


@given(st.text())
def test_any_text_parses_or_is_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        parse_scheme(text)

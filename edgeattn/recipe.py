"""The frozen value that says what is asked for: from flags, from TOML, or from a manifest."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from edgeattn.attention import (
    AttentionRequest,
    FftRopeRequest,
    GroupQueryRequest,
    HeadSparseRequest,
    LayerRequest,
    LionRequest,
    RecurrentRequest,
    parse_attention,
)
from edgeattn.errors import UsageError, unknown_name
from edgeattn.quant.scheme import Scheme, parse_scheme

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DTYPES = ("fp32", "fp16", "bf16")
LOGITS = ("all", "last")
KV_CACHES = ("growing", "static")
# Tokens of a calibration window, where the model's context is as long; and how many windows.
CALIBRATION_LENGTH, CALIBRATION_WINDOWS = 512, 64
_COUNTS = ("context", "batch", "calibration_windows", "finetune_steps")
# Of recovery training, which is meant to be short: a step takes around a second on a CPU.
_MOST_STEPS = 100_000


@dataclass(frozen=True)
class Recipe:
    """What a user asks of `export`; everything else is derived from it, the model and the target.

    Attributes:
        target: NAME[@SOFTWARE].
        quant: NAME[:key=value,…] of a quantisation scheme.
        dtype: activations and unquantised weights; None takes the target's preferred one.
        context: longest sequence in tokens; None takes the checkpoint's own.
        batch: most rows at once.
        logits: "all" positions or the "last" one only.
        kv_cache: "growing", joined at each step, or "static", a buffer for the whole context from
            the start.
        attention: NAME[:key=value,…] of attention variants; at most gqa and one other.
        task: of an encoder, what comes out: "hidden" token states, an "embedding" of each text, or
            a "classification"; None takes what the checkpoint was made for.
        calibration: a text file, or a folder of them, for what is calibrated.
        calibration_windows: stretches of 512 tokens that are taken from it; of an encoder 128.
        rotations: a file of learned rotations to use again.
        finetune_text: a text, or a folder of them, on which a model whose attention lost something
            learns to predict as the original does, before it is quantised; for an encoder of
            images, a .npy file of them.
        finetune_steps: of that training.
        finetune_lr: its highest learning rate; None takes the default.
        eval_text: a text on which the exported graph's quality is measured.
        max_ppl_increase: most its perplexity may be above the checkpoint's, as "10%".
    """

    target: str
    quant: str = "none"
    dtype: str | None = None
    context: int | None = None
    batch: int = 1
    logits: str = "all"
    kv_cache: str = "growing"
    attention: tuple[str, ...] = ()
    task: str | None = None
    calibration: str | None = None
    calibration_windows: int = CALIBRATION_WINDOWS
    rotations: str | None = None
    finetune_text: str | None = None
    finetune_steps: int | None = None
    finetune_lr: float | None = None
    eval_text: str | None = None
    max_ppl_increase: str | None = None

    def __post_init__(self) -> None:
        """Refuses values that are no recipe, whatever the target.

        Raises:
            UsageError: naming the field, what it allows and what came.
        """
        _check_types(self)
        parse_scheme(self.quant)
        _check_attention(self.attention)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
        if self.logits not in LOGITS:
            raise unknown_name("choice of logits", self.logits, LOGITS)
        if self.kv_cache not in KV_CACHES:
            raise unknown_name("KV cache", self.kv_cache, KV_CACHES)
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(
                    expected=f"a positive {name}", came=f"it is {value}", todo="give at least 1"
                )
        _check_finetuning(self)

    @property
    def scheme(self) -> Scheme:
        """The parsed quantisation scheme."""
        return parse_scheme(self.quant)

    @property
    def attention_requests(self) -> tuple[AttentionRequest, ...]:
        """The parsed attention variants."""
        return tuple(map(parse_attention, self.attention))

    @property
    def attention_request(self) -> LayerRequest | None:
        """What computes attention in the layers; None for softmax in all of them."""
        found = (r for r in self.attention_requests if not isinstance(r, GroupQueryRequest))
        return next(found, None)

    @property
    def group_query(self) -> GroupQueryRequest | None:
        """Other numbers of heads than the checkpoint's."""
        found = (r for r in self.attention_requests if isinstance(r, GroupQueryRequest))
        return next(found, None)

    @property
    def needs_calibration(self) -> bool:
        """Whether a text must be run through the model."""
        variants = any(request.needs_calibration for request in self.attention_requests)
        return self.scheme.needs_calibration or variants

    @property
    def calibrated_part(self) -> str:
        """What is calibrated, where something is: the scheme, else an attention variant."""
        if self.scheme.needs_calibration:
            return f"scheme {self.scheme.name}"
        return next(r.label for r in self.attention_requests if r.needs_calibration)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values without the fields that say nothing."""
        return {key: value for key, value in asdict(self).items() if value not in (None, ())}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Builds a recipe from names and values.

        Raises:
            UsageError: an unknown field, a missing target, or a value of the wrong type.
        """
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise unknown_name("field of a recipe", key, known)
        if "target" not in values:
            raise UsageError(
                expected="a target",
                came="none was named",
                todo='pass --target NAME or write target = "NAME" into the recipe',
            )
        if isinstance(values.get("attention"), list):  # of TOML or JSON
            values = {**values, "attention": tuple(values["attention"])}
        return cls(**values)


def read_recipe(path: Path) -> dict[str, Any]:
    """The fields of a recipe file, still unchecked so that flags can override them.

    Raises:
        UsageError: the file is missing or no TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            expected=f"a TOML recipe at {path}",
            came=f"it cannot be read ({error})",
            todo='write lines like target = "jetson-orin"',
        ) from error


def _check_attention(asked: tuple[str, ...]) -> None:
    requests = [parse_attention(text) for text in asked]
    regrouped = [r.label for r in requests if isinstance(r, GroupQueryRequest)]
    others = [r.label for r in requests if not isinstance(r, GroupQueryRequest)]
    if len(regrouped) > 1 or len(others) > 1:
        raise UsageError(
            expected="one attention variant, and perhaps gqa, as others do not compose yet",
            came=f"{' and '.join(r.label for r in requests)} were given",
            todo="leave one out",
        )
    if regrouped and any(isinstance(r, RecurrentRequest) for r in requests):
        raise UsageError(
            expected="recurrent alone, as layers of linear attention have no heads to regroup",
            came=f"{regrouped[0]} was given, too",
            todo="leave one out",
        )


def _check_finetuning(recipe: Recipe) -> None:
    given = {
        name: value
        for name in ("finetune_text", "finetune_steps", "finetune_lr")
        if (value := getattr(recipe, name)) is not None
    }
    learns = isinstance(recipe.attention_request, LionRequest)
    if learns and "finetune_text" not in given:
        raise UsageError(
            expected="a text, or images, that linear attention is distilled on",
            came="none was given",
            todo="pass --finetune-text FILE (of images, prepared ones in a .npy file) "
            "and --finetune-steps N",
        )
    if not given:
        return
    if len(given.keys() & {"finetune_text", "finetune_steps"}) < 2:
        raise UsageError(
            expected="--finetune-text FILE and --finetune-steps N, for recovery training",
            came=f"only {' and '.join(given)} was given",
            todo="give both, for example 200 steps, or neither",
        )
    lossy = isinstance(recipe.attention_request, FftRopeRequest | HeadSparseRequest | LionRequest)
    if recipe.group_query is None and not lossy:
        raise UsageError(
            expected="a lossy attention, whose loss --finetune-text pays down",
            came="the recipe has none, and rounded weights are not trained",
            todo="ask for one with --attention gqa:kv_heads=K, fft-rope or head-sparse:density=S, "
            "or of an encoder lion:variant=d; or leave out --finetune-text, and choose a GPTQ "
            "scheme where rounding loses too much",
        )
    if (recipe.finetune_steps or 0) > _MOST_STEPS:
        raise UsageError(
            expected=f"at most {_MOST_STEPS:,} steps of recovery training",
            came=f"--finetune-steps is {recipe.finetune_steps:,}",
            todo="give fewer, such as 200; a longer training is work for other tools",
        )
    rate = recipe.finetune_lr
    if rate is not None and not 0 < rate < 1:
        raise UsageError(
            expected="a learning rate above 0 and below 1",
            came=f"--finetune-lr is {rate:g}",
            todo="leave it out, or give a value around 5e-4",
        )


_KIND_NAMES = {int: "a whole number", float: "a number such as 5e-4", str: "a text"}


def _check_types(recipe: Recipe) -> None:
    for f in fields(recipe):
        value = getattr(recipe, f.name)
        if f.name == "attention":
            if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
                raise UsageError(
                    expected="attention as a list of texts",
                    came=f"it is {value!r}",
                    todo='write attention = ["head-sparse:density=0.75"]',
                )
            continue
        kind = int if f.name in _COUNTS else float if f.name == "finetune_lr" else str
        optional = f.default is None and value is None
        if not optional and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UsageError(
                expected=f"{f.name} as {_KIND_NAMES[kind]}",
                came=f"it is {value!r}",
                todo="correct the recipe",
            )

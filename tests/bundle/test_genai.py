"""onnxruntime-genai runs a bundle as it is, and says what our own session and transformers say.

genai runs in a child process: it keeps threads and an ONNX Runtime of its own.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeattn.bundle.genai import genai_config
from edgeattn.models.families import FAMILIES as KNOWN_FAMILIES
from edgeattn.runtime import Session
from edgeattn.shape import LayerKind, ModelShape, Rope

needs_genai = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None,
    reason="onnxruntime-genai is missing: pip install --no-deps onnxruntime-genai==0.18.0",
)

PAD = 3
# Answers each request with the tokens of each row and the logits they were chosen from, or with
# what genai refused. A request holds `rows` of ids or `texts`, `new` tokens, and perhaps `cuts`,
# where the prompt is cut into chunks, `pad_left`, or `logits` false.
CHILD = """
import json
import sys

import numpy as np
import onnxruntime_genai as genai

model = genai.Model(sys.argv[1])
pad = json.load(open(sys.argv[1] + "/genai_config.json"))["model"]["pad_token_id"]


def prompt(request):
    if "texts" in request:
        return genai.Tokenizer(model).encode_batch(request["texts"]).as_numpy()
    width = max(map(len, request["rows"]))
    left = request.get("pad_left", False)
    padding = [[pad] * (width - len(row)) for row in request["rows"]]
    rows = zip(request["rows"], padding)
    return np.array([p + row if left else row + p for row, p in rows], np.int32)


def answer(request):
    ids = prompt(request)
    rows, width = ids.shape
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=width + request["new"], batch_size=rows)
    generator, logits = genai.Generator(model, parameters), []
    for chunk in np.split(ids, request.get("cuts", []), axis=1):
        generator.append_tokens(np.ascontiguousarray(chunk))
    while not generator.is_done():
        if request.get("logits", True):
            logits.append(generator.get_logits().reshape(rows, -1).tolist())
        generator.generate_next_token()
    tokens = [generator.get_sequence(i)[width:].tolist() for i in range(rows)]
    return {"ids": ids.tolist(), "tokens": tokens, "logits": logits}


def attempt(request):
    try:
        return answer(request)
    except Exception as error:
        return {"error": str(error)}


json.dump([attempt(request) for request in json.load(sys.stdin)], sys.stdout)
"""
# Random models say anything: the end is a token that none of them says here.
TINY = {"tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
WINDOW = 8
FULL_AND_WINDOW = {"sliding_window": WINDOW, "sliding_window_pattern": 2}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 9, **FULL_AND_WINDOW}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.5, 2, 2, 3, 3]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "phi3": {"rope_scaling": LONGROPE, "original_max_position_embeddings": 128},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": GEMMA,
    "qwen3_5_text": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "full_attention_interval": 2,
    },
}
# genai wants a convolution's state beside every recurrent one.
UNKNOWN_TO_GENAI = {"gla"}
JOINED = {"mistral", "gemma2", "gemma3_text", "qwen3_5_text"}
SHAPE = ModelShape(
    family="llama", num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16,
    intermediate_size=128, vocab_size=272, max_context=256, norm_eps=1e-5,
    layer_cycle=(LayerKind(Rope(16, 10000.0)),),
)  # fmt: skip


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(10, 272, length).tolist()


LONG, SHORT = prompt(19), prompt(11, seed=1)


def ask(bundle: Path, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(bundle)],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def our_logits(session: Session, ids: Sequence[int], chosen: Sequence[int]) -> np.ndarray:
    """`[len(chosen), V]`, what each of `chosen` is chosen from."""
    step = session.run([ids])
    logits = [step.logits[0, -1]]
    for token in chosen[:-1]:
        step = session.run([[token]], step.state)
        logits.append(step.logits[0, -1])
    return np.stack(logits)


def assert_equal(answer: dict[str, Any], session: Session, rows: Sequence[Sequence[int]]) -> None:
    """Each row of a batch is what it is alone, in our session: tokens and logits."""
    assert "error" not in answer, answer["error"]
    for i, row in enumerate(rows):
        chosen, theirs = answer["tokens"][i], np.array(answer["logits"])[:, i]
        ours = our_logits(session, row, chosen)
        np.testing.assert_allclose(theirs, ours, atol=1e-4, rtol=0)
        assert chosen == ours.argmax(1).tolist()


@pytest.fixture(scope="module")
def tiny(
    random_checkpoint: Callable[..., Path], export_tiny: Callable[..., Path]
) -> Callable[..., Path]:
    """A function from config keys, and fields of the export, to a bundle."""

    def make(target: str = "cpu", quant: str = "none", **fields: Any) -> Path:
        config = {**TINY, **fields.pop("config", {})}
        return export_tiny(target, quant, model=random_checkpoint(**config), verify=False, **fields)

    return make


@pytest.fixture
def in_place(tiny: Callable[..., Path]) -> Path:
    return tiny()


@pytest.fixture
def joined(tiny: Callable[..., Path]) -> Path:
    """A graph that joins past and new keys."""
    return tiny("jetson-orin@jetpack6.2", dtype="fp32")


@pytest.fixture
def with_config(changed: Callable[..., Path]) -> Callable[..., Path]:
    """A function that copies a bundle with other values in genai_config.json."""

    def change(bundle: Path, **values: Any) -> Path:
        config = json.loads((bundle / "genai_config.json").read_text())
        for key, value in values.items():
            groups = (config["model"], config["model"]["decoder"], config["search"])
            (group,) = (group for group in groups if key in group)
            group[key] = value
        return changed(bundle, {"genai_config.json": json.dumps(config).encode()})

    return change


def check(bundle: Path, *, exact: bool = False) -> None:
    """One prompt, the same in chunks, and beside a shorter one; all longer than a window."""
    one, chunks, batch = ask(
        bundle,
        {"rows": [LONG], "new": 24},
        {"rows": [LONG], "new": 24, "cuts": [7, 8]},
        {"rows": [SHORT, LONG], "new": 24},
    )
    session = Session.open(bundle, exact=exact)
    assert_equal(one, session, [LONG])
    assert_equal(chunks, session, [LONG])
    assert_equal(batch, session, [SHORT, LONG])
    assert len(one["tokens"][0]) == 24
    assert len(set(one["tokens"][0])) > 5


def shares_buffer(bundle: Path) -> bool:
    config = json.loads((bundle / "genai_config.json").read_text())
    shared: bool = config["search"]["past_present_share_buffer"]
    return shared


@needs_genai
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tiny: Callable[..., Path]) -> None:
    bundle = tiny(config={"model_type": family, **FAMILIES[family]})
    assert shares_buffer(bundle) == (family not in JOINED)
    check(bundle)


def test_no_family_is_forgotten() -> None:
    assert set(FAMILIES) == set(KNOWN_FAMILIES) - UNKNOWN_TO_GENAI


@needs_genai
def test_a_joined_cache(joined: Path) -> None:
    assert not shares_buffer(joined)
    check(joined)


@needs_genai
@pytest.mark.parametrize("fields", [{"quant": "w8-rtn"}, {"quant": "w4-rtn"}, {"dtype": "fp16"}])
def test_smaller_weights(
    fields: dict[str, str], tiny: Callable[..., Path], with_config: Callable[..., Path]
) -> None:
    """With activations that are not rounded to int8: rounding makes much of the last bit."""
    options = {"session.qdq_matmulnbits_accuracy_level": "1", "provider_options": []}
    check(with_config(tiny(**fields), session_options=options), exact=True)


@needs_genai
def test_an_int8_cache(
    tiny: Callable[..., Path], tmp_path: Path, with_config: Callable[..., Path]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged. " * 100)
    quant = "w4a16-gptq:group=32,kv=int8"
    bundle = tiny(quant=quant, calibration=str(text), calibration_windows=4)
    options = {"session.qdq_matmulnbits_accuracy_level": "1", "provider_options": []}
    check(with_config(bundle, session_options=options), exact=True)


@needs_genai
def test_a_wrong_buffer_flag(
    in_place: Path, joined: Path, with_config: Callable[..., Path]
) -> None:
    """A joined cache cannot be written in place: genai refuses. The other way round it copies."""
    request = {"rows": [LONG], "new": 8}
    (refused,) = ask(with_config(joined, past_present_share_buffer=True), request)
    assert "shape" in refused["error"]
    (copied,) = ask(with_config(in_place, past_present_share_buffer=False), request)
    assert_equal(copied, Session.open(in_place), [LONG])


@needs_genai
def test_padding_on_the_left(in_place: Path, joined: Path) -> None:
    """genai, which pads on the right, takes it for text, whatever the graph."""
    for bundle in in_place, joined:
        (left,) = ask(bundle, {"rows": [LONG, SHORT], "new": 8, "pad_left": True})
        expected = our_logits(Session.open(bundle), SHORT, left["tokens"][1])
        assert np.abs(expected - np.array(left["logits"])[:, 1]).max() > 0.1


@needs_genai
def test_a_prompt_that_ends_with_the_pad_id(in_place: Path) -> None:
    """A limit of genai: it takes the last token for padding, and answers to the one before it."""
    inside, end = ask(
        in_place,
        {"rows": [[*SHORT[:5], PAD, *SHORT[5:]]], "new": 8},
        {"rows": [[*SHORT, PAD]], "new": 1},
    )
    session = Session.open(in_place)
    assert_equal(inside, session, [[*SHORT[:5], PAD, *SHORT[5:]]])
    assert_equal(end, session, [SHORT])


@needs_genai
def test_logits_of_the_last_place_only(tiny: Callable[..., Path]) -> None:
    """Rows of one length are right. Of others genai takes what it reads at the padding."""
    bundle = tiny(logits="last")
    same, ragged = ask(
        bundle,
        {"rows": [LONG, LONG[::-1]], "new": 8},
        {"rows": [LONG, SHORT], "new": 8},
    )
    session = Session.open(bundle)
    assert_equal(same, session, [LONG, LONG[::-1]])
    expected = our_logits(session, SHORT, ragged["tokens"][1])
    assert np.abs(expected - np.array(ragged["logits"])[:, 1]).max() > 0.1


@needs_genai
def test_a_row_ends_at_its_end(in_place: Path, with_config: Callable[..., Path]) -> None:
    request = {"rows": [LONG, SHORT], "new": 24}
    (whole,) = ask(in_place, request)
    ends = [row[5] for row in whole["tokens"]]
    (found,) = ask(with_config(in_place, eos_token_id=ends), request)
    for row, expected in zip(found["tokens"], whole["tokens"], strict=True):
        length = min(expected.index(end) for end in ends if end in expected)
        assert row[:length] == expected[:length]
        assert set(row[length:]) <= {*ends, PAD}


@needs_genai
def test_smollm2(smollm2_gguf: Path, tmp_path: Path) -> None:
    """A real model as it comes, on real texts: each token is the one that transformers chooses."""
    torch = pytest.importorskip("torch")
    from edgeattn.pipeline import export
    from edgeattn.recipe import Recipe

    bundle = tmp_path / "bundle"
    export(smollm2_gguf, Recipe("cpu"), bundle, verify=False)
    texts = ["It is a truth universally acknowledged", "Once upon a time, in the land of Ürümqi,"]
    request = {"texts": texts, "new": 32, "logits": False}
    batch, chunks = ask(bundle, request, {**request, "texts": texts[:1], "cuts": [3]})
    tokenizer, theirs = Session.open(bundle).text, in_transformers(smollm2_gguf)
    rows = [tokenizer.encode(text) for text in texts]
    width = max(map(len, rows))
    assert batch["ids"] == [row + [2] * (width - len(row)) for row in rows]
    for row, chosen in zip(rows, batch["tokens"], strict=True):
        assert len(chosen) == 32
        logits = theirs(torch.tensor([row + chosen[:-1]])).logits[0]
        assert logits[len(row) - 1 :].argmax(1).tolist() == chosen
    assert chunks["tokens"] == batch["tokens"][:1]


def in_transformers(gguf: Path) -> Any:
    """The model with weights of our reader, which equals that of transformers and is faster."""
    transformers = pytest.importorskip("transformers")
    from edgeattn.models.checkpoint import open_checkpoint
    from edgeattn.models.families import parameter_names

    checkpoint = open_checkpoint(gguf)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**checkpoint.config))
    weights = {f"model.{n}": checkpoint.weights.read(n) for n in parameter_names(checkpoint.shape)}
    unread = model.load_state_dict(weights, strict=False)
    assert unread == (["lm_head.weight"], [])  # tied to the embedding
    return model.eval()


def config_of(config: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    made = genai_config(
        SHAPE,
        context=64,
        shared_buffer=True,
        model_file="model.onnx",
        config=config,
        generation_config=generation,
    )
    assert made["model"]["context_length"] == made["search"]["max_length"] == 64
    return {k: v for k, v in made["model"].items() if k.endswith("_token_id")}


@pytest.mark.parametrize(
    ("config", "generation", "bos", "eos", "pad"),
    [
        ({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}, {}, 1, 2, 3),
        ({"bos_token_id": 1, "eos_token_id": 2}, {"eos_token_id": [7, 8]}, 1, [7, 8], 7),
        ({"eos_token_id": [7]}, {"eos_token_id": None}, 7, 7, 7),
        ({"eos_token_id": 2, "pad_token_id": 3}, {"pad_token_id": None}, 2, 2, 3),
        ({"eos_token_id": 2, "pad_token_id": -1}, {}, 2, 2, 2),
        ({"eos_token_id": 2, "pad_token_id": 272}, {}, 2, 2, 2),
        ({}, {}, 0, 0, 0),
    ],
)
def test_special_tokens(
    config: dict[str, Any], generation: dict[str, Any], bos: int, eos: int | list[int], pad: int
) -> None:
    expected = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    assert config_of(config, generation) == expected

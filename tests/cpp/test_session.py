"""The C++ session under sanitizers, on a fake TensorRT of the headers' ABI and a fake libcuda.

Engines are run by ONNX Runtime in another process, and what comes out is what the Python session
gives with ONNX Runtime: the same numbers, the same tokens, the same refusals.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from cpp_session import CppSession
from fake_engine import SM, write_engine

from edgeattn.engine.profiles import DecoderProfile, Range
from edgeattn.errors import EdgeattnError, UsageError
from edgeattn.runtime import Session, generate

CONTEXT = 160
PROFILES = (
    DecoderProfile("prefill", Range(1, 1, 2), Range(1, 64, 64), Range(0, 0, 64)),
    DecoderProfile("decode", Range(1, 1, 2), Range(1, 1, 1), Range(0, 64, CONTEXT - 1)),
)
PROMPT = "Once upon a time, there was a"
USAGE, BUNDLE, INPUT, LOWERING, MISSING = 2, 3, 4, 5, 6


RECIPE = {"target": "a100", "context": CONTEXT, "batch": 2}


@pytest.fixture(scope="module")
def growing(export_stories: Callable[..., Path], tensorrt: str) -> Path:
    """A trained model with an engine; each step returns a longer cache."""
    return with_engine(export_stories(**RECIPE), tensorrt)


@pytest.fixture(scope="module")
def static(export_stories: Callable[..., Path], tensorrt: str) -> Path:
    """Likewise; the cache is written in place."""
    return with_engine(export_stories(**RECIPE, kv_cache="static"), tensorrt)


@pytest.fixture(params=["growing", "static"])
def bundle(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


def with_engine(bundle: Path, tensorrt: str, **told: object) -> Path:
    write_engine(bundle, PROFILES, record={"tensorrt": tensorrt}, **told)
    return bundle


def test_a_hundred_steps_give_pythons_tokens(
    bundle: Path, cpp: Callable[..., CppSession], request: pytest.FixtureRequest
) -> None:
    plain = Session.open(bundle, exact=True)
    prompt = plain.text.encode(PROMPT)
    static = request.node.callspec.params["bundle"] == "static"
    with cpp() as session:
        opened = session.get("open", bundle=str(bundle))
        assert opened["context"] == plain.context
        assert tuple(opened["stop_tokens"]) == plain.eos_token_ids
        for asked in (
            {"max_new_tokens": 101},
            {"max_new_tokens": 101, "temperature": 0.9, "top_k": 40, "seed": 7},
            {"max_new_tokens": 30, "temperature": 1.3, "top_p": 0.8, "seed": 2**40},
        ):
            expected = generate(plain, prompt, **asked)
            found = session.get("generate", prompt=prompt, **asked)
            assert tuple(found["tokens"]) == expected.token_ids
            assert found["streamed"] == found["tokens"]
            assert found["decode_steps"] == expected.decode_steps
            assert found["replays"] == static  # growing shapes cannot be replayed
        assert expected.decode_steps > 20
    assert generate(plain, prompt, max_new_tokens=101).decode_steps == 100


def test_steps_of_several_rows_and_padding(bundle: Path, cpp: Callable[..., CppSession]) -> None:
    plain = Session.open(bundle, exact=True)
    ids = np.arange(14).reshape(2, 7) + 40
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3])
    with cpp() as session:
        session.get("open", bundle=str(bundle), rows=2)
        for _ in range(2):  # and once more from the beginning
            state = None
            for new, valid in (
                (ids, mask),
                (ids[:, :1], None),
                (ids[:, :3] + 1, None),
                (ids[:, :2], np.array([[1, 0], [1, 1]])),
                (ids[:, :1] + 2, None),
                (ids[:, :1] + 3, None),
            ):
                step = plain.run(new, state and state, attention_mask=valid)
                state = step.state
                real = np.ones_like(new) if valid is None else valid
                given = {"tokens": new.ravel().tolist(), "mask": real.ravel().tolist()}
                found = session.get("step", **given, all=True)
                logits = np.reshape(np.array(found["logits"], np.float32), found["shape"])
                np.testing.assert_allclose(
                    logits[real == 1], step.logits[real == 1], rtol=0, atol=5e-5
                )
                assert found["length"] == state.length
            session.get("reset")


def test_only_the_last_tokens_logits(growing: Path, cpp: Callable[..., CppSession]) -> None:
    plain = Session.open(growing, exact=True)
    ids, mask = np.arange(10).reshape(2, 5) + 40, np.array([[1] * 5, [1, 1, 0, 0, 0]])
    expected = plain.run(ids, attention_mask=mask).logits[[0, 1], [4, 1]]
    with cpp() as session:
        session.get("open", bundle=str(growing), rows=2)
        asked = {"tokens": ids.ravel().tolist(), "mask": mask.ravel().tolist()}
        found = session.get("step", **asked)
    assert found["shape"] == [2, 1, plain.vocab_size]
    logits = np.reshape(np.array(found["logits"], np.float32), (2, -1))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=5e-5)


def test_through_the_c_functions(bundle: Path, cpp: Callable[..., CppSession]) -> None:
    plain = Session.open(bundle, exact=True)
    prompt = plain.text.encode(PROMPT)
    with cpp() as session:
        found = session.get("generate_c", bundle=str(bundle), prompt=prompt, max_new_tokens=20)
        assert tuple(found["tokens"]) == generate(plain, prompt, max_new_tokens=20).token_ids
        assert found["reason"] == 1
    with cpp(FAKE_NVINFER_FAIL="deserialize") as session:
        found = session.ask("generate_c", bundle=str(bundle), prompt=prompt)
        assert found["code"] == LOWERING
        assert found["tensorrt"] == "IRuntime::deserializeCudaEngine: Error Code 1"


def test_how_a_text_ends(growing: Path, cpp: Callable[..., CppSession]) -> None:
    plain = Session.open(growing, exact=True)
    prompt = plain.text.encode(PROMPT)
    whole = generate(plain, prompt, max_new_tokens=200)
    assert whole.finish_reason == "context"
    with cpp() as session:
        session.get("open", bundle=str(growing))
        found = session.get("generate", prompt=prompt, max_new_tokens=200)
        assert (tuple(found["tokens"]), found["reason"]) == (whole.token_ids, 2)
        stop = whole.token_ids[6]
        expected = generate(plain, prompt, max_new_tokens=200, stop_tokens=[stop])
        found = session.get("generate", prompt=prompt, max_new_tokens=200, stop_tokens=[stop])
        assert (tuple(found["tokens"]), found["reason"]) == (expected.token_ids, 0)
        found = session.get("generate", prompt=prompt, interrupt=3)
        assert (tuple(found["tokens"]), found["reason"]) == (whole.token_ids[:3], 3)


@pytest.mark.parametrize(
    "function",
    ["cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags"],
)
def test_what_cannot_be_recorded_is_run(
    function: str, cpp: Callable[..., CppSession], static: Path
) -> None:
    plain = Session.open(static, exact=True)
    prompt = plain.text.encode(PROMPT)
    expected = generate(plain, prompt, max_new_tokens=12).token_ids
    with cpp(FAKE_CUDA_FAIL=f"{function}:900") as session:
        session.get("open", bundle=str(static))
        found = session.get("generate", prompt=prompt, max_new_tokens=12)
        assert (tuple(found["tokens"]), found["replays"]) == (expected, False)
    with cpp() as session:
        session.get("open", bundle=str(static), cuda_graph=False)
        found = session.get("generate", prompt=prompt, max_new_tokens=12)
        assert (tuple(found["tokens"]), found["replays"]) == (expected, False)


# What fails when a session is opened: fake, function and code -> code and part of the sentence.
OPENING = {
    "FAKE_CUDA_FAIL=cuInit:999": (MISSING, "cuInit says: unknown error"),
    "FAKE_CUDA_FAIL=cuDeviceGet:101": (MISSING, "cuDeviceGet says: error 101"),
    "FAKE_CUDA_FAIL=cuDevicePrimaryCtxRetain:2": (MISSING, "out of memory"),
    "FAKE_CUDA_FAIL=cuStreamCreate:2": (MISSING, "cuStreamCreate says: out of memory"),
    "FAKE_CUDA_FAIL=cuDeviceGetAttribute:1": (INPUT, "cuDeviceGetAttribute says: error 1"),
    "FAKE_CUDA_FAIL=cuMemAlloc_v2:2": (INPUT, "bytes of free memory on the GPU"),
    "FAKE_CUDA_FAIL=cuMemsetD8Async:700": (INPUT, "cuMemsetD8Async says: error 700"),
    "FAKE_CUDA_FAIL=cuStreamSynchronize:700": (INPUT, "cuStreamSynchronize says: error 700"),
    "FAKE_NVINFER_FAIL=create_runtime": (LOWERING, "to start"),
    "FAKE_NVINFER_FAIL=deserialize": (LOWERING, "to load the engine, but it says: IRuntime"),
    "FAKE_NVINFER_FAIL=create_context": (LOWERING, "Error Code 2: OutOfMemory"),
    "FAKE_NVINFER_FAIL=create_context:1": (LOWERING, "to prepare the engine"),
    "FAKE_NVINFER_FAIL=set_profile": (LOWERING, "setOptimizationProfileAsync: Error Code 3"),
    "FAKE_NVINFER_FAIL=set_input_shape": (LOWERING, "setInputShape"),
    "FAKE_CUDA_SM=87": (LOWERING, f"it was built for SM {SM}"),
}


@pytest.mark.parametrize("setting", OPENING)
def test_what_fails_when_it_is_opened(
    setting: str, growing: Path, cpp: Callable[..., CppSession]
) -> None:
    name, _, value = setting.partition("=")
    code, sentence = OPENING[setting]
    with cpp(**{name: value}) as session:
        found = session.ask("open", bundle=str(growing))
        assert found.get("code") == code, found
        assert sentence in found["error"]


# What fails in one call, which a step makes: it is told, and a reset brings the session back.
STEPPING = {
    "FAKE_CUDA_FAIL=cuMemcpyHtoDAsync_v2:700:9": (INPUT, "cuMemcpyHtoDAsync_v2 says: error 700"),
    "FAKE_CUDA_FAIL=cuMemcpyDtoHAsync_v2:700:1": (INPUT, "cuMemcpyDtoHAsync_v2 says: error 700"),
    "FAKE_CUDA_FAIL=cuStreamSynchronize:719:4": (INPUT, "cuStreamSynchronize says: error 719"),
    "FAKE_CUDA_FAIL=cuGraphLaunch:700:1": (INPUT, "cuGraphLaunch says: error 700"),
    "FAKE_NVINFER_FAIL=set_input_shape:32": (LOWERING, "setInputShape"),
    "FAKE_NVINFER_FAIL=set_tensor_address:30": (LOWERING, "to take memory for"),
    "FAKE_NVINFER_FAIL=enqueue:0": (LOWERING, "enqueueV3: Error Code 1"),
}


@pytest.mark.parametrize("setting", STEPPING)
def test_what_fails_in_a_step(setting: str, static: Path, cpp: Callable[..., CppSession]) -> None:
    name, _, value = setting.partition("=")
    code, sentence = STEPPING[setting]
    tokens = [5, 6, 7, 8, 9, 10]
    with cpp(**{name: value}) as session:
        session.get("open", bundle=str(static))
        answers = [session.ask("step", tokens=[token]) for token in tokens]
        refusals = [answer for answer in answers if "error" in answer]
        assert refusals, answers[-1].keys()
        assert (refusals[0]["code"], sentence in refusals[0]["error"]) == (code, True), refusals[0]
        assert all("its state is lost" in answer["error"] for answer in refusals[1:])
        assert "error" in answers[-1]
        session.get("reset")
        again = [session.get("step", tokens=[token])["logits"] for token in tokens]
    passed = [answer["logits"] for answer in answers if "logits" in answer]
    assert again[: len(passed)] == passed
    plain, state = Session.open(static, exact=True), None
    for token, logits in zip(tokens, again, strict=True):
        step = plain.run([[token]], state)
        state = step.state
        np.testing.assert_allclose(logits, step.logits[0, -1], rtol=0, atol=5e-5)


@pytest.mark.parametrize("release", ["12.0.0", "9.3.0"])
def test_an_unknown_major_is_refused_before_anything_is_made(
    release: str, growing: Path, cpp: Callable[..., CppSession], tensorrt: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with cpp(FAKE_NVINFER_VERSION=number(release), FAKE_NVINFER_LOG=str(log)) as session:
        found = session.ask("open", bundle=str(growing))
    major = tensorrt.split(".")[0]
    assert found["code"] == LOWERING
    assert f"TensorRT {major} in libnvinfer.so.{major}, but it is {release}" in found["error"]
    assert log.read_text() == "getInferLibVersion\n"


def test_another_release_than_the_engine_s_is_refused(
    growing: Path, cpp: Callable[..., CppSession], tensorrt: str
) -> None:
    other = f"{tensorrt.split('.')[0]}.13.0"
    with cpp(FAKE_NVINFER_VERSION=number(other)) as session:
        found = session.ask("open", bundle=str(growing))
    assert found["code"] == LOWERING
    assert f"an engine for TensorRT {other}, which is" in found["error"]


def number(release: str) -> str:
    """As getInferLibVersion has it."""
    major, minor, patch = map(int, release.split("."))
    return str((major * 100 + minor) * 100 + patch)


def test_machines_that_lack_something(
    sanitized: Path,
    there: dict[str, str],
    fake_cuda: Path,
    growing: Path,
    tensorrt: str,
    tmp_path: Path,
) -> None:
    major = int(tensorrt.split(".")[0])
    asked = {"bundle": str(growing)}
    with CppSession(sanitized, {**there, "LD_LIBRARY_PATH": ""}) as session:
        found = session.ask("open", **asked)
        assert found["code"] == MISSING
        assert "an NVIDIA GPU to run an engine on" in found["error"]
        assert "there is no libcuda.so.1" in found["error"]
    with CppSession(sanitized, {**there, "LD_LIBRARY_PATH": str(fake_cuda)}) as session:
        found = session.ask("open", **asked)
        assert found["code"] == MISSING
        assert "TensorRT, which runs the engine" in found["error"]
        assert f"libnvinfer.so.{major}" in found["error"]
    other = shutil.copytree(growing, tmp_path / "bundle")
    write_engine(other, PROFILES, record={"tensorrt": tensorrt})
    for version, code, part in (
        (f"{21 - major}.1.0", MISSING, f"libedgeattn_trt{21 - major}.so beside libedgeattn"),
        ("12.0.0", LOWERING, "an engine of TensorRT 10 or 11, or of TensorRT-RTX 1"),
    ):
        for engine in (other / "engines").iterdir():
            engine.unlink()
        write_engine(other, PROFILES, record={"tensorrt": version})
        with CppSession(sanitized, there) as session:
            found = session.ask("open", bundle=str(other))
            assert (found["code"], part in found["error"]) == (code, True), found


def test_bad_input_gets_pythons_sentences(growing: Path, cpp: Callable[..., CppSession]) -> None:
    plain = Session.open(growing, exact=True)
    ids = [[5, 6, 7]]

    def of_python(**asked: object) -> str:
        with pytest.raises(EdgeattnError) as refusal:
            plain.run(**asked)  # type: ignore[arg-type]
        return str(refusal.value)

    with cpp() as session:
        session.get("open", bundle=str(growing))
        for given, asked in (
            ({"tokens": [512]}, {"input_ids": [[512]]}),
            ({"tokens": [-1]}, {"input_ids": [[-1]]}),
            (
                {"tokens": [5, 6, 7], "mask": [0, 1, 1]},
                {"input_ids": ids, "attention_mask": [[0, 1, 1]]},
            ),
            (
                {"tokens": [5, 6, 7], "mask": [1, 2, 1]},
                {"input_ids": ids, "attention_mask": [[1, 2, 1]]},
            ),
            (
                {"tokens": [5, 6, 7], "mask": [0, 0, 0]},
                {"input_ids": ids, "attention_mask": [[0, 0, 0]]},
            ),
            ({"tokens": [5] * (CONTEXT + 1)}, {"input_ids": [[5] * (CONTEXT + 1)]}),
        ):
            found = session.ask("step", **given)
            assert (found["code"], found["error"]) == (INPUT, of_python(**asked))
        for asked in ({"prompt": []}, {"prompt": [5] * (CONTEXT + 1)}, {"prompt": [512]}):
            with pytest.raises(EdgeattnError) as refusal:
                generate(plain, asked["prompt"])
            assert session.ask("generate", **asked)["error"] == str(refusal.value)
        for asked in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}):
            with pytest.raises(UsageError) as usage:
                generate(plain, [5], **asked)  # type: ignore[arg-type]
            found = session.ask("generate", prompt=[5], **asked)
            assert (found["code"], found["error"]) == (USAGE, str(usage.value))
        found = session.ask("step", tokens=[5] * 65)  # beyond the profile
        assert found["code"] == LOWERING
        assert "shapes within an optimisation profile" in found["error"]
        session.get("step", tokens=[5])  # none of these did it any harm


def test_batches_and_logits_that_cannot_be(
    export_stories: Callable[..., Path], cpp: Callable[..., CppSession], tensorrt: str
) -> None:
    made = with_engine(export_stories(**RECIPE), tensorrt, perturb={"logits": float("nan")})
    with cpp() as session:
        for rows, code, part in ((3, LOWERING, "at most 2 rows"), (0, USAGE, "at least 1 row")):
            found = session.ask("open", bundle=str(made), rows=rows)
            assert (found["code"], part in found["error"]) == (code, True)
        session.get("open", bundle=str(made))
        found = session.ask("step", tokens=[5])
        assert (found["code"], "NaN or infinity" in found["error"]) == (INPUT, True)
        session.get("open", bundle=str(made), rows=2)
        found = session.ask("generate", prompt=[5])
        assert (found["code"], "a session of 1 row" in found["error"]) == (USAGE, True)


def test_two_threads_are_refused_not_mixed(growing: Path, cpp: Callable[..., CppSession]) -> None:
    with cpp() as session:
        session.get("open", bundle=str(growing))
        found = session.get("threads", steps=40)
        assert found["passed"] == found["length"] > 0
        refused = [text for text in found["refusals"] if text]
        assert all(text.startswith(f"{USAGE}: expected one thread") for text in refused)
        assert refused or found["passed"] == 80

"""The session against transformers, its states, and everything it refuses."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from edgeattn.bundle.bundle import Bundle
from edgeattn.errors import BundleError, MissingDependencyError, RuntimeInputError, UsageError
from edgeattn.runtime import Session
from edgeattn.runtime.onnxruntime_backend import open_onnxruntime
from edgeattn.runtime.session import _find_likeliest

ROW = [1, 403, 407, 261, 378, 432, 286, 356]


def hf_logits(model, ids):
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def test_prefill_and_decode_equal_transformers(stories, stories_hf):
    expected = hf_logits(stories_hf, [ROW])[0]
    step = stories.run([ROW[:5]])
    logits = [step.logits[0]]
    for token in ROW[5:]:
        step = stories.run([[token]], step.state)
        logits.append(step.logits[0])
    found = np.concatenate(logits)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_ragged_rows_equal_separate_runs(stories):
    """Right padding at the prompt, then a step in which one row pauses, then one for both."""
    ids = np.array([[*ROW[:6]], [*ROW[:3], -100, -100, -100]])
    mask = np.array([[1] * 6, [1, 1, 1, 0, 0, 0]])
    step = stories.run(ids, attention_mask=mask)
    alone = [stories.run([ROW[:6]]), stories.run([ROW[:3]])]
    np.testing.assert_allclose(step.logits[0], alone[0].logits[0], atol=1e-4)
    np.testing.assert_allclose(step.logits[1, :3], alone[1].logits[0], atol=1e-4)

    step = stories.run([[9], [7]], step.state, attention_mask=np.array([[True], [False]]))
    alone[0] = stories.run([[9]], alone[0].state)
    step = stories.run([[5], [8]], step.state)
    for row, (token, single) in enumerate(zip((5, 8), alone, strict=True)):
        expected = stories.run([[token]], single.state).logits[0]
        np.testing.assert_allclose(step.logits[row], expected, atol=1e-4)


def test_a_state_can_branch(stories):
    start = stories.run([ROW[:5]]).state
    first = stories.run([[7]], start)
    again = stories.run([[9]], start)
    stories.run([[3, 4]], first.state)
    np.testing.assert_array_equal(stories.run([[7]], start).logits, first.logits)
    assert not np.array_equal(first.logits, again.logits)
    assert (start.batch, start.length, first.state.length) == (1, 5, 6)
    with pytest.raises(AttributeError):
        start._mask = None


def test_a_state_has_a_mask_of_its_own(stories):
    mask = np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    state = stories.run([ROW[:4], ROW[:4]], attention_mask=mask).state
    expected = stories.run([[5], [5]], state).logits
    mask[:] = 1
    np.testing.assert_array_equal(stories.run([[5], [5]], state).logits, expected)


@pytest.mark.parametrize("length", [1, 2])
def test_logits_at_padding_mean_nothing(length):
    logits = np.zeros((1, length, 4), np.float32)
    logits[0, -1] = np.nan
    _find_likeliest(logits, np.array([[1, 0][-length:]]))
    with pytest.raises(RuntimeInputError, match="finite logits"):
        _find_likeliest(logits, None)


def test_cache_bytes(stories):
    shape = stories.bundle.shape
    step = stories.run([ROW, ROW])
    per_token = shape.num_layers * 2 * shape.kv_size * 4
    assert stories.cache_bytes(step.state) == 2 * len(ROW) * per_token


def test_properties(stories, stories_bundle):
    assert stories.vocab_size == 512
    assert stories.context == 512
    assert stories.eos_token_ids == (2,)
    assert stories.bundle.path == stories_bundle
    assert not stories.last_logits_only
    assert Session.open(Bundle.open(stories_bundle), threads=1).context == 512


def test_threads_share_a_session(stories):
    expected = [stories.run([[1, token]]).logits for token in range(8)]
    start = threading.Barrier(4)

    def work(_):
        start.wait()
        return [stories.run([[1, token]]).logits for token in range(8)]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(work, range(4)):
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5)


def test_fp16_cache_and_logits_of_the_last_position(export_stories, stories):
    """fp16 on another lowering (opset 20, primitive operators), with only the last logits kept."""
    session = Session.open(export_stories(target="jetson-orin@jetpack6.2", logits="last"))
    assert session.last_logits_only
    step = session.run([ROW[:5]])
    assert step.logits.shape == (1, 1, 512)
    assert step.logits.dtype == np.float32
    shape = session.bundle.shape
    assert session.cache_bytes(step.state) == 5 * shape.num_layers * 2 * shape.kv_size * 2
    logits = session.run([ROW[5:]], step.state).logits[0, -1]
    np.testing.assert_allclose(logits, stories.run([ROW]).logits[0, -1], atol=0.05)
    with pytest.raises(RuntimeInputError, match="row 1 ends in padding"):
        session.run([[1, 2], [1, 2]], attention_mask=[[1, 1], [1, 0]])


@pytest.mark.parametrize(
    ("ids", "mask", "words"),
    [
        ([1, 2], None, r"shape \[batch, length\].* shape is \[2\]"),
        ([[]], None, "whole numbers"),
        (np.zeros((1, 0), np.int64), None, "at least 1"),
        ([[1.5]], None, "whole numbers.*float64"),
        ([["a"]], None, "whole numbers"),
        ([[1, 2], [3]], None, "rows of one length"),
        ([[512]], None, "ids from 0 to 511, but there is 512"),
        ([[-1]], None, "there is -1"),
        (np.full((1, 513), 5), None, "at most 512 tokens.*would be 513"),
        ([[1, 2]], [[1]], r"attention_mask of shape \[1, 2\]"),
        ([[1, 2]], [[0, 1]], "pad on the right"),
        ([[1, 2]], [[1, 2]], "pad on the right"),
        ([[1, 2]], [[1.0, 0.0]], "attention_mask as whole numbers"),
        ([[1, 2], [1, 2]], [[1, 1], [0, 0]], "row 1 is all padding"),
    ],
)
def test_unfit_inputs_are_refused(stories, ids, mask, words):
    with pytest.raises(RuntimeInputError, match=words):
        stories.run(ids, attention_mask=mask)


def test_unfit_states_are_refused(stories, stories_bundle):
    state = stories.run([ROW]).state
    with pytest.raises(RuntimeInputError, match="made by another one"):
        Session.open(stories_bundle).run([[1]], state)
    with pytest.raises(RuntimeInputError, match=r"1 rows.*input_ids has 2"):
        stories.run([[1], [2]], state)
    with pytest.raises(RuntimeInputError, match="would be 513"):
        stories.run(np.ones((1, 513 - len(ROW)), np.int64), state)


def test_context_of_the_recipe(changed_bundle):
    session = Session.open(changed_bundle(context=6))
    assert session.context == 6
    with pytest.raises(RuntimeInputError, match="at most 6 tokens"):
        session.run([ROW])


def test_nan_logits_are_refused(changed_bundle, stories_bundle):
    weights = bytearray((stories_bundle / "model.onnx.data").read_bytes())
    weights[:] = np.full(len(weights) // 4, np.nan, np.float32).tobytes()
    session = Session.open(changed_bundle({"model.onnx.data": bytes(weights)}))
    with pytest.raises(RuntimeInputError, match=r"finite logits.*NaN"):
        session.run([ROW])


def test_eos_ids(changed_bundle):
    listed = changed_bundle({"generation_config.json": b'{"eos_token_id": [2, 5]}'})
    assert Session.open(listed).eos_token_ids == (2, 5)


@pytest.mark.parametrize("wrong", ['"</s>"', "512", "true", "[2, null]"])
def test_wrong_eos_ids_are_refused(changed_bundle, wrong):
    content = f'{{"eos_token_id": {wrong}}}'.encode()
    session = Session.open(changed_bundle({"generation_config.json": content}))
    with pytest.raises(BundleError, match=r"eos_token_id in generation_config\.json"):
        _ = session.eos_token_ids


def test_eos_ids_may_be_absent(changed_bundle):
    bundle = changed_bundle({"generation_config.json": b"{}", "config.json": b"{}"})
    assert Session.open(bundle).eos_token_ids == ()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"backend": "onnxruntim"}, UsageError, "did you mean onnxruntime"),
        ({"provider": "gpu"}, UsageError, "known provider.*cpu"),
        ({"threads": 0}, UsageError, "positive number of threads"),
        ({"threads": "two"}, UsageError, "positive number of threads"),
    ],
)
def test_wrong_options_are_refused(stories_bundle, options, error, words):
    with pytest.raises(error, match=words):
        Session.open(stories_bundle, **options)


def test_a_folder_that_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="there is no manifest"):
        Session.open(tmp_path)
    with pytest.raises(BundleError, match="nothing is there"):
        Session.open(tmp_path / "absent")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (b"not a graph", "it does not parse"),
        (b"", "onnxruntime .* says"),
    ],
)
def test_a_graph_that_does_not_load(changed_bundle, model, words):
    with pytest.raises(BundleError, match=words):
        Session.open(changed_bundle({"model.onnx": model}))


def test_a_graph_too_new_for_this_onnxruntime(changed_bundle, stories_bundle):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(stories_bundle / "model.onnx", load_external_data=False)
    model.opset_import[0].version = 99
    bundle = changed_bundle({"model.onnx": model.SerializeToString()}, opset=99)
    import onnxruntime

    with pytest.raises(BundleError, match="opset 99") as refusal:
        Session.open(bundle)
    assert f"onnxruntime {onnxruntime.__version__} says" in str(refusal.value)
    assert "pip install --upgrade" in str(refusal.value)


def test_a_graph_that_is_no_decoder(changed_bundle, stories_bundle):
    onnx = pytest.importorskip("onnx")
    x = onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["n"])
    y = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.INT64, ["n"])
    node = onnx.helper.make_node("Identity", ["input_ids"], ["logits"])
    graph = onnx.helper.make_graph([node], "identity", [x], [y])
    opsets = [onnx.helper.make_opsetid("", 20)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    with pytest.raises(BundleError, match="the graph has no attention_mask"):
        Session.open(changed_bundle({"model.onnx": model.SerializeToString()}))


def test_serialised_graph_with_weights_elsewhere(stories_bundle, stories):
    graph = (stories_bundle / "model.onnx").read_bytes()
    session = open_onnxruntime(graph, weights_dir=stories_bundle, threads=1, exact=True)
    assert [i.name for i in session.get_inputs()][:3] == [
        "input_ids",
        "attention_mask",
        "position_ids",
    ]


def test_without_onnxruntime(stories_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install edgeattn\[ort\]"):
        Session.open(stories_bundle)


def test_importing_the_runtime_is_light():
    heavy = "'onnxruntime', 'tokenizers', 'jinja2', 'torch', 'transformers'"
    program = f"import sys, edgeattn.runtime; print([m for m in ({heavy}) if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

"""Runs a bundle with onnxruntime, tokenizers and numpy; edgeattn is not imported.

    pip install onnxruntime tokenizers numpy
    python onnxruntime_only.py BUNDLE "It is a truth universally acknowledged" --new-tokens 32

Inputs and outputs carry the names of Hugging Face's ONNX exports (optimum), B rows of T new tokens
after P earlier ones:

    input_ids, position_ids                  [B, T]            int64
    attention_mask                           [B, P + T]        int64, 1 at tokens, 0 at padding
    past_key_values.<layer>.key and .value   [B, Hkv, P, D]    P is 0 at first
    logits                                   [B, T, V]
    present.<layer>.key and .value           [B, Hkv, P + T, D]: the past of the next step

Rows of different length are padded on the right. int8 weights want onnxruntime 1.30 or newer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


class Decoder:
    """A graph and its cache, for one row; right for every decoder whose cache grows."""

    def __init__(self, bundle: Path) -> None:
        """Loads the graph; its weights are found beside it."""
        self.session = ort.InferenceSession(
            str(bundle / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        self.length = 0
        self.past = {
            value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), DTYPES[value.type])
            for value in self.session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self.present = [name.replace("past_key_values", "present") for name in self.past]

    def tokens(self, ids: list[int]) -> dict[str, NDArray[np.int64]]:
        """The inputs other than the cache, for tokens that follow those before."""
        end = self.length + len(ids)
        return {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(self.length, end, dtype=np.int64)[None],
        }

    def step(self, ids: list[int]) -> NDArray[np.float32]:
        """The logits `[V]` after `ids`: a prompt, a part of it, or the token chosen last."""
        feeds = {**self.tokens(ids), **self.past}
        logits, *present = self.session.run(["logits", *self.present], feeds)
        self.past = dict(zip(self.past, present, strict=True))
        self.length += len(ids)
        return np.asarray(logits[0, -1], np.float32)


class InPlaceDecoder(Decoder):
    """The same without a copy of the cache in each step, where the graph can write in place.

    One buffer `[1, Hkv, capacity, D]` is given as past and as present; what the attention mask
    counts is valid.
    """

    def __init__(self, bundle: Path, capacity: int) -> None:
        """Allocates the cache for `capacity` tokens."""
        config = json.loads((bundle / "genai_config.json").read_text(encoding="utf-8"))
        if not config["search"]["past_present_share_buffer"]:
            raise SystemExit(
                f"the graph in {bundle} joins past and present: run without --in-place"
            )
        super().__init__(bundle)
        self.past = {
            name: np.zeros((1, empty.shape[1], capacity, empty.shape[3]), empty.dtype)
            for name, empty in self.past.items()
        }
        # These values read and write the arrays, which therefore must live as long.
        self.values = [ort.OrtValue.ortvalue_from_numpy(array) for array in self.past.values()]

    def step(self, ids: list[int]) -> NDArray[np.float32]:
        """As above."""
        binding = self.session.io_binding()
        for name, array in self.tokens(ids).items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits")
        for past, present, value in zip(self.past, self.present, self.values, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        self.session.run_with_iobinding(binding)
        self.length += len(ids)
        return np.asarray(binding.get_outputs()[0].numpy()[0, -1], np.float32)


def end_ids(bundle: Path) -> set[int]:
    """Ids that end a text: an id, a list or nothing in either file."""
    for name in ("generation_config.json", "config.json"):
        found = json.loads((bundle / name).read_text(encoding="utf-8")).get("eos_token_id")
        if found is not None:
            return set(found) if isinstance(found, list) else {found}
    return set()


def generate(decoder: Decoder, prompt: list[int], count: int, ends: set[int]) -> Iterator[int]:
    """The likeliest token, again and again."""
    logits = decoder.step(prompt)
    for left in range(count - 1, -1, -1):
        token = int(logits.argmax())
        if token in ends:
            return
        yield token
        if left:
            logits = decoder.step([token])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--in-place", action="store_true", help="write the cache in place")
    parser.add_argument("--ids", action="store_true", help="print token ids instead of text")
    asked = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(asked.bundle / "tokenizer.json"))
    prompt = tokenizer.encode(asked.prompt).ids
    capacity = len(prompt) + asked.new_tokens
    decoder = InPlaceDecoder(asked.bundle, capacity) if asked.in_place else Decoder(asked.bundle)
    ids = list(generate(decoder, prompt, asked.new_tokens, end_ids(asked.bundle)))
    print(json.dumps(ids) if asked.ids else tokenizer.decode(ids))


if __name__ == "__main__":
    main()

"""How an encoder's time grows with its input: softmax attention beside LION's linear form.

    python benchmarks/length.py

One block of a random encoder (384 channels, 6 heads, RoPE, a feed-forward layer of 1,536) runs in
ONNX Runtime on this CPU in fp32, batch 1: once with ONNX Runtime's own fused attention
(com.microsoft::MultiHeadAttention), once with edgeattn::BidirectionalLinearAttention (LION-D, as
its function body). All else is the same. Each length is timed in alternating runs of the two; the
growth is the slope of log time over log length between the two longest. Needs edgeattn[ort,report].
Writes benchmarks/results/length.json and length.svg.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from measure import RESULTS, write_result
from onnx import TensorProto, helper, numpy_helper

from edgeattn.ops import find_op
from edgeattn.ops.spec import DOMAIN, OP_VERSION, PLUGIN_ATTRIBUTES

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
WIDTH, HEADS, INNER = 384, 6, 1536
HEAD = WIDTH // HEADS
OPSET, THREADS = 21, 2
LION = "BidirectionalLinearAttention"
# Linear growth has slope 1, quadratic 2; both blocks have linear layers besides.
GOALS = {"LION's slope at most": 1.1, "softmax attention's slope at least": 1.6}


class Graph:
    """Nodes and initialisers of a model that is being built."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(0)

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """The one output of a new node."""
        name = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], domain=domain, **attributes))
        return name

    def constant(self, value: Any) -> str:
        """A constant of the model."""
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def linear(self, x: str, inputs: int, outputs: int) -> str:
        """A product with a random matrix that keeps the variance."""
        weight = self._random.standard_normal((inputs, outputs), np.float32) / math.sqrt(inputs)
        return self.op("MatMul", x, self.constant(weight.astype(np.float32)))

    def norm(self, x: str) -> str:
        """Layer normalisation."""
        return self.op("LayerNormalization", x, self.constant(np.ones(WIDTH, np.float32)), axis=-1)


def rotary(graph: Graph, x: str) -> str:
    """RoPE of `[B, H, T, D]`."""
    places = np.arange(LENGTHS[-1])[:, None] / 10_000.0 ** (np.arange(0, HEAD, 2) / HEAD)
    tables = [graph.constant(f(places).astype(np.float32)) for f in (np.cos, np.sin)]
    return graph.op("RotaryEmbedding", x, "positions", *tables, domain="com.microsoft")


def heads(graph: Graph, x: str) -> str:
    """`[B, T, H D]` as `[B, H, T, D]`."""
    split = graph.op("Reshape", x, graph.constant(np.array([0, 0, HEADS, HEAD])))
    return graph.op("Transpose", split, perm=(0, 2, 1, 3))


def joined(graph: Graph, x: str) -> str:
    """`[B, H, T, D]` as `[B, T, H D]`."""
    rows = graph.op("Transpose", x, perm=(0, 2, 1, 3))
    return graph.op("Reshape", rows, graph.constant(np.array([0, 0, WIDTH])))


def softmax_attention(graph: Graph, q: str, k: str, v: str) -> str:
    """ONNX Runtime's fused attention; its queries are `[B, T, H D]`, the others have heads."""
    return graph.op(
        "MultiHeadAttention", joined(graph, q), k, v, domain="com.microsoft", num_heads=HEADS
    )


def feature_map(graph: Graph, x: str) -> str:
    """LION's: (SiLU(x) + 0.5) of length 1, which is positive."""
    silu = graph.op("Mul", x, graph.op("Sigmoid", x))
    shifted = graph.op("Add", silu, graph.constant(np.float32(0.5)))
    return graph.op("LpNormalization", shifted, axis=-1, p=2)


def lion_attention(graph: Graph, q: str, k: str, v: str) -> str:
    """LION-D: one decay per head, such as RetNet has them."""
    decays = np.log(1 - 2.0 ** (-3 - np.arange(HEADS, dtype=np.float64))).astype(np.float32)
    rows = graph.op("Shape", q, end=3)
    decay = graph.op("Expand", graph.constant(decays[None, :, None]), rows)
    nobody = graph.op("Cast", graph.op("Sub", "positions", "positions"), to=TensorProto.INT32)
    features = (feature_map(graph, q), feature_map(graph, k))
    attributes = {**find_op(LION).complete_attributes({}), **PLUGIN_ATTRIBUTES}
    y = graph.op(LION, *features, v, decay, nobody, domain=DOMAIN, **attributes)
    return joined(graph, y)


def block(attention: Any) -> onnx.ModelProto:
    """The encoder block with one of the two attentions."""
    graph = Graph()
    normal = graph.norm("x")
    q, k, v = (heads(graph, graph.linear(normal, WIDTH, WIDTH)) for _ in range(3))
    mixed = attention(graph, rotary(graph, q), rotary(graph, k), v)
    stream = graph.op("Add", "x", graph.linear(mixed, WIDTH, WIDTH))
    inner = graph.op("Gelu", graph.linear(graph.norm(stream), WIDTH, INNER))
    graph.op("Add", stream, graph.linear(inner, INNER, WIDTH))
    graph.nodes[-1].output[0] = "y"
    value = helper.make_tensor_value_info
    built = helper.make_graph(
        graph.nodes,
        "encoder block",
        [
            value("x", TensorProto.FLOAT, ["B", "T", WIDTH]),
            value("positions", TensorProto.INT64, ["B", "T"]),
        ],
        [value("y", TensorProto.FLOAT, ["B", "T", WIDTH])],
        graph.constants,
    )
    domains = {"": OPSET, "com.microsoft": 1, DOMAIN: OP_VERSION}
    return helper.make_model(
        built,
        opset_imports=[helper.make_opsetid(name, version) for name, version in domains.items()],
        functions=[ir.to_proto(find_op(LION).function_body(OPSET))],
        ir_version=10,
    )


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """The model on this CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def seconds(sessions: Sequence[onnxruntime.InferenceSession], length: int) -> list[float]:
    """Median seconds of each session, in runs that take turns."""
    x = np.random.default_rng(1).standard_normal((1, length, WIDTH), np.float32)
    feeds = {"x": x, "positions": np.arange(length)[None]}
    found: list[list[float]] = [[] for _ in sessions]
    for turn in range(3 if length > 4096 else 7):
        for times, one in zip(found, sessions, strict=True):
            start = time.perf_counter()
            (y,) = one.run(None, feeds)
            if turn:  # the first run makes ready
                times.append(time.perf_counter() - start)
            assert np.isfinite(y).all()
    return [statistics.median(times) for times in found]


def slope(times: dict[int, float]) -> float:
    """Of log time over log length, between the two longest."""
    (short, first), (long, last) = sorted(times.items())[-2:]
    return math.log(last / first) / math.log(long / short)


def crossover(softmax: dict[int, float], linear: dict[int, float]) -> float | None:
    """The length from which LION's block is faster, between those measured; None where none is."""
    lengths = sorted(softmax)
    gains = [math.log(softmax[n] / linear[n]) for n in lengths]
    if gains[0] > 0:
        return float(lengths[0])
    for i, (one, other) in enumerate(itertools.pairwise(gains)):
        if one <= 0 < other:
            share = -one / (other - one)
            return float(lengths[i] * (lengths[i + 1] / lengths[i]) ** share)
    return None


def plot(softmax: dict[int, float], linear: dict[int, float], crossing: float | None) -> None:
    """Writes length.svg."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, times in (("softmax attention", softmax), ("LION", linear)):
        axes.loglog(list(times), [1e3 * t for t in times.values()], marker="o", label=name)
    if crossing is not None:
        axes.axvline(crossing, color="gray", linestyle=":", label=f"{crossing:,.0f} tokens")
    axes.set_xlabel("tokens")
    axes.set_ylabel("milliseconds per block")
    axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(RESULTS / "length.svg", bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Measures both blocks at every length."""
    sessions = [session(block(softmax_attention)), session(block(lion_attention))]
    softmax: dict[int, float] = {}
    linear: dict[int, float] = {}
    for length in LENGTHS:
        softmax[length], linear[length] = seconds(sessions, length)
        print(f"{length:6} tokens: {softmax[length]:8.4f} s, LION {linear[length]:8.4f} s")
    crossing = crossover(softmax, linear)
    slopes = {"softmax attention": round(slope(softmax), 3), "LION": round(slope(linear), 3)}
    missed = []
    if slopes["LION"] > GOALS["LION's slope at most"]:
        missed.append("LION's slope")
    if slopes["softmax attention"] < GOALS["softmax attention's slope at least"]:
        missed.append("softmax attention's slope")
    plot(softmax, linear, crossing)
    content = {
        "block": {"channels": WIDTH, "heads": HEADS, "feed-forward": INNER, "threads": THREADS},
        "onnxruntime": onnxruntime.__version__,
        "results": {
            "seconds, softmax attention": {n: round(t, 5) for n, t in softmax.items()},
            "seconds, LION": {n: round(t, 5) for n, t in linear.items()},
            "slopes": slopes,
            "LION is faster from (tokens)": None if crossing is None else round(crossing),
        },
        "goals": GOALS,
        "missed": missed,
    }
    write_result("length", content)
    if missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()

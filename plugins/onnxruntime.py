"""ONNX Runtime's fused attention ops, as its CPU provider runs them. Knows how a model of one is built, no kernel.

Which op is fastest was measured with ONNX Runtime 1.32.0 on two cores of an AMD EPYC (AVX2, 512 KiB of L2 each), fp32,
head size 128; times are the shortest of many calls, in ms. FLASH is com.microsoft's MultiHeadAttention with keys and
values in three dimensions, IN PLACE the same with four, GROUP com.microsoft's GroupQueryAttention, and ATTENTION the
standard's op of opset 23, which is as fast in opset 24:

    one head, no mask    128×1024  128×8192  512×2048  1024×1024  2048×1024  2048×8192
    FLASH                    0.91       8.4       3.7        3.7        7.6         67
    IN PLACE                 0.80       7.0       5.3        5.6       11.3         95
    ATTENTION                0.86       8.1       6.9        6.8       14.6        121

    causal               1024×1024  2048×2048  1024×1024, 8 query heads on 2 key heads
    GROUP                      3.7       13.6                                       24
    IN PLACE, a mask           5.9       24.5                                       45
    ATTENTION                  7.6       35.2                                       36

FLASH copies q, k and v first and splits the work by blocks of queries, 128 there: it pays for more than those. It takes
no mask. GROUP skips what a causal mask hides, and needs as many queries as keys; it copies the keys and values, too.
MultiHeadAttention has a kernel for fp32 alone: fp16 and bf16 are cast in the graph, and so in the time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from attnbench import Backend, Problem, hookimpl
from attnbench.problem import DeviceKind
from attnbench_plugins.folding import fold, folded_visible
from attnbench_plugins.packages import missing

if TYPE_CHECKING:
    from torch import Tensor

FLASH_ABOVE = 128
"""With more queries a key head than this, and no mask, flash attention is the faster: see the table above."""
HEAD_DIM_MULTIPLE = 8
"""GroupQueryAttention takes no other head sizes."""
OPSET, IR_VERSION = 21, 10
"""Of the ONNX format: old enough for every ONNX Runtime that pip may choose, and with all that the model uses."""


class OnnxRuntime(Backend):
    """Forward attention by a model of one op; for fp16 and bf16 with casts to fp32 and back around it."""

    name = "onnxruntime"
    device: DeviceKind = "cpu"
    summary = "ONNX Runtime's MultiHeadAttention or GroupQueryAttention (its CPU provider)"
    homepage = "https://onnxruntime.ai"
    libraries = MappingProxyType({"onnxruntime": "1.32.0", "onnx": "1.23.2"})

    def unavailable(self) -> str | None:
        # onnx writes the model that onnxruntime reads.
        reason: str | None = missing("onnxruntime", "onnxruntime") or missing("onnx", "onnxruntime")
        return reason

    def unsupported(self, problem: Problem) -> str | None:
        if problem.direction != "fwd":
            return "forward only"
        if problem.visible_rows < problem.seqlen_q:
            return "ONNX Runtime gives a query that sees no key other values than zeros"
        return None

    def prepare(self, problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
        import torch

        out = torch.empty(problem.out_shape, dtype=q.dtype)
        graph = attention(problem, q, k, v, out)
        runtime = session(graph)
        binding = runtime.io_binding()
        for bind, tensors in ((binding.bind_input, graph.inputs), (binding.bind_output, graph.outputs)):
            for name, tensor in tensors.items():
                bind(name, "cpu", 0, _element_type(tensor), list(tensor.shape), tensor.data_ptr())

        def call(_owner: Graph = graph) -> Tensor:  # the binding holds addresses, which keep nothing alive
            runtime.run_with_iobinding(binding)
            return out

        return call

    def parallel_units(self, problem: Problem) -> int:
        import torch

        return torch.get_num_threads()


@dataclass(frozen=True)
class Graph:
    """Nodes, and what they read and write: tensors in the memory of q, k, v and the output, in the shapes of the op."""

    nodes: list[Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    constants: list[Any] = field(default_factory=list)


def attention(problem: Problem, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Graph:
    """The graph of the op that is fastest for a problem. Raises ValueError where a tensor is not contiguous."""
    folded = {name: fold(problem, tensor) for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out))}
    square = problem.causal and problem.window is None and problem.seqlen_q == problem.seqlen_k
    even = problem.head_dim == problem.head_dim_v and problem.head_dim % HEAD_DIM_MULTIPLE == 0
    build = _group_query if square and even else _multi_head
    return _with_casts(build(problem, folded))


def session(graph: Graph) -> Any:
    """The onnxruntime.InferenceSession of a graph, with torch's number of threads."""
    import onnxruntime as ort
    import torch
    from onnx import helper

    def infos(tensors: dict[str, Tensor]) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, _element_type(tensor), list(tensor.shape))
            for name, tensor in tensors.items()
        ]

    body = helper.make_graph(graph.nodes, "attention", infos(graph.inputs), infos(graph.outputs), graph.constants)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _multi_head(problem: Problem, folded: dict[str, Tensor]) -> Graph:
    """MultiHeadAttention of one head on batch · heads_kv elements, whose layout is then BHSD: nothing is transposed."""
    import torch
    from onnx import helper

    inputs = {name: folded[name].flatten(0, 1) for name in "qkv"}
    names = ["q", "k", "v"]
    mask = folded_visible(problem, folded["q"].device)
    if mask is not None:
        inputs["bias"] = torch.zeros(1, 1, *mask.shape).masked_fill_(~mask, -torch.inf)
        names += ["", "", "bias"]
    # With a dimension for the head, keys and values are read in place, and not by flash attention.
    if problem.head_dim == problem.head_dim_v and (mask is not None or inputs["q"].shape[1] <= FLASH_ABOVE):
        for name in "kv":
            inputs[name] = inputs[name].unsqueeze(1)
    node = helper.make_node(
        "MultiHeadAttention", names, ["out"], domain="com.microsoft", num_heads=1, scale=problem.softmax_scale
    )
    return Graph([node], inputs, {"out": folded["out"].flatten(0, 1)})


def _group_query(problem: Problem, folded: dict[str, Tensor]) -> Graph:
    """GroupQueryAttention of one key head on batch · heads_kv elements, as many queries as keys, under a causal mask.

    With one query head a key head its layout is BHSD. With more, q and the output are transposed, in the graph and so
    in the time.
    """
    from onnx import TensorProto, helper

    batch, group = problem.batch * problem.heads_kv, problem.heads_q // problem.heads_kv
    length, dim = problem.seqlen_k, problem.head_dim
    constants = [
        helper.make_tensor("last_key", TensorProto.INT32, [batch], [length - 1] * batch),
        helper.make_tensor("keys", TensorProto.INT32, [], [length]),
    ]
    # The outputs after the first are keys and values for a next call, which nobody reads: asking for them is what makes
    # it take its flash attention (3.3 ms instead of 6.5 at 1024×1024).
    nodes = [
        helper.make_node(
            "GroupQueryAttention",
            ["q" if group == 1 else "q_joined", "k", "v", "", "", "last_key", "keys"],
            ["out" if group == 1 else "out_joined", "next_k", "next_v"],
            domain="com.microsoft",
            num_heads=group,
            kv_num_heads=1,
            scale=problem.softmax_scale,
        )
    ]
    if group > 1:
        constants += [
            helper.make_tensor("joined", TensorProto.INT64, [3], [batch, length, group * dim]),
            helper.make_tensor("apart", TensorProto.INT64, [4], [batch, length, group, dim]),
        ]
        nodes = [
            helper.make_node("Transpose", ["q"], ["q_apart"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", ["q_apart", "joined"], ["q_joined"]),
            *nodes,
            helper.make_node("Reshape", ["out_joined", "apart"], ["out_apart"]),
            helper.make_node("Transpose", ["out_apart"], ["out"], perm=[0, 2, 1, 3]),
        ]
    heads = (batch, length, dim) if group == 1 else (batch, group, length, dim)
    return Graph(
        nodes,
        {"q": folded["q"].view(heads), **{name: folded[name].flatten(0, 1) for name in "kv"}},
        {"out": folded["out"].view(heads)},
        constants,
    )


def _with_casts(graph: Graph) -> Graph:
    """The graph with its inputs cast to fp32 and its output back, where they are not fp32."""
    import torch
    from onnx import TensorProto, helper

    narrow = [name for name, tensor in graph.inputs.items() if tensor.dtype != torch.float32]
    if not narrow:
        return graph
    out = graph.outputs["out"]
    return dataclasses.replace(
        graph,
        nodes=[
            *(helper.make_node("Cast", [f"narrow_{name}"], [name], to=TensorProto.FLOAT) for name in narrow),
            *graph.nodes,
            helper.make_node("Cast", ["out"], ["narrow_out"], to=_element_type(out)),
        ],
        inputs={f"narrow_{name}" if name in narrow else name: tensor for name, tensor in graph.inputs.items()},
        outputs={"narrow_out": out},
    )


def _element_type(tensor: Tensor) -> int:
    import torch
    from onnx import TensorProto

    types = {torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
    return int(TensorProto.DataType.Value(types[tensor.dtype]))


@hookimpl
def attnbench_backends() -> Iterable[Backend]:
    return [OnnxRuntime()]

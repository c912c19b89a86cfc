"""Backends that fall into the traps of torch_npu's operators and of its task queue, and one that does not."""

import torch

from attnbench import Backend


class Trap(Backend):
    device = "npu"

    def prepare(self, problem, q, k, v):
        import torch_npu

        mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1).to("npu")
        heads = {"num_heads": problem.heads_q, "num_key_value_heads": problem.heads_kv}
        return self.call(torch_npu, problem, (q, k, v), {**heads, "input_layout": "BNSD"}, mask)


class DefaultScale(Trap):
    name = "default_scale"

    def call(self, npu, problem, qkv, options, mask):
        options |= {"atten_mask": mask, "sparse_mode": 3} if problem.causal else {}
        return lambda: npu.npu_fused_infer_attention_score(*qkv, **options)[0]


class NextTokensWithoutMask(Trap):
    name = "next_tokens_without_mask"

    def call(self, npu, problem, qkv, options, mask):
        options |= {"next_tokens": 0, "scale": problem.softmax_scale}
        return lambda: npu.npu_fused_infer_attention_score(*qkv, **options)[0]


class SparseModeWithoutMask(Trap):
    name = "sparse_mode_without_mask"

    def call(self, npu, problem, qkv, options, mask):
        scale = problem.softmax_scale
        return lambda: npu.npu_fusion_attention(*qkv, problem.heads_q, "BNSD", scale=scale, sparse_mode=3)[0]


class TopLeft(Trap):
    name = "top_left"

    def call(self, npu, problem, qkv, options, mask):
        options |= {"atten_mask": mask, "sparse_mode": 2, "scale": problem.softmax_scale}
        return lambda: npu.npu_fused_infer_attention_score(*qkv, **options)[0]


class InvertedMask(Trap):
    name = "inverted_mask"

    def call(self, npu, problem, qkv, options, mask):
        options |= {"atten_mask": ~mask, "sparse_mode": 3, "scale": problem.softmax_scale}
        return lambda: npu.npu_fused_infer_attention_score(*qkv, **options)[0]


class Launched(Backend):
    """A library's kernel, launched on a stream's handle past torch_npu's queue."""

    device = "npu"

    def prepare(self, problem, q, k, v):
        from torch_npu.machine import Handle, Task, on
        from torch_npu.operators import attention

        host, out = [on(tensor, "cpu") for tensor in (q, k, v)], torch.empty_like(q)
        to = on(out, "cpu")
        kernel = Task(lambda _: to.copy_(attention(*host, problem.softmax_scale, None)) and None)
        stream = self.stream()

        def call():
            handle = Handle.from_address(stream())
            handle.launch(stream(), kernel, None, 10.0)
            return out

        return call


class StreamFetchedOnce(Launched):
    name = "stream_fetched_once"

    def stream(self):
        address = torch.npu.current_stream().npu_stream
        return lambda: address


class StreamOfEachCall(Launched):
    name = "stream_of_each_call"

    def stream(self):
        return lambda: torch.npu.current_stream().npu_stream

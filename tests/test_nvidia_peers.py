"""flashinfer_fa2, flashinfer_fa3, cudnn_frontend and transformer_engine on a GPU: right where they say that they can.

Their libraries are asked for nothing here that test_flashinfer.py and test_cudnn_peers.py do not stand in for.
"""

from __future__ import annotations

import json

import pytest
import torch
from helpers import attnbench
from test_cuda import with_gpu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="it computes on a GPU, and torch sees none")

PEERS = ("flashinfer_fa2", "flashinfer_fa3", "cudnn_frontend", "transformer_engine")
SUITE = """
name = "nvidia"
[[problems]]
seqlen_q = 200
seqlen_k = 200
causal = true
[[problems]]
seqlen_q = 96
seqlen_k = 300
batch = 2
heads_q = 8
heads_kv = 2
causal = true
[[problems]]
seqlen_q = 130
seqlen_k = 1260
causal = true
window = 40
[[problems]]
seqlen_q = 140
seqlen_k = 1260
window = 40
[[problems]]
seqlen_q = 160
seqlen_k = 96
causal = true
[[problems]]
seqlen_q = 1
seqlen_k = 4096
batch = 3
heads_q = 8
heads_kv = 2
[[problems]]
seqlen_q = 2
seqlen_k = 512
batch = 80
heads_q = 4
"""
REFUSED = {
    "flashinfer_fa2": [160],
    "flashinfer_fa3": [140],
    "cudnn_frontend": [160],
    "transformer_engine": [160],
}
COMPILING_S = 600
"""FlashInfer compiles each of its kernels for a minute or more, and this suite takes six."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("nvidia")
    (folder / "suite.toml").write_text(SUITE)
    how = ("--suite", folder / "suite.toml", "--iters", "40", "--warmup", "5", "--timeout", COMPILING_S)
    words = ("run", "--device", "cuda", "--backends", ",".join(PEERS), *how, "--out", folder / "run")
    answer = attnbench(*words, env=with_gpu(), timeout=6 * COMPILING_S)
    lines = (folder / "run" / "results.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines, answer.err
    return [json.loads(line) for line in lines]


def of(results: list[dict], backend: str) -> list[dict]:
    """Its results; skips where it is not there."""
    own = [result for result in results if result["backend"] == backend]
    assert len(own) == 7
    if own[0]["status"] == "UNAVAILABLE":
        pytest.skip(own[0]["reason"])
    return own


@pytest.mark.parametrize("backend", PEERS)
def test_it_is_right_where_it_says_that_it_can(results: list[dict], backend: str) -> None:
    ends = {r["problem"]["seqlen_q"]: (r["status"], r["reason"]) for r in of(results, backend)}
    assert {status for status, _ in ends.values()} <= {"PASSED", "UNSUPPORTED"}, ends
    assert [length for length, (status, _) in ends.items() if status == "UNSUPPORTED"] == REFUSED[backend]


@pytest.mark.parametrize("backend", PEERS)
def test_it_can_be_captured(results: list[dict], backend: str) -> None:
    methods = {r["measurement"]["timing_method"] for r in of(results, backend) if r["measurement"]}
    assert methods == {"cuda_graph"}

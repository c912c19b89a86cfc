"""Tiles of a problem's queries for kernels of our own that fold grouped heads (folding.py). Knows no kernel."""

from __future__ import annotations

from attnbench import Problem

MAX_SPLITS = 64
"""What combines the parts of a row reads them all."""


def rows(problem: Problem) -> int:
    """Queries that read one key head of one batch element."""
    return problem.heads_q // problem.heads_kv * problem.seqlen_q


def tile_count(problem: Problem, rows_a_tile: int) -> int:
    """Tiles of that many queries of all key heads."""
    return problem.batch * problem.heads_kv * -(-rows(problem) // rows_a_tile)


def split_count(problem: Problem, rows_a_tile: int, keys_a_block: int, cores: int) -> int:
    """How many programs may share a tile's keys so that no core idles, a power of two; 1 where tiles are enough."""
    blocks = -(-problem.seqlen_k // keys_a_block)
    room = min(cores // tile_count(problem, rows_a_tile), blocks, MAX_SPLITS)
    return 1 << (max(room, 1).bit_length() - 1)


def reach(problem: Problem) -> tuple[int, int]:
    """How far before and after its own position a query sees no key any more; no limit is beyond all keys."""
    everything = problem.seqlen_q + problem.seqlen_k
    behind = everything if problem.window is None else min(problem.window, everything)
    return behind, 1 if problem.causal else behind

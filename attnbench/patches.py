"""Owns how inputs change between timed calls: which rows, to what, so that the worker and the judge agree on it.

At any call one patch lies over the prepared inputs, derived from a seed and the call's number alone. Knows no backend.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnbench.problem import Problem

# Taken before any plugin is imported: a plugin that replaces them later changes nothing here.
_MULTIPLY, _CLONE, _COPY = torch.mul, torch.Tensor.clone, torch.Tensor.copy_

MAX_EXPONENT = 3
"""Keys are scaled by no more than 2³, so that no product of theirs overflows fp16."""


@dataclass(frozen=True)
class Patch:
    """Query `row` of one head becomes another row of it, key `key` is aligned with that query, its value another's.

    The key then carries much of the row's weight, so that an output is wrong in that row by far more than any error
    budget if it was computed from an earlier q, k or v.
    """

    batch: int
    head: int
    head_kv: int
    row: int
    row_from: int
    key: int
    key_from: int
    q_sign: float
    v_sign: float
    key_scale: float
    """A power of two, by which every dtype multiplies exactly."""

    @classmethod
    def of(cls, problem: Problem, seed: int, call: int) -> Patch | None:
        """The patch of a call; the same on every machine. None where no query sees a key."""
        if not problem.visible_rows:
            return None
        draw = _draws(seed, call)
        head = next(draw) % problem.heads_q
        row = problem.seqlen_q - problem.visible_rows + next(draw) % problem.visible_rows
        low, high = problem.key_range(row)
        # A query times itself is about head_dim; times other keys it has a standard deviation of its root. The score
        # must stand out from the sum of all others, or from the largest.
        spread = problem.softmax_scale * math.sqrt(problem.head_dim)
        wanted = max(math.log(high - low), spread * math.sqrt(2 * math.log(high - low))) + 0.5
        exponent = math.ceil(math.log2(wanted / (problem.head_dim * problem.softmax_scale)))
        exponent = min(max(exponent, -2 * MAX_EXPONENT), MAX_EXPONENT)
        signs = next(draw)
        return cls(
            batch=next(draw) % problem.batch,
            head=head,
            head_kv=head // (problem.heads_q // problem.heads_kv),
            row=row,
            row_from=next(draw) % problem.seqlen_q,
            key=low + next(draw) % (high - low),
            key_from=next(draw) % problem.seqlen_k,
            q_sign=-1.0 if signs & 1 else 1.0,
            v_sign=-1.0 if signs & 2 else 1.0,
            key_scale=2.0**exponent,
        )


def _draws(seed: int, call: int) -> Iterator[int]:
    digest = hashlib.blake2b(f"{seed}:{call}".encode(), digest_size=56).digest()
    return (int.from_bytes(digest[at : at + 8], "little") for at in range(0, 56, 8))


class Patched:
    """q, k and v, on any device, over which one patch at a time is laid. No write touches a tensor's version."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._q, self._k, self._v = q.data, k.data, v.data  # which count versions of their own
        self._saved: list[tuple[Tensor, Tensor]] = []

    def lay(self, patch: Patch | None) -> None:
        """Take the last patch away and lay this one."""
        self.restore()
        if patch is None:
            return
        queries = self._q[patch.batch, patch.head]
        values = self._v[patch.batch, patch.head_kv]
        query, key, value = queries[patch.row], self._k[patch.batch, patch.head_kv, patch.key], values[patch.key]
        self._saved = [(place, _CLONE(place)) for place in (query, key, value)]
        _MULTIPLY(queries[patch.row_from], patch.q_sign, out=query)
        _MULTIPLY(query, patch.key_scale, out=key)
        _MULTIPLY(values[patch.key_from], patch.v_sign, out=value)

    def restore(self) -> None:
        """Put back what lay below the last patch."""
        for place, before in self._saved:
            _COPY(place, before)
        self._saved = []

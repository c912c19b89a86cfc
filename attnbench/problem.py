"""Owns what is computed: Problem and Suite, their names, their FLOPs and bytes. Knows no backend, device or clock."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from attnbench.errors import AttnbenchError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Dtype = Literal["fp16", "bf16", "fp32"]
Direction = Literal["fwd", "bwd", "fwd_bwd"]
Layout = Literal["BHSD"]
DeviceKind = Literal["cpu", "cuda", "npu"]

DTYPES: tuple[Dtype, ...] = get_args(Dtype)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
DEVICE_KINDS: tuple[DeviceKind, ...] = get_args(DeviceKind)
ITEM_BYTES: Mapping[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4}

MAX_SIZE = 2**40
"""The most that a size may be: far beyond any memory, and products of sizes still fit a float."""

BACKWARD_GEMM_RATIO = 2.5
"""Backward runs five GEMMs (S again, dV, dP, dQ, dK) where forward runs two."""


def auto_dtype(device: DeviceKind) -> Dtype:
    """The dtype that `auto` stands for: fp16 where the matrix units are, fp32 on a CPU."""
    return "fp32" if device == "cpu" else "fp16"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One attention problem: out = softmax(softmax_scale · Q Kᵀ + mask) V, on BHSD tensors.

    q is (batch, heads_q, seqlen_q, head_dim), k (batch, heads_kv, seqlen_k, head_dim),
    v (batch, heads_kv, seqlen_k, head_dim_v) and the output (batch, heads_q, seqlen_q, head_dim_v).
    Query head h reads key head h // (heads_q / heads_kv).

    Query i stands at key position i + seqlen_k - seqlen_q (bottom-right alignment, as in flash-attn ≥ 2.1).
    Causal lets it see the keys up to there; `window` the keys less than `window` away from there (so causal with
    window 1 sees one key). A row that sees no key is zeros.

    Raises ValueError where a field is out of range, naming it.
    """

    batch: int = 1
    heads_q: int = 1
    heads_kv: int = cast(int, None)
    """Divides heads_q; left out, it is heads_q."""
    seqlen_q: int
    seqlen_k: int
    head_dim: int = 128
    head_dim_v: int = cast(int, None)
    """Left out, it is head_dim."""
    dtype: Dtype | Literal["auto"] = "auto"
    """`auto` is for suites alone: `resolve` turns it into the device's dtype before anything runs."""
    causal: bool = False
    window: int | None = None
    softmax_scale: float = cast(float, None)
    """Left out, it is 1/sqrt(head_dim)."""
    direction: Direction = "fwd"
    layout: Layout = "BHSD"

    def __post_init__(self) -> None:
        for name, default in (
            ("heads_kv", self.heads_q),
            ("head_dim_v", self.head_dim),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        for name in ("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v"):
            _require_positive(name, getattr(self, name))
        if self.window is not None:
            _require_positive("window", self.window)
        if self.softmax_scale is None:
            object.__setattr__(self, "softmax_scale", self._default_scale)
        if isinstance(self.softmax_scale, bool) or not isinstance(self.softmax_scale, (int, float)):
            raise ValueError(f"softmax_scale must be a number, not {self.softmax_scale!r}")
        try:
            scale = float(self.softmax_scale)
        except OverflowError:
            scale = math.inf
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"softmax_scale must be positive and finite, not {self.softmax_scale!r:.40}")
        object.__setattr__(self, "softmax_scale", scale)
        if self.heads_q % self.heads_kv:
            raise ValueError(f"heads_kv must divide heads_q, and {self.heads_kv} does not divide {self.heads_q}")
        if not isinstance(self.causal, bool):
            raise ValueError(f"causal must be true or false, not {self.causal!r}")
        _require_choice("dtype", self.dtype, (*DTYPES, "auto"))
        _require_choice("direction", self.direction, DIRECTIONS)
        _require_choice("layout", self.layout, LAYOUTS)

    @property
    def _default_scale(self) -> float:
        return 1.0 / math.sqrt(self.head_dim)

    def resolve(self, device: DeviceKind) -> Problem:
        """This problem with dtype `auto` replaced by the device's."""
        return dataclasses.replace(self, dtype=auto_dtype(device)) if self.dtype == "auto" else self

    @property
    def q_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.heads_q, self.seqlen_q, self.head_dim)

    @property
    def k_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.heads_kv, self.seqlen_k, self.head_dim)

    @property
    def v_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.heads_kv, self.seqlen_k, self.head_dim_v)

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        return (self.batch, self.heads_q, self.seqlen_q, self.head_dim_v)

    @property
    def case_id(self) -> str:
        """The problem's name, unique among problems: `b1-h1-q128-k1024-d128-fp16`, then suffixes."""
        heads = f"h{self.heads_q}" if self.heads_q == self.heads_kv else f"h{self.heads_q}x{self.heads_kv}"
        dims = f"d{self.head_dim}" if self.head_dim == self.head_dim_v else f"d{self.head_dim}x{self.head_dim_v}"
        parts = [f"b{self.batch}", heads, f"q{self.seqlen_q}", f"k{self.seqlen_k}", dims, self.dtype]
        if self.causal:
            parts.append("causal")
        if self.window is not None:
            parts.append(f"w{self.window}")
        if self.softmax_scale != self._default_scale:
            parts.append(f"s{self.softmax_scale:.17g}")
        if self.direction != "fwd":
            parts.append(self.direction)
        return "-".join(parts)

    def key_range(self, row: int) -> tuple[int, int]:
        """The half-open range of keys that query `row` sees; (0, 0) where it sees none."""
        position = row + self.seqlen_k - self.seqlen_q
        low = 0 if self.window is None else max(0, position - self.window + 1)
        high = self.seqlen_k
        if self.causal:
            high = min(high, position + 1)
        elif self.window is not None:
            high = min(high, position + self.window)
        return (low, high) if low < high else (0, 0)

    @functools.cached_property
    def visible_pairs(self) -> int:
        """How many (query, key) pairs one head of one batch element computes, masked ones not counted."""
        if not self._masked:
            return self.seqlen_q * self.seqlen_k
        # Query positions p run from `first`, the first that sees a key, to seqlen_k - 1, and see the keys from
        # max(0, p - window + 1) to min(seqlen_k, p + ahead); each sum of those over p is a difference of triangles.
        first, last, ahead = self._first_position, self.seqlen_k - 1, self._ahead

        def ramp(shift: int) -> int:
            """The sum of max(0, p + shift) over all p."""
            return _triangle(last + shift) - _triangle(first + shift - 1)

        below = 0 if self.window is None else ramp(1 - self.window)
        return ramp(ahead) - ramp(ahead - self.seqlen_k) - below

    @functools.cached_property
    def visible_rows(self) -> int:
        """How many queries of one head see at least one key."""
        return self.seqlen_k - self._first_position if self._masked else self.seqlen_q

    @property
    def _ahead(self) -> int:
        """Under a mask: a query at position p sees no key from p + `_ahead` on."""
        return 1 if self.causal or self.window is None else self.window

    @property
    def _first_position(self) -> int:
        """Under a mask: the key position of the first query that sees a key."""
        return max(self.seqlen_k - self.seqlen_q, 1 - self._ahead)

    @property
    def _visible_keys(self) -> int:
        """How many keys lie between the first and the last that any query sees."""
        return self.seqlen_k - (0 if self.window is None else max(0, self._first_position - self.window + 1))

    @property
    def flops_gemm(self) -> int:
        """FLOPs of the matrix products alone: 2·pairs·(d + e) forward, 2.5 times that backward."""
        forward = 2 * self.batch * self.heads_q * self.visible_pairs * (self.head_dim + self.head_dim_v)
        return round(forward * self._passes)

    @property
    def flops(self) -> int:
        """FLOPs of the whole: `flops_gemm` and, forward, the scaling and the softmax.

        Per batch element and query head, with P visible pairs in R rows: P (scale) + (P - R) max + P subtract + P exp
        + (P - R) sum + P divide = 6P - 2R, which unmasked is sq·sk + sq·(5·sk - 2). Backward counts its GEMMs alone.
        """
        if self.direction == "bwd":
            return self.flops_gemm
        softmax = self.batch * self.heads_q * (6 * self.visible_pairs - 2 * self.visible_rows)
        return self.flops_gemm + softmax

    @property
    def _passes(self) -> float:
        return {"fwd": 1.0, "bwd": BACKWARD_GEMM_RATIO, "fwd_bwd": 1.0 + BACKWARD_GEMM_RATIO}[self.direction]

    @functools.cached_property
    def bytes_moved(self) -> int:
        """The fewest bytes that can cross the memory bus: every visible input read once, every output written once.

        Backward also reads the output and its gradient and writes a gradient for each input. Raises ValueError for
        dtype `auto`, whose item size is not known.
        """
        if self.dtype == "auto":
            raise ValueError("bytes_moved needs a dtype: call resolve(device) first")
        out = self.batch * self.heads_q * self.seqlen_q * self.head_dim_v * ITEM_BYTES[self.dtype]
        forward, backward = self.input_bytes + out, 2 * self.input_bytes + 2 * out
        return {"fwd": forward, "bwd": backward, "fwd_bwd": forward + backward}[self.direction]

    @functools.cached_property
    def input_bytes(self) -> int:
        """The bytes of q, k and v that are visible, which every direction reads. Raises ValueError as `bytes_moved`."""
        if self.dtype == "auto":
            raise ValueError("input_bytes needs a dtype: call resolve(device) first")
        keys = self._visible_keys if self._masked else self.seqlen_k
        q = self.batch * self.heads_q * self.visible_rows * self.head_dim
        kv = self.batch * self.heads_kv * keys * (self.head_dim + self.head_dim_v)
        return (q + kv) * ITEM_BYTES[self.dtype]

    @property
    def _masked(self) -> bool:
        return self.causal or self.window is not None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Problem:
        """The problem that `to_json` wrote. Raises ValueError where a field is unknown, missing or out of range."""
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - known):
            raise ValueError(f"a problem has no field {unknown[0]!r}")
        if missing := sorted({"seqlen_q", "seqlen_k"} - set(data)):
            raise ValueError(f"a problem needs {missing[0]}")
        return cls(**data)


def _triangle(n: int) -> int:
    """1 + 2 + … + n; 0 for n below 1."""
    return n * (n + 1) // 2 if n > 0 else 0


def _require_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
    if value > MAX_SIZE:
        raise ValueError(f"{name} must be at most 2**40")  # its digits may be too many to print


def _require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


@dataclass(frozen=True)
class Suite:
    """A named, ordered list of different problems.

    Raises ValueError where the name is not `[a-z][a-z0-9_-]*`, no problem is given, or one stands in it twice.
    """

    name: str
    problems: tuple[Problem, ...]
    summary: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", self.name):
            raise ValueError(f"a suite's name must match [a-z][a-z0-9_-]*, and {self.name!r} does not")
        object.__setattr__(self, "problems", tuple(self.problems))
        if not self.problems:
            raise ValueError(f"suite {self.name} has no problems")
        ids = Counter(problem.case_id for problem in self.problems)
        if twice := sorted(case for case, count in ids.items() if count > 1):
            raise ValueError(f"suite {self.name} holds {twice[0]} twice")

    def __iter__(self) -> Iterator[Problem]:
        return iter(self.problems)

    def __len__(self) -> int:
        return len(self.problems)

    def to_json(self) -> dict[str, Any]:
        problems = [problem.to_json() for problem in self.problems]
        return {"name": self.name, "problems": problems, "summary": self.summary}

    @classmethod
    def from_json(cls, data: object) -> Suite:
        """The suite that `to_json` wrote. Raises ValueError where it is anything else."""
        match data:
            case {"name": str(name), "problems": [*problems], "summary": str(summary), **rest} if not rest:
                if all(isinstance(problem, dict) for problem in problems):
                    return cls(name, tuple(map(Problem.from_json, problems)), summary)
        raise ValueError("a suite is a name, problems and a summary")


def cross(**axes: Sequence[Any]) -> tuple[Problem, ...]:
    """Every combination of the given fields' values, the first field varying slowest."""
    return tuple(Problem(**dict(zip(axes, values))) for values in itertools.product(*axes.values()))


PTO_SEQLENS_Q = (128, 256, 512, 1024, 2048)
PTO_SEQLENS_K = (1024, 2048, 4096, 8192)

PTO = Suite(
    "pto",
    cross(seqlen_q=PTO_SEQLENS_Q, seqlen_k=PTO_SEQLENS_K),
    "the 5x4 grid of the published Ascend 910B2 table: batch 1, one head, head size 128",
)
SMOKE = Suite(
    "smoke",
    (
        Problem(seqlen_q=64, seqlen_k=128, head_dim=64),
        Problem(seqlen_q=1, seqlen_k=257, head_dim=64),
        Problem(seqlen_q=33, seqlen_k=65, heads_q=4, heads_kv=2, head_dim=64, causal=True),
    ),
    "three tiny problems: a plain one, one query, and causal with grouped heads",
)
BUILTIN_SUITES: tuple[Suite, ...] = (PTO, SMOKE)

_SUITE_KEYS = {"name", "summary", "problems"}


def load_suite(path: Path) -> Suite:
    """The suite in a TOML file: `name`, `summary` and `[[problems]]` tables of Problem fields.

    A list as a field's value makes a cross product within its table. Raises AttnbenchError where the file cannot be
    read or describes no valid suite, naming the table at fault.
    """
    hint = "a suite is a name and [[problems]] tables, each with seqlen_q and seqlen_k"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        where = "give a suite's name or the path of a TOML file"
        raise AttnbenchError(f"cannot read suite {path}: {error.strerror}", where) from error
    except RecursionError as error:
        raise AttnbenchError(f"suite {path} is nested too deeply", hint) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AttnbenchError(f"suite {path} is not TOML: {error}", hint) from error
    if unknown := sorted(set(data) - _SUITE_KEYS):
        raise AttnbenchError(f"suite {path} has an unknown key {unknown[0]!r}", hint)
    tables = data.get("problems", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise AttnbenchError(f"suite {path}: problems must be [[problems]] tables", hint)
    name, summary = data.get("name", path.stem), data.get("summary", "")
    if not isinstance(name, str) or not isinstance(summary, str):
        raise AttnbenchError(f"suite {path}: name and summary must be text", hint)
    problems: dict[Problem, None] = {}
    for index, table in enumerate(tables, 1):
        axes = {key: value if isinstance(value, list) else [value] for key, value in table.items()}
        try:
            if empty := [key for key, values in axes.items() if not values]:
                raise ValueError(f"{empty[0]} is an empty list")
            for values in itertools.product(*axes.values()):
                problem = Problem.from_json(dict(zip(axes, values)))
                if problem in problems:
                    raise ValueError(f"{problem.case_id} is there twice")
                problems[problem] = None
        except (ValueError, OverflowError) as error:
            raise AttnbenchError(f"suite {path}, problem table {index}: {error}", hint) from error
    try:
        return Suite(name, tuple(problems), summary)
    except ValueError as error:
        raise AttnbenchError(f"suite {path}: {error}", hint) from error

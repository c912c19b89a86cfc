"""Owns the row format of results.csv, both ways: from a Result to text, and from a CSV of any origin back to rows.

Knows no directory, no table and no statistics beyond those a row shows.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnbench import stats
from attnbench.devices import DeviceInfo
from attnbench.devices.known import known_device
from attnbench.errors import AttnbenchError
from attnbench.problem import DEVICE_KINDS, Problem, auto_dtype
from attnbench.result import MAX_TIME_US, MIN_TIME_US, Result, Status
from attnbench.roofline import MARGIN
from attnbench.text import no_formula, one_line

SCHEMA_VERSION = 1
LEAD_COLUMNS = ("sq", "sk", "head_size", "kernel", "time_us", "tflops", "flops_total")
COLUMNS = (
    *LEAD_COLUMNS,
    *("batch", "heads_q", "heads_kv", "head_dim_v", "dtype", "causal", "direction", "device", "device_name"),
    *("status", "reason", "timing_method", "cache", "statistic", "n_samples", "n_blocks"),
    *("mean_us", "median_us", "p10_us", "p90_us", "ci95_low_us", "ci95_high_us", "host_us"),
    *("tflops_gemm", "gbps", "pct_peak", "used_cores", "normalized_tflops", "max_abs_err", "err_budget"),
    *("clock_mhz", "case_id", "schema_version"),
)
"""The columns of results.csv, in order: readers outside this project count on it. Units stand in the names."""

Row = dict[str, Any]
"""One row of results.csv by column: str, int, float, bool, or None where there is no value."""


def row(result: Result, device: DeviceInfo) -> Row:
    """The CSV row of a result. Rates are in TFLOP/s and GB/s (10⁹ bytes); a failed case has none."""
    problem, measurement = result.problem, result.measurement
    values: Row = dict.fromkeys(COLUMNS) | _shape(problem)
    values.update(
        kernel=result.backend,
        device=result.device,
        device_name=device.name,
        status=result.status.value,
        reason=result.reason or None,
        used_cores=result.used_cores,
        schema_version=SCHEMA_VERSION,
    )
    if result.check is not None:
        values.update(max_abs_err=result.check.max_abs_err, err_budget=result.check.err_budget)
    if measurement is not None:
        samples, interval = measurement.samples, measurement.ci95_us
        values.update(
            time_us=measurement.time_us,
            timing_method=measurement.timing_method,
            cache=measurement.cache,
            statistic=measurement.statistic,
            n_samples=len(samples),
            n_blocks=len(measurement.blocks),
            mean_us=measurement.mean_us,
            median_us=measurement.median_us,
            p10_us=stats.percentile(samples, 10),
            p90_us=stats.percentile(samples, 90),
            ci95_low_us=interval[0] if interval else None,
            ci95_high_us=interval[1] if interval else None,
            host_us=measurement.host_us,
            clock_mhz=measurement.clock_mhz,
        )
    values.update(rates(values, problem, device))
    return values


def _shape(problem: Problem) -> Row:
    """The columns that say which problem a row is of."""
    return {
        "sq": problem.seqlen_q,
        "sk": problem.seqlen_k,
        "head_size": problem.head_dim,
        "flops_total": problem.flops,
        "batch": problem.batch,
        "heads_q": problem.heads_q,
        "heads_kv": problem.heads_kv,
        "head_dim_v": problem.head_dim_v,
        "dtype": problem.dtype,
        "causal": problem.causal,
        "direction": problem.direction,
        "case_id": problem.case_id,
    }


def rates(values: Mapping[str, Any], problem: Problem, device: DeviceInfo) -> Row:
    """What follows from a row's time: tflops, tflops_gemm, gbps, pct_peak, normalized_tflops; empty without a time.

    normalized_tflops = tflops · device cores / used_cores, a projection; pct_peak is `tflops_gemm` over the peak.
    """
    time_us = values.get("time_us")
    if time_us is None:
        return {}
    tflops, tflops_gemm = problem.flops / time_us / 1e6, problem.flops_gemm / time_us / 1e6
    peak, used = device.peak_tflops.get(problem.dtype), values.get("used_cores")
    return {
        "tflops": tflops,
        "tflops_gemm": tflops_gemm,
        "gbps": problem.bytes_moved / time_us / 1e3,
        "pct_peak": 100 * tflops_gemm / peak if peak else None,
        "normalized_tflops": tflops * device.cores / used if used and device.cores else None,
    }


def csv_text(rows: Iterable[Row]) -> str:
    """results.csv: RFC 4180 with `\\n`, empty where there is no value, text made harmless to spreadsheets."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for values in rows:
        writer.writerow({column: _cell(values[column]) for column in COLUMNS})
    return buffer.getvalue()


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, int):
        return str(value)
    return no_formula(one_line(str(value)))


PUBLISHED_BASELINE = "npu_fused_attention"
PUBLISHED_DEVICE = "Ascend 910B2"
TFLOPS_TOLERANCE = 0.01
"""A CSV's tflops may differ by this much, which rounding of short times explains."""
QUERY_TILE = 128
"""Queries that one AI core of the published kernel takes, which says how many cores a problem occupies."""


def load_csv(path: Path, text: str, device_name: str | None) -> tuple[list[Row], DeviceInfo, list[str]]:
    """The rows of a CSV whose columns include results.csv's first seven, the device they are taken for, and warnings.

    Rates are computed afresh from times; a CSV's own that disagree make a warning. `device_name` overrides what the
    CSV says. Raises AttnbenchError naming the line and the column at fault.
    """
    parsed, warnings = _parse(path, text)
    device, notes = _device_of(path, [values for _, values in parsed], device_name)
    plain = not any(values["device_name"] for _, values in parsed)
    rows, seen = [], set()
    for number, values in parsed:
        problem = _problem_of(path, number, values, device)
        key = (problem.case_id, values["kernel"])
        if key in seen:
            raise AttnbenchError(f"{path}, line {number}: {' on '.join(key)} is there twice")
        seen.add(key)
        warnings += _disagreements(path, number, values, problem)
        if plain and device.kind == "npu" and device.cores and values["used_cores"] is None:
            values["used_cores"] = min(device.cores, -(-problem.seqlen_q // QUERY_TILE))
        values |= _shape(problem)
        values |= {"device": device.kind, "device_name": device.name, "schema_version": SCHEMA_VERSION}
        if reason := _implausible(values, problem, device):
            values |= dict.fromkeys(_OF_A_TIME) | {"status": Status.IMPLAUSIBLE.value, "reason": reason}
        rows.append(values | rates(values, problem, device))
    if beyond := sum(values["status"] == Status.IMPLAUSIBLE.value for values in rows):
        notes.append(f"{beyond} of {len(rows)} rows are IMPLAUSIBLE and show no number; the details say why")
    return rows, device, warnings + notes


def _implausible(values: Row, problem: Problem, device: DeviceInfo) -> str:
    """Why a CSV's row claims more than the device can do; empty where it does not."""
    peak = device.peak_tflops.get(problem.dtype)
    if peak is None or values["status"] != Status.PASSED.value:
        return ""
    by_time = problem.flops_gemm / values["time_us"] / 1e6
    claimed = (values["tflops"] or 0.0) * problem.flops_gemm / problem.flops  # its claim counts the softmax too
    fastest = max(by_time, claimed)
    if fastest <= MARGIN["table"] * peak:
        return ""
    limit = f"the {peak:g} TFLOP/s that {_with_article(device.name)} can do in {problem.dtype}"
    return f"{fastest:.4g} TFLOP/s is above {limit}"


def _with_article(name: str) -> str:
    return f"{'an' if name.startswith(('A', 'E', 'I', 'O', 'NVIDIA')) else 'a'} {name}"


def _parse(path: Path, text: str) -> tuple[list[tuple[int, Row]], list[str]]:
    reader = csv.reader(io.StringIO(text))
    try:
        lines = [(reader.line_num, fields) for fields in reader]
    except csv.Error as error:
        raise AttnbenchError(f"{path}, line {reader.line_num}: {error}") from error
    if not lines:
        raise AttnbenchError(f"{path} is empty", f"its first line must be {','.join(LEAD_COLUMNS)}")
    columns = [name.strip() for name in lines[0][1]]
    for name in LEAD_COLUMNS:
        if name not in columns:
            raise AttnbenchError(f"{path} lacks the column {name}", f"it needs {','.join(LEAD_COLUMNS)}")
    for name in columns:
        if columns.count(name) > 1:
            raise AttnbenchError(f"{path} has the column {name} twice", "leave one of them")
    parsed = []
    for number, fields in lines[1:]:
        if not fields:
            continue
        if len(fields) != len(columns):
            raise AttnbenchError(f"{path}, line {number} has {len(fields)} fields of {len(columns)}: is it cut?")
        parsed.append((number, _parse_row(path, number, dict(zip(columns, fields)))))
    if not parsed:
        raise AttnbenchError(f"{path} has no rows below its header")
    cut = [] if text.endswith("\n") else [f"{path}: the last line has no line break; it may be cut"]
    return parsed, cut


MAX_WHOLE = 2**53
"""What a count stays below: as far as a float, and so any reader of the CSV, counts exactly."""
MAX_FLOPS_DIGITS = 100
"""FLOPs are a product of counts and may be more."""
RATES = (1e-30, 1e30)
"""What rates, errors and clocks lie between."""


def _whole(text: str) -> int:
    value = _flops(text)
    if value >= MAX_WHOLE:
        raise ValueError("must be below 2**53")
    return value


def _flops(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text):
        raise ValueError("must be a whole number of at least 1")
    if len(text) > MAX_FLOPS_DIGITS:
        raise ValueError(f"must have at most {MAX_FLOPS_DIGITS} digits")
    if int(text) < 1:
        raise ValueError("must be a whole number of at least 1")
    return int(text)


def _positive(text: str, low: float = RATES[0], high: float = RATES[1]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError("must be a number above 0")
    if not low <= value <= high:
        raise ValueError(f"must be between {low:g} and {high:g}")
    return value


def _time(text: str) -> float:
    return _positive(text, MIN_TIME_US, MAX_TIME_US)


def _error(text: str) -> float:
    return 0.0 if text and float(text) == 0 else _positive(text)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("must be true or false")
    return text.lower() == "true"


def _status(text: str) -> str:
    return Status(text).value


def _device(text: str) -> str:
    if text not in DEVICE_KINDS:
        raise ValueError(f"must be one of {', '.join(DEVICE_KINDS)}")
    return text


_PARSERS: Mapping[str, Callable[[str], Any]] = {
    **dict.fromkeys(("sq", "sk", "head_size", "batch", "heads_q", "heads_kv", "head_dim_v"), _whole),
    **dict.fromkeys(("n_samples", "n_blocks", "used_cores", "schema_version"), _whole),
    **dict.fromkeys(("time_us", "mean_us", "median_us", "p10_us", "p90_us", "host_us"), _time),
    **dict.fromkeys(("ci95_low_us", "ci95_high_us"), _positive),
    **dict.fromkeys(("tflops", "tflops_gemm", "gbps", "pct_peak", "normalized_tflops"), _positive),
    **dict.fromkeys(("err_budget", "max_abs_err"), _error),
    "flops_total": _flops,
    "clock_mhz": _positive,
    "causal": _boolean,
    "status": _status,
    "device": _device,
}
_REQUIRED = ("sq", "sk", "head_size", "kernel")
_MEASURED = tuple(column for column, parser in _PARSERS.items() if parser in (_time, _positive))
_OF_A_TIME = (*_MEASURED, "timing_method", "cache", "statistic", "n_samples", "n_blocks")
FLOAT_COLUMNS = tuple(column for column, parser in _PARSERS.items() if parser in (_time, _positive, _error))


def _parse_row(path: Path, number: int, fields: Mapping[str, str]) -> Row:
    values: Row = dict.fromkeys(COLUMNS)
    for column in COLUMNS:
        text = fields.get(column, "").strip()
        if not text:
            continue
        try:
            values[column] = _PARSERS.get(column, str)(text)
        except ValueError as error:
            shown = text if len(text) <= 40 else f"{text[:39]}…"
            raise AttnbenchError(f"{path}, line {number}: {column} is {shown!r}: {error}") from error
    for column in _REQUIRED:
        if values[column] is None:
            raise AttnbenchError(f"{path}, line {number}: {column} is empty")
    values["status"] = values["status"] or Status.PASSED.value
    passed = values["status"] == Status.PASSED.value
    if passed and values["time_us"] is None:
        raise AttnbenchError(f"{path}, line {number}: {values['kernel']} has no time_us")
    for column in () if passed else _MEASURED:
        if values[column] is not None:
            state = f"is {values['status']} and has a {column}"
            raise AttnbenchError(f"{path}, line {number}: {values['kernel']} {state}")
    return values


def _device_of(path: Path, rows: Sequence[Row], device_name: str | None) -> tuple[DeviceInfo, list[str]]:
    """The device the rows name, or the one the published table was measured on, or `device_name`."""
    named = {(values["device"], values["device_name"]) for values in rows}
    if len(named) > 1:
        raise AttnbenchError(f"{path} holds rows of several devices", "one table is of one device: split it")
    kind, name = named.pop()
    published = any(values["kernel"] == PUBLISHED_BASELINE for values in rows)
    if kind is None:
        kind = "npu" if published else "cpu"
    if device_name:
        return known_device(device_name, kind), []
    if name:
        cores = set(map(_cores, rows)) - {None}
        device = known_device(name, kind)
        return (dataclasses.replace(device, cores=cores.pop()) if len(cores) == 1 else device), []
    if published:
        note = f"taken for an {PUBLISHED_DEVICE} (24 cores, one for every {QUERY_TILE} queries); see --device-name"
        return known_device(PUBLISHED_DEVICE, kind), [note]
    assumed = kind if all(values["dtype"] for values in rows) else f"{kind} with {auto_dtype(kind)}"
    note = f"the CSV names no device: {assumed} is assumed; say otherwise with --device-name"
    return DeviceInfo(kind=kind, name="unknown", cores=None), [note]


def _cores(values: Row) -> int | None:
    """The device's cores that a row was normalized with."""
    tflops, normalized, used = values["tflops"], values["normalized_tflops"], values["used_cores"]
    return round(normalized / tflops * used) if normalized and tflops and used else None


def _problem_of(path: Path, number: int, values: Row, device: DeviceInfo) -> Problem:
    fields = ("batch", "heads_q", "heads_kv", "head_dim_v", "dtype", "causal", "direction")
    given = {name: values[name] for name in fields if values[name] is not None}
    suffixes = dict(re.findall(r"-(w|s)([\d.e+-]*\d)", values["case_id"] or ""))
    for letter, name, parse in (("w", "window", _whole), ("s", "softmax_scale", float)):
        if letter in suffixes:
            try:
                given[name] = parse(suffixes[letter])
            except ValueError as error:
                fault = f"case_id is {values['case_id']!r}: {name} {error}"
                raise AttnbenchError(f"{path}, line {number}: {fault}") from error
    try:
        problem = Problem(seqlen_q=values["sq"], seqlen_k=values["sk"], head_dim=values["head_size"], **given)
    except ValueError as error:
        raise AttnbenchError(f"{path}, line {number}: {error}") from error
    return problem.resolve(device.kind)


def _disagreements(path: Path, number: int, values: Row, problem: Problem) -> list[str]:
    """Where the CSV's own flops_total or tflops are not what its shape and time give."""
    found = []
    if values["flops_total"] not in (None, problem.flops):
        found.append(
            f"{path}, line {number}: flops_total is {values['flops_total']}, the formula gives {problem.flops}"
        )
    if values["tflops"] and values["time_us"]:
        tflops = problem.flops / values["time_us"] / 1e6
        if abs(values["tflops"] / tflops - 1) > TFLOPS_TOLERANCE:
            found.append(f"{path}, line {number}: tflops is {values['tflops']:g}, its time gives {tflops:.4g}")
    return found

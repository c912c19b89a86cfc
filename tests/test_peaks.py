"""attnbench.devices.peaks: what is measured, what is kept of it, and what a second measurement may change."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from attnbench import jit
from attnbench.devices import DeviceInfo, Timing, peaks
from attnbench.devices.cpu import CpuDevice, total_cache_bytes
from attnbench.devices.known import known_device
from attnbench.devices.peaks import Peaks, with_peaks, working_sets
from attnbench.jit import cache

INFO = DeviceInfo(kind="cpu", name="Fine Processor", cores=2)
SLOW = Peaks({"fp32": 0.1, "bf16": 0.3}, ((1000, 50.0), (9000, 20.0)))
FAST = Peaks({"fp32": 0.2, "bf16": 0.2}, ((1000, 40.0), (9000, 30.0)))
BEST = Peaks({"fp32": 0.2, "bf16": 0.3}, ((1000, 50.0), (9000, 30.0)))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNBENCH_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def measured(monkeypatch):
    """Measurements come from this list, and are taken off it."""
    answers = []
    monkeypatch.setattr(peaks, "measure", lambda device: answers.pop(0))
    return answers


def found(info: DeviceInfo) -> Peaks:
    assert info.peak_source == "measured"
    return Peaks(info.peak_tflops, info.bandwidths)


def test_peaks_are_measured_once_and_kept(measured):
    measured += [SLOW]
    info = with_peaks(INFO, CpuDevice())
    assert info == dataclasses.replace(
        INFO, peak_tflops=SLOW.tflops, peak_source="measured", bandwidths=SLOW.bandwidths
    )
    assert with_peaks(INFO, CpuDevice()) == info
    assert DeviceInfo.from_json(json.loads(json.dumps(dataclasses.asdict(info)))) == info


@pytest.mark.parametrize(
    "change", [{"cores": 3}, {"name": "Finer Processor"}, {"kind": "npu"}, "torch", "compiler", "source"], ids=str
)
def test_other_threads_devices_libraries_or_sources_are_measured_anew(measured, change, monkeypatch, tmp_path):
    measured += [SLOW, FAST]
    with_peaks(INFO, CpuDevice())
    if change == "torch":
        monkeypatch.setattr(torch, "__version__", "99")
    elif change == "compiler":
        monkeypatch.setenv("CXX", "no-such-compiler")
    elif change == "source":
        (tmp_path / "other.cpp").write_text("")
        monkeypatch.setattr(peaks, "CPU_SOURCE", tmp_path / "other.cpp")
    info = dataclasses.replace(INFO, **change) if isinstance(change, dict) else INFO
    assert found(with_peaks(info, CpuDevice())) == FAST
    assert measured == []


def test_a_refresh_measures_again_and_keeps_the_maximum(measured):
    measured += [SLOW, FAST]
    with_peaks(INFO, CpuDevice())
    assert found(with_peaks(INFO, CpuDevice(), refresh=True)) == BEST
    assert found(with_peaks(INFO, CpuDevice())) == BEST  # it is the maximum that is kept
    measured += [SLOW]
    assert found(with_peaks(INFO, CpuDevice(), refresh=True)) == BEST


def test_a_refresh_without_a_cache_keeps_the_maximum_of_what_it_was_given(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNBENCH_CACHE_DIR", str(tmp_path / "file"))
    measured += [SLOW, FAST]
    first = with_peaks(INFO, CpuDevice())
    assert found(first) == SLOW
    assert found(with_peaks(first, CpuDevice(), refresh=True)) == BEST


def test_a_corrupt_entry_is_a_miss_and_cache_clear_removes_it(measured):
    measured += [SLOW, FAST, SLOW]
    with_peaks(INFO, CpuDevice())
    (entry,) = cache.default().entries()
    assert (entry.source, entry.compiler) == ("peaks of Fine Processor", f"torch {torch.__version__}")
    (entry.path / "peaks.json").write_text("{")
    assert found(with_peaks(INFO, CpuDevice())) == FAST
    assert cache.default().clear() > 0
    assert cache.default().entries() == []
    assert found(with_peaks(INFO, CpuDevice())) == SLOW


H100 = known_device("NVIDIA H100 80GB HBM3", "cuda")


def test_what_a_table_tells_is_not_measured(measured):
    assert with_peaks(H100, CpuDevice()) is H100


def test_a_refresh_measures_even_what_a_table_tells_since_a_card_may_be_faster_than_its_sheet(measured):
    measured += [Peaks({"fp16": 700.0, "fp32": 40.0}), Peaks({"fp16": 1000.0})]
    assert with_peaks(H100, CpuDevice(), refresh=True) == H100
    info = with_peaks(H100, CpuDevice(), refresh=True)
    assert (info.peak_tflops["fp16"], info.peak_tflops["fp32"], info.peak_source) == (1000.0, 66.9, "measured")
    assert info.bandwidths == H100.bandwidths


def test_where_nothing_could_be_measured_there_is_no_source(measured):
    measured += [Peaks()]
    assert with_peaks(INFO, CpuDevice()) == INFO


# Measuring


def test_working_sets_are_l1_half_of_l2_half_of_l3_and_four_times_both():
    assert working_sets(2, 1 << 20, 32 << 20) == [32 << 10, 512 << 10, 16 << 20, 132 << 20]
    assert working_sets(64, 128 << 20, 96 << 20) == [1 << 20, 48 << 20, 64 << 20, 896 << 20]
    assert working_sets(1, 0, 0) == [16 << 10, 256 << 20]  # nothing known: four times a safe guess


def test_a_smaller_set_is_never_slower_than_a_larger_one():
    assert peaks._falling([(10, 5.0), (40, 2.0), (20, 9.0), (30, 0.0)]) == ((10, 9.0), (20, 9.0), (30, 2.0), (40, 2.0))
    assert peaks._falling([(10, 5.0), (20, 0.0)]) == ((10, 5.0),)


class Clockwork:
    """A device on which a product of n × n matrices takes n³ / `speed` µs."""

    kind = "cpu"

    def __init__(self, speed):
        self.speed = speed
        self.sizes = []
        self.forgotten = []

    def time_calls(self, call, count, *, cold):
        n = call.args[0].shape[0]
        self.sizes.append(n)
        times = [n**3 / self.speed * (1 + i) for i in reversed(range(count))]
        return Timing(times_us=times, method="host_clock")

    def forget(self, call):
        self.forgotten.append(call.args[0].shape[0])


def test_a_matrix_product_is_the_best_call_of_the_largest_size_that_takes_no_time():
    quick, slow = Clockwork(1e6), Clockwork(1000.0)
    assert peaks._matrix_product(quick, torch.float32) == pytest.approx(2.0)  # 2n³ FLOPs in n³ / 1e6 µs: 2 TFLOP/s
    assert quick.sizes == quick.forgotten == [256, 512, 1024], "what was kept of a call holds its matrices"
    assert peaks._matrix_product(slow, torch.float32) == pytest.approx(0.002)
    assert slow.sizes == [256]  # 17 ms; the next would take 134 ms


def test_a_dtype_that_the_device_does_not_have_has_no_rate(monkeypatch):
    def refuse(*sizes, dtype, device):
        if dtype is torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return torch.empty(*sizes, dtype=dtype, device=device)

    monkeypatch.setattr(torch, "ones", refuse)
    assert set(peaks._matrix_products(Clockwork(1e6))) == {"fp16", "fp32"}


def test_on_a_cpu_no_dtype_is_slower_than_fp32_and_each_keeps_its_best(monkeypatch):
    monkeypatch.setattr(peaks, "_cpu", lambda threads: Peaks({"fp32": 0.2, "bf16": 0.4}, ((10, 5.0),)))
    monkeypatch.setattr(peaks, "_matrix_products", lambda device: {"fp32": 0.1, "bf16": 0.5, "fp16": 0.01})
    assert peaks.measure(CpuDevice()) == Peaks({"fp32": 0.2, "bf16": 0.5, "fp16": 0.2}, ((10, 5.0),))


def test_another_device_is_measured_by_matrix_products_alone_and_gives_its_memory_back(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    monkeypatch.setattr(peaks, "_matrix_products", lambda device: {"fp16": 300.0, "fp32": 20.0})
    device = Clockwork(1.0)
    device.kind = "cuda"
    assert peaks.measure(device) == Peaks({"fp16": 300.0, "fp32": 20.0})
    assert emptied == [1]


def test_without_a_compiler_matrix_products_have_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "ATTNBENCH_CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(peaks, "_matrix_products", lambda device: {"fp32": 0.1, "fp16": 0.01})
    assert found(with_peaks(INFO, CpuDevice())) == Peaks({"fp32": 0.1, "fp16": 0.1, "bf16": 0.1})


@pytest.fixture(scope="module")
def real():
    """One real measurement, and the rate of torch.mm before it."""
    try:
        jit.cpp_toolchain()
    except jit.ToolchainMissing:
        pytest.skip("no C++ compiler")
    reached = peaks._matrix_product(CpuDevice(), torch.float32)
    return reached, peaks._cpu(torch.get_num_threads())


def test_no_matrix_product_is_faster_than_the_multiply_adds(real):
    reached, measured = real
    assert measured.tflops["fp32"] >= 0.8 * reached > 0
    # 4 units of 16 lanes at 6 GHz are more than any core has; the loop has not been optimised away.
    assert measured.tflops["fp32"] < torch.get_num_threads() * 4 * 16 * 2 * 6e9 / 1e12


@pytest.mark.skipif(torch.get_num_threads() > 8, reason="as many busy neighbours as processors would be many")
def test_busy_neighbours_do_not_halve_the_peak(real):
    reached, measured = real
    command = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    neighbours = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(torch.get_num_threads())]
    try:
        for neighbour in neighbours:
            neighbour.stdout.readline()
        disturbed = peaks._cpu(torch.get_num_threads())
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.communicate()
    assert disturbed.tflops["fp32"] >= 0.75 * measured.tflops["fp32"]
    assert disturbed.tflops["fp32"] >= 0.8 * reached


def test_a_cache_is_read_faster_than_memory_and_slower_than_wires_allow(real):
    _, measured = real
    sizes = [size for size, _ in measured.bandwidths]
    threads = torch.get_num_threads()
    assert sizes == working_sets(threads, total_cache_bytes(2), total_cache_bytes(3))
    # 4 loads of 64 bytes a clock at 6 GHz are more than any core does.
    assert all(0.5 < gbps < threads * 4 * 64 * 6 for _, gbps in measured.bandwidths)


def test_each_level_is_measured_and_l1_beats_memory_by_itself(real, monkeypatch):
    """Before `_falling`, which would put them right."""
    monkeypatch.setattr(peaks, "_falling", tuple)
    rates = dict(peaks._cpu(1).bandwidths)
    assert rates[min(rates)] >= 0.8 * rates[max(rates)]
    if len(rates) > 2:  # the large set is gone through, not a piece of it that L2 holds
        assert rates[max(rates)] <= 0.7 * rates[sorted(rates)[1]]


def test_bf16_has_a_rate_of_its_own_only_where_the_cpu_computes_in_it(real):
    _, measured = real
    flags = jit.toolchain.cpu_features().split()
    assert ("bf16" in measured.tflops) is ("avx512_bf16" in flags)

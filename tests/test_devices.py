"""attnbench.devices: what is timed, in which unit and order, what a flush evicts, and what a device says of itself."""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import pytest
import torch

from attnbench import devices
from attnbench.devices import DeviceInfo, cpu, npu
from attnbench.devices.cpu import DEFAULT_CACHE_BYTES, CpuDevice, cpu_name, last_level_cache_bytes
from attnbench.devices.cuda import CudaDevice
from attnbench.devices.events import EventTimer
from attnbench.devices.known import known_device
from attnbench.devices.npu import NpuDevice
from attnbench.errors import AttnbenchError

OUT = torch.zeros(1)


# CPU


@pytest.mark.parametrize("cold", [False, True])
def test_cpu_times_are_one_a_call_in_microseconds(cold):
    calls = []

    def call():
        calls.append(1)
        time.sleep(0.002)
        return OUT

    times = CpuDevice().time_calls(call, 4, cold=cold)
    assert len(times) == len(calls) == 4
    assert all(2000 <= value < 2_000_000 for value in times)


def test_host_us_on_a_cpu_is_the_time_of_the_call():
    times = CpuDevice().host_us(lambda: time.sleep(0.002) or OUT, 3)
    assert len(times) == 3
    assert min(times) >= 2000


def test_a_cpu_call_takes_more_than_no_time(monkeypatch):
    monkeypatch.setattr(time, "perf_counter_ns", lambda: 7)
    assert CpuDevice().time_calls(lambda: OUT, 2, cold=False) == [1e-3, 1e-3]


def test_a_cold_call_comes_after_an_untimed_flush_and_a_hot_one_does_not(monkeypatch):
    journal = []
    now = iter(range(0, 10**9, 1000))

    class Watched(CpuDevice):
        def flush_cache(self):
            journal.append("flush")

    def clock():
        journal.append("clock")
        return next(now)

    monkeypatch.setattr(time, "perf_counter_ns", clock)
    call = lambda: journal.append("call")  # noqa: E731
    assert Watched().time_calls(call, 2, cold=True) == [1.0, 1.0]
    assert journal == ["flush", "clock", "call", "clock"] * 2
    journal.clear()
    Watched().time_calls(call, 2, cold=False)
    assert journal == ["clock", "call", "clock"] * 2


def test_a_flush_writes_twice_the_last_level_cache(monkeypatch):
    monkeypatch.setattr(cpu, "last_level_cache_bytes", lambda: 1 << 16)
    device = CpuDevice()
    device.flush_cache()
    device.flush_cache()
    buffer = device._flush_buffer
    assert buffer.numel() * buffer.element_size() == 2 << 16
    assert (buffer == 2).all()


@pytest.mark.parametrize(
    ("text", "size"),
    [("32K\n", 32 << 10), ("260096K", 260096 << 10), ("64M", 64 << 20), ("", 0), ("big", 0), ("1.5M", 0)],
)
def test_cache_sizes_are_read_as_the_kernel_writes_them(text, size):
    assert cpu._cache_bytes(text) == size


def test_the_last_level_cache_is_the_largest_one_or_a_safe_guess(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "Path", lambda _: tmp_path)
    assert last_level_cache_bytes() == DEFAULT_CACHE_BYTES == 64 << 20
    for index, size in enumerate(("32K", "1M", "24M", "junk")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    monkeypatch.setattr(cpu, "_read", lambda path: path.read_text())
    assert last_level_cache_bytes() == 24 << 20


CPUINFO = """processor : 0
model name\t: Fine  Processor   9000
cpu MHz\t\t: 1000.5
processor : 1
model name\t: Fine  Processor   9000
cpu MHz\t\t: 3000.5
processor : 2
cpu MHz\t\t: 2000.0
"""


def test_name_and_clock_are_read_from_cpuinfo(monkeypatch):
    monkeypatch.setattr(cpu, "_read", lambda path: CPUINFO if path == "/proc/cpuinfo" else "")
    assert cpu_name() == "Fine Processor 9000"
    assert CpuDevice().clock_mhz() == 3000.5


def test_without_cpuinfo_there_is_a_name_and_no_clock(monkeypatch):
    monkeypatch.setattr(cpu, "_read", lambda path: "")
    assert cpu_name()
    assert CpuDevice().clock_mhz() is None


def test_a_cpus_cores_are_the_threads_in_use():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        info = CpuDevice().info()
    finally:
        torch.set_num_threads(threads)
    assert info == DeviceInfo(kind="cpu", name=cpu_name(), cores=1, peak_tflops={})
    assert CpuDevice().unavailable() is None
    assert CpuDevice().timing_method == "host_clock"


# Events


class Api:
    """What EventTimer uses of torch.cuda: an in-order queue, whose tasks take the time their kernels say."""

    def __init__(self):
        self.journal = []
        self.queue_ms = 0.0

    def launch(self, milliseconds):
        self.journal.append("call")
        self.queue_ms += milliseconds
        return OUT

    def synchronize(self):
        self.journal.append("synchronize")

    def Event(self, *, enable_timing):
        assert enable_timing
        api = self

        class Event:
            def record(self):
                api.journal.append("record")
                self.at = api.queue_ms

            def elapsed_time(self, end):
                assert api.journal[-1] == "synchronize" or "read" in api.journal
                api.journal.append("read")
                return end.at - self.at

        return Event()


class Timer(EventTimer):
    def __init__(self, api):
        super().__init__(api, "cpu")
        self.api = api

    def flush_cache(self):
        self.api.launch(50.0)
        self.api.journal[-1] = "flush"


def test_all_events_are_recorded_before_anything_synchronises_and_milliseconds_become_microseconds():
    api = Api()
    costs = iter([1.5, 0.25, 2.0])
    times = Timer(api).time_calls(lambda: api.launch(next(costs)), 3, cold=False)
    assert times == [1500.0, 250.0, 2000.0]
    assert api.journal == ["record", "call", "record"] * 3 + ["synchronize"] + ["read"] * 3


def test_a_cold_call_is_flushed_outside_its_events():
    api = Api()
    assert Timer(api).time_calls(lambda: api.launch(1.0), 2, cold=True) == [1000.0, 1000.0]
    assert api.journal[:8] == ["flush", "record", "call", "record"] * 2


def test_host_us_starts_each_call_with_an_empty_queue(monkeypatch):
    api = Api()
    now = iter([0, 4000, 10_000, 17_500])
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(now))
    assert Timer(api).host_us(lambda: api.launch(99.0), 2) == [4.0, 7.5]
    assert api.journal == ["synchronize", "call"] * 2 + ["synchronize"]


def test_the_flush_buffer_outgrows_any_gpu_cache(monkeypatch):
    monkeypatch.setattr(EventTimer, "FLUSH_BYTES", 1024)
    timer = EventTimer(Api(), "cpu")
    timer._flush_buffer.fill_(3)
    timer.flush_cache()
    assert timer._flush_buffer.numel() * timer._flush_buffer.element_size() == 1024
    assert not timer._flush_buffer.any()


def test_the_real_flush_is_256_mib_which_is_more_than_any_gpu_cache():
    assert EventTimer.FLUSH_BYTES == 256 << 20


# Devices that are not here


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_without_cuda_the_reason_says_what_to_install():
    assert CudaDevice().unavailable() == (
        "this torch is built without CUDA: install a CUDA build of torch (https://pytorch.org/get-started)"
    )


def test_a_cuda_torch_without_a_gpu_says_what_to_check(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "check nvidia-smi and CUDA_VISIBLE_DEVICES" in CudaDevice().unavailable()


@pytest.mark.parametrize("error", [RuntimeError("no driver"), ModuleNotFoundError("pynvml")])
def test_a_gpu_clock_that_cannot_be_read_is_none(monkeypatch, error):
    def clock_rate():
        raise error

    monkeypatch.setattr(torch.cuda, "clock_rate", clock_rate)
    assert CudaDevice().clock_mhz() is None
    monkeypatch.setattr(torch.cuda, "clock_rate", lambda: 1980)
    assert CudaDevice().clock_mhz() == 1980.0


@pytest.fixture
def sdk(tmp_path, monkeypatch):
    """Installs a fake torch_npu, whose import puts torch.npu there, as the real one's does."""

    def install(body):
        (tmp_path / "torch_npu.py").write_text(body)
        monkeypatch.syspath_prepend(str(tmp_path))

    npu._probe.cache_clear()
    yield install
    npu._probe.cache_clear()
    sys.modules.pop("torch_npu", None)
    if hasattr(torch, "npu"):
        del torch.npu


FAKE_SDK = """
import types, torch
torch.npu = types.SimpleNamespace(
    is_available=lambda: {there}, current_device=lambda: 0, get_device_name=lambda index: "Ascend910B2",
    synchronize=lambda: None,
)
"""


def test_an_npu_that_torch_npu_brings_is_available_and_known_by_name(sdk):
    sdk(FAKE_SDK.format(there=True))
    device = NpuDevice()
    assert device.unavailable() is None
    info = device.info()
    assert (info.kind, info.name, info.cores) == ("npu", "Ascend910B2", 24)
    assert info.peak_tflops == {"fp16": 353.9, "bf16": 353.9}
    device.synchronize()
    assert device.clock_mhz() is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (FAKE_SDK.format(there=False), "torch_npu sees no NPU: check npu-smi info"),
        ("", "torch_npu sees no NPU"),
        ("raise ImportError('libhccl.so: no such file')", "libhccl.so: no such file; is the CANN toolkit's set_env.sh"),
        ("raise OSError('broken')", "torch_npu does not import: broken"),
    ],
)
def test_an_npu_that_is_not_there_says_what_to_check(sdk, body, words):
    sdk(body)
    assert words in NpuDevice().unavailable()


def test_without_torch_npu_the_reason_says_what_to_install(sdk):
    assert NpuDevice().unavailable() == (
        "torch_npu is not installed: on an Ascend machine, pip install 'attnbench[npu]'"
    )


@pytest.mark.parametrize("kind", ["cpu", "cuda", "npu"])
def test_a_device_can_be_had_by_name_there_or_not(kind):
    found = devices.choose(kind)
    assert found.kind == kind
    assert found.timing_method == ("host_clock" if kind == "cpu" else "device_events")


def test_an_unknown_device_is_refused():
    with pytest.raises(AttnbenchError, match="no device is called 'CPU'"):
        devices.choose("CPU")


# What is known by name


@pytest.mark.parametrize(
    ("name", "cores", "clock_ghz"),
    [("Ascend 910B2", 24, 1.8), ("Ascend910B1", 24, 1.85), ("ascend 910b3", 20, 1.8), ("Ascend910B4-1", 20, 1.5)],
)
def test_an_ascends_peak_is_cores_times_16_cubed_times_2_times_its_clock(name, cores, clock_ghz):
    info = known_device(name, "cpu")
    assert (info.kind, info.name, info.cores) == ("npu", name, cores)
    assert info.peak_tflops["fp16"] == pytest.approx(cores * 16**3 * 2 * clock_ghz / 1e3, abs=0.06)


@pytest.mark.parametrize("name", ["Ascend 910A", "910B", "910B25", "some GPU", ""])
def test_of_an_unknown_name_cores_and_peaks_stay_open(name):
    assert known_device(name, "cuda") == DeviceInfo(kind="cuda", name=name, cores=None, peak_tflops={})


def test_device_info_survives_json():
    for info in (known_device("Ascend 910B2", "npu"), DeviceInfo(kind="cpu", name="x", cores=None)):
        assert DeviceInfo.from_json(json.loads(json.dumps(dataclasses.asdict(info)))) == info


@pytest.mark.parametrize(
    "changes",
    [{"kind": "gpu"}, {"name": 3}, {"peak_tflops": 3}, {"cores": 0}, {"cores": "24"}, {"speed": 1}],
)
def test_json_that_is_no_device_info_is_refused(changes):
    with pytest.raises((ValueError, TypeError)):
        DeviceInfo.from_json({"kind": "cpu", "name": "x", "cores": 1} | changes)

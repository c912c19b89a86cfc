"""attnbench.devices: what is timed, in which unit and order, what a flush evicts, and what a device says of itself."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
import types

import pytest
import torch

from attnbench import devices
from attnbench.devices import DeviceInfo, Reading, Timing, cpu, cuda, events, npu
from attnbench.devices.cpu import DEFAULT_CACHE_BYTES, CpuDevice, cpu_name, last_level_cache_bytes
from attnbench.devices.cuda import CudaDevice
from attnbench.devices.events import EventTimer
from attnbench.devices.known import ASCEND, NVIDIA, Npu, known_device
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

    times = CpuDevice().time_calls(call, 4, cold=cold).times_us
    assert len(times) == len(calls) == 4
    assert all(2000 <= value < 2_000_000 for value in times)


def test_host_us_on_a_cpu_is_the_time_of_the_call():
    times = CpuDevice().host_us(lambda: time.sleep(0.002) or OUT, 3)
    assert len(times) == 3
    assert min(times) >= 2000


def test_a_cpu_call_takes_more_than_no_time(monkeypatch):
    monkeypatch.setattr(cpu, "_CLOCK", lambda: 7)
    assert CpuDevice().time_calls(lambda: OUT, 2, cold=False) == Timing(times_us=[1e-3, 1e-3], method="host_clock")


def test_a_cold_call_comes_after_an_untimed_flush_and_a_hot_one_does_not(monkeypatch):
    journal = []
    now = iter(range(0, 10**9, 1000))

    class Watched(CpuDevice):
        def flush_cache(self):
            journal.append("flush")

    def clock():
        journal.append("clock")
        return next(now)

    monkeypatch.setattr(cpu, "_CLOCK", clock)
    call = lambda: journal.append("call")  # noqa: E731
    assert Watched().time_calls(call, 2, cold=True).times_us == [1.0, 1.0]
    assert journal == ["flush", "clock", "call", "clock"] * 2
    journal.clear()
    Watched().time_calls(call, 2, cold=False)
    assert journal == ["clock", "call", "clock"] * 2


class Journalled:
    """An exercise that writes down when it changes the inputs."""

    def __init__(self, journal):
        self.journal = journal

    def before(self, index):
        self.journal.append("change")

    def after(self, index, output):
        pass


def test_a_flush_comes_before_the_inputs_change_so_that_nothing_can_work_on_them_meanwhile(monkeypatch):
    journal = []
    monkeypatch.setattr(CpuDevice, "flush_cache", lambda self: journal.append("flush"))
    CpuDevice().time_calls(lambda: journal.append("call"), 2, cold=True, exercise=Journalled(journal))
    assert journal == ["flush", "change", "call"] * 2
    api = Api()
    Timer(api).time_calls(lambda: api.launch(1.0), 9, cold=True, exercise=Journalled(api.journal))
    assert api.journal[:5] == ["flush", "change", "record", "call", "record"]
    assert api.journal.count("change") == 2


def test_a_flush_writes_twice_the_last_level_cache(monkeypatch):
    monkeypatch.setattr(cpu, "last_level_cache_bytes", lambda: 1 << 16)
    device = CpuDevice()
    buffer = device._flush_buffer
    assert buffer.nbytes == 2 << 16
    for _ in range(2):
        buffer.zero_()
        device.flush_cache()
        assert (buffer == 1).all()


@pytest.mark.parametrize(
    ("text", "size"),
    [("32K\n", 32 << 10), ("260096K", 260096 << 10), ("64M", 64 << 20), ("", 0), ("big", 0), ("1.5M", 0)],
)
def test_cache_sizes_are_read_as_the_kernel_writes_them(text, size):
    assert cpu._cache_bytes(text) == size


def test_the_last_level_cache_is_the_largest_one_or_a_safe_guess(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "CPUS", tmp_path)
    assert last_level_cache_bytes() == DEFAULT_CACHE_BYTES == 64 << 20
    for index, size in enumerate(("32K", "1M", "24M", "junk")):
        place = tmp_path / "cpu0" / "cache" / f"index{index}"
        place.mkdir(parents=True)
        (place / "size").write_text(size + "\n")
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
    assert CpuDevice().reading().clock_mhz == 3000.5


def test_without_cpuinfo_there_is_a_name_and_no_reading(monkeypatch):
    monkeypatch.setattr(cpu, "_read", lambda path: "")
    assert cpu_name()
    assert CpuDevice().reading() == Reading()


@pytest.fixture
def sysfs(tmp_path, monkeypatch):
    """A /sys of the test's own, and no /proc/cpuinfo: writes files given by path and text."""
    read = cpu._read
    monkeypatch.setattr(cpu, "_read", lambda path: "" if path == "/proc/cpuinfo" else read(path))
    monkeypatch.setattr(cpu, "CPUS", tmp_path / "cpu")
    monkeypatch.setattr(cpu, "THERMAL", tmp_path / "thermal")

    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")

    return write


def test_where_cpuinfo_has_no_clock_the_busiest_cores_frequency_is_read(sysfs):
    sysfs({f"cpu/cpu{i}/cpufreq/scaling_cur_freq": khz for i, khz in enumerate(["900000", "2600500", "<unknown>"])})
    sysfs({"cpu/cpufreq/scaling_cur_freq": "9999999"})
    assert CpuDevice().reading().clock_mhz == 2600.5


def test_the_temperature_is_the_hottest_of_the_processors_sensors(sysfs):
    zones = [("acpitz", "99000"), ("x86_pkg_temp", "61500"), ("cpu-thermal", "58000"), ("SoC", "0"), ("cpu1", "")]
    for index, (kind, millidegrees) in enumerate(zones):
        sysfs({f"thermal/thermal_zone{index}/type": kind, f"thermal/thermal_zone{index}/temp": millidegrees})
    assert CpuDevice().reading() == Reading(clock_mhz=None, temperature_c=61.5)


def test_all_caches_of_a_level_count_once_each_and_code_not_at_all(sysfs):
    for core, pair in enumerate(["0-1", "0-1", "2-3", "2-3"]):
        for index, (level, kind, size, shared) in enumerate(
            [
                ("1", "Data", "32K", str(core)),
                ("1", "Instruction", "64K", str(core)),
                ("2", "Unified", "1M", pair),
                ("3", "Unified", "24M", "0-3"),
            ]
        ):
            place = f"cpu/cpu{core}/cache/index{index}"
            sysfs({f"{place}/level": level, f"{place}/type": kind, f"{place}/size": size})
            sysfs({f"{place}/shared_cpu_list": shared})
    assert [cpu.total_cache_bytes(level) for level in (1, 2, 3, 4)] == [128 << 10, 2 << 20, 24 << 20, 0]


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
    timing = Timer(api).time_calls(lambda: api.launch(next(costs)), 3, cold=False)
    assert timing == Timing(times_us=[1500.0, 250.0, 2000.0], method="device_events", calls_a_change=8)
    assert api.journal == ["record", "call", "record"] * 3 + ["synchronize"] + ["read"] * 3


def test_a_cold_call_is_flushed_outside_its_events():
    api = Api()
    assert Timer(api).time_calls(lambda: api.launch(1.0), 2, cold=True).times_us == [1000.0, 1000.0]
    assert api.journal[:8] == ["flush", "record", "call", "record"] * 2


def test_host_us_starts_each_call_with_an_empty_queue(monkeypatch):
    api = Api()
    now = iter([0, 4000, 10_000, 17_500])
    monkeypatch.setattr(events, "_CLOCK", lambda: next(now))
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


UUID = "0dd6b3e0-1111-2222-3333-444455556666"
NVML = f"""
class NVMLError(Exception):
    pass

NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
ready = 0

def nvmlInit():
    global ready
    ready += 1

def nvmlDeviceGetHandleByUUID(uuid):
    if uuid != "GPU-{UUID}":
        raise NVMLError("not found")
    return "by uuid"

def nvmlDeviceGetHandleByPciBusId(place):
    if place != "00000001:A3:00.0":
        raise NVMLError("not found")
    return "by bus"

def nvmlDeviceGetClockInfo(handle, clock):
    assert ready == 1 and handle in ("by uuid", "by bus") and clock == NVML_CLOCK_SM
    return 1755

def nvmlDeviceGetTemperature(handle, sensor):
    assert sensor == NVML_TEMPERATURE_GPU
    return 64

def nvmlDeviceGetCurrentClocksEventReasons(handle):
    return 0x1 | 0x2 | 0x4 | 0x20 | 0x40
"""


@pytest.fixture
def nvml(tmp_path, monkeypatch):
    """Installs a fake nvidia-ml-py, and a GPU that torch knows by these properties."""

    def install(body, **properties):
        if body is not None:
            (tmp_path / "pynvml.py").write_text(body)
            monkeypatch.syspath_prepend(str(tmp_path))
        else:
            monkeypatch.setitem(sys.modules, "pynvml", None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(**properties))

    def forget():
        cuda._nvml.cache_clear()
        cuda._handle.cache_clear()
        sys.modules.pop("pynvml", None)

    forget()
    yield install
    forget()


BUS = {"pci_domain_id": 1, "pci_bus_id": 0xA3, "pci_device_id": 0}


@pytest.mark.parametrize("properties", [{"uuid": UUID}, BUS, BUS | {"uuid": "a-mig-slice"}], ids=["uuid", "bus", "mig"])
def test_a_gpus_reading_is_of_the_gpu_that_torch_uses(nvml, properties):
    nvml(NVML, **properties)
    reading = Reading(clock_mhz=1755.0, temperature_c=64.0, throttled=("power cap", "heat"))
    assert CudaDevice().reading() == reading
    assert CudaDevice().reading() == reading  # nvmlInit once


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (None, Reading()),
        (NVML + "\ndef nvmlInit():\n    raise NVMLError('no driver')\n", Reading()),
        (NVML + "\ndel nvmlDeviceGetHandleByUUID\n", Reading()),
        (
            NVML + "\ndef nvmlDeviceGetTemperature(handle, sensor):\n    raise NVMLError('not supported')\n"
            "def nvmlDeviceGetCurrentClocksEventReasons(handle):\n    raise NVMLError('function not found')\n"
            "def nvmlDeviceGetCurrentClocksThrottleReasons(handle):\n    return 0x88\n",
            Reading(clock_mhz=1755.0, throttled=("hardware slowdown", "power brake")),
        ),
        (
            NVML + "\ndel nvmlDeviceGetCurrentClocksEventReasons\n",
            Reading(clock_mhz=1755.0, temperature_c=64.0),
        ),
    ],
    ids=["not installed", "no driver", "no such gpu", "older driver", "no reasons"],
)
def test_what_nvml_does_not_tell_stays_open(nvml, body, expected):
    nvml(body, uuid=UUID)
    assert CudaDevice().reading() == expected


def test_a_gpus_info_is_the_tables_with_the_sms_that_torch_counts(nvml):
    nvml(NVML, name="NVIDIA H100 80GB HBM3", multi_processor_count=131)
    assert CudaDevice().info() == dataclasses.replace(known_device("NVIDIA H100 80GB HBM3", "cuda"), cores=131)
    nvml(NVML, name="NVIDIA Z1", multi_processor_count=9)
    assert CudaDevice().info() == DeviceInfo(kind="cuda", name="NVIDIA Z1", cores=9)


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


NO_LIBRARY = "raise ImportError('libhccl.so: cannot open shared object file')"
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
    assert device.reading() == Reading()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (FAKE_SDK.format(there=False), "torch_npu sees no NPU: check npu-smi info"),
        ("", "torch_npu sees no NPU"),
        (
            NO_LIBRARY,
            "torch_npu does not import: ImportError: libhccl.so: cannot open shared object file: install CANN and "
            "source its set_env.sh (neither ASCEND_HOME_PATH nor ASCEND_TOOLKIT_HOME is set); until then `import "
            "torch` fails too, unless TORCH_DEVICE_BACKEND_AUTOLOAD=0 is set",
        ),
        ("raise OSError('broken')", "torch_npu does not import: OSError: broken"),
        ("raise RuntimeError('two accelerators')", "torch_npu does not import: RuntimeError: two accelerators"),
    ],
)
def test_an_npu_that_is_not_there_says_what_to_check(sdk, body, words, monkeypatch):
    for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):
        monkeypatch.delenv(name, raising=False)
    sdk(body)
    assert words in NpuDevice().unavailable()


@pytest.mark.parametrize(
    ("body", "home", "words"),
    [
        (
            "raise ImportError('libhccl.so: cannot open shared object file')",
            "",
            "source CANN's set_env.sh anew, or repair",
        ),
        (NO_LIBRARY, "gone", "gone is not there)"),
        ("raise RuntimeError('two accelerators')", "", "of the same version, and torch a CPU build"),
    ],
)
@pytest.mark.parametrize("name", ["ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"])
def test_what_helps_depends_on_what_there_is_of_cann(sdk, tmp_path, monkeypatch, body, home, words, name):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.setenv(name, str(tmp_path / home))
    sdk(body)
    assert words in NpuDevice().unavailable()


def platform_file(home, name="Ascend910B2", folder="aarch64-linux/data/platform_config", **changes):
    facts = {"ai_core_cnt": "24", "l2_size": "201326592", "cube_freq": "1800"} | changes
    path = home / folder / f"{name}.ini"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"# 100% of it\n[SoCInfo]\nai_core_cnt={facts['ai_core_cnt']}\nmemory_type=\nl2_size={facts['l2_size']}\n"
        f"l2_size={facts['l2_size']}\n[AICoreSpec]\ncube_freq={facts['cube_freq']}\n"
    )


@pytest.mark.parametrize("folder", ["aarch64-linux/data/platform_config", "compiler/data/platform_config"])
def test_an_npus_cores_and_peaks_are_those_of_the_toolkit_where_it_has_them(sdk, tmp_path, monkeypatch, folder):
    sdk(FAKE_SDK.format(there=True))
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    platform_file(tmp_path, folder=folder, ai_core_cnt="23", cube_freq="1000")
    info = NpuDevice().info()
    assert (info.cores, info.peak_source) == (23, "table")
    assert info.peak_tflops == {"fp16": 188.4, "bf16": 188.4}
    assert npu.platform_config("Ascend910B2") == Npu(23, 1000, 192)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Ascend910B3", {}),
        ("../Ascend910B2", {}),
        ("Ascend910B2", {"cube_freq": "fast"}),
        ("Ascend910B2", {"ai_core_cnt": "0"}),
        ("Ascend910B2", {"l2_size": "[x"}),
    ],
)
def test_what_a_toolkit_does_not_tell_is_the_tables(tmp_path, monkeypatch, name, changes):
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    platform_file(tmp_path, **changes)
    assert npu.platform_config(name) is None
    monkeypatch.delenv("ASCEND_HOME_PATH")
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    assert npu.platform_config("Ascend910B2") is None


def test_without_torch_npu_the_reason_says_what_to_install(sdk):
    assert NpuDevice().unavailable() == (
        "torch_npu is not installed: on an Ascend machine, pip install 'attnbench[npu]'"
    )


@pytest.mark.parametrize("kind", ["cpu", "cuda", "npu"])
def test_a_device_can_be_had_by_name_there_or_not(kind):
    found = devices.choose(kind)
    assert found.kind == kind
    assert found.timing_method == {"cpu": "host_clock", "cuda": "cuda_graph", "npu": "npu_graph"}[kind]


def test_an_unknown_device_is_refused():
    with pytest.raises(AttnbenchError, match="no device is called 'CPU'"):
        devices.choose("CPU")


# What is known by name


@pytest.mark.parametrize(
    ("name", "cores", "clock_ghz"),
    [
        *(("Ascend 910B2", 24, 1.8), ("Ascend910B1", 24, 1.85), ("ascend 910b3", 20, 1.8), ("Ascend910B4-1", 20, 1.5)),
        *(("Ascend910_9391", 24, 1.85), ("Ascend910_9392", 24, 1.85)),
    ],
)
def test_an_ascends_peak_is_cores_times_16_cubed_times_2_times_its_clock(name, cores, clock_ghz):
    info = known_device(name, "cpu")
    assert (info.kind, info.name, info.cores) == ("npu", name, cores)
    assert info.peak_tflops["fp16"] == pytest.approx(cores * 16**3 * 2 * clock_ghz / 1e3, abs=0.06)


@pytest.mark.parametrize(
    ("name", "sms", "fp16", "bf16", "fp32", "memory_gbps"),
    [
        ("NVIDIA H100 80GB HBM3", 132, 989.4, 989.4, 66.9, 3352),
        ("NVIDIA H100 PCIe", 114, 756.0, 756.0, 51.2, 2039),
        ("NVIDIA H100 NVL", 132, 835.5, 835.5, 60.3, 3938),
        ("NVIDIA H200", 132, 989.4, 989.4, 66.9, 4917),
        ("NVIDIA H20", 78, 148.0, 148.0, 44.0, 4096),
        ("NVIDIA GH200 480GB", 132, 989.4, 989.4, 66.9, 4917),
        ("NVIDIA B200", 148, 2250.0, 2250.0, 80.0, 8000),
        ("NVIDIA A100-SXM4-80GB", 108, 312.0, 312.0, 19.5, 2039),
        ("NVIDIA A100-PCIE-40GB", 108, 312.0, 312.0, 19.5, 2039),
        ("NVIDIA A10", 72, 125.0, 125.0, 31.2, 600),
        ("NVIDIA L40S", 142, 362.1, 362.1, 91.6, 864),
        ("NVIDIA L4", 58, 121.0, 121.0, 30.3, 300),
        ("NVIDIA GeForce RTX 4090", 128, 330.3, 165.2, 82.6, 1008),
        ("Tesla V100-SXM2-16GB", 80, 125.0, None, 15.7, 900),
        ("Tesla T4", 40, 65.0, None, 8.1, 320),
    ],
)
def test_an_nvidia_gpu_is_known_by_torchs_name(name, sms, fp16, bf16, fp32, memory_gbps):
    info = known_device(name, "cuda")
    assert (info.kind, info.name, info.cores, info.peak_source) == ("cuda", name, sms, "table")
    assert info.peak_tflops == {"fp16": fp16, "fp32": fp32} | ({} if bf16 is None else {"bf16": bf16})
    (l2_bytes, l2_gbps), (memory_bytes, gbps) = info.bandwidths
    assert (gbps, memory_bytes) == (memory_gbps, 8 * l2_bytes)
    assert l2_gbps > 2 * gbps


def test_an_h100s_l2_holds_50_mib_and_gives_10_terabytes_a_second():
    assert known_device("NVIDIA H100 80GB HBM3", "cuda").bandwidths[0] == (50 << 20, 10_140)


@pytest.mark.parametrize("gpu", NVIDIA.values(), ids=NVIDIA)
def test_every_gpus_fp32_is_its_lanes_times_2_times_a_clock_that_gpus_have(gpu):
    lanes = 64 if gpu.fp32 / gpu.cores < 0.21 else 128  # an SM of Volta, Turing and GA100, and of those after
    assert 1.4 < gpu.fp32 * 1e3 / (2 * lanes * gpu.cores) < 2.6


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A10G",
        "NVIDIA T400",
        "NVIDIA L40",
        "NVIDIA H2000",
    ],
)
def test_what_only_resembles_a_known_gpu_is_not_known(name):
    assert known_device(name, "cuda") == DeviceInfo(kind="cuda", name=name, cores=None)


def test_a_processor_called_like_a_gpu_is_none():
    assert known_device("AMD A10-7850K", "cpu") == DeviceInfo(kind="cpu", name="AMD A10-7850K", cores=None)


def test_the_flush_is_larger_than_any_npus_l2():
    assert {npu.l2_mib for npu in ASCEND.values()} == {192, 96}
    assert max(npu.l2_mib << 20 for npu in ASCEND.values()) < EventTimer.FLUSH_BYTES


def test_the_published_peaks_are_the_tables():
    peaks = {re.sub(r"\W.*", "", name): round(npu.tflops, 1) for name, npu in ASCEND.items()}
    assert peaks == {"910B1": 363.7, "910B2": 353.9, "910B3": 294.9, "910B4": 245.8, "910_939": 363.7}


@pytest.mark.parametrize("name", ["Ascend 910A", "910B", "910B25", "Ascend910_9362", "some GPU", ""])
def test_of_an_unknown_name_cores_and_peaks_stay_open(name):
    assert known_device(name, "cuda") == DeviceInfo(kind="cuda", name=name, cores=None, peak_tflops={})


def test_device_info_survives_json():
    for info in (
        known_device("Ascend 910B2", "npu"),
        known_device("NVIDIA L4", "cuda"),
        DeviceInfo(kind="cpu", name="x", cores=None),
    ):
        assert DeviceInfo.from_json(json.loads(json.dumps(dataclasses.asdict(info)))) == info


@pytest.mark.parametrize(
    "changes",
    [{"kind": "gpu"}, {"name": 3}, {"peak_tflops": 3}, {"cores": 0}, {"cores": "24"}, {"speed": 1}]
    + [
        {"bandwidths": value}
        for value in (3, [1, 2], [[0, 1.0]], [[1, 0.0]], [[2, 1.0], [1, 2.0]], [[1, 1.0], [1, 2.0]])
    ],
)
def test_json_that_is_no_device_info_is_refused(changes):
    with pytest.raises((ValueError, TypeError)):
        DeviceInfo.from_json({"kind": "cpu", "name": "x", "cores": 1} | changes)

"""attnbench.seal: what a plugin may not change, and that the rest of the world may be."""

from __future__ import annotations

import gc
import signal
import threading
import time

import pytest
import torch

from attnbench import protocol, spot, worker
from attnbench.devices.cpu import CpuDevice
from attnbench.devices.cuda import CudaDevice
from attnbench.seal import Seal


def test_what_nobody_changed_is_whole():
    assert Seal().broken() == ""


CHANGES = [
    (time, "perf_counter_ns", "it changed time.perf_counter_ns"),
    (time, "sleep", "it changed time.sleep"),
    (signal, "setitimer", "it changed signal.setitimer"),
    (gc, "disable", "it changed gc.disable"),
    (threading, "current_thread", "it changed threading.current_thread"),
    (worker.Worker, "time_calls", "it changed attnbench.worker.Worker.time_calls"),
    (CpuDevice, "synchronize", "it changed attnbench.devices.cpu.CpuDevice.synchronize"),
    (spot, "fault", "it changed attnbench.spot.fault"),
    (spot, "ROWS", "it changed attnbench.spot.ROWS"),
    (protocol, "take_block", "it changed attnbench.protocol.take_block"),
]


@pytest.mark.parametrize(("owner", "name", "words"), CHANGES, ids=[name for _, name, _ in CHANGES])
def test_a_change_is_named_though_it_does_the_same(monkeypatch, owner, name, words):
    seal, value = Seal(), getattr(owner, name)
    monkeypatch.setattr(owner, name, (lambda *a, **k: value(*a, **k)) if callable(value) else 10**6)
    assert seal.broken() == words
    monkeypatch.undo()
    assert seal.broken() == ""


def test_code_that_was_exchanged_in_place_is_found(monkeypatch):
    def other(problem, inputs, output, err_budget, seed, patch=None):
        return ""

    seal = Seal()
    monkeypatch.setattr(spot.fault, "__code__", other.__code__)
    assert seal.broken() == "it changed attnbench.spot.fault"


def test_a_name_that_was_deleted_is_found(monkeypatch):
    seal = Seal()
    monkeypatch.delattr(worker.Worker, "output")
    assert seal.broken() == "it changed attnbench.worker.Worker.output"


@pytest.mark.parametrize("name", ["synchronize", "Event", "current_stream"])
def test_a_devices_own_functions_are_sealed(monkeypatch, name):
    seal = Seal(CudaDevice().timing_functions())
    monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    assert seal.broken().endswith(f"torch.cuda.{name}")


def test_a_method_of_a_devices_events_is_sealed(monkeypatch):
    seal = Seal(CudaDevice().timing_functions())
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda *_: 1.0)
    assert seal.broken() == "it changed torch.cuda.streams.Event.elapsed_time"


def test_other_parts_of_torch_may_be_changed_as_vendors_do(monkeypatch):
    seal = Seal(CudaDevice().timing_functions())
    monkeypatch.setattr(torch, "empty", lambda *a, **k: None)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *a, **k: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "mine")
    assert seal.broken() == ""


def test_a_name_that_was_added_is_found_and_a_module_that_was_imported_is_not(monkeypatch):
    seal = Seal()
    monkeypatch.setattr(spot, "abs", lambda value: 0.0, raising=False)
    assert seal.broken() == "it changed attnbench.spot.abs"
    monkeypatch.undo()
    monkeypatch.setattr(spot, "submodule", time, raising=False)
    assert seal.broken() == ""


def test_builtins_and_keyword_defaults_are_sealed(monkeypatch):
    seal = Seal()
    monkeypatch.setattr("builtins.sum", lambda *_: 0)
    assert seal.broken() == "it changed builtins.sum"
    monkeypatch.undo()
    monkeypatch.setattr(CpuDevice.time_calls, "__kwdefaults__", {"exercise": 1})
    assert seal.broken() == "it changed attnbench.devices.cpu.CpuDevice.time_calls"

"""Owns the main loop of a worker process: one backend, answering the runner over the wire. Knows no judge.

Started by isolation.py, below a keeper. It ends when the runner closes its end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import socket
import time
from typing import Any

from attnbench import devices, registry
from attnbench.errors import in_a_line
from attnbench.problem import Problem
from attnbench.reference import Inputs, form_fault
from attnbench.registry import BackendInfo, EntryPointRef
from attnbench.result import Status
from attnbench.seal import Seal
from attnbench.wire import VERSION, Channel, Closed, Region
from attnbench.worker import CaseFailed, Worker


def serve(descriptor: int) -> None:
    """Answer the runner at the other end of the socket until it is gone.

    The first message names the backend, each one after that a method of Worker; tensors go by shared memory.
    """
    channel = Channel(socket.socket(fileno=descriptor))
    hello, _ = channel.receive()
    if hello["version"] != VERSION:
        refusal = f"the worker's attnbench speaks version {VERSION}, the runner's {hello['version']}"
        channel.send({"failed": [Status.UNAVAILABLE.value, refusal]})
        return
    source = EntryPointRef(**hello["backend"].pop("source"))
    info = BackendInfo(**hello["backend"], source=source)
    device = devices.device(info.device)
    seal = Seal(device.timing_functions())  # before the plugin is imported
    try:
        host = _Host(Worker(registry.load(info), device, hello["timeout_s"], seal))
        if fault := seal.broken():
            raise CaseFailed(Status.TAMPERED, f"when it was imported, {fault}")
    except CaseFailed as failure:
        channel.send({"failed": [failure.status.value, failure.reason]})
        return
    except (Exception, SystemExit) as error:  # the plugin loaded when it was described, and may not now
        channel.send({"failed": [Status.RUNTIME_ERROR.value, f"the plugin did not load: {in_a_line(error)}"]})
        return
    gc.collect()
    gc.freeze()  # or every later collection would look at all of torch again, for a tenth of a second
    channel.send({"value": None})
    with contextlib.suppress(Closed):
        while True:
            message, shared = channel.receive()
            try:
                answer: dict[str, Any] = {"value": host.answer(message, shared)}
            except CaseFailed as failure:
                answer = {"failed": [failure.status.value, failure.reason]}
            channel.send(answer)


class _Host:
    """A worker and the memory it shares with the runner."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._shared: tuple[Problem, Region] | None = None

    def answer(self, message: dict[str, Any], descriptor: int | None) -> Any:
        """Do what a message asks for; its value is JSON. Raises CaseFailed where the backend fails."""
        worker, do = self._worker, message["do"]
        if do in ("unsupported", "parallel_units"):
            return getattr(worker, do)(Problem.from_json(message["problem"]))
        if do == "prepare":
            problem = Problem.from_json(message["problem"])
            self._shared = (problem, Region(problem, descriptor))
            return worker.prepare(problem, self._inputs())
        if do == "warm_up":
            return worker.warm_up(message["seconds"], message["seed"])
        if do == "host_us":
            return worker.host_us(message["count"])
        if do in ("begin", "release_twin"):
            return getattr(worker, do)()
        if do == "release":
            worker.release()
            self._shared = None
            return None
        problem, region = self._memory
        if do == "prepare_twin":
            return worker.prepare_twin(problem, self._inputs())
        if do == "renew":
            return worker.renew(self._inputs())
        if do == "inputs":
            return region.put(Inputs(*worker.inputs(), "normal"))
        if do == "time_calls":
            how = {name: message[name] for name in ("cold", "seed", "look_at")}
            start_s = time.perf_counter()
            timed = worker.time_calls(message["count"], **how)
            for place, returned in zip(region.outputs, timed.outputs):
                place.copy_(returned)
            return {"timing": dataclasses.asdict(timed.timing), "elapsed_s": time.perf_counter() - start_s}
        output = worker.output(twin=message["twin"])
        if fault := form_fault(problem, output):
            return fault
        region.outputs[0].copy_(output)  # type: ignore[arg-type]  # form_fault says that it is a tensor
        return ""

    @property
    def _memory(self) -> tuple[Problem, Region]:
        if self._shared is None:
            raise RuntimeError("prepare() comes before any call")
        return self._shared

    def _inputs(self) -> Inputs:
        _, region = self._memory
        return Inputs(*region.inputs, "normal")

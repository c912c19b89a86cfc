"""Owns the plugin `jit_flash`: flash attention compiled on the machine that runs it, one module a device."""

from __future__ import annotations

from attnbench.backend import Backend
from attnbench.hookspecs import hookimpl
from attnbench_plugins.jit_flash.cpu import JitFlashCpu
from attnbench_plugins.jit_flash.cuda import JitFlashCuda
from attnbench_plugins.jit_flash.npu import JitFlashNpu


@hookimpl
def attnbench_backends() -> list[Backend]:
    return [JitFlashCpu(), JitFlashCuda(), JitFlashNpu()]

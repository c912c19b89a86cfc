"""A stand-in for CANN's compiler: records its arguments, and emits a library of the kernel's entry points for this CPU.

Called as bisheng.py LOG FAULT [compiler arguments]; FAULT is what is wrong with what it emits, `none` for nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FAULTS = ("none", "no_op", "dropped_tail", "unnormalised", "flat", "status", "does_not_compile")
ENTRIES = {"flash_pto.cpp": "FLASH_PTO", "fa_kernel.cpp": "FA_KERNEL"}


def main(log: str, fault: str, *arguments: str) -> int:
    assert fault in FAULTS
    if arguments == ("--version",):
        print(f"bisheng, a stand-in\nfault: {fault}")
        return 0
    source = next(argument for argument in arguments if argument.endswith(".cpp"))
    with Path(log).open("a") as lines:
        lines.write(json.dumps(arguments) + "\n")
    if fault == "does_not_compile":
        print(f"{source}:1:1: error: this core has no such instruction\nand more about it", file=sys.stderr)
        return 1
    macros = [argument for argument in arguments if argument.startswith("-D")]
    entry = ENTRIES[Path(source).name]
    command = ["c++", "-O1", "-std=c++17", "-shared", "-fPIC", *macros, f"-D{entry}", f"-D{fault.upper()}"]
    output = arguments[arguments.index("-o") + 1]
    return subprocess.run(
        [*command, str(Path(__file__).with_name("kernels.cpp")), "-o", output], check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

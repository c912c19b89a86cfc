"""Owns the options that several commands share: their types, names and help. Knows no command."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[str, typer.Option(help="auto (npu, else cuda, else cpu), cpu, cuda or npu.", metavar="NAME")]
Backends = Annotated[
    str | None, typer.Option(help="Names, unique prefixes or file.py:name, comma-separated. [default: all available]")
]
Skip = Annotated[str | None, typer.Option(help="Names or unique prefixes to leave out.")]
SuiteName = Annotated[
    str | None, typer.Option("--suite", help="A suite's name or a file.toml. [default: pto]", metavar="SUITE")
]
SeqlenQ = Annotated[str | None, typer.Option(help="Query lengths: 128,1k.", metavar="LIST")]
SeqlenK = Annotated[str | None, typer.Option(help="Key lengths: 1k,8k.", metavar="LIST")]
HeadDim = Annotated[str | None, typer.Option(help="Head sizes: 64,128 or 192x128 (q and k, v).", metavar="LIST")]
Batch = Annotated[str | None, typer.Option(help="Batch sizes.", metavar="LIST")]
Heads = Annotated[str | None, typer.Option(help="Heads: 8 or 32x8 (query, key and value).", metavar="LIST")]
Dtype = Annotated[str | None, typer.Option(help="fp16, bf16, fp32 or auto.", metavar="LIST")]
Causal = Annotated[str | None, typer.Option(help="true, false or true,false.", metavar="LIST")]
# None where it was not given: a run that goes on then keeps what it was begun with.
Timeout = Annotated[
    float | None,
    typer.Option(help="Seconds for prepare and check together, and again for timing, of a case.", show_default="120"),
]
Seed = Annotated[int | None, typer.Option(help="Seed of inputs, order and sampled rows.", show_default="0")]
NoPlugin = Annotated[
    list[str] | None, typer.Option(help="Do not load this entry point. Can be given again.", metavar="NAME")
]
Python = Annotated[
    list[str] | None,
    typer.Option(
        "--python",
        help="Take this plugin or backend from another interpreter's environment. Can be given again.",
        metavar="NAME=EXE",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Baseline = Annotated[
    str | None,
    typer.Option(
        help="A name, a unique prefix, or best: the fastest other backend of each problem. [default: the device's]"
    ),
]
NoIsolate = Annotated[
    bool, typer.Option("--no-isolate", help="Run backends in this process, for a debugger: what crashes one ends all.")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also tell how every case ended.")]

"""A stand-in for torch_npu on a machine without an NPU, for tests: put this folder's parent on PYTHONPATH.

FAKE_NPU=no_cann lets its import fail as the real one's does without CANN; FAKE_NPU=absent shows no device.
"""

import os

AUTOLOAD = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # as the real one does, since it imports torch itself

import torch  # noqa: E402
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend  # noqa: E402

if os.environ.get("FAKE_NPU") == "no_cann":
    raise ImportError("libhccl.so: cannot open shared object file: No such file or directory")

from . import machine, npu  # noqa: E402
from .operators import (  # noqa: E402, F401
    npu_fused_infer_attention_score,
    npu_fusion_attention,
    npu_incre_flash_attention,
    npu_prompt_flash_attention,
)

__version__ = "2.13.0"

_setup_privateuseone_for_python_backend("npu", npu.module())
_library = torch.library.Library("_", "IMPL")
_library.fallback(machine.fallback, "PrivateUse1")


def _autoload():
    """What torch calls when it has imported this for its entry point."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = AUTOLOAD

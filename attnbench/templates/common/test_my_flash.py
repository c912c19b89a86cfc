"""my_flash under attnbench's conformance kit. What it does not support is skipped, with its own reason."""

import pytest
from my_flash.backend import attnbench_backends

from attnbench.testing import BackendConformance


@pytest.fixture(params=attnbench_backends(), ids=lambda backend: backend.device, scope="class", autouse=True)
def backend(request):
    request.cls.backend = request.param


class TestMyFlash(BackendConformance):
    pass

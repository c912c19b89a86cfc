"""my_flash under attnbench's conformance kit. What it does not support is skipped, with its own reason."""

import pytest
from my_flash.backend import attnbench_backends

from attnbench.testing import BackendConformance


@pytest.mark.parametrize("which", attnbench_backends(), ids=lambda backend: backend.device, scope="class")
class TestMyFlash(BackendConformance):
    @pytest.fixture(autouse=True)
    def backend(self, which):
        self.backend = which

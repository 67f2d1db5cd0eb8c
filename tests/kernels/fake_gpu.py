"""A machine on which Triton compiles for an H100 that is not there. Launches would fail."""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from s1engine.kernels import pdl


class FakeDriver:
    """What compiling asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def install() -> None:
    """For the whole process; not with TRITON_INTERPRET=1."""
    fake: Any = FakeDriver()
    driver.set_active(fake)
    pdl.available = lambda: True  # type: ignore[assignment]

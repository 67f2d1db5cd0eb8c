"""Lets Triton compile for an H100 on a machine without one. Launches would fail."""

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from s1engine.kernels import pdl


class FakeDriver:
    """The part of a driver that compiling uses."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def install() -> None:
    """For the whole process; incompatible with TRITON_INTERPRET=1."""
    fake: Any = FakeDriver()
    driver.set_active(fake)
    pdl.available = lambda: True  # type: ignore[assignment]

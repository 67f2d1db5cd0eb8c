"""Settings of all tests: hypothesis, Triton, OpenMP. With CI set, hypothesis repeats its examples.

Triton reads TRITON_INTERPRET at its first import, and tests of kernels run without a GPU, so it is
set before any test module loads. OMP_WAIT_POLICY lets torch's threads sleep while they wait:
spinning threads block the cores and made some tests ten times slower on a busy machine.
"""

import os

from hypothesis import settings

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

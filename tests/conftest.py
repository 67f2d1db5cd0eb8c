"""What all tests share: how hypothesis searches. Where CI is set, always the same examples.

Triton reads TRITON_INTERPRET when it is first imported, which may be anywhere: tests of kernels run
without a GPU, so it is set before any test module is. So is OMP_WAIT_POLICY: torch's threads sleep
where they wait. Spinning takes the cores from each other and from whatever else runs, which made
some tests ten times slower on a busy machine.
"""

import os

from hypothesis import settings

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

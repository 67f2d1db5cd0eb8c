"""What pyproject.toml cannot say: the folders that make up the one package, and its extension.

The folders kernels/, training/ and bench/ stand at the top of the repository and are imported as
s1engine.kernels and so on, so that nothing but s1engine is ever installed. The extension is built
for any CPU: csrc/cpu chooses the instruction set at run time, hence no -march here.

Other systems than Linux are refused: the engine shares memory and sees its CPUs as Linux does it.
"""

import sys
from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

if sys.platform != "linux":
    sys.exit(
        f"error: s1engine runs on Linux (x86-64, ARM64), not on {sys.platform}; "
        "on other systems use a container or, on Windows, WSL"
    )

FOLDERS = {f"s1engine.{folder}": folder for folder in ("kernels", "training", "bench")}

CHECKOUT_ONLY = ["studies", "studies.*"]  # of bench/: run from a checkout, never installed


def packages() -> list[str]:
    """Import names of all installed packages, those of the mapped folders included."""
    found = find_packages(include=["s1engine", "s1engine.*"])
    for name, folder in FOLDERS.items():
        inner = find_packages(folder, exclude=CHECKOUT_ONLY)
        found += [name, *(f"{name}.{package}" for package in inner)]
    return found


core = Pybind11Extension(
    "s1engine._core",
    sources=["csrc/bindings.cpp", *sorted(glob("csrc/*/*.cpp"))],
    depends=sorted(glob("csrc/**/*.hpp", recursive=True) + glob("csrc/**/*.inc", recursive=True)),
    include_dirs=["csrc"],
    cxx_std=20,
    extra_compile_args=["-O3", "-Wall", "-Wextra", "-pthread"],
    extra_link_args=["-pthread"],
)

ParallelCompile("S1ENGINE_BUILD_JOBS").install()
setup(packages=packages(), package_dir=FOLDERS, ext_modules=[core])

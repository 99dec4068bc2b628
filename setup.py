"""Builds mrl_fast._C: SIMD kernels behind pybind11, with no dependence on torch or CUDA."""

import os
import platform
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup

# On ARM, compilers fuse multiplies and adds on their own; without that scores have x86's bits.
UNFUSED = ["-ffp-contract=off"] if platform.machine() in ("aarch64", "arm64") else []
FLAGS = ["-O3", "-fno-math-errno", "-pthread", "-MMD", "-Wall", "-Wextra"]
FLAGS += ["-Wno-maybe-uninitialized"]  # GCC's own avx512fintrin.h


def out_of_date(compiled: str, source: str) -> bool:
    """Whether something that the compiler read for this object, by its depfile, is newer."""
    depfile = Path(compiled).with_suffix(".d")
    if not depfile.exists():
        return True
    read = [*depfile.read_text().replace("\\\n", " ").split()[1:], __file__]
    made = os.path.getmtime(compiled)
    return any(not os.path.exists(name) or os.path.getmtime(name) > made for name in read)


JOBS = os.cpu_count() or 1
ParallelCompile("MRL_FAST_BUILD_JOBS", default=JOBS, needs_recompile=out_of_date).install()

setup(
    # Objects that every way of building shares: in place, by pip, for a wheel.
    options={"build_ext": {"build_temp": "build/objects"}},
    # `kernels/` cannot be installed under its own name: PyPI has a package called kernels.
    package_dir={"mrl_fast": "mrl_fast", "mrl_fast.kernels": "kernels"},
    packages=[
        *find_packages(include=["mrl_fast*"]),
        *(f"mrl_fast.{name}" for name in find_packages(include=["kernels*"])),
    ],
    ext_modules=[
        Pybind11Extension(
            "mrl_fast._C",
            sorted(glob("csrc/**/*.cpp", recursive=True)),
            include_dirs=["csrc"],
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            cxx_std=17,
            extra_compile_args=[*FLAGS, *UNFUSED],
            extra_link_args=["-pthread"],
            libraries=["dl"],
        )
    ],
)

"""The library of our own kernels for CPUs, compiled once for a processor and kept in the user's cache.

There is one source for every processor: the compiler makes the best of its vector registers. A machine without a C++
compiler decodes without these kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import torch

from outdraft.errors import UserError, first_line
from outdraft.output import made_once

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-Wno-psabi")
"""Flags of the compiler. Sums keep their order: nothing here lets it reassociate."""

SECONDS = 300
"""Seconds after which a compiler is given up."""


@lru_cache(maxsize=1)
def compiled() -> ctypes.CDLL | str:
    """Return the loaded kernels, or the reason why there are none."""
    if sys.platform == "win32":
        return "the kernels are not built on Windows"
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or [*filter(shutil.which, ("c++", "g++", "clang++"))][:1]
    except ValueError as error:
        return f"CXX cannot be read: {first_line(error)}"
    if not compiler:
        return "no C++ compiler (c++, g++, clang++) is installed"
    tuned = ("-mcpu=native",) if platform.machine() in ("arm64", "aarch64") else ("-march=native",)
    try:
        folder = made_once(_name(compiler, tuned), lambda folder: _compile(compiler, tuned, folder))
        torch.get_num_threads()  # OpenMP's functions are those of the library that torch has loaded
        return ctypes.CDLL(str(folder / "kernels.so"))
    except (OSError, subprocess.SubprocessError, UserError) as error:
        said = getattr(error, "stderr", None)
        return f"the kernels cannot be built: {first_line(said or error)}"


def why_not_native() -> str | None:
    """Return why this machine has no kernels, None if it has."""
    found = compiled()
    if isinstance(found, str):
        return found
    narrow = found.outdraft_lanes() < 8 and platform.machine() not in ("arm64", "aarch64")
    return "this processor has no AVX2, and oneDNN is faster without" if narrow else None


def kernels() -> ctypes.CDLL:
    """Return the loaded kernels, where `compiled` says that there are some."""
    found = compiled()
    assert not isinstance(found, str), found
    return found


def _name(compiler: list[str], tuned: tuple[str, ...]) -> str:
    """Return a name that changes with sources, compiler and processor."""
    digest = hashlib.sha256(" ".join((*compiler, *FLAGS, *tuned, torch.__version__)).encode())
    for source in sorted(SOURCES.glob("*.h")) + sorted(SOURCES.glob("*.cpp")):
        digest.update(source.read_bytes())
    # What the compiler takes the processor for, with all of its extensions.
    target = [*compiler, *tuned, "-dM", "-E", "-x", "c++", os.devnull]
    digest.update(subprocess.run(target, capture_output=True, check=True, timeout=SECONDS).stdout)
    return f"kernels-{digest.hexdigest()[:16]}"


def _compile(compiler: list[str], tuned: tuple[str, ...], folder: Path) -> None:
    print("compiling kernels for this processor, once ...", end=" ", file=sys.stderr, flush=True)
    steps = (
        [*FLAGS, *tuned, "-c", str(SOURCES / "layers.cpp"), "-o", "kernels.o"],
        # Without OpenMP's own library: the process has torch's, and two would fight for the processors.
        ["-shared", "kernels.o", "-o", "kernels.so", *(["-undefined", "dynamic_lookup"] * (sys.platform == "darwin"))],
    )
    for step in steps:
        subprocess.run([*compiler, *step], cwd=folder, capture_output=True, check=True, timeout=SECONDS, text=True)
    (folder / "kernels.o").unlink()
    print("done", file=sys.stderr, flush=True)

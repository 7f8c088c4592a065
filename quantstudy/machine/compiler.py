"""Kernels of this project in C++ for x86 CPUs with AVX2, compiled when first needed."""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from quantstudy.errors import one_line
from quantstudy.machine.hardware import cpu_flags

_FLAGS = ("-std=c++17", "-O3", "-mavx2", "-mfma", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """Return the kernels of a C++ file; None on a CPU without AVX2 and, with a warning, where they cannot be compiled.

    What is compiled is kept in TORCHINDUCTOR_CACHE_DIR, beside inductor's kernels, or in ~/.cache/quantstudy.
    """
    if not {"avx2", "fma"} <= cpu_flags():
        return None
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    try:
        folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path.home() / ".cache" / "quantstudy").absolute()
        built_by = repr((compiler, _FLAGS, platform.libc_ver()))
        digest = hashlib.sha256(source.read_bytes() + built_by.encode()).hexdigest()
        path = folder / f"{source.stem}-{digest[:16]}.so"
        if not path.exists():
            if compiler is None:
                raise RuntimeError("there is no C++ compiler; install g++ or set CXX")
            _compile(compiler, source, path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, ValueError) as error:  # the last of a CXX with an open quotation mark
        warnings.warn(f"{source.name} is not used, which is slower: {one_line(error)}", stacklevel=2)
        return None


def _compile(compiler: str, source: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        done = subprocess.run(
            [*shlex.split(compiler), *_FLAGS, str(source), "-o", str(built)],
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            raise RuntimeError(f"{compiler} failed: {done.stderr.strip()}")
        with built.open("rb") as file:
            os.fsync(file.fileno())  # half a library would end the process that loads it
        built.replace(path)  # at once, whoever else compiles it

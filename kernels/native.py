"""C++ for this processor: a file beside this one is compiled once, kept in $COMPRESS_CACHE/native, and called through ctypes.

Nothing of torch is compiled against, so it takes seconds and any C++ compiler; only its OpenMP is linked, so that the threads are those that torch has started,
and no second pool of them waits in a loop while these work. Where there is no compiler, or the processor lacks an instruction, `library` says so in words and
other routes are taken. COMPRESS_NATIVE=0 in the environment asks for that.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from . import tune

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("cpu_native.cpp")
NEEDED = {  # what /proc/cpuinfo and compilers call it
    "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512dq": "avx512dq", "avx512vl": "avx512vl", "avx512_vbmi2": "avx512vbmi2",
    "avx512_bf16": "avx512bf16", "avx512_vnni": "avx512vnni", "fma": "fma", "f16c": "f16c", "popcnt": "popcnt",
}  # fmt: skip
FLAGS = ["-O2", "-std=c++17", "-shared", "-fPIC", "-fopenmp", *(f"-m{name}" for name in NEEDED.values())]


@functools.cache
def library() -> ctypes.CDLL | str:
    """What SOURCE compiles to, or the reason why it cannot be had."""
    if os.environ.get("COMPRESS_NATIVE") == "0":
        return "COMPRESS_NATIVE=0"
    if sys.platform != "linux":
        return f"native code is compiled on Linux, this is {sys.platform}"
    has = next((line.split() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), [])
    if missing := [name for name in NEEDED if name not in has]:
        return f"this processor has no {', '.join(missing)}"
    if not (compiler := shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")):
        return "no C++ compiler: c++ and g++ are not on PATH"
    packages = Path(torch.__file__).parent
    openmp = sorted(map(str, [*packages.glob("lib/libgomp*.so*"), *packages.with_name("torch.libs").glob("libgomp*.so*")]))[:1]
    command = [compiler, *FLAGS, str(SOURCE), "-Wl,--as-needed", *openmp]
    name = hashlib.sha256(SOURCE.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
    file = tune.table_file().with_name("native") / f"{name}.so"
    try:
        if not file.is_file():
            log.info("compiling %s into %s", SOURCE.name, file)
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=file.parent) as folder:
                subprocess.run([*command, "-o", f"{folder}/new.so"], check=True, capture_output=True, text=True)
                os.replace(f"{folder}/new.so", file)
        return ctypes.CDLL(str(file))
    except subprocess.CalledProcessError as error:
        return f"{compiler} does not compile {SOURCE.name}: {(error.stderr.splitlines() or ['no message'])[0]}"
    except OSError as error:
        return f"native code: {error}"

"""What nvcc says of a source of csrc/cuda."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from torch.utils import cpp_extension

from tests.cuda.emulation import ROOT


def _cuda_libraries() -> list[str]:
    """Where nvcc itself looks for libraries."""
    dry = subprocess.run(
        ["nvcc", "--dryrun", "-x", "cu", "/dev/null", "-o", "x"], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    line = next(x for x in dry.stderr.splitlines() if "LIBRARIES=" in x)
    return [x.strip('"') for x in line.split("LIBRARIES=")[1].split()]


ARCHITECTURES = ("80", "90")


def compiles_and_links(name: str, folder: Path, *, kernels: int) -> None:
    """At least so many kernels an architecture, without a warning, and none spills registers."""
    out = folder / f"{name}.o"
    command = ["nvcc", "-std=c++20", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    command += ["-DUSE_CUDA", "-Xptxas=-v", "-c"]
    command += [f"-I{ROOT / 'csrc'}", *(f"-I{p}" for p in cpp_extension.include_paths())]
    command += ["-Xcompiler=-fPIC", str(ROOT / f"csrc/cuda/{name}.cu"), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "warning" not in done.stderr, done.stderr
    report = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores",
        done.stderr, re.DOTALL,
    )  # fmt: skip
    for architecture in ARCHITECTURES:
        assert len([x for x, arch, *_ in report if arch == architecture]) >= kernels
    spilling = {x: sizes for x, _, *sizes in report if sizes != ["0", "0"]}
    assert not spilling
    shared = ["g++", "-shared", str(out), "-o", str(folder / "_C_cuda.so")]
    shared += [*_cuda_libraries(), "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
    linked = subprocess.run(shared, capture_output=True, text=True, check=False)
    assert linked.returncode == 0, linked.stderr

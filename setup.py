"""Builds the two extension libraries against the torch that the user already has.

LWKD_BUILD=0           build nothing: the pure PyTorch reference serves every op
LWKD_CUDA=auto|0|1     CUDA kernels where nvcc is found and torch has CUDA | never | with any torch,
                       or stop with the reason
TORCH_CUDA_ARCH_LIST   defaults to 8.0;9.0+PTX
MAX_JOBS               compile jobs; by default bounded by the memory at hand
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import setuptools

ROOT = Path(__file__).resolve().parent
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # the stable ABI of torch 2.10
CUDART = "libcudart_static.a"
SANITIZE = os.environ.get("LWKD_SANITIZE", "")  # e.g. "address,undefined"; see `make sanitize`
BUILDING = not {"sdist", "egg_info", "dist_info"} & set(sys.argv[1:])
INPLACE = bool({"editable_wheel", "develop", "--inplace", "-i"} & set(sys.argv[1:]))
BUILT = {"_C": sysconfig.get_config_var("EXT_SUFFIX"), "_C_cuda": ".so"}
INSTALL = "pip install --no-build-isolation ."


def say(text: str) -> None:
    """Print one line that is found again in pip's output."""
    print(f"lwkd: {text}", file=sys.stderr, flush=True)


def forget(*names: str) -> None:
    """Remove what an earlier in-place build left where this one makes nothing: it would load."""
    for name in names if INPLACE else ():
        old = ROOT / "lwkd" / f"{name}{BUILT[name]}"
        if old.exists():
            old.unlink()
            say(f"{old.name} of an earlier build is removed")


def site_folders() -> list[str]:
    """Return where the user's torch may lie, which pip's isolated build environment hides."""
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    kinds = ("purelib", "platlib")
    under = [sysconfig.get_path(kind, vars=base) for kind in kinds]
    own = [sysconfig.get_path(kind) for kind in kinds]  # a virtual environment's, or the same
    first = [] if own == under else own
    return [*first, site.getusersitepackages(), *under]


def import_torch() -> Any:
    """Import the user's torch, also from inside pip's isolated build environment."""
    sys.path += site_folders()
    try:
        import torch
    except ImportError:
        found = "no torch was found beside this Python"
    else:
        if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10):
            return torch
        found = f"torch {torch.__version__} is too old, it lacks the stable ABI of 2.10"
    raise SystemExit(
        f"lwkd: {found}; lwkd builds against the torch you use.\n"
        f"lwkd: install torch >= 2.10 first, then: {INSTALL}"
    )


def cuda_wanted() -> str:
    """Return LWKD_CUDA."""
    wanted = os.environ.get("LWKD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"lwkd: LWKD_CUDA: expected auto, 0 or 1, got {wanted!r}")
    return wanted


def ask(*command: str | Path) -> str:
    """Return what a command prints, on either stream."""
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ).stdout


def home_of(nvcc: str) -> Path:
    """Return the toolkit that an nvcc on PATH belongs to: it may be a link, or a script."""
    for program in (Path(nvcc).resolve(), nvcc):
        said = re.search(r"^#\$ TOP=(.*)$", ask(program, "--dryrun", "-x", "cu", os.devnull), re.M)
        if said:
            return Path(said[1]).resolve()
    return Path(nvcc).resolve().parents[1]


def find_home() -> tuple[Path | None, str]:
    """Return the toolkit that the user names, else the one on PATH, or None and the reason."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if named := os.environ.get(name):
            home = Path(named)
            there = (home / "bin/nvcc").exists()
            return (home, "") if there else (None, f"{name}={named} has no bin/nvcc")
    found = shutil.which("nvcc")
    homes = [home_of(found)] if found else []
    homes += [Path("/usr/local/cuda")]
    home = next((h for h in homes if (h / "bin/nvcc").exists()), None)
    return home, "" if home else "no nvcc was found (set CUDA_HOME)"


def find_cuda(torch: Any) -> tuple[Path | None, str]:
    """Return the CUDA toolkit's home and its version, or None and the reason."""
    if cuda_wanted() == "0":
        return None, "LWKD_CUDA=0"
    home, reason = find_home()
    if home is None:
        return None, reason
    said = re.search(r"release (\d+\.\d+)", ask(home / "bin/nvcc", "--version"))
    if said is None:
        return None, f"{home}/bin/nvcc does not say its version"
    version, wanted = said[1], torch.version.cuda
    if not wanted and cuda_wanted() == "auto":  # minutes for what only another torch can load
        return None, f"torch {torch.__version__} has no CUDA (LWKD_CUDA=1 builds them all the same)"
    if wanted and wanted.split(".")[0] != version.split(".")[0]:
        return None, f"nvcc is {version}, torch {torch.__version__} was built for CUDA {wanted}"
    return home, version


def bound_jobs() -> None:
    """Keep parallel compiles within memory: nvcc takes about 3 GB a job."""
    if "MAX_JOBS" not in os.environ:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        os.environ["MAX_JOBS"] = str(max(1, min(os.cpu_count() or 1, int(memory / 3))))


def sources(folder: str, *endings: str) -> list[str]:
    """List the sources of one folder, relative to the project as setuptools wants them."""
    paths = (p for e in endings for p in (ROOT / folder).glob(f"*{e}"))
    return sorted(str(p.relative_to(ROOT)) for p in paths)


def cxx_flags() -> list[str]:
    """Return the C++ flags of both libraries."""
    flags = ["-std=c++20", TARGET, "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
    # One rounding on every machine: without contraction all target_clones agree bit for bit.
    flags += ["-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fopenmp-simd"]
    flags += [f"-ffile-prefix-map={ROOT}=."]
    if SANITIZE:
        flags += [
            f"-fsanitize={SANITIZE}",
            "-fno-sanitize-recover=undefined",
            "-g",
            "-O1",
            "-DLWKD_SANITIZE",
        ]
    return flags


def cpu_extension(cpp: Any) -> Any:
    """Describe lwkd._C: the pybind11 module and the CPU kernels."""
    import pybind11

    link = [f"-fsanitize={SANITIZE}"] if SANITIZE else []
    extension = cpp.CppExtension(
        "lwkd._C",
        sources("csrc", ".cpp"),
        include_dirs=[pybind11.get_include(), str(ROOT / "csrc")],
        depends=sources("csrc", ".h"),
        extra_compile_args={"cxx": cxx_flags()},
        extra_link_args=link,
    )
    extension.libraries = [x for x in extension.libraries if x not in ("torch_python", "c10")]
    return extension


def cuda_extension(cpp: Any, home: Path) -> Any:
    """Describe lwkd._C_cuda: a plain shared library of CUDA kernels, loadable without Python."""
    cpp.CUDA_HOME = str(home)  # torch leaves it None on CPU builds
    # Where it lies differs between NVIDIA's, conda's and pip's toolkits.
    runtimes = [p for d in ("lib64", "lib", "targets/*/lib") for p in home.glob(f"{d}/{CUDART}")]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    nvcc = ["-O3", "-std=c++20", TARGET, "-DUSE_CUDA", "--threads=2"]
    extension = cpp.CppExtension(
        "lwkd._C_cuda",
        sources("csrc/cuda", ".cu"),
        include_dirs=[str(ROOT / "csrc"), str(home / "include")],
        depends=sources("csrc", ".h") + sources("csrc/cuda", ".cuh"),
        extra_compile_args={"nvcc": nvcc, "cxx": [*cxx_flags(), "-DUSE_CUDA"]},
        # The CUDA shims live in libtorch_cuda, which a CPU build of torch lacks: libtorch
        # pulls it in at run time. The static runtime needs no libcudart of the right name.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-lrt", "-ldl", "-lpthread"],
        library_dirs=[str(p.parent) for p in runtimes],
        libraries=["cudart_static"],
    )
    extension.libraries = [x for x in extension.libraries if x not in ("torch_python", "c10")]
    extension.optional = cuda_wanted() != "1"
    return extension


def build_command(cpp: Any, info: dict[str, str]) -> Any:
    """Return build_ext: CUDA first, so that lwkd._C can say why it is missing."""

    class Build(cpp.BuildExtension):
        def run(self) -> None:
            if not info["cuda"]:  # a build folder may be used again
                Path(self.get_ext_fullpath("lwkd._C_cuda")).unlink(missing_ok=True)
            super().run()

        def get_ext_filename(self, fullname: str) -> str:
            if fullname.endswith("_C_cuda"):
                return str(Path(*fullname.split("."))) + ".so"
            return str(super().get_ext_filename(fullname))

        def build_extension(self, extension: Any) -> None:
            if extension.name.endswith("_C_cuda"):
                try:
                    super().build_extension(extension)
                except Exception as error:  # BuildExtension raises RuntimeError, distutils others
                    if not extension.optional:
                        raise
                    info["cuda"], info["cuda_reason"] = "", f"nvcc failed: {error}"
                    stale = Path(self.get_ext_fullpath(extension.name))
                    stale.unlink(missing_ok=True)
                    forget("_C_cuda")
                    say(f"CUDA kernels are left out, {info['cuda_reason']}")
                return
            self.write_info(extension)
            super().build_extension(extension)

        def write_info(self, extension: Any) -> None:
            folder = Path(self.build_temp).resolve()
            folder.mkdir(parents=True, exist_ok=True)
            rows = (f'{{"{k}", R"lwkd({v})lwkd"}},' for k, v in info.items())
            (folder / "lwkd_build_info.h").write_text("\n".join(rows) + "\n")
            extension.include_dirs.append(str(folder))

    return Build


def extensions() -> dict[str, Any]:
    """Return setup()'s arguments for what can be built here."""
    if os.environ.get("LWKD_BUILD", "1") == "0":
        say("LWKD_BUILD=0: nothing is compiled, the reference serves every op")
        forget("_C", "_C_cuda")
        return {}
    if not BUILDING:
        return {}
    wanted, torch = cuda_wanted(), import_torch()
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        say("no C++ compiler was found: nothing is compiled, the reference serves every op")
        forget("_C", "_C_cuda")
        return {}
    from torch.utils import cpp_extension as cpp

    bound_jobs()
    home, version = find_cuda(torch)
    if home is None and wanted == "1":
        raise SystemExit(f"lwkd: LWKD_CUDA=1, but {version}")
    modules = [cpu_extension(cpp)]
    if home is None:
        forget("_C_cuda")
        say(f"CUDA kernels are left out: {version}; CPU and Triton kernels are not affected")
    else:
        modules.insert(0, cuda_extension(cpp, home))
    info = {
        "torch": torch.__version__,
        "cuda": version if home else "",
        "cuda_reason": "" if home else version,
        "cuda_archs": os.environ.get("TORCH_CUDA_ARCH_LIST", "") if home else "",
        "sanitize": SANITIZE,
    }
    return {"ext_modules": modules, "cmdclass": {"build_ext": build_command(cpp, info)}}


# pyproject.toml can say this only to setuptools >= 77, and containers have older ones.
LICENSE = "license_expression" if int(setuptools.__version__.split(".")[0]) >= 77 else "license"
setuptools.setup(**{LICENSE: "BSD-3-Clause"}, **extensions())

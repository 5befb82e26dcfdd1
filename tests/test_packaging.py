"""The sdist is complete, and wheels made from it work away from the source tree."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from lwkd._version import __version__
from tests.cases import Target, why_not
from tests.ops.test_backends import ROOT, use

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text[-4000:]
    return text


def tracked() -> list[Path]:
    """What git knows, relative to the root; in an unpacked sdist, what is there."""
    if (ROOT / ".git").exists():
        names = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
        return [Path(n) for n in names.split("\0") if n and (ROOT / n).is_file()]
    folders = ("csrc", "kernels", "lwkd", "tests", "bench", "examples", "docs")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.is_file()]
    files += [p for p in ROOT.iterdir() if p.is_file()]
    skip = {".so", ".pyc"}
    return [p.relative_to(ROOT) for p in files if p.suffix not in skip]


LIBRARIES = (f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", "_C_cuda.so")


def leave_libraries(tree: Path) -> None:
    """What builds in the tree leave there: of another torch, perhaps, or of an older source."""
    for name in LIBRARIES:
        (tree / "lwkd" / name).write_text("of another build")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist, made from a copy of the tracked files: this tree stays as it is."""
    copy = tmp_path_factory.mktemp("source")
    for path in tracked():
        (copy / path.parent).mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, copy / path)
    leave_libraries(copy)
    build = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    run(sys.executable, "-c", build, cwd=copy)
    (archive,) = (copy / "dist").iterdir()
    assert archive.name == f"lwkd-{__version__}.tar.gz"
    with tarfile.open(archive) as tar:
        tar.extractall(copy / "unpacked", filter="data")
    return copy / "unpacked" / f"lwkd-{__version__}"


# Optimising takes a minute, and is not what is tested here.
HASTY = """#!/bin/sh
for word do
    shift
    test "$word" = -O3 && word=-O0
    set -- "$@" "$word"
done
exec c++ "$@"
"""


def wheel(source: Path, to: Path, *env: str) -> Path:
    """Build as a user does, with no network and this torch; unpack. Returns the wheel."""
    pip = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", "dist"]
    shutil.copytree(source, to / "source")
    run("env", *env, sys.executable, *pip, ".", cwd=to / "source")
    (built,) = (to / "source/dist").glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(to / "installed")
    moved = Path(shutil.move(built, to))
    shutil.rmtree(to / "source")
    return moved


def test_the_sdist_has_every_source(sdist: Path) -> None:
    """Headers, CUDA sources and kernels too, whether or not they are compiled here."""
    wanted = {p for p in tracked() if p.parts[0] in ("csrc", "kernels", "lwkd", "tests", "bench")}
    wanted = {p for p in wanted if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh", ".typed")}
    wanted |= {Path(n) for n in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile")}
    missing = {str(p) for p in wanted if not (sdist / p).is_file()}
    assert missing == set()
    assert {p.suffix for p in wanted if p.parts[0] == "csrc"} >= {".cpp", ".h"}
    assert not list(sdist.rglob("*.so"))


def test_a_wheel_works_elsewhere(sdist: Path, tmp_path: Path) -> None:
    """Built from the sdist, unpacked into an empty folder, used from there."""
    if why_not(Target("compiled", "cpu")):
        pytest.skip("no C++ compiler")
    compiler = tmp_path / "hasty"
    compiler.write_text(HASTY)
    compiler.chmod(0o755)
    built = wheel(sdist, tmp_path, "LWKD_CUDA=0", f"CXX={compiler}")
    assert re.fullmatch(rf"lwkd-{__version__}-cp\d+-cp\d+-linux_\w+\.whl", built.name)
    report = use(tmp_path / "installed")
    assert report["live"]
    assert report["serving"] == "compiled"
    assert report["warnings"] == []
    assert report["compiled"] == ""
    assert report["info"]["cuda_reason"] == "LWKD_CUDA=0"
    expected = {p.name for p in (ROOT / "kernels").glob("*.py")}
    assert {p.name for p in (tmp_path / "installed/lwkd/kernels").glob("*.py")} == expected
    assert (tmp_path / "installed/lwkd/py.typed").exists()
    if not why_not(Target("triton", "cpu")):
        assert report["triton"] == ""  # TRITON_INTERPRET stands in this environment
    # Nothing of another machine, and nothing that is not the library's.
    names = [p.relative_to(tmp_path / "installed") for p in (tmp_path / "installed").iterdir()]
    assert {p.parts[0] for p in names} == {"lwkd", f"lwkd-{__version__}.dist-info"}
    (library,) = (tmp_path / "installed/lwkd").glob("_C.*.so")
    assert str(tmp_path).encode() not in library.read_bytes()


def test_a_wheel_without_a_compiler(sdist: Path, tmp_path: Path) -> None:
    """LWKD_BUILD=0: pure Python, for every machine, whatever lies in the tree; the reference
    serves every op."""
    shutil.copytree(sdist, tmp_path / "tree")
    leave_libraries(tmp_path / "tree")
    built = wheel(tmp_path / "tree", tmp_path, "LWKD_BUILD=0")
    assert built.name == f"lwkd-{__version__}-py3-none-any.whl"
    assert not list((tmp_path / "installed").rglob("*.so"))
    report = use(tmp_path / "installed")
    assert report["serving"] == "reference"
    assert report["warnings"] == []
    assert "lwkd._C is not built" in report["compiled"]


def test_the_version_is_stated_once(sdist: Path) -> None:
    metadata = (sdist / "PKG-INFO").read_text()
    assert f"\nVersion: {__version__}\n" in metadata
    assert "\nLicense-Expression: BSD-3-Clause\n" in metadata
    assert re.findall(r"^Requires-Dist: (?!.*extra)(.*)$", metadata, re.M) == ["torch>=2.10"]

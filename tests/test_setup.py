"""setup.py, without building: which torch, which toolkit, what is left out and what it says."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import setuptools

from tests.ops.test_backends import ROOT

Setup = Callable[..., SimpleNamespace]
SETTINGS = ("LWKD_BUILD", "LWKD_CUDA", "CUDA_HOME", "CUDA_PATH", "CXX", "MAX_JOBS",
            "TORCH_CUDA_ARCH_LIST", "LWKD_SANITIZE")  # fmt: skip
CPU, CUDA = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", "_C_cuda.so"
NVCC = """#!/bin/sh
case "$*" in
    *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
    *--dryrun*) echo "#$ TOP=$(dirname "$0")/.." >&2 ;;
esac
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree with nothing but setup.py, and an old library of each kind."""
    (tmp_path / "tree/lwkd").mkdir(parents=True)
    shutil.copy2(ROOT / "setup.py", tmp_path / "tree")
    for name in (CPU, CUDA):
        (tmp_path / "tree/lwkd" / name).touch()
    return tmp_path / "tree"


@pytest.fixture
def setup(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Run setup.py as pip does for a command; a C++ compiler is on PATH, nvcc is not."""
    program(tmp_path / "bin/c++", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # so that what setup.py sets is taken back as well
        monkeypatch.delenv(name)
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda p: "/usr/local" not in str(p) and exists(p))

    def run(command: str = "bdist_wheel", **env: str) -> SimpleNamespace:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["setup.py", command])
        given.clear()
        names = runpy.run_path(str(tree / "setup.py"))
        modules = [m.name for m in given.get("ext_modules", [])]
        left = sorted(p.name for p in (tree / "lwkd").iterdir())
        return SimpleNamespace(**names, given=dict(given), modules=modules, left=left)

    return run


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CUDA toolkit that says it is 13.0, and a torch built for that."""
    import torch

    program(tmp_path / "toolkit/bin/nvcc", NVCC)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return tmp_path / "toolkit"


# --- torch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("torch", "found"),
    [
        (None, "no torch was found beside this Python"),
        ("2.9.1+cu130", "torch 2.9.1+cu130 is too old, it lacks the stable ABI of 2.10"),
        ("1.13.1", "torch 1.13.1 is too old, it lacks the stable ABI of 2.10"),
    ],
)
def test_without_a_torch_that_serves(
    torch: str | None, found: str, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = None if torch is None else ModuleType("torch")
    if module is not None:
        module.__version__ = torch
    monkeypatch.setitem(sys.modules, "torch", module)
    with pytest.raises(SystemExit) as stop:
        setup()
    assert str(stop.value.code).split("\n") == [
        f"lwkd: {found}; lwkd builds against the torch you use.",
        "lwkd: install torch >= 2.10 first, then: pip install --no-build-isolation .",
    ]
    assert setup("egg_info").modules == []  # metadata needs no torch


def test_where_torch_is_looked_for(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip hides all of them: a virtual environment's, the user's, the interpreter's."""
    folders = setup(LWKD_BUILD="0").site_folders
    monkeypatch.setattr("site.getusersitepackages", lambda: "user")
    places = {"purelib": "pure", "platlib": "plat"}
    monkeypatch.setattr(
        "sysconfig.get_path", lambda kind, vars=None: f"{'base' if vars else 'own'}/{places[kind]}"
    )
    assert folders() == ["own/pure", "own/plat", "user", "base/pure", "base/plat"]
    monkeypatch.setattr("sysconfig.get_path", lambda kind, vars=None: places[kind])
    assert folders() == ["user", "pure", "plat"]  # no virtual environment: Python's own order


# --- the toolkit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["link", "script", "itself", "CUDA_HOME", "CUDA_PATH"])
def test_the_toolkit_behind_an_nvcc(
    kind: str, setup: Setup, toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands on PATH may be a link to the toolkit's nvcc, or a script that runs it."""
    path = tmp_path / "path"
    path.mkdir()
    if kind == "link":
        (path / "nvcc").symlink_to(toolkit / "bin/nvcc")
    elif kind == "script":
        program(path / "nvcc", f'#!/bin/sh\nexec {toolkit}/bin/nvcc "$@"\n')
    find_cuda = setup(LWKD_BUILD="0").find_cuda
    if kind.startswith("CUDA"):
        monkeypatch.setenv(kind, str(toolkit))
    monkeypatch.setenv("PATH", f"{toolkit / 'bin' if kind == 'itself' else path}:{os.defpath}")
    torch = SimpleNamespace(version=SimpleNamespace(cuda="13.0"), __version__="2.13.0")
    assert find_cuda(torch) == (toolkit, "13.0")
    torch.version.cuda = "12.8"
    assert find_cuda(torch) == (None, "nvcc is 13.0, torch 2.13.0 was built for CUDA 12.8")


def test_a_torch_without_cuda_gets_none_unasked(setup: Setup, toolkit: Path) -> None:
    """It could not load what takes minutes to compile; whoever builds for others asks for it."""
    torch = SimpleNamespace(version=SimpleNamespace(cuda=None), __version__="2.13.0+cpu")
    home = {"CUDA_HOME": str(toolkit)}
    reason = "torch 2.13.0+cpu has no CUDA (LWKD_CUDA=1 builds them all the same)"
    assert setup(LWKD_BUILD="0", **home).find_cuda(torch) == (None, reason)
    assert setup(LWKD_CUDA="1", **home).find_cuda(torch) == (toolkit, "13.0")


def test_without_nvcc_the_cpu_kernels_are_built(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    done = setup()
    assert done.modules == ["lwkd._C"]
    assert set(done.given["cmdclass"]) == {"build_ext"}
    assert capsys.readouterr().err == (
        "lwkd: CUDA kernels are left out: no nvcc was found (set CUDA_HOME); "
        "CPU and Triton kernels are not affected\n"
    )


def test_a_toolkit_that_is_named_and_absent_is_not_replaced(
    setup: Setup, toolkit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another one stands on PATH: not the one that was asked for."""
    env = {"PATH": f"{toolkit / 'bin'}:{tmp_path / 'bin'}", "CUDA_HOME": "/nowhere"}
    assert setup(**env).modules == ["lwkd._C"]
    assert "left out: CUDA_HOME=/nowhere has no bin/nvcc;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({}, "LWKD_CUDA=1, but no nvcc was found (set CUDA_HOME)"),
        ({"CUDA_HOME": "/nowhere"}, "LWKD_CUDA=1, but CUDA_HOME=/nowhere has no bin/nvcc"),
    ],
)
def test_cuda_that_is_asked_for_and_absent_stops(
    env: dict[str, str], said: str, setup: Setup
) -> None:
    with pytest.raises(SystemExit) as stop:
        setup(LWKD_CUDA="1", **env)
    assert stop.value.code == f"lwkd: {said}"


@pytest.mark.parametrize("value", ["yes", "2", "AUTO", ""])
def test_a_setting_that_is_none_stops(value: str, setup: Setup) -> None:
    with pytest.raises(SystemExit) as stop:
        setup(LWKD_CUDA=value)
    assert stop.value.code == f"lwkd: LWKD_CUDA: expected auto, 0 or 1, got {value!r}"


def test_an_nvcc_that_says_nothing(setup: Setup, tmp_path: Path) -> None:
    program(tmp_path / "toolkit/bin/nvcc", "#!/bin/sh\nexit 1\n")
    done = setup(CUDA_HOME=str(tmp_path / "toolkit"))
    assert done.modules == ["lwkd._C"]


# --- what a user may set -------------------------------------------------------------------------


def test_jobs_and_architectures(
    setup: Setup, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filled in where they are not set, left alone where they are."""
    done = setup(CUDA_HOME=str(toolkit))
    assert done.modules == ["lwkd._C_cuda", "lwkd._C"]
    jobs, architectures = os.path.expandvars("$MAX_JOBS $TORCH_CUDA_ARCH_LIST").split()
    assert 1 <= int(jobs) <= (os.cpu_count() or 1)
    assert architectures == "8.0;9.0+PTX"
    setup(CUDA_HOME=str(toolkit), MAX_JOBS="7", TORCH_CUDA_ARCH_LIST="10.0")
    assert os.path.expandvars("$MAX_JOBS $TORCH_CUDA_ARCH_LIST") == "7 10.0"


# --- what an earlier build left ------------------------------------------------------------------


@pytest.mark.parametrize("command", ["editable_wheel", "--inplace", "bdist_wheel", "sdist"])
@pytest.mark.parametrize(
    ("env", "kept"),
    [
        ({"LWKD_BUILD": "0"}, []),
        ({"CXX": "no-such-compiler"}, []),
        ({"LWKD_CUDA": "0"}, [CPU]),
        ({}, [CPU]),  # no nvcc
    ],
)
def test_old_libraries(command: str, env: dict[str, str], kept: list[str], setup: Setup) -> None:
    """An in-place build removes those that it makes no new ones of; other builds leave the tree."""
    inplace = command in ("editable_wheel", "--inplace")
    assert setup(command, **env).left == sorted(kept if inplace else [CPU, CUDA])


def test_with_nvcc_both_stay_until_they_are_replaced(setup: Setup, toolkit: Path) -> None:
    assert setup("editable_wheel", CUDA_HOME=str(toolkit)).left == sorted([CPU, CUDA])


class Extension(SimpleNamespace):
    """One of the libraries, as far as build_ext looks at it."""


class BuildExtension:
    """torch's build_ext, whose nvcc fails."""

    def __init__(self, folder: Path) -> None:
        self.build_temp, self.build_lib = str(folder / "temp"), folder / "lib"
        self.built: list[str] = []

    def get_ext_fullpath(self, name: str) -> str:
        return str(self.build_lib / f"{name.replace('.', '/')}.so")

    def run(self) -> None:
        for extension in self.extensions:
            self.build_extension(extension)

    def build_extension(self, extension: Extension) -> None:
        if extension.name == "lwkd._C_cuda":
            raise RuntimeError("exit status 1")
        self.built.append(extension.name)


def build(setup: Setup, tmp_path: Path, cuda: str, optional: bool) -> Any:
    """Run setup.py's build_ext in place, over a build folder that holds an older library."""
    done = setup("editable_wheel", LWKD_BUILD="1", CUDA_HOME=str(tmp_path / "toolkit"))
    info = {"cuda": cuda, "cuda_reason": "" if cuda else "no nvcc was found"}
    command = done.build_command(SimpleNamespace(BuildExtension=BuildExtension), info)(tmp_path)
    names = ["lwkd._C_cuda", "lwkd._C"] if cuda else ["lwkd._C"]
    command.extensions = [Extension(name=n, optional=optional, include_dirs=[]) for n in names]
    command.old = Path(command.get_ext_fullpath("lwkd._C_cuda"))
    command.old.parent.mkdir(parents=True)
    command.old.touch()
    return command


def test_where_nvcc_fails_the_cpu_kernels_are_built_and_say_so(
    setup: Setup, toolkit: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = build(setup, tmp_path, "13.0", optional=True)
    command.run()
    assert command.built == ["lwkd._C"]
    header = (tmp_path / "temp/lwkd_build_info.h").read_text()
    assert '{"cuda", R"lwkd()lwkd"},' in header
    assert '{"cuda_reason", R"lwkd(nvcc failed: exit status 1)lwkd"},' in header
    assert "CUDA kernels are left out, nvcc failed: exit status 1" in capsys.readouterr().err
    assert not command.old.exists()
    assert not (tree / "lwkd" / CUDA).exists()


def test_where_nvcc_fails_and_was_asked_for_the_build_stops(
    setup: Setup, toolkit: Path, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="exit status 1"):
        build(setup, tmp_path, "13.0", optional=False).run()


def test_a_build_folder_that_is_used_again(setup: Setup, toolkit: Path, tmp_path: Path) -> None:
    """A wheel of a CPU build must not take along what a CUDA build left there."""
    command = build(setup, tmp_path, "", optional=True)
    command.run()
    assert command.built == ["lwkd._C"]
    assert not command.old.exists()

"""What is live and why the rest is not: libraries absent, broken, mismatched; lazy imports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import lwkd
from lwkd.ops import backends, jacobian
from tests import cases
from tests.cases import TARGETS, Target

ROOT = Path(__file__).resolve().parents[2]
OPS = (
    "attention", "attention_backward", "attention_maps", "jacobian_rows", "jacobian_rows_backward",
)  # fmt: skip


# --- this machine --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_what_should_be_live_is(target: Target) -> None:
    target.require()
    d = target.distance([torch.ones(1, 2, 3, 3, device=target.device)] * 2,
                        [torch.ones(1, 3, 3, 3, device=target.device)] * 2)  # fmt: skip
    assert d.tolist() == [0.0, 0.0]


def test_compiled_kernels_are_the_dispatchers_choice() -> None:
    Target("compiled", "cpu").require()
    for op in OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lwkd::{op}", "CPU")
    assert backends.serving("cpu") == "compiled"
    assert backends.serving("mps") == "reference"
    x, y = (cases.draw((2, 9, 7, 5), torch.float32, i) for i in (1, 2))
    chosen = lwkd.ops.layer_discrepancy([x], [y])
    assert torch.equal(chosen, lwkd.ops.layer_discrepancy([x], [y], backend="compiled"))


def test_a_library_without_this_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for by name never turns into the reference in silence."""
    monkeypatch.setattr(jacobian.ROWS, "compiled", [])
    x = torch.ones(2, 3)
    text = "'compiled' on cpu, got the compiled library has no kernel of jacobian_rows"
    with pytest.raises(RuntimeError, match=text):
        lwkd.ops.layer_discrepancy([x], [x], kind="jacobian", backend="compiled")
    assert lwkd.ops.layer_discrepancy([x], [x], kind="jacobian").tolist() == [0.0]


@pytest.mark.parametrize("op", OPS)
def test_one_schema_in_three_namespaces(op: str) -> None:
    spaces = (torch.ops.lwkd, torch.ops.lwkd_reference, torch.ops.lwkd_triton)
    schemas = {str(getattr(n, op).default._schema).split("::", 1)[1] for n in spaces}
    assert len(schemas) == 1


def test_build_info_names_the_build() -> None:
    Target("compiled", "cpu").require()
    info = backends.build_info()
    assert info["torch"].split(".")[0] == torch.__version__.split(".")[0]
    assert info["cuda"] or info["cuda_reason"]


@pytest.mark.parametrize(
    ("built", "running", "named"),
    [("13.0", "12.8", True), ("12.4", "12.8", False), ("", "12.8", False), ("12.8", "13.0", True)],
)
def test_a_cuda_of_another_major_is_named(built: str, running: str, named: bool) -> None:
    """Fault 27: both versions and what to do."""
    text = backends._cuda_mismatch(built, running)
    if not named:
        assert text == ""
        return
    assert f"lwkd._C_cuda was built with CUDA {built}" in text
    assert f"torch {torch.__version__} runs CUDA {running}" in text
    assert "rebuild" in text


class Loading(NamedTuple):
    """What `_load_cuda` finds, and what it may make of it."""

    cpu: backends.Library
    info: dict[str, str]
    library: bool
    live: bool
    reason: str


LIVE, ABSENT = backends.Library(True, ""), backends.Library(False, "lwkd._C is not built")
LOADINGS = {
    "as built": Loading(LIVE, {"cuda": "13.0", "cuda_reason": ""}, True, True, ""),
    "left out": Loading(
        LIVE, {"cuda": "", "cuda_reason": "LWKD_CUDA=0"}, False, False,
        "lwkd._C_cuda is missing: LWKD_CUDA=0",
    ),
    "left over from another build": Loading(
        LIVE, {"cuda": "", "cuda_reason": "LWKD_CUDA=0"}, True, False,
        "_C_cuda.so is of another build than lwkd._C, which says: LWKD_CUDA=0",
    ),
    "alone": Loading(
        ABSENT, {}, True, False, "lwkd._C_cuda is not used without lwkd._C: lwkd._C is not built"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOADINGS.values(), ids=LOADINGS)
def test_a_cuda_library_that_nobody_vouches_for_is_not_loaded(
    case: Loading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 27: an old one left in place would answer with old kernels."""
    loaded: list[str] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setattr(backends, "CPU", case.cpu)
    monkeypatch.setattr(backends, "build_info", lambda: case.info)
    monkeypatch.setattr(backends, "__file__", str(tmp_path / "ops/backends.py"))
    library = tmp_path / "_C_cuda.so"
    if case.library:
        library.touch()
    assert backends._load_cuda() == backends.Library(case.live, case.reason)
    assert loaded == ([str(library)] if case.live else [])


# --- other machines: a copy of the package in a process of its own --------------------------------


def copy(to: Path, library: bool) -> Path:
    """The package as a wheel lays it out, with the compiled library or without."""
    skip = ["__pycache__"] if library else ["__pycache__", "*.so"]
    shutil.copytree(ROOT / "lwkd", to / "lwkd", ignore=shutil.ignore_patterns(*skip))
    kernels = ROOT / "kernels"
    shutil.copytree(kernels, to / "lwkd/kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return to


USE = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import lwkd
import torch
from lwkd.ops import backends
def error(**options):
    try:
        lwkd.ops.layer_discrepancy([x], [y], **options)
    except Exception as e:
        return type(e).__name__ + ": " + str(e)
    return ""
torch.manual_seed(0)
x, y = torch.rand(2, 3, 4, 4, requires_grad=True), torch.rand(2, 5, 2, 2)
d = lwkd.ops.layer_discrepancy([x], [y])
d.sum().backward()
again = lwkd.ops.layer_discrepancy([x], [y], backend="reference")
print(json.dumps({
    "file": lwkd.__file__, "live": backends.CPU.live, "serving": backends.serving("cpu"),
    "warnings": [str(w.message) for w in seen if "lwkd" in str(w.message)],
    "categories": [w.category.__name__ for w in seen if "lwkd" in str(w.message)],
    "reason": backends.unavailable("compiled", "cpu"), "info": backends.build_info(),
    "compiled": error(backend="compiled"), "triton": error(backend="triton"),
    "equal": bool(torch.equal(d, again)), "distance": d.tolist(),
    "gradient": bool(x.grad.isfinite().all() and x.grad.any()),
    "maps": list(lwkd.ops.attention_maps([x])[0].shape),
    "modules": [m for m in ("triton", "lwkd.kernels", "matplotlib", "sklearn", "rich", "numpy")
                if sys.modules.get(m) is not None],
}))
"""


def use(path: Path, before: str = "", *env: str) -> dict[str, Any]:
    """Import the copy in ``path``, use it, report; its environment is this one's and ``env``.

    -S leaves out the .pth files of site-packages, and with them an editable install of lwkd.
    """
    others = [p for p in sys.path if p and Path(p).resolve() != ROOT]
    paths = f"PYTHONPATH={':'.join([str(path), *others])}"
    command = ["env", *env, paths, sys.executable, "-S", "-c", before + USE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=path, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert Path(report["file"]).is_relative_to(path)
    assert report["gradient"]
    assert report["maps"] == [2, 4, 4]
    return report


def test_without_a_compiled_library(tmp_path: Path) -> None:
    """The reference serves every op, torch.ops.lwkd included, without a word; the backend that
    was asked for and is absent says what to install. No triton either."""
    report = use(copy(tmp_path, library=False), "import sys; sys.modules['triton'] = None\n")
    assert report["serving"] == "reference"
    assert report["warnings"] == []
    assert report["info"] == {}
    assert report["equal"]
    prefix = "RuntimeError: lwkd.ops.layer_discrepancy: backend: expected "
    assert report["compiled"].startswith(prefix + "'compiled' on cpu, got lwkd._C is not built")
    # From the source tree, for lwkd is on no index; without --no-deps torch itself would go.
    assert report["compiled"].endswith(
        "from the source tree: pip install --no-build-isolation --no-deps --force-reinstall ."
    )
    assert report["triton"].startswith(prefix + "'triton' on cpu, got triton is not installed")
    assert "pip install triton" in report["triton"]


OTHER = """
extern int torch_of_another_version(void);
void *PyInit__C(void) { torch_of_another_version(); return 0; }
"""


def broken(kind: str, library: Path) -> str:
    """Break the library; what the reason has to mention."""
    if kind == "garbage":
        library.write_bytes(b"not a shared library " * 1000)
        return "invalid ELF header"
    if kind == "cut short":
        library.write_bytes(library.read_bytes()[:40])
        return "file too short"
    if kind == "empty":
        library.write_bytes(b"")
        return "file too short"
    source = library.with_name("other.c")  # built against a torch that has more symbols
    source.write_text(OTHER)
    command = ["cc", "-shared", "-fPIC", "-Wl,-z,now", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return "undefined symbol: torch_of_another_version"


@pytest.mark.parametrize("kind", ["garbage", "cut short", "empty", "another torch"])
def test_a_broken_library(tmp_path: Path, kind: str) -> None:
    """Fault 27: the reference serves, one warning says so and why; never a crash."""
    if kind == "another torch" and shutil.which("cc") is None:
        pytest.skip("no C compiler")
    copy(tmp_path, library=True)
    libraries = list((tmp_path / "lwkd").glob("_C.*.so"))
    assert libraries, "build lwkd._C first: pip install --no-build-isolation -e ."
    mention = broken(kind, libraries[0])
    report = use(tmp_path)
    assert report["serving"] == "reference"
    assert report["equal"]
    assert report["categories"] == ["RuntimeWarning"]
    for text in (report["warnings"][0], report["reason"], report["compiled"]):
        assert f"lwkd._C does not load under torch {torch.__version__}" in text
        assert mention in text
    assert "python -m lwkd info" in report["warnings"][0]


def test_importing_is_cheap_and_quiet(tmp_path: Path) -> None:
    """With everything built: no warning, no Triton before its first use, no extras at all; and
    Triton on a CPU tensor without its interpreter says how."""
    report = use(copy(tmp_path, library=True), "", "-u", "TRITON_INTERPRET")
    assert report["live"]
    assert report["warnings"] == []
    assert not {"matplotlib", "sklearn", "rich"} & set(report["modules"])
    if cases.why_not(Target("triton", "cpu")) == "":
        assert "only under its interpreter (TRITON_INTERPRET=1)" in report["triton"]
    quiet = "import sys, lwkd\nassert not {'triton', 'torch._dynamo'} & set(sys.modules)\n"
    quiet += "assert 'lwkd.kernels' not in sys.modules\n"
    use(tmp_path, quiet)

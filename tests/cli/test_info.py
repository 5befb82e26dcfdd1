"""``info`` tells the truth, also about an installation that is broken."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

import lwkd
from lwkd.cli import info, main
from lwkd.ops import backends

PACKAGE = Path(lwkd.__file__).parent


def test_facts() -> None:
    facts = info.collect()
    assert facts["versions"]["lwkd"] == lwkd.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["python"] == platform.python_version()
    assert (facts["cpu_level"] is None) == (not backends.CPU.live)
    assert facts["build"] == backends.build_info()
    assert len([d for d in facts["devices"] if d != "cpu"]) == torch.cuda.device_count()


def test_devices_that_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "devices", lambda: {"cpu": "", "cuda:0": "", "cuda:1": ""})
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        info.check_device("demo", name)
    with pytest.raises(ValueError, match=r"cpu, cuda:0, cuda:1, cuda, got 'cuda:2'$"):
        info.check_device("demo", "cuda:2")
    with pytest.raises(ValueError, match=r"got 'cpuu'; did you mean 'cpu'\?$"):
        info.check_device("demo", "cpuu")


def test_every_op_is_listed_with_who_serves_it_and_why_not() -> None:
    rows = {(r["op"], r["device"]): r for r in info.collect()["ops"]}
    assert {op for op, _ in rows} == {
        "attention", "attention_backward", "attention_maps", "jacobian_factors", "jacobian_rows",
        "jacobian_rows_backward", "probe_dot", "rademacher",
    }  # fmt: skip
    for (_, device), row in rows.items():
        for backend in backends.BACKENDS:
            if not backends.unavailable(backend, device) and device == "cpu":
                assert backend not in row["unavailable"]
            else:
                assert row["unavailable"].get(backend, "live") != ""
        if device == "cpu":
            assert row["served_by"] == backends.serving("cpu")
    if not torch.cuda.is_available():
        row = rows["attention", "cuda"]
        assert row["served_by"] is None
        assert set(row["unavailable"]) == set(backends.BACKENDS)


def test_the_op_that_serves_is_the_op_that_runs() -> None:
    """What info says is what the dispatcher does: a compiled kernel is registered, or none is."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for row in info.collect()["ops"]:
        if row["device"] == "cpu":
            assert (row["served_by"] == "compiled") == has(f"lwkd::{row['op']}", "CPU")


def test_json_and_text_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts == json.loads(json.dumps(info.collect()))
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for row in facts["ops"]:
        assert all(reason in text for reason in row["unavailable"].values())


# Without the finder of an editable install, which would find the library that the copy lacks.
RUN = """
import sys
sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__name__", "").startswith("_Editable")]
from lwkd.cli import main
raise SystemExit(main(["info", "--json"]))
"""


def run_copy(folder: Path, library: bytes | None) -> tuple[dict[str, Any], str]:
    """Run info on a copy of the package with ``library`` in the place of the compiled one."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "kernels")
    shutil.copytree(PACKAGE, folder / "lwkd", ignore=ignored)
    if library is not None:
        name = "_C" + str(sysconfig.get_config_var("EXT_SUFFIX"))
        (folder / "lwkd" / name).write_bytes(library)
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout), done.stderr


def test_with_a_corrupt_library(tmp_path: Path) -> None:
    """Fault 27: a library that does not load is announced, with the reason; the rest works."""
    facts, errors = run_copy(tmp_path, b"\x7fELF, cut off")
    row = facts["ops"][0]
    assert row["served_by"] == "reference"
    reason = row["unavailable"]["compiled"]
    assert "lwkd._C does not load under torch" in reason
    assert "_C.c" in reason  # the loader's own words name the file
    assert "the compiled CPU kernels are off" in errors
    assert facts["cpu_level"] is None


def test_without_a_library(tmp_path: Path) -> None:
    """Fault 27: nothing built is no error, and says how to get it."""
    facts, errors = run_copy(tmp_path, None)
    assert facts["ops"][0]["served_by"] == "reference"
    assert "is not built; reinstall" in facts["ops"][0]["unavailable"]["compiled"]
    assert errors == ""
    assert facts["build"] == {}

"""Where things live: imports go down only, no environment, no machine paths, lazy kernels."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Rooms of one floor never import each other; a file or a folder of that name under lwkd/.
FLOORS = [
    {"kernels", "csrc"},
    {"ops"},
    {"hooks", "names"},  # which word their errors as ops does
    {"layers", "autopair", "factoring", "batches", "frozen"},
    {"curvature", "policy", "losses", "distributed", "degradation"},
    {"schedule", "groups", "rates", "base", "saved", "meters"},
    {"study", "integrations", "plotting"},
    {"cli", "__main__"},
]
# One room in several files: what a room keeps beside it for itself.
ROOMS = {
    "autopair": "layers",
    **dict.fromkeys(("groups", "rates", "base", "saved"), "schedule"),
    "__main__": "cli",
}
OUTSIDE = {"__init__", "_version", "_C", "_C_cuda"}  # public names; one number; what is built


def sources(*folders: str) -> list[Path]:
    return sorted(
        p for f in folders for p in (ROOT / f).rglob("*.py") if "__pycache__" not in p.parts
    )


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def room_of(module: str) -> str:
    """ "lwkd.ops.checks" -> "ops"."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def module_of(path: Path) -> str:
    inside = path.is_relative_to(ROOT)
    parts = list((path.relative_to(ROOT) if inside else Path(path.name)).with_suffix("").parts)
    if parts[0] == "kernels":
        parts = ["lwkd", *parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, top_level: bool = False) -> set[str]:
    """The modules that a file imports; ``from lwkd import ops`` counts as lwkd.ops."""
    tree = ast.parse(path.read_text())
    lazy = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    package = module_of(path).split(".")
    package = package if path.stem == "__init__" else package[:-1]
    found = set()
    for node in ast.walk(tree):
        if top_level and id(node) in lazy:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {f"{base}.{a.name}" for a in node.names} if base == "lwkd" else {base}
    return found


def lwkd_imports(path: Path) -> set[str]:
    return {m for m in imports(path) if m == "lwkd" or m.startswith("lwkd.")}


def test_every_room_has_a_floor() -> None:
    known = set().union(*FLOORS) | OUTSIDE
    rooms = {p.stem if p.is_file() else p.name for p in (ROOT / "lwkd").iterdir()}
    rooms = {r.split(".")[0] for r in rooms} - {"__pycache__", "py"}
    assert rooms <= known, f"say on which floor {sorted(rooms - known)} live"


@pytest.mark.parametrize("path", sources("lwkd", "kernels"), ids=relative)
def test_imports_go_down_only(path: Path) -> None:
    own = room_of(module_of(path))
    if own in OUTSIDE:
        return
    for module in lwkd_imports(path):
        other = room_of(module)
        if other in OUTSIDE:
            assert other != "__init__", f"{relative(path)} imports lwkd itself: name the room"
            continue
        same = ROOMS.get(own, own) == ROOMS.get(other, other)
        assert same or floor(other) < floor(own), f"{relative(path)}: {own} must not see {other}"


def test_the_table_can_be_broken(tmp_path: Path) -> None:
    """The reader sees every form of an import, lazy ones included."""
    file = tmp_path / "x.py"
    file.write_text(
        "import lwkd.cli.demo\nfrom lwkd import policy as p\nfrom lwkd.ops.checks import message\n"
        "def f():\n    from lwkd.kernels import attention\n    import triton\n"
    )
    assert imports(file) == {
        "lwkd.cli.demo", "lwkd.policy", "lwkd.ops.checks", "lwkd.kernels", "triton",
    }  # fmt: skip
    assert "triton" not in imports(file, top_level=True)
    assert floor("cli") > floor("policy") > floor("ops") > floor("kernels")


def test_torch_is_the_only_runtime_dependency() -> None:
    """Extras are imported inside functions, where they are needed."""
    for path in sources("lwkd"):
        for module in imports(path, top_level=True):
            name = module.split(".")[0]
            ok = name in {"torch", "lwkd", "__future__"} or name in sys.stdlib_module_names
            assert ok, f"{relative(path)} imports {module} at import time"


def test_kernels_see_torch_and_triton_and_are_seen_lazily() -> None:
    for path in sources("kernels"):
        names = {m.split(".")[0] for m in imports(path)}
        assert names - set(sys.stdlib_module_names) <= {"torch", "triton", "lwkd"}, relative(path)
        assert all(m.startswith("lwkd.kernels") for m in lwkd_imports(path)), relative(path)
    for path in sources("lwkd"):
        early = {
            m for m in imports(path, top_level=True) if m.startswith(("lwkd.kernels", "triton"))
        }
        assert not early, f"{relative(path)} imports {early} at import time"
        # By the name that is mapped, never as a package of the top level.
        assert not {m for m in imports(path) if m.split(".")[0] == "kernels"}, relative(path)


ENVIRONMENT = re.compile(r"\bos\.(environ|getenv|putenv)\b|\bfrom os import .*environ")


def test_the_environment_is_read_in_one_place() -> None:
    """setup.py and the tests' conftest.py; the bench's, for a row says what malloc it ran under."""
    allowed = {"setup.py", "tests/conftest.py", "bench/conftest.py"}
    files = [ROOT / "setup.py", *sources("lwkd", "kernels", "tests", "bench", "examples")]
    found = {relative(p) for p in files if ENVIRONMENT.search(p.read_text())}
    assert found - {relative(Path(__file__))} == allowed
    native = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert [relative(p) for p in native if "getenv" in p.read_text()] == []


MACHINE = re.compile(r"(?<![\w.])/(?:home|root|work|Users|mnt|data)/")
TEXT = (".py", ".cpp", ".h", ".cu", ".cuh", ".md", ".toml", ".sh", ".txt", ".in")


def test_no_paths_of_a_machine() -> None:
    own = relative(Path(__file__))
    folders = ("lwkd", "kernels", "csrc", "tests", "bench", "docs", "examples", ".ci")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in TEXT or f == ".ci"]
    files += [p for p in ROOT.iterdir() if p.suffix in TEXT or p.name == "Makefile"]
    assert len(files) > 50
    found = {relative(p) for p in files if p.is_file() and MACHINE.search(p.read_text())}
    assert found - {own} == set()


STATE = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)


def test_no_mutable_state_is_written_by_functions() -> None:
    """Module-level tables are constants: nobody rebinds a global or writes into one."""
    for path in sources("lwkd"):
        tree = ast.parse(path.read_text())
        tables = {
            target.id
            for node in tree.body
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, STATE)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        for function in ast.walk(tree):
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            for node in ast.walk(function):
                assert not isinstance(node, ast.Global), f"{relative(path)}: {function.name}"
                written = (
                    isinstance(node, ast.Subscript)
                    and isinstance(node.ctx, (ast.Store, ast.Del))
                    and isinstance(node.value, ast.Name)
                    and node.value.id in tables
                )
                assert not written, f"{relative(path)}: {function.name} writes {node.value.id}"


LONGEST = 300
# What is longer, how long it may be, and why; who needs more lines takes a file apart first.
LONGER = {
    "kernels/attention.py": (700, "the Triton kernels of one kind, forward and backward"),
    "kernels/common.py": (450, "what all Triton kernels share: tables, tiles, launches"),
    "kernels/jacobian.py": (400, "the Triton kernels of rows, forward and backward"),
    "lwkd/cli/digits.py": (330, "the demo's experiment: data, networks, three kinds of distances"),
    "lwkd/curvature/graph.py": (340, "one batch's graph, and what is asked of it"),
    "lwkd/hooks.py": (400, "what hooks are hung on, and their way back"),
    "lwkd/layers.py": (570, "pairing: shapes, the table that is printed, capture"),
    "lwkd/ops/attention.py": (380, "one page per op: contract, schema, fakes, backward"),
    "lwkd/ops/factors.py": (380, "one page per op: what an item is, its checks, schema, fake"),
    "lwkd/plotting.py": (440, "the figures, and where their labels go"),
    "lwkd/policy.py": (400, "every policy, a pure function each, with its formula"),
    "lwkd/schedule.py": (520, "one class, most of it its contract; its state is in saved.py"),
}


def test_files_stay_short() -> None:
    lengths = {relative(p): p.read_text().count("\n") for p in sources("lwkd", "kernels")}
    long = {path: lines for path, lines in lengths.items() if lines > LONGEST}
    grown = {path: n for path, n in long.items() if n > LONGER.get(path, (LONGEST, ""))[0]}
    assert grown == {}
    assert LONGER.keys() - long.keys() == set()  # no longer long

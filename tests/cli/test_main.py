"""``python -m lwkd``: commands, help, close matches, exit codes."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from lwkd._version import __version__
from lwkd.cli import COMMANDS, main, table


def test_without_arguments_it_prints_help() -> None:
    done = subprocess.run([sys.executable, "-m", "lwkd"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m lwkd")
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"python -m lwkd {command}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"lwkd {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["dmeo"], "invalid choice: 'dmeo' (choose from"),
        (["dmeo"], "did you mean 'demo'?"),
        (["demo", "--sead", "3"], "unrecognized arguments: --sead 3; did you mean '--seeds'?"),
        (["info", "--jsn"], "unrecognized arguments: --jsn; did you mean '--json'?"),
        (["bench", "extra"], "unrecognized arguments: extra"),
        (["demo", "--seeds", "x"], "argument --seeds: invalid int value: 'x'"),
    ],
)
def test_wrong_usage(argv: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert text in capsys.readouterr().err


def test_what_the_library_raises_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", "--policy", "rato"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: lwkd.demo: --policy: expected one of ratio, power")
    assert "did you mean 'ratio'?" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("argv", [["info"], ["info", "--json"], ["info", "--help"], []])
def test_a_reader_that_has_gone_away_is_no_failure(argv: list[str]) -> None:
    """As `python -m lwkd info | head -1`, where head was faster."""
    command = [sys.executable, "-m", "lwkd", *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        assert done.stdout is not None
        done.stdout.close()
        error = done.stderr.read() if done.stderr else b""
    assert error == b""
    assert done.returncode == 0


def test_what_the_disk_says_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(args: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lwkd.cli.info.main", full)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_tables_with_rich_on_a_terminal_and_plain_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("rich")
    texts = []
    for out in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", out)
        table.show(("name", "ms"), [("[red]a", "1.5"), ("b", "12.25")], title="t", align="lr")
        texts.append(out.getvalue())
    assert "[red]a" in texts[0]  # no markup is interpreted
    assert "│" in texts[0]
    lines = texts[1].splitlines()
    assert lines == ["", "t", "name       ms", "-------------", "[red]a    1.5", "b       12.25"]


@pytest.mark.parametrize("rich", [True, False])
def test_progress_on_a_terminal(rich: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if rich:
        pytest.importorskip("rich")
    else:  # what importlib finds where rich is not installed
        monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    with table.progress("training", 4) as tick:
        for _ in range(4):
            tick()
    assert "training" in out.getvalue()
    assert rich or f"[{'#' * 30}] 4/4" in out.getvalue()


def test_progress_is_silent_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with table.progress("training", 2) as tick:
        tick()
    assert capsys.readouterr() == ("", "")

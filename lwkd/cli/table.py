"""Tables and progress on a terminal: through rich where it is installed, else as plain text."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


def fancy() -> bool:
    """Whether to draw with rich: it is installed, and a person is looking."""
    return sys.stdout.isatty() and importlib.util.find_spec("rich") is not None


def render(header: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """Lay out a plain table.

    Args:
        header: The columns' names.
        rows: Their cells.
        align: "l" or "r" a column; columns without a letter are left-aligned.

    Returns:
        The lines, without trailing spaces.

    >>> print(render(["layer", "rate"], [["conv1", "1.00"], ["fc", "10.25"]], "lr"))
    layer   rate
    ------------
    conv1   1.00
    fc     10.25
    """
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    sides = align.ljust(len(widths), "l")
    texts = [
        "  ".join(
            c.rjust(w) if side == "r" else c.ljust(w)
            for c, w, side in zip(line, widths, sides, strict=True)
        ).rstrip()
        for line in lines
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([texts[0], rule, *texts[1:]])


def show(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", align: str = ""
) -> None:
    """Print a table; see `render` for the arguments."""
    if not fancy():
        print(f"\n{title}" if title else "")
        print(render(header, rows, align))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", header_style="bold")
    for name, side in zip(header, align.ljust(len(header), "l"), strict=True):
        table.add_column(name, justify="right" if side == "r" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    print()
    Console().print(table)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a bar on standard error while the block runs; call what it yields once per step.

    Nothing is drawn where standard error is not a terminal, so that logs stay clean.

    Args:
        label: What is going on.
        total: How many steps there will be.

    >>> with progress("training", 2) as tick:
    ...     tick()
    """
    if not sys.stderr.isatty():
        yield lambda: None
    elif importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total)
            yield lambda: bar.advance(task)
    else:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            filled = 30 * done // max(total, 1)
            line = f"\r{label} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}"
            print(line, end="", file=sys.stderr, flush=True)

        try:
            yield tick
        finally:
            print(file=sys.stderr)

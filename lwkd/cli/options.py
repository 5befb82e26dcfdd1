"""What the commands check of their options, in the words that all errors of lwkd have."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from lwkd import plotting
from lwkd.ops.checks import message, suggest


def at_least_one(command: str, args: argparse.Namespace, names: Iterable[str]) -> None:
    """Raise where one of these options is below 1."""
    for name in names:
        value = getattr(args, name)
        if value < 1:
            raise ValueError(message(command, f"--{name}", "at least 1", value))


def one_of(command: str, option: str, value: str, names: Iterable[str]) -> None:
    """Raise where an option has another value than these names."""
    known = list(names)
    if value not in known:
        got = repr(value) + suggest(value, known)
        raise ValueError(message(command, option, f"one of {', '.join(known)}", got))


def a_picture(command: str, path: str) -> None:
    """Raise where a picture cannot be written there: before the work, not after."""
    try:
        plotting.check(path)
    except OSError as error:
        got = f"{path!r}: {error.strerror}"
        raise ValueError(message(command, "--out", "a file that can be written", got)) from None

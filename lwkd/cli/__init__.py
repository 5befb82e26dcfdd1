"""The command line: ``python -m lwkd demo | transfer | info | doctor | bench``."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from lwkd._version import __version__
from lwkd.ops.checks import suggest

COMMANDS = {
    "demo": "distil a small network on bundled images, with one rate and with a rate per layer",
    "transfer": "fine-tune a small network on a few bundled images, by a transfer method",
    "info": "show versions, and which backend serves which op on which device, and why not",
    "doctor": "run every backend against float64; exit with 1 on a difference",
    "bench": "time the ops on this machine against plain PyTorch and torch.compile",
}


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that names the closest match of an unknown command or option."""

    def error(self, message: str) -> NoReturn:
        """Print usage, error and close matches; exit with 2."""
        unknown = re.search(r"unrecognized arguments: (\S+)|invalid choice: '(\S+)'", message)
        hint = ""
        if unknown and unknown[1]:
            hint = suggest(unknown[1].split("=")[0], self._option_string_actions)
        elif unknown:
            names = [c for a in self._actions if a.choices is not None for c in a.choices]
            hint = suggest(unknown[2], map(str, names))
        super().error(message + hint)


def build_parser() -> Parser:
    """Return the parser of every command."""
    parser = Parser(prog="python -m lwkd", description="Layer-wise student-teacher distances.")
    parser.add_argument("--version", action="version", version=f"lwkd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", parser_class=Parser)
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"lwkd.cli.{name}")
        command = commands.add_parser(name, help=text, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the program's name; None takes them from the command line.

    Returns:
        The exit code: 0, or 1 where the command failed. A reader that has gone away
        (``python -m lwkd info | head -1``) is no failure.

    Raises:
        SystemExit: With 2 on wrong usage, 0 after ``--help``.
    """
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here, where it can be caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush
        return 0


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if unknown:
        commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        commands.choices[args.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        return int(args.run(args))
    except BrokenPipeError:
        raise
    except (RuntimeError, ValueError, OSError) as error:  # what is raised on purpose, or the disk
        print(f"error: {error}", file=sys.stderr)
        return 1

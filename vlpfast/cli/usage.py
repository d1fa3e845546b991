"""What the commands share: arguments to a dataclass, names to what they stand for, results to the
terminal.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Sequence


class UsageError(Exception):
    """The command line is wrong."""


def parse(prog: str, kind: type, args: Sequence[str], description: str, **default: object):
    """`kind` from the arguments. tyro's own error box becomes one line.

    Raises:
        UsageError: with that line.
        SystemExit: after --help.
    """
    import tyro

    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught):
            return tyro.cli(kind, prog=prog, args=args, description=description, **default)
    except SystemExit as done:
        if done.code in (0, None):
            raise
    lines = [line.strip("│ ") for line in caught.getvalue().splitlines()]
    rule = next((i for i, line in enumerate(lines) if i and line[:2] in ("──", "╰─")), len(lines))
    raise UsageError(f"{' '.join(lines[1:rule])} ({prog} --help says more)") from None


def pick(what: str, name: str, known: dict[str, Callable]) -> Callable:
    """The one of `known` that is called so; UsageError where there is none."""
    from vlpfast.config import close_match

    if name not in known:
        raise UsageError(f"unknown {what} {name!r}{close_match(name, known)}")
    return known[name]


def print_summary(summary: dict[str, object], as_json: bool) -> None:
    """A line for each entry; a mapping has a line for each of its own, and none if it is empty."""
    if as_json:
        print_json(summary)
        return
    for name, value in summary.items():
        if isinstance(value, dict):
            for key, text in value.items():
                print(f"  {name}: {key}: {text}")
        else:
            print(f"{name}: {value}")


def print_json(value: object) -> None:
    """Indented, on the terminal."""
    print(json.dumps(value, indent=2))

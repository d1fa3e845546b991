"""`vlpfast env`."""

from __future__ import annotations

import dataclasses

from vlpfast.cli.usage import parse, print_json


def run(args: list[str]) -> int:
    """Prints what is here; returns the exit code."""

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Arguments of `vlpfast env`.

        Attributes:
            json: print JSON instead of text.
        """

        json: bool = False

    help_text = """Prints versions, hardware, and which op runs by which implementation, or why not.

Input: nothing.

Output: text, or JSON with --json.

Example:

    vlpfast env
"""
    a = parse("vlpfast env", Arguments, args, help_text)
    from vlpfast import env

    if a.json:
        print_json(env.report())
    else:
        print(env.describe())
    return 0

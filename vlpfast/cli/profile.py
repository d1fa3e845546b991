"""`vlpfast profile`."""

from __future__ import annotations

import os
from pathlib import Path

from vlpfast.cli.fields import take_options
from vlpfast.cli.recipe import print_recipes, recipe_config
from vlpfast.cli.usage import UsageError

_HELP = """Profiles a recipe's training steps: throughput, and where the time goes.

Input: an image-text data set (--data), as for train. --warmup-steps, --timed-steps and
--recorded-steps say how much is measured, --depth how finely modules are told apart (1: towers,
3: a block's attention and MLP). All other fields are the recipe's.

Output: a table of parts (forward and backward) and one of operators; profile.json, profile.png and
trace.json.gz (for Perfetto) in logs/NAME/profile, or the folder that --out names.

Example:

    vlpfast profile albef_small --data data/scenes/train --depth 1
"""
# Flags of this command, and the fields of `ProfileOptions` that they set.
_OPTIONS = {
    "warmup-steps": "warmup",
    "timed-steps": "timed",
    "recorded-steps": "recorded",
    "depth": "depth",
}


def run(args: list[str]) -> int:
    """Profiles a recipe; returns the exit code."""
    if not args or args[0] in ("-h", "--help"):
        print_recipes("profile", "--data PATH [--out DIR] [--depth N]", _HELP)
        return 0 if args else 2
    name, *flags = args
    flags, given = take_options(flags, (*_OPTIONS, "out"))
    config = recipe_config("profile", name, flags, _HELP)
    out = Path(given.pop("out", config.run_dir / "profile"))

    from vlpfast.profile import ProfileOptions, profile

    try:
        options = ProfileOptions(**{_OPTIONS[flag]: int(value) for flag, value in given.items()})
    except ValueError as error:
        raise UsageError(
            f"{', '.join(f'--{flag} {v}' for flag, v in given.items())}: {error}"
        ) from error
    result = profile(config, out, options)
    if os.environ.get("RANK", "0") == "0":
        print(result.table())
        print(f"\n{out}: profile.json, profile.png, trace.json.gz")
    return 0

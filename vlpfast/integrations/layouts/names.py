"""Tables of names as rules.

In a table, `{k}` stands for "weight" and "bias", `{n}` for what a BatchNorm has, and several names
on one side are joined by rows.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlpfast.integrations.weights import ZEROS, Rule

Names = Mapping[str, str]
_ENDINGS = {
    "{k}": ("weight", "bias"),
    "{n}": ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"),
}


def rules_of(names: Names, here: str = "", there: str = "", **options: object) -> list[Rule]:
    """A rule for each entry, with prefixes; `options` of `Rule`."""
    rules = []
    for ours, theirs in names.items():
        mark = next((mark for mark in _ENDINGS if mark in ours), "")
        for ending in _ENDINGS.get(mark, ("",)):
            sides = [
                tuple(
                    name
                    if name == ZEROS
                    else prefix + (name.replace(mark, ending) if mark else name)
                    for name in side.split()
                )
                for prefix, side in ((here, ours), (there, theirs))
            ]
            rules.append(Rule(*sides, **options))
    return rules


def stack_of(names: Names, here: str, there: str, depth: int) -> list[Rule]:
    """The rules of every block of a tower."""
    return [
        rule
        for n in range(depth)
        for rule in rules_of(names, f"{here}.blocks.{n}.", f"{there}.{n}.")
    ]

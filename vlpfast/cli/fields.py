"""Flags of `vlpfast train`: short names to the paths of a configuration's fields."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from vlpfast.cli.usage import UsageError

if TYPE_CHECKING:
    from vlpfast.train.config import RunConfig


def take_options(flags: Sequence[str], names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The flags without `--NAME X` of any of `names`, and X by name: these are a command's own, no
    fields of the run.

    Raises:
        UsageError: one of them has no value.
    """
    rest, found = [], {}
    tokens = iter(flags)
    for token in tokens:
        name, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or name not in names:
            rest.append(token)
            continue
        found[name] = value if equals else next(tokens, "--")
        if found[name].startswith("--"):
            raise UsageError(f"--{name} needs a value")
    return rest, found


def take_resume(flags: Sequence[str]) -> tuple[list[str], str | None]:
    """The flags without `--resume X`, and X: it belongs to this start, not to the run."""
    try:
        rest, found = take_options(flags, ("resume",))
    except UsageError as error:
        raise UsageError("--resume needs 'latest' or the path of a checkpoint") from error
    return rest, found.get("resume")


def full_paths(flags: Sequence[str], config: object) -> list[str]:
    """Flags with whole paths: `--data X` becomes `--data.path X`, `--steps 9` `--train.steps 9`.

    Raises:
        UsageError: a field that does not exist, or a short name that several fields have.
    """
    paths = list(_field_paths(config))
    full = []
    for flag in flags:
        name, equals, value = flag.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not flag.startswith("--") or name == "help":
            full.append(flag)
            continue
        name = "data.path" if name == "data" else name
        # tyro's form for switching off: --path.no-field.
        parent, dot, leaf = name.rpartition(".")
        asked = f"{parent}{dot}{leaf.removeprefix('no_')}"
        fitting = [p for p in paths if p in (name, asked)]
        fitting = fitting or [p for p in paths if not dot and p.rpartition(".")[2] in (name, asked)]
        if not fitting:
            raise UsageError(f"unknown field {name!r}; {_nearest_field(name, paths)}")
        if len(fitting) > 1:
            raise UsageError(f"several fields are named {name!r}: {', '.join(fitting)}")
        path = (
            fitting[0] if fitting[0].endswith(leaf) else f"{fitting[0].rpartition('.')[0]}.{leaf}"
        )
        option = f"--{path.replace('_', '-')}"
        if path == "data.path" and option in (f.partition("=")[0] for f in full):
            raise UsageError("--data is given twice: a run reads one data set, a file or a folder")
        full.append(f"{option}{equals}{value}")
    return full


def one_length(flags: Sequence[str], config: RunConfig) -> list[str]:
    """Whole paths that set one of `train.steps` and `train.epochs` unset the recipe's other one."""
    given = {flag.partition("=")[0] for flag in flags}
    lengths = {"--train.steps": config.train.steps, "--train.epochs": config.train.epochs}
    unset = [option for option, value in lengths.items() if value and option not in given]
    if not given & lengths.keys():
        return list(flags)
    return [*flags, *(part for option in unset for part in (option, "0"))]


def _nearest_field(name: str, paths: Sequence[str]) -> str:
    by_leaf = {path.rpartition(".")[2]: path for path in paths}
    near = get_close_matches(name, paths, n=1) or get_close_matches(name, by_leaf, n=1)
    return f"did you mean {by_leaf.get(near[0], near[0])!r}?" if near else "--help lists all fields"


def _field_paths(config: object, prefix: str = "") -> Iterator[str]:
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from _field_paths(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}"

"""A recipe and its fields from the command line: what `train` and `profile` share."""

from __future__ import annotations

from collections.abc import Sequence

from vlpfast.cli.fields import full_paths, one_length
from vlpfast.cli.usage import UsageError, parse


def recipe_config(command: str, name: str, flags: Sequence[str], description: str):
    """The `RunConfig` of recipe `name` with the fields that `flags` set.

    Raises:
        UsageError: no such recipe or field, a field that belongs to the recipe, or no data.
    """
    from vlpfast import recipes

    try:
        recipe = recipes.get(name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    prog, flags = f"vlpfast {command} {name}", full_paths(flags, recipe)
    config = parse(prog, type(recipe), one_length(flags, recipe), description, default=recipe)
    if (config.model.preset, config.model.size) != (recipe.model.preset, recipe.model.size):
        raise UsageError(
            "model.preset and model.size belong to the recipe; choose another recipe: "
            f"{', '.join(recipes.names())}"
        )
    if not config.data.path:
        raise UsageError(f"recipe {name!r} needs data: {prog} --data PATH")
    return config


def print_recipes(command: str, usage: str, description: str) -> None:
    """Help of a command that takes a recipe, with all their names."""
    from vlpfast import recipes

    known = "\n  ".join(recipes.names())
    print(f"usage: vlpfast {command} RECIPE {usage} [--field value ...]\n")
    print(
        f"{description}\nrecipes:\n  {known}\n\nvlpfast {command} RECIPE --help lists all fields."
    )

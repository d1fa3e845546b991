"""`vlpfast train`."""

from __future__ import annotations

import os
import shlex

from vlpfast.cli.fields import full_paths, take_resume
from vlpfast.cli.usage import UsageError, parse

_HELP = """Trains a recipe. A field is set by its path, or by its name where no other has it.

Input: an image-text data set (--data): a folder of *.tar shards, .tar, .jsonl, .json, .csv or .tsv.

Output: the run folder logs/NAME with config.json, tokenizer.json, out.log, metrics.jsonl, loss.png,
tensorboard/, checkpoints/ and model.safetensors. --resume latest continues a run that was stopped.

Example:

    vlpfast train albef_tiny --data data/scenes/train --steps 2000 --optim.lr 1e-3
"""


def run(args: list[str]) -> int:
    """Trains a recipe; returns the exit code."""
    from vlpfast import recipes

    if not args or args[0] in ("-h", "--help"):
        known = "\n  ".join(recipes.names())
        print("usage: vlpfast train RECIPE [--data PATH] [--resume latest] [--field value ...]\n")
        print(f"{_HELP}\nrecipes:\n  {known}\n\nvlpfast train RECIPE --help lists all fields.")
        return 0 if args else 2
    name, *flags = args
    try:
        recipe = recipes.get(name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    flags, resume = take_resume(flags)
    flags = full_paths(flags, recipe)
    config = parse(f"vlpfast train {name}", type(recipe), flags, _HELP, default=recipe)
    if (config.model.preset, config.model.size) != (recipe.model.preset, recipe.model.size):
        raise UsageError(
            "model.preset and model.size belong to the recipe; choose another recipe: "
            f"{', '.join(recipes.names())}"
        )
    if not config.data.path:
        raise UsageError(f"recipe {name!r} needs data: vlpfast train {name} --data PATH")

    from vlpfast.train.run import train

    result = train(config, resume=resume)
    if os.environ.get("RANK", "0") != "0":
        return int(result.stopped == "interrupted")
    if result.stopped == "done":
        print(f"done: {result.step} steps, {result.samples_seen} samples; {result.run_dir}")
        return 0
    again = shlex.join(["vlpfast", "train", *take_resume(args)[0], "--resume", "latest"])
    print(f"{result.stopped} after step {result.step}, saved {result.checkpoint}")
    print(f"continue with: {again}")
    return int(result.stopped == "interrupted")

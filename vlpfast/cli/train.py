"""`vlpfast train`."""

from __future__ import annotations

import os
import shlex

from vlpfast.cli.fields import take_resume
from vlpfast.cli.recipe import print_recipes, recipe_config

_HELP = """Trains a recipe. A field is set by its path, or by its name where no other has it.

Input: an image-text data set (--data): a folder of *.tar shards, .tar, .jsonl, .json, .csv or .tsv.

Output: the run folder logs/NAME with config.json, tokenizer.json, out.log, metrics.jsonl, loss.png,
tensorboard/, checkpoints/ and model.safetensors. --resume latest continues a run that was stopped.

Example:

    vlpfast train albef_tiny --data data/scenes/train --steps 2000 --optim.lr 1e-3
"""


def run(args: list[str]) -> int:
    """Trains a recipe; returns the exit code."""
    if not args or args[0] in ("-h", "--help"):
        print_recipes("train", "[--data PATH] [--resume latest]", _HELP)
        return 0 if args else 2
    name, *flags = args
    flags, resume = take_resume(flags)
    config = recipe_config("train", name, flags, _HELP)

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

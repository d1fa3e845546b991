"""The command line: `vlpfast train | eval | data | env`.

Exit codes: 0 done; 1 the run failed or was interrupted; 2 wrong usage. An error is one line on
stderr, with VLPFAST_TRACEBACK=1 the whole traceback. Heavy modules are imported where a command
needs them.
"""

# No `from __future__ import annotations`: tyro reads annotations that name lazily imported classes.
import contextlib
import dataclasses
import io
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

_HELP = """usage: vlpfast COMMAND ...

Vision-language pre-training with the same numbers and far less work.

commands:
  train RECIPE             train a model; leaves a run folder logs/NAME
  eval RUN                 evaluate a run on a task; prints a table or JSON
  data make scenes OUT     write the embedded data set
  data pack INPUT OUT      turn a table of images and captions into tar shards
  data check PATH          count a data set's samples and name the corrupt ones
  env                      print versions and which op runs by which implementation here

Each command explains itself with --help.

example:
  vlpfast data make scenes data/scenes --num-samples 20000
  vlpfast train albef_scenes --data data/scenes/train
  vlpfast eval logs/albef_scenes --task retrieval --data data/scenes/val
"""

_TRAIN_HELP = """Trains a recipe. A field is set by its path, or by its name where no other has it.

Input: an image-text data set (--data): a folder of *.tar shards, .tar, .jsonl, .json, .csv or .tsv.

Output: the run folder logs/NAME with config.json, tokenizer.json, out.log, metrics.jsonl, loss.png,
tensorboard/, checkpoints/ and model.safetensors. --resume latest continues a run that was stopped.

Example:

    vlpfast train albef_tiny --data data/scenes/train --steps 2000 --optim.lr 1e-3
"""

_EVAL_HELP = """Evaluates a trained run.

Input: a run folder, a task and a data set (--data), in the formats that training reads.

Output: a table on the terminal, or JSON with --json; both are kept in RUN/eval.

Example:

    vlpfast eval logs/albef_tiny --task retrieval --data data/scenes/val --rerank-k 16
"""

_DATA_HELP = """usage: vlpfast data ACTION ...

Makes, packs and checks data sets. Each action explains itself with --help.

Input and output:
  make scenes OUT     nothing -> the embedded data set as tar shards
  pack INPUT OUT      a table of images and captions -> tar shards
  check PATH          a data set -> counts, and the corrupt samples with their reasons

Example:
  vlpfast data make scenes data/scenes --num-samples 20000
"""


class UsageError(Exception):
    """The command line is wrong."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)
    except UsageError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:
        # The reader has gone (`vlpfast ... | head`): nothing is left to say, at exit neither.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, NotImplementedError, RuntimeError) as error:
        if os.environ.get("VLPFAST_TRACEBACK") == "1":
            raise
        return _fail(str(error), 1)


def _run(argv: list[str]) -> int:
    commands = {"train": _train, "eval": _eval, "data": _data, "env": _env}
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0 if argv else 2
    return _pick("command", argv[0], commands)(argv[1:])


def _train(args: list[str]) -> int:
    from vlpfast import recipes

    if not args or args[0] in ("-h", "--help"):
        known = "\n  ".join(recipes.names())
        print("usage: vlpfast train RECIPE [--data PATH] [--resume latest] [--field value ...]\n")
        print(
            f"{_TRAIN_HELP}\nrecipes:\n  {known}\n\nvlpfast train RECIPE --help lists all fields."
        )
        return 0 if args else 2
    name, *flags = args
    try:
        recipe = recipes.get(name)
    except ValueError as error:
        raise UsageError(str(error)) from error
    flags, resume = _take_resume(flags)
    flags = _full_paths(flags, recipe)
    config = _parse(f"vlpfast train {name}", type(recipe), flags, _TRAIN_HELP, default=recipe)
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
    again = shlex.join(["vlpfast", "train", *_without_resume(args), "--resume", "latest"])
    print(f"{result.stopped} after step {result.step}, saved {result.checkpoint}")
    print(f"continue with: {again}")
    return int(result.stopped == "interrupted")


def _eval(args: list[str]) -> int:
    import tyro

    from vlpfast.eval.run import TASKS, EvalOptions, evaluate

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Arguments of `vlpfast eval`.

        Attributes:
            run: run folder (logs/NAME).
            data: the data set to evaluate on.
            task: what to measure.
            where: "field=value" conditions on the samples.
            id_key: record field that says which samples show the same; empty takes the run's.
            weights: "latest" checkpoint, or the path of a checkpoint or a .safetensors file.
            device: "auto" is a GPU where there is one.
            json: print JSON instead of a table.
            options: of the task.
        """

        run: tyro.conf.Positional[str]
        data: str
        options: tyro.conf.OmitArgPrefixes[EvalOptions]
        task: Literal[tuple(TASKS)] = "retrieval"
        where: tuple[str, ...] = ()
        id_key: str = ""
        weights: str = "latest"
        device: Literal["auto", "cpu", "cuda"] = "auto"
        json: bool = False

    a = _parse("vlpfast eval", Arguments, args, _EVAL_HELP)
    result = evaluate(
        a.run,
        a.task,
        a.data,
        where=a.where,
        id_key=a.id_key,
        weights=a.weights,
        device=a.device,
        **dataclasses.asdict(a.options),
    )
    print(result.to_json() if a.json else result.table())
    return 0


def _data(args: list[str]) -> int:
    actions = {"make": _data_make, "pack": _data_pack, "check": _data_check}
    if not args or args[0] in ("-h", "--help"):
        print(_DATA_HELP, end="")
        return 0 if args else 2
    return _pick("data action", args[0], actions)(args[1:])


def _data_make(args: list[str]) -> int:
    import tyro

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Arguments of `vlpfast data make`.

        Attributes:
            kind: the data set.
            out: folder to write, made if missing.
            num_samples: training images.
            val_samples: validation images.
            heldout_samples: images with attribute combinations that training never shows.
            image_size: side of the square images, pixels.
            siblings: share of pairs of neighbouring training images that differ only in attributes
                or places of two objects, swapped, and are told by captions of the same words;
                --data.window 2 trains with both in one batch.
            seed: another seed gives other samples.
            json: print the summary as JSON.
        """

        kind: tyro.conf.Positional[Literal["scenes"]]
        out: tyro.conf.Positional[str]
        num_samples: int
        val_samples: int = 1000
        heldout_samples: int = 1000
        image_size: int = 64
        siblings: float = 0.0
        seed: int = 0
        json: bool = False

    help_text = """Writes the embedded data set: rendered shapes with captions and their truth.

Input: nothing; every sample is a function of the seed and its number.

Output: OUT/train, OUT/val, OUT/heldout: tar shards, image pairs and a summary each.

Example:

    vlpfast data make scenes data/scenes --num-samples 20000
"""
    a = _parse("vlpfast data make", Arguments, args, help_text)
    from vlpfast.data.scenes import make

    made = make(
        a.out,
        a.num_samples,
        val_samples=a.val_samples,
        heldout_samples=a.heldout_samples,
        image_size=a.image_size,
        siblings=a.siblings,
        seed=a.seed,
    )
    if a.json:
        _print_json(made)
    else:
        for split in made:
            print(f"wrote {Path(a.out) / split}")
    return 0


def _data_pack(args: list[str]) -> int:
    import tyro

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Arguments of `vlpfast data pack`.

        Attributes:
            source: a table (.jsonl, .json, .csv, .tsv), a .tar, or a folder of *.tar shards.
            out: folder to write, made if missing.
            samples_per_shard: most samples of a shard.
            max_shard_mb: most bytes of a shard, 1e6.
            image_key: column of the image path; empty finds it.
            caption_key: column of the captions; empty finds it.
            json: print the summary as JSON.
        """

        source: tyro.conf.Positional[str]
        out: tyro.conf.Positional[str]
        samples_per_shard: int = 10_000
        max_shard_mb: float = 1000.0
        image_key: str = ""
        caption_key: str = ""
        json: bool = False

    help_text = """Turns a data set into WebDataset tar shards.

Input: a .jsonl, .json, .csv or .tsv table of image paths and captions, or shards to cut anew.

Output: OUT/000000.tar, ...; corrupt samples are left out and counted.

Example:

    vlpfast data pack train.jsonl data/shards
"""
    a = _parse("vlpfast data pack", Arguments, args, help_text)
    from vlpfast.data import tools

    summary = tools.pack(
        a.source,
        a.out,
        samples_per_shard=a.samples_per_shard,
        max_shard_mb=a.max_shard_mb,
        image_key=a.image_key,
        caption_key=a.caption_key,
    )
    _print_summary(summary, a.json)
    return 0


def _data_check(args: list[str]) -> int:
    import tyro

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Arguments of `vlpfast data check`.

        Attributes:
            path: the data set.
            image_key: column of the image path; empty finds it.
            caption_key: column of the captions; empty finds it.
            json: print the report as JSON.
        """

        path: tyro.conf.Positional[str]
        image_key: str = ""
        caption_key: str = ""
        json: bool = False

    help_text = """Decodes every sample of a data set, counts them and names the corrupt ones.

Input: a folder of *.tar shards, a .tar, .jsonl, .json, .csv or .tsv.

Output: counts, and each corrupt sample with its reason.

Example:

    vlpfast data check data/scenes/train
"""
    a = _parse("vlpfast data check", Arguments, args, help_text)
    from vlpfast.data import tools

    _print_summary(tools.check(a.path, image_key=a.image_key, caption_key=a.caption_key), a.json)
    return 0


def _env(args: list[str]) -> int:
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
    a = _parse("vlpfast env", Arguments, args, help_text)
    from vlpfast import env

    if a.json:
        _print_json(env.report())
    else:
        print(env.describe())
    return 0


def _parse(prog: str, kind: type, args: Sequence[str], description: str, **default: object):
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


def _pick(what: str, name: str, known: dict[str, Callable]) -> Callable:
    from vlpfast.config import close_match

    if name not in known:
        raise UsageError(f"unknown {what} {name!r}{close_match(name, known)}")
    return known[name]


def _take_resume(flags: list[str]) -> tuple[list[str], str | None]:
    """The flags without `--resume X`, and X: it belongs to this start, not to the run."""
    rest, resume = [], None
    tokens = iter(flags)
    for token in tokens:
        if token == "--resume":
            resume = next(tokens, None)
            if resume is None or resume.startswith("--"):
                raise UsageError("--resume needs 'latest' or the path of a checkpoint")
        elif token.startswith("--resume="):
            resume = token.partition("=")[2]
        else:
            rest.append(token)
    return rest, resume


def _without_resume(args: list[str]) -> list[str]:
    return _take_resume(args)[0]


def _full_paths(flags: Sequence[str], config: object) -> list[str]:
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
        full.append(f"--{path.replace('_', '-')}{equals}{value}")
    return full


def _nearest_field(name: str, paths: Sequence[str]) -> str:
    from difflib import get_close_matches

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


def _print_summary(summary: dict[str, object], as_json: bool) -> None:
    """A line for each entry; a mapping has a line for each of its own, and none if it is empty."""
    if as_json:
        _print_json(summary)
        return
    for name, value in summary.items():
        if isinstance(value, dict):
            for key, text in value.items():
                print(f"  {name}: {key}: {text}")
        else:
            print(f"{name}: {value}")


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2))


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split()) or "failed without a message"
    print(f"vlpfast: error: {line}", file=sys.stderr)
    return code

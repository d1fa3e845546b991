"""The command line: `vlpfast train | eval | data | profile | env`, a module for each.

Exit codes: 0 done; 1 the run failed or was interrupted; 2 wrong usage. An error is one line on
stderr, with VLPFAST_TRACEBACK=1 the whole traceback. Heavy modules are imported where a command
needs them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from vlpfast.cli import data, env, evaluate, profile, train
from vlpfast.cli.usage import UsageError, pick

_HELP = """usage: vlpfast COMMAND ...

Vision-language pre-training with the same numbers and far less work.

commands:
  train RECIPE             train a model; leaves a run folder logs/NAME
  eval RUN                 evaluate a run on a task; prints a table or JSON
  data make scenes OUT     write the embedded data set
  data pack INPUT OUT      turn a table of images and captions into tar shards
  data regions INPUT FILES give a data set's images a detector's regions
  data check PATH          count a data set's samples and name the corrupt ones
  data score RUN           score a data set's pairs by a trained model, to filter them
  data capfilt RUN RUN     write a data set's captions anew and filter them
  profile RECIPE           measure a recipe's steps: throughput, and where the time goes
  env                      print versions and which op runs by which implementation here

Each command explains itself with --help.

example:
  vlpfast data make scenes data/scenes --num-samples 20000
  vlpfast train albef_scenes --data data/scenes/train
  vlpfast eval logs/albef_scenes --task retrieval --data data/scenes/val
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(argv)
        # Here, and not at exit, where what goes wrong cannot be caught.
        sys.stdout.flush()
        return code
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
    commands = {
        "train": train.run,
        "eval": evaluate.run,
        "data": data.run,
        "profile": profile.run,
        "env": env.run,
    }
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0 if argv else 2
    return pick("command", argv[0], commands)(argv[1:])


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split()) or "failed without a message"
    print(f"vlpfast: error: {line}", file=sys.stderr)
    return code

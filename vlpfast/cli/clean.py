"""`vlpfast data score | capfilt`."""

# No `from __future__ import annotations`: tyro reads annotations that name lazily imported classes.
import dataclasses
import os
from typing import Literal

from vlpfast.cli.usage import parse, print_summary


def score(args: list[str]) -> int:
    """Scores pairs; returns the exit code."""
    import tyro

    from vlpfast.clean import score as scoring

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Arguments of `vlpfast data score`.

        Attributes:
            run: run folder (logs/NAME) of the model that scores.
            data: the data set.
            out: folder of the scores, made if missing.
            options: of scoring.
            weights: "latest" checkpoint, or the path of a checkpoint or a .safetensors file.
            device: "auto" is a GPU where there is one.
            json: print the summary as JSON.
        """

        run: tyro.conf.Positional[str]
        data: str
        out: str
        options: tyro.conf.OmitArgPrefixes[scoring.ScoreOptions]
        weights: str = "latest"
        device: Literal["auto", "cpu", "cuda"] = "auto"
        json: bool = False

    help_text = """Scores every image-text pair of a data set by a trained model.

Input: a run folder and a data set. Shards that have their scores are left alone; torchrun shares
them out among its processes.

Output: OUT/SHARD.npy, float32 in the order of the index, NaN where a sample cannot be read, and
OUT/scores.json. --data.scores OUT with --data.keep-fraction or --data.min-score trains on the best.

Example:

    vlpfast data score logs/clip_small --data pairs --out pairs.scores
    vlpfast train albef_small --data pairs --data.scores pairs.scores --data.keep-fraction 0.3
"""
    a = parse("vlpfast data score", Arguments, args, help_text)
    done = scoring.score(a.run, a.data, a.out, a.options, weights=a.weights, device=a.device)
    return _print_once(done, a.json)


def capfilt(args: list[str]) -> int:
    """Writes and filters captions; returns the exit code."""
    import tyro

    from vlpfast.clean import capfilt as filtering

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Arguments of `vlpfast data capfilt`.

        Attributes:
            captioner: run folder (logs/NAME) of the model that writes captions.
            filter: run folder of the model that judges them.
            data: the data set.
            out: folder of the captions, made if missing.
            options: of writing and filtering.
            device: "auto" is a GPU where there is one.
            json: print the summary as JSON.
        """

        captioner: tyro.conf.Positional[str]
        filter: tyro.conf.Positional[str]
        data: str
        out: str
        options: tyro.conf.OmitArgPrefixes[filtering.CapFiltOptions]
        device: Literal["auto", "cpu", "cuda"] = "auto"
        json: bool = False

    help_text = """Writes captions anew; a filter keeps what fits, of them and of the data's own.

Input: run folders of a captioner (blip, coca) and of a filter (a model with a matching head, or
--metric similarity), and a data set. Shards that are done are left alone; torchrun shares them out.

Output: OUT/SHARD.jsonl, a line for each sample, and OUT/captions.json with the counts.
--data.recaptions OUT trains on these captions.

Example:

    vlpfast data capfilt logs/captioner logs/filter --data pairs --out pairs.captions
    vlpfast train blip_small --data pairs --data.recaptions pairs.captions
"""
    a = parse("vlpfast data capfilt", Arguments, args, help_text)
    done = filtering.capfilt(a.captioner, a.filter, a.data, a.out, a.options, device=a.device)
    return _print_once(done, a.json)


def _print_once(summary: dict[str, object], as_json: bool) -> int:
    """Of several processes the first says what all have done so far."""
    if os.environ.get("RANK", "0") == "0":
        print_summary(summary, as_json)
    return 0

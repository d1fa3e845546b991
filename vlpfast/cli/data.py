"""`vlpfast data make | pack | regions | check`; score and capfilt are `clean`'s."""

# No `from __future__ import annotations`: tyro reads annotations that name lazily imported classes.
import dataclasses
from pathlib import Path
from typing import Literal

from vlpfast.cli import clean
from vlpfast.cli.usage import parse, pick, print_json, print_summary

_HELP = """usage: vlpfast data ACTION ...

Makes, packs, completes, checks and cleans data sets. Each action explains itself with --help.

Input and output:
  make scenes OUT     nothing -> the embedded data set as tar shards
  pack INPUT OUT      a table of images and captions -> tar shards
  regions INPUT FILES a detector's feature files -> regions of the images of a data set
  check PATH          a data set -> counts, and the corrupt samples with their reasons
  score RUN           a trained model and a data set -> a score of each of its pairs
  capfilt RUN RUN     a captioner, a filter and a data set -> captions that fit its images

Example:
  vlpfast data make scenes data/scenes --num-samples 20000
"""


def run(args: list[str]) -> int:
    """Makes, packs, completes, checks or cleans data; returns the exit code."""
    actions = {
        "make": _make,
        "pack": _pack,
        "regions": _regions,
        "check": _check,
        "score": clean.score,
        "capfilt": clean.capfilt,
    }
    if not args or args[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0 if args else 2
    return pick("data action", args[0], actions)(args[1:])


def _make(args: list[str]) -> int:
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
            noise: share of training images whose captions are another image's, as much of the web's
                are; the field `noisy` of each record, which no model reads, says which.
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
        noise: float = 0.0
        seed: int = 0
        json: bool = False

    help_text = """Writes the embedded data set: rendered shapes with captions and their truth.

Input: nothing; every sample is a function of the seed and its number.

Output: OUT/train, OUT/val, OUT/heldout: tar shards, image pairs and a summary each.

Example:

    vlpfast data make scenes data/scenes --num-samples 20000
"""
    a = parse("vlpfast data make", Arguments, args, help_text)
    from vlpfast.data.scenes import make

    made = make(
        a.out,
        a.num_samples,
        val_samples=a.val_samples,
        heldout_samples=a.heldout_samples,
        image_size=a.image_size,
        siblings=a.siblings,
        noise=a.noise,
        seed=a.seed,
    )
    if a.json:
        print_json(made)
    else:
        for split in made:
            print(f"wrote {Path(a.out) / split}")
    return 0


def _pack(args: list[str]) -> int:
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
    a = parse("vlpfast data pack", Arguments, args, help_text)
    from vlpfast.data import tools

    summary = tools.pack(
        a.source,
        a.out,
        samples_per_shard=a.samples_per_shard,
        max_shard_mb=a.max_shard_mb,
        image_key=a.image_key,
        caption_key=a.caption_key,
    )
    print_summary(summary, a.json)
    return 0


def _regions(args: list[str]) -> int:
    import tyro

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        """Arguments of `vlpfast data regions`.

        Attributes:
            source: the data set: a table (.jsonl, .json, .csv, .tsv), a .tar, or a folder of
                *.tar shards.
            files: TSV files of bottom-up attention or LXMERT, or one LMDB folder of UNITER.
            name_key: record field whose value the files call an image by; empty takes the image
                file's name without its extension.
            image_key: column of the image path; empty finds it.
            caption_key: column of the captions; empty finds it.
            json: print the summary as JSON.
        """

        source: tyro.conf.Positional[str]
        files: tyro.conf.Positional[tuple[str, ...]]
        name_key: str = ""
        image_key: str = ""
        caption_key: str = ""
        json: bool = False

    help_text = """Rewrites a detector's feature files in the order of a data set.

Input: a data set, and the files. An image that they do not have is named and gets no regions;
training leaves it out.

Output: SOURCE.regions, which --data.regions files reads.

Example:

    vlpfast data regions coco.jsonl train2014_obj36.tsv val2014_obj36.tsv
"""
    a = parse("vlpfast data regions", Arguments, args, help_text)
    from vlpfast.data.index import Index
    from vlpfast.data.region_files import open_files, write_regions

    index = Index.open(a.source, image_key=a.image_key, caption_key=a.caption_key)
    folder = index.source.with_name(index.source.name + ".regions")
    files = open_files([Path(f) for f in a.files])
    print_summary(write_regions(index, files, folder, name_key=a.name_key), a.json)
    return 0


def _check(args: list[str]) -> int:
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
    a = parse("vlpfast data check", Arguments, args, help_text)
    from vlpfast.data import tools

    print_summary(tools.check(a.path, image_key=a.image_key, caption_key=a.caption_key), a.json)
    return 0

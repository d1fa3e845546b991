"""`vlpfast eval`."""

# No `from __future__ import annotations`: tyro reads annotations that name lazily imported classes.
import dataclasses
from typing import Literal

from vlpfast.cli.usage import parse

_HELP = """Evaluates a trained run.

Input: a run folder, a task and a data set (--data), in the formats that training reads.

Output: a table on the terminal, or JSON with --json; both are kept in RUN/eval.

Example:

    vlpfast eval logs/albef_tiny --task retrieval --data data/scenes/val --rerank-k 16
"""


def run(args: list[str]) -> int:
    """Evaluates a run; returns the exit code."""
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
            scores: folder of scores (`vlpfast data score`), by which samples are left out.
            min_score: of a sample that stays.
            keep_fraction: share of the samples that stay, those of the highest scores.
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
        scores: str = ""
        min_score: float = -1.0
        keep_fraction: float = 1.0
        weights: str = "latest"
        device: Literal["auto", "cpu", "cuda"] = "auto"
        json: bool = False

    a = parse("vlpfast eval", Arguments, args, _HELP)
    result = evaluate(
        a.run,
        a.task,
        a.data,
        where=a.where,
        id_key=a.id_key,
        scores=a.scores,
        min_score=a.min_score,
        keep_fraction=a.keep_fraction,
        weights=a.weights,
        device=a.device,
        **dataclasses.asdict(a.options),
    )
    print(result.to_json() if a.json else result.table())
    return 0

"""Evaluates a model, or the newest weights of a run folder, on the tasks of `TASKS`."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from vlpfast.data.config import LOWEST_SCORE, DataConfig
from vlpfast.data.index import Index
from vlpfast.data.loader import open_index
from vlpfast.data.prompts import ANSWER
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.eval import tasks as registry
from vlpfast.eval.evaluation import EvalOptions, Evaluation
from vlpfast.eval.load import load_run
from vlpfast.eval.report import EvalResult, save_bars
from vlpfast.models.vlp import VLPModel
from vlpfast.objectives.config import ObjectivesConfig

TASKS = tuple(registry.TASKS)


def evaluate(
    run_dir: str | Path,
    task: str,
    data: str | Path,
    *,
    where: Sequence[str] = (),
    id_key: str = "",
    scores: str = "",
    min_score: float = LOWEST_SCORE,
    keep_fraction: float = 1.0,
    weights: str = "latest",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    **options: object,
) -> EvalResult:
    """Evaluates a run and writes `RUN/eval/TASK-N.json` and a bar chart `RUN/eval/TASK-N.png`.

    Args:
        run_dir: folder with config.json, tokenizer.json and weights.
        task: one of `TASKS`.
        data: folder of shards, or a table, as in training.
        where: "field=value" conditions on the samples.
        id_key: record field that says which samples show the same; empty takes the run's.
        scores, min_score, keep_fraction: which samples stay, as in `DataConfig`.
        weights: "latest" checkpoint (else model.safetensors), or the path of either kind of file.
        device: "auto" is a GPU where there is one.
        options: fields of `EvalOptions`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("evaluation is of one process: start it without torchrun")
    registry.find(task)
    settings = EvalOptions(**options)
    run = load_run(run_dir, weights=weights, device=device)
    config = replace(
        run.data.unfiltered(),
        path=str(data),
        where=tuple(where),
        id_key=id_key or run.data.id_key,
        index_dir="",
        scores=scores,
        min_score=min_score,
        keep_fraction=keep_fraction,
    )
    if task in ANSWER:
        config = replace(config, tasks=(task,))
    index = open_index(config)
    result = evaluate_model(
        run.model,
        index,
        run.tokenizer,
        (task,),
        data=config,
        options=settings,
        objectives=run.objectives,
        answers=run.answers,
    )[task]
    info = {"run": str(run_dir), "weights": str(run.weights), "data": str(data)}
    info |= {"where": " ".join(where)} if where else {}
    if scores:
        info |= {"scores": scores, "min_score": min_score, "keep_fraction": keep_fraction}
    result = replace(result, info=info | result.info)
    save(result, Path(run_dir) / "eval")
    return result


def evaluate_model(
    model: VLPModel,
    index: Index,
    tokenizer: Tokenizer,
    tasks: Sequence[str] = ("retrieval",),
    *,
    data: DataConfig,
    options: EvalOptions | None = None,
    objectives: ObjectivesConfig | None = None,
    answers: tuple[str, ...] = (),
) -> dict[str, EvalResult]:
    """Evaluates a model that is in memory; leaves it in the mode (train or eval) it was in.

    Args:
        model: on the device to evaluate on.
        index: the samples.
        tokenizer: the model's.
        tasks: some of `TASKS`.
        data: how images are loaded and captions cut; its path and conditions are not read.
        options: `EvalOptions()` if None.
        objectives: what the model was trained on: `mim` reads which tokenizer's codes it learned.
        answers: those that the model's answer head tells, by number.
    """
    wanted = {task: registry.find(task) for task in tasks}
    options = options or EvalOptions()
    evaluation = Evaluation(model, index, tokenizer, data, options, objectives, answers)
    results = {}
    with _evaluating(model):
        for task, measure in wanted.items():
            started = time.monotonic()
            result = measure(evaluation)
            info = result.info | {"seconds": round(time.monotonic() - started, 2)}
            if evaluation.corrupt:
                info["corrupt"] = (
                    f"{len(evaluation.corrupt)} left out: {min(evaluation.corrupt)} .."
                )
            results[task] = replace(result, info=info)
    return results


def save(result: EvalResult, folder: Path) -> Path:
    """Writes `TASK-N.json` and `TASK-N.png`, N the next free number, and where there are any
    `answers/TASK-N.json`; returns the JSON's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (path := folder / f"{result.task}-{number}.json").exists():
        number += 1
    path.write_text(result.to_json() + "\n")
    if result.answers:
        (folder / "answers").mkdir(exist_ok=True)
        (folder / "answers" / path.name).write_text(json.dumps(result.answers))
    if result.metrics:
        save_bars(result, path.with_suffix(".png"))
    return path


@contextlib.contextmanager
def _evaluating(model: VLPModel) -> Iterator[None]:
    """Inside, the model is in eval mode and nothing is recorded for a backward."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)

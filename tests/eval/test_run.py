"""Whole evaluations: a small set on disk, a tiny model, a run folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vlpfast.config import to_dict
from vlpfast.data.config import DataConfig
from vlpfast.data.loader import make_loader, open_index
from vlpfast.data.tokenizer import Tokenizer
from vlpfast.eval import EvalOptions, EvalResult, evaluate, evaluate_model, retrieval_metrics
from vlpfast.models import VLPModel, create_model
from vlpfast.objectives import ObjectivesConfig
from vlpfast.ragged import Ragged
from vlpfast.train.config import RunConfig, TrainConfig

SIDE = 32
WORDS = ["red circle", "blue square", "green cross", "grey ring", "black star", "white line"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven images of six concepts, one or two captions each; two vendors; swapped captions."""
    folder = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(0).integers(0, 256, (11, 40, 40, 3), dtype=np.uint8)
    rows = []
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")
        words = WORDS[i % 6]
        rows.append(
            {
                "image": f"{i}.png",
                "captions": [f"a {words}", f"{words} number {i}"][: 1 + i % 2],
                "concept": words,
                "vendor": "left" if i < 7 else "right",
                "relational": f"{words} above {WORDS[(i + 1) % 6]}" if i % 3 else None,
                "swapped": f"{WORDS[(i + 1) % 6]} above {words}" if i % 3 else None,
            }
        )
    path = folder / "val.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(table: Path) -> DataConfig:
    return DataConfig(path=str(table), loader="torch", id_key="concept", max_tokens=12, workers=1)


@pytest.fixture(scope="module")
def tokenizer(data: DataConfig) -> Tokenizer:
    return Tokenizer.train(open_index(data).iter_captions(), 300)


def model_of(preset: str, tokenizer: Tokenizer, seed: int = 0) -> VLPModel:
    torch.manual_seed(seed)
    overrides = {"vocab_size": tokenizer.vocab_size, "context_length": 16, "image_size": SIDE}
    return create_model(preset, size="tiny", **overrides)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> VLPModel:
    return model_of("albef", tokenizer).eval()


def by_hand(model, index, tokenizer, data, **options) -> dict:
    """Encodes every image and every distinct caption on its own."""
    loader = make_loader(
        index, data, tokenizer=tokenizer, image_size=SIDE, batch_size=1, seed=0, train=False
    )
    image, captions = [], []
    for i, batch in enumerate(loader):
        image.append(model.encode_image(batch.images).embedding)
        for caption in index.captions(i):
            if (index.image_ids[i], caption) not in captions:
                captions.append((index.image_ids[i], caption))
    loader.close()
    text = [
        model.encode_text(Ragged.from_lists(tokenizer.encode([c], data.max_tokens))).embedding
        for _, c in captions
    ]
    ids = torch.from_numpy(np.array(index.image_ids)), torch.tensor([int(i) for i, _ in captions])
    return retrieval_metrics(torch.cat(image), torch.cat(text), *ids, **options)


@pytest.mark.parametrize("pool_texts", ["none", "mean"])
@torch.inference_mode()
def test_retrieval_equals_encoding_one_by_one(model, data, tokenizer, pool_texts) -> None:
    index = open_index(data)
    options = EvalOptions(batch_size=4, pool_texts=pool_texts)
    result = evaluate_model(model, index, tokenizer, data=data, options=options)["retrieval"]
    expected = by_hand(model, index, tokenizer, data, pool_texts=pool_texts)
    assert result.chance == expected.pop("chance")
    assert result.metrics | result.counts == pytest.approx(expected)
    # Eleven samples say "a ..." of six concepts, and five say more.
    num_texts = 11 if pool_texts == "none" else 6
    assert result.counts == {"num_images": 11, "num_texts": num_texts, "num_ids": 6}


def test_full_reranking_is_the_matching_head(data, tokenizer) -> None:
    index, model = open_index(data), model_of("albef", tokenizer).eval()
    # Fresh weights hardly look at the image: larger ones give each image its own order of captions.
    for parameter in model.fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    options = EvalOptions(batch_size=4, rerank_k=100, pairs_per_call=7)
    result = evaluate_model(model, index, tokenizer, data=data, options=options)["retrieval"]
    plain = evaluate_model(model, index, tokenizer, data=data)["retrieval"]
    assert {n: result.metrics[n] for n in plain.metrics} == pytest.approx(plain.metrics)
    captions = list(
        dict.fromkeys((int(index.image_ids[i]), c) for i in range(11) for c in index.captions(i))
    )
    loader = make_loader(
        index, data, tokenizer=tokenizer, image_size=SIDE, batch_size=1, seed=0, train=False
    )
    ranks, orders = [], set()
    with torch.inference_mode():
        ids = tokenizer.encode([c for _, c in captions], data.max_tokens)
        text = model.encode_text(Ragged.from_lists(ids)).tokens
        for i, batch in enumerate(loader):
            keys = model.image_keys(model.encode_image(batch.images).tokens)
            logits = model.match(model.fuse(text, keys, torch.zeros(len(captions)).long()))
            order = (logits[:, 1] - logits[:, 0]).argsort(descending=True).tolist()
            orders.add(tuple(order))
            ranks.append([captions[c][0] == index.image_ids[i] for c in order].index(True))
    loader.close()
    assert len(orders) > 5
    assert result.metrics["itm_txt_r1"] == pytest.approx(100 * ranks.count(0) / 11)
    assert result.metrics["itm_txt_meanr"] == pytest.approx(sum(ranks) / 11 + 1)


def test_all_tasks_and_the_mode_is_kept(data, tokenizer, device) -> None:
    model = model_of("albef", tokenizer).train().to(device)
    tasks, options = ("retrieval", "mlm", "swap"), EvalOptions(batch_size=6, rerank_k=3)
    results = evaluate_model(model, open_index(data), tokenizer, tasks, data=data, options=options)
    assert list(results) == ["retrieval", "mlm", "swap"]
    assert results["swap"].counts == {"num_pairs": 7}
    assert results["mlm"].counts["num_samples"] == 11
    assert model.training
    images = torch.zeros(2, SIDE, SIDE, 3, dtype=torch.uint8, device=device)
    model.encode_image(images).embedding.sum().backward()


def test_selection_of_samples(model, data, tokenizer) -> None:
    index = open_index(replace(data, where=("vendor=right",)))
    result = evaluate_model(model, index, tokenizer, data=data, options=EvalOptions(max_samples=3))[
        "retrieval"
    ]
    assert result.counts["num_images"] == 3
    expected = by_hand(model, replace(index, rows=index.rows[:3]), tokenizer, data)
    assert result.metrics["txt_meanr"] == pytest.approx(expected["txt_meanr"])


def test_corrupt_image_is_left_out_with_its_captions(model, data, tokenizer, tmp_path) -> None:
    folder = Path(data.path).parent
    for path in folder.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "val.jsonl").write_bytes((folder / "val.jsonl").read_bytes())
    index = open_index(replace(data, path=str(tmp_path / "val.jsonl")))
    # 1.png gives the only "blue square number 1".
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[:60] + bytes(len(whole) - 60))
    for batch_size in (1, 4):
        options = EvalOptions(batch_size=batch_size)
        result = evaluate_model(model, index, tokenizer, data=data, options=options)["retrieval"]
        assert result.counts == {"num_images": 10, "num_texts": 10, "num_ids": 6}
        assert "1 left out: 1.png" in result.info["corrupt"]


@pytest.fixture(scope="module")
def shared_run(
    tmp_path_factory: pytest.TempPathFactory, data: DataConfig, tokenizer: Tokenizer
) -> Path:
    """A run folder with checkpoints of steps 9 and 10, to be read only."""
    folder = tmp_path_factory.mktemp("logs") / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for step in (9, 10):
        model = model_of("albef", tokenizer, seed=step)
        state = {f"model.{name}": value for name, value in model.state_dict().items()}
        state["teacher.other"] = torch.zeros(3)
        torch.save({"state_dict": state}, folder / "checkpoints" / f"step_{step}.pt")
    config = RunConfig(
        "run", model.config, ObjectivesConfig(), replace(data, id_key=""), TrainConfig(2, steps=10)
    )
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def run_dir(shared_run: Path, tmp_path: Path) -> Path:
    """A copy of it to write in."""
    return shutil.copytree(shared_run, tmp_path / "run")


def test_run_folder_is_evaluated_with_its_newest_weights(run_dir, table, data, tokenizer) -> None:
    result = evaluate(run_dir, "retrieval", table, id_key="concept", device="cpu")
    assert result.info["weights"] == str(run_dir / "checkpoints" / "step_10.pt")
    model = model_of("albef", tokenizer, seed=10)
    expected = evaluate_model(model, open_index(data), tokenizer, data=data)["retrieval"]
    assert result.metrics == pytest.approx(expected.metrics)
    assert EvalResult.from_json((run_dir / "eval" / "retrieval-1.json").read_text()) == result
    assert f"{result.metrics['txt_meanr']:.2f}" in result.table()
    with Image.open(run_dir / "eval" / "retrieval-1.png") as image:
        assert image.format == "PNG"
    older = run_dir / "checkpoints" / "step_9.pt"
    second = evaluate(
        run_dir, "swap", table, weights=str(older), device="cpu", where=["vendor=left"]
    )
    assert second.counts == {"num_pairs": 4}
    assert second.info["weights"] == str(older)
    assert second.info["where"] == "vendor=left"
    evaluate(run_dir, "swap", table, device="cpu")
    assert sorted(p.name for p in (run_dir / "eval").glob("*.json")) == [
        "retrieval-1.json",
        "swap-1.json",
        "swap-2.json",
    ]


def test_exported_weights_serve_where_there_is_no_checkpoint(run_dir, table, tokenizer) -> None:
    before = evaluate(run_dir, "retrieval", table, device="cpu")
    for path in (run_dir / "checkpoints").iterdir():
        path.unlink()
    state = model_of("albef", tokenizer, seed=10).state_dict()
    save_file({n: t.clone() for n, t in state.items()}, run_dir / "model.safetensors")
    after = evaluate(run_dir, "retrieval", table, device="cpu")
    assert after.info["weights"].endswith("model.safetensors")
    assert after.metrics == before.metrics
    (run_dir / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither checkpoints/step_\*.pt nor model.safet"):
        evaluate(run_dir, "retrieval", table, device="cpu")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"task": "riddle"}, ValueError, "unknown task 'riddle'; tasks are retrieval, mlm, swap"),
        (
            {"run_dir": "nowhere"},
            FileNotFoundError,
            "nowhere is not a run folder: it has no config",
        ),
        ({"weights": "gone.pt"}, FileNotFoundError, "no weights at gone.pt"),
        ({"where": ["vendor=up"]}, ValueError, "no sample has .*vendor.*up"),
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ({"pool_texts": "max"}, ValueError, "pool_texts must be 'none' or 'mean', got 'max'"),
        ({"rerank_k": 2, "pool_texts": "mean"}, ValueError, "rerank_k matches single captions"),
    ],
)
def test_refuses(shared_run, table, change, error, message) -> None:
    arguments = {
        "run_dir": shared_run,
        "task": "retrieval",
        "data": table,
        "device": "cpu",
    } | change
    with pytest.raises(error, match=message):
        evaluate(**arguments)


def test_names_what_does_not_fit(run_dir, table, data, tokenizer) -> None:
    index, clip = open_index(data), model_of("clip", tokenizer)
    with pytest.raises(ValueError, match="rerank_k needs a fusion tower; preset 'clip' has none"):
        evaluate_model(clip, index, tokenizer, data=data, options=EvalOptions(rerank_k=2))
    with pytest.raises(ValueError, match="mlm needs a model with a fusion tower; preset 'clip'"):
        evaluate_model(clip, index, tokenizer, ("mlm",), data=data)
    config = json.loads((run_dir / "config.json").read_text())
    config["model"]["text"]["vocab_size"] += 1
    (run_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"step_10.pt does not fit the run's config.json"):
        evaluate(run_dir, "retrieval", table, device="cpu")
    (run_dir / "config.json").write_text('{"model": {"depth": 3}}')
    with pytest.raises(ValueError, match=r"config.json is not a run's configuration"):
        evaluate(run_dir, "retrieval", table, device="cpu")


def test_selection_of_captions(model, data, tokenizer) -> None:
    index = open_index(data)
    options = EvalOptions(captions=(0,))
    result = evaluate_model(model, index, tokenizer, data=data, options=options)["retrieval"]
    # "a red circle" and its like once for each concept; the numbered second captions are left out.
    assert result.counts == {"num_images": 11, "num_texts": 6, "num_ids": 6}
    with pytest.raises(ValueError, match="captions: no sample has a caption"):
        evaluate_model(model, index, tokenizer, data=data, options=replace(options, captions=(7,)))

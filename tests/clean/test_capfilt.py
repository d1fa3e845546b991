"""CapFilt: what is written and kept, that the data alone decide it, and what is then read."""

import json

import numpy as np
import pytest
import torch

from tests._clean import SIDE, data_of, make_run
from tests._images import encode, picture, write_tar
from vlpfast import cli
from vlpfast.clean import capfilt as module
from vlpfast.clean.capfilt import CapFiltOptions, capfilt
from vlpfast.data.index import Index
from vlpfast.data.loader import make_loader, make_tokenizer, open_index
from vlpfast.data.recaptions import captions_in, recaptioned, write_captions
from vlpfast.data.sidecar import parts
from vlpfast.eval.load import load_run
from vlpfast.eval.pairs import pair_scores
from vlpfast.ops.seed import fold_seed
from vlpfast.ragged import Ragged


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two shards of 6 and 5 samples of two captions, sample 1 of each without pixels; a captioner
    and a filter.
    """
    folder = tmp_path_factory.mktemp("capfilt")
    (folder / "data").mkdir()
    for shard, count in enumerate((6, 5)):
        members = []
        for i in range(count):
            image = encode(picture(10 * shard + i), "PNG")
            image = image[:60] + bytes(len(image) - 80) + image[-20:] if i == 1 else image
            captions = [f"number {i} of {shard}", f"a picture, {i * 3}"]
            fields = {"captions": captions, "noisy": i % 2 == 0}
            members += [(f"{i}.png", image), (f"{i}.json", json.dumps(fields).encode())]
        write_tar(folder / "data" / f"{shard}.tar", members)
    index = Index.open(folder / "data")
    data = data_of(folder / "data")
    make_run(folder / "captioner", index, "blip", data, lm=1.0)
    make_run(folder / "filter", index, "albef", data, itm=1.0)
    return folder


def run(runs, out, **options):
    options = CapFiltOptions(**{"batch_size": 4, "max_tokens": 10, **options})
    return capfilt(runs / "captioner", runs / "filter", runs / "data", out, options)


def lines(out):
    return [json.loads(x) for p in sorted(out.glob("*.jsonl")) for x in p.read_text().splitlines()]


@pytest.fixture(scope="module")
def middle(runs, tmp_path_factory):
    """A bound that lets some captions pass and others not."""
    run(runs, out := tmp_path_factory.mktemp("all") / "out", min_score=0.0)
    found = lines(out)
    scores = [
        s for line in found for s in line.get("web_scores", []) + line.get("written_scores", [])
    ]
    return float(np.median(scores))


@torch.inference_mode()
def by_hand(runs, min_score, *, seed=0, top_p=0.9):
    """Each image alone: (captions kept, what was written)."""
    captioner, judge = (load_run(runs / name, device="cpu") for name in ("captioner", "filter"))
    index = Index.open(runs / "data")
    loader = make_loader(
        index,
        data_of(runs / "data"),
        tokenizer=judge.tokenizer,
        image_size=SIDE,
        batch_size=1,
        seed=0,
        train=False,
    )
    found = {}
    for batch in loader:
        if not len(batch):
            continue
        row = int(batch.sample_ids[0])
        ids = captioner.model.generate(
            batch.images,
            start_id=captioner.tokenizer.start_id,
            end_id=captioner.tokenizer.end_id,
            max_tokens=10,
            banned=tuple(
                i for i in captioner.tokenizer.special_ids if i != captioner.tokenizer.end_id
            ),
            seeds=(fold_seed(seed, row),),
            top_p=top_p,
        ).text.values
        written = captioner.tokenizer.decode(ids.tolist()).strip()
        texts = [*index.captions(row), *([written] if written else [])]
        text = Ragged.from_lists(judge.tokenizer.encode(texts, 16))
        own = torch.zeros(len(texts), dtype=torch.int64)
        scores = pair_scores(judge.model, "match", batch.images, text, own).tolist()
        kept = [t for t, score in zip(texts, scores, strict=True) if score >= min_score]
        found[row] = list(dict.fromkeys(kept)), [written] if written else []
    loader.close()
    return found


def test_capfilt_is_each_image_alone(runs, middle, tmp_path):
    done = run(runs, tmp_path / "out", min_score=middle)
    found, wanted = lines(tmp_path / "out"), by_hand(runs, middle)
    assert sorted(wanted) == [0, 2, 3, 4, 5, 6, 8, 9, 10]
    for row, line in enumerate(found):
        captions, written = wanted.get(row, ([], []))
        assert line["captions"] == captions
        assert line.get("written", []) == written
    judged = [line for line in found if "written" in line]
    web = [score >= middle for line in judged for score in line["web_scores"]]
    new = [score >= middle for line in judged for score in line["written_scores"]]
    assert 0 < sum(web) < len(web) == 18
    assert (done["num_web"], done["num_web_kept"]) == (18, sum(web))
    assert (done["num_synthetic"], done["num_synthetic_kept"]) == (len(new), sum(new))
    assert done["num_kept"] == sum(bool(line["captions"]) for line in found)
    assert (done["num_samples"], done["num_corrupt"], done["finished"]) == (11, 2, True)
    assert list(done["corrupt"]) == ["0.tar/1.png", "1.tar/1.png"]
    assert len({w for line in judged for w in line["written"]}) > 3


def test_batches_and_processes_do_not_matter(runs, middle, tmp_path, monkeypatch):
    run(runs, tmp_path / "one", min_score=middle)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        done = run(runs, tmp_path / "two", min_score=middle, batch_size=3, pairs_per_call=5)
        assert done["finished"] == (rank == "0")
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert (a["captions"], a.get("written")) == (b["captions"], b.get("written"))
    assert captions_in(tmp_path / "one").identity() == captions_in(tmp_path / "two").identity()


def test_a_seed_decides(runs, tmp_path):
    run(runs, tmp_path / "a", min_score=0.0, seed=1)
    written = [line.get("written") for line in lines(tmp_path / "a")]
    wanted = by_hand(runs, 0.0, seed=1)
    assert written == [wanted.get(row, ([], None))[1] for row in range(11)]
    run(runs, tmp_path / "b", min_score=0.0, seed=2)
    assert written != [line.get("written") for line in lines(tmp_path / "b")]


def test_a_stopped_call_goes_on(runs, middle, tmp_path, monkeypatch):
    run(runs, tmp_path / "whole", min_score=middle)
    write, calls = write_captions, []

    def stop_within_the_second(files, part, found, corrupt):
        calls.append(part.name)
        if part.name == "1":
            found = (line if n < 2 else 1 / 0 for n, line in enumerate(found))
        write(files, part, found, corrupt)

    monkeypatch.setattr(module, "write_captions", stop_within_the_second)
    with pytest.raises(ZeroDivisionError):
        run(runs, tmp_path / "out", min_score=middle)
    assert [p.name for p in (tmp_path / "out").glob("[!.]*.jsonl")] == ["0.jsonl"]
    with pytest.raises(ValueError, match=r"has no 1.jsonl: run `vlpfast data capfilt` to its end"):
        recaptioned(Index.open(runs / "data"), tmp_path / "out")
    monkeypatch.setattr(module, "write_captions", write)
    run(runs, tmp_path / "out", min_score=middle)
    assert calls == ["0", "1"]
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")


def test_places_that_are_judged(runs, tmp_path):
    run(runs, tmp_path / "out", min_score=0.0, captions=(1,))
    index = Index.open(runs / "data")
    for row, line in enumerate(lines(tmp_path / "out")):
        if "written" in line:
            assert line["captions"] == [index.captions(row)[1], *line["written"]]
            assert line["web"] == 1


def test_models_of_unlike_images(runs, tmp_path, monkeypatch):
    """A captioner that squashes its images, and a filter that crops them, read them twice."""
    config = json.loads((runs / "captioner" / "config.json").read_text())
    twin = tmp_path / "captioner"
    twin.mkdir()
    for path in (runs / "captioner").iterdir():
        (twin / path.name).write_bytes(path.read_bytes())
    config["data"]["eval_crop"] = "squash"
    (twin / "config.json").write_text(json.dumps(config))
    options = CapFiltOptions(batch_size=4, max_tokens=10, min_score=0.0)
    capfilt(twin, runs / "filter", runs / "data", tmp_path / "out", options)
    run(runs, tmp_path / "plain", min_score=0.0)
    one, two = lines(tmp_path / "plain"), lines(tmp_path / "out")
    web = [[line.get("web_scores") for line in found] for found in (one, two)]
    for a, b in zip(*web, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert [line.get("written") for line in one] != [line.get("written") for line in two]


def test_a_run_reads_the_captions(runs, middle, tmp_path):
    """Samples, captions and tokens of an epoch are those of the lines, whatever else selects."""
    run(runs, tmp_path / "out", min_score=middle)
    found = {row: line["captions"] for row, line in enumerate(lines(tmp_path / "out"))}
    config = data_of(
        runs / "data", recaptions=str(tmp_path / "out"), where=("noisy=false",), vocab_size=300
    )
    odd = [row for row, i in enumerate([*range(6), *range(5)]) if i % 2]
    wanted = [row for row in odd if found[row]]
    index = open_index(config)
    assert wanted
    assert np.asarray(index.rows).tolist() == wanted
    assert [index.captions(i) for i in range(len(index))] == [found[row] for row in wanted]
    tokenizer = make_tokenizer(config, index)
    loader = make_loader(index, config, tokenizer=tokenizer, image_size=16, batch_size=1, seed=0)
    stream, seen = iter(loader), set()
    for _ in range(8 * len(wanted)):
        batch = next(stream)
        row = int(index.rows_of(batch.sample_ids.numpy())[0])
        text = tokenizer.decode(batch.text.values.tolist())
        captions = [
            tokenizer.decode(ids) for ids in tokenizer.encode(found[row], config.max_tokens)
        ]
        assert text in captions
        seen.add((row, text))
    loader.close()
    assert {row for row, _ in seen} == set(wanted)
    whole = open_index(data_of(runs / "data", recaptions=str(tmp_path / "out")))
    assert np.asarray(whole.rows).tolist() == [row for row in found if found[row]]
    # The data's own captions are where they were.
    assert open_index(config.unfiltered()).captions(0)[0] == "number 0 of 0"


def test_what_is_refused(runs, middle, tmp_path):
    data = runs / "data"
    with pytest.raises(ValueError, match=r"preset 'albef' has no text decoder; .* 'blip'"):
        capfilt(runs / "filter", runs / "filter", data, tmp_path / "out")
    with pytest.raises(ValueError, match=r"trained: objectives.itm was 0"):
        capfilt(runs / "captioner", runs / "captioner", data, tmp_path / "out")
    with pytest.raises(ValueError, match=r"max_tokens must be in .* context 32, got 33"):
        run(runs, tmp_path / "out", max_tokens=33)
    assert not (tmp_path / "out").exists()
    run(runs, tmp_path / "out", min_score=middle)
    with pytest.raises(ValueError, match=r"holds captions of seed 0, expected 5"):
        run(runs, tmp_path / "out", min_score=middle, seed=5)
    (tmp_path / "other").mkdir()
    write_tar(
        tmp_path / "other" / "0.tar",
        [("0.png", encode(picture(0), "PNG")), ("0.txt", b"one")],
    )
    with pytest.raises(ValueError, match=r"captions of 11 samples, .* has 1: they are of other"):
        recaptioned(Index.open(tmp_path / "other"), tmp_path / "out")
    run(runs, tmp_path / "none", min_score=1.1)
    with pytest.raises(ValueError, match="no sample has a caption in"):
        recaptioned(Index.open(data), tmp_path / "none")
    path = tmp_path / "out" / "0.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n")
    with pytest.raises(ValueError, match=r"0.jsonl: expected 6 lines, found 3"):
        recaptioned(Index.open(data), tmp_path / "out")
    index = Index.open(data)
    with pytest.raises(ValueError, match="captions of 0: expected 6 lines, got 0"):
        write_captions(captions_in(tmp_path / "out"), next(parts(index)), [], {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"min_tokens": 1}, "min_tokens must be >= 2"),
        ({"seed": -1}, "seed must be >= 0"),
        ({"captions": (-1,)}, "captions must be places >= 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        CapFiltOptions(**options)


def test_command_line(runs, tmp_path, capsys):
    args = ["data", "capfilt", str(runs / "captioner"), str(runs / "filter")]
    args += ["--data", str(runs / "data"), "--out", str(tmp_path / "out"), "--max-tokens=8"]
    assert cli.main([*args, "--metric=similarity", "--min-score=-1", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert (done["metric"], done["num_web_kept"], done["num_corrupt"]) == ("similarity", 18, 2)

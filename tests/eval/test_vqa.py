"""Answers word by word, and their share by hand."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests._images import encode, picture, write_jsonl
from tests.models.test_prefix import prefix_model
from vlpfast.data.answers import accuracies
from vlpfast.data.config import DataConfig
from vlpfast.data.index import Index
from vlpfast.data.loader import make_loader, make_tokenizer
from vlpfast.data.prompts import examples, iter_texts
from vlpfast.data.scenes import blind_answer_accuracy, write_shards
from vlpfast.eval import evaluate_model, vqa
from vlpfast.eval.run import save
from vlpfast.models import create_model
from vlpfast.ragged import Ragged


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "val"
    write_shards(folder, num_samples=16, split="val", progress=False)
    return Index.open(folder)


CONFIG = DataConfig(
    path="", tasks=("vqa", "caption", "entailment"), workers=1, vocab_size=512, max_tokens=64
)


def batches(index: Index, **options):
    tokenizer = make_tokenizer(CONFIG, index)
    loader = make_loader(
        index, CONFIG, tokenizer=tokenizer, image_size=16, batch_size=8, seed=0, **options
    )
    return tokenizer, loader


def test_batches_carry_what_is_asked_and_answered(scenes):
    tokenizer, loader = batches(scenes)
    kinds = set()
    for step in range(6):
        batch = loader.load(step)
        for row, sample in enumerate(batch.sample_ids.tolist()):
            one = torch.tensor([row])
            texts = [part.select(one).values.tolist() for part in (batch.prompt, batch.text)]
            pair = [tokenizer.decode(ids) for ids in texts]
            record = scenes.record(sample)
            found = {
                "vqa": examples(record, "vqa"),
                "entailment": examples(record, "entailment"),
                "caption": [("caption", c) for c in scenes.captions(sample)],
            }
            names = [name for name, pairs in found.items() if tuple(pair) in pairs]
            assert len(names) == 1, pair
            kinds |= set(names)
    loader.close()
    assert kinds == {"vqa", "caption", "entailment"}
    again = batches(scenes)[1].load(5)
    assert torch.equal(again.text.values, batch.text.values)


def test_prompts_are_texts_of_the_tokenizer(scenes):
    texts = list(iter_texts(scenes, ("vqa",)))
    assert len(texts) == 2 * sum(len(scenes.record(i)["questions"]) for i in range(16))
    with pytest.raises(
        ValueError, match="tasks must be caption, vqa, entailment, nlvr, box, region or "
    ):
        DataConfig(path="", tasks=("riddle",))
    with pytest.raises(
        ValueError, match=r"'vqa': no field 'questions' or 'question', found \['a'\]"
    ):
        examples({"a": 1}, "vqa")


@torch.no_grad()
def test_answers_are_the_likeliest_tokens_one_by_one():
    torch.manual_seed(0)
    model = prefix_model().eval()
    nn.init.normal_(model.lm_head.weight)
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    keys = model.image_keys(model.encode_image(images).tokens)
    prompt = Ragged.from_lists([[1, 5, 6, 2], [1, 7, 2], [1, 2]])
    tokenizer = SimpleNamespace(start_id=1, end_id=2, decode=lambda ids: " ".join(map(str, ids)))
    rows = torch.tensor([1, 0, 1])
    said = vqa.answers(model, keys, rows, prompt, tokenizer)
    for row in range(3):
        ids, one = [1], torch.tensor([row])
        while len(ids) <= vqa.MAX_ANSWER:
            text = Ragged.from_lists([ids])
            states = model.decode(text, keys, rows[one], prompt=prompt.select(one)).values
            ids.append(int(model.next_token_logits(states[-1]).argmax()))
            if ids[-1] == 2:
                break
        assert said[row] == " ".join(str(i) for i in ids[1:] if i != 2)
    assert len(set(said)) > 1


def test_shares_by_hand(scenes, monkeypatch):
    """A reader that answers from the record of the image it is shown; another image's is wrong."""
    tokenizer, loader = batches(scenes, train=False)
    own = list(loader)
    asked = [question for i in range(16) for question in scenes.record(i)["questions"]]
    samples = torch.cat([batch.sample_ids for batch in own])
    assert samples.tolist() == list(range(16))

    def answers(_model, keys, kv_index, prompt, tokenizer):
        said = []
        for row, image in enumerate(kv_index.tolist()):
            text = tokenizer.decode(prompt.select(torch.tensor([row])).values.tolist())
            record = scenes.record(int(keys[image]))
            said.append(dict(examples(record, "vqa")).get(text, "unknown"))
        return said

    monkeypatch.setattr(vqa, "answers", answers)
    place = iter(own)
    current: list = []

    def stream():
        for batch in place:
            current[:] = batch.sample_ids.tolist()
            yield batch

    model = SimpleNamespace(
        device=torch.device("cpu"),
        config=SimpleNamespace(vision=SimpleNamespace(front="patches")),
        encode_image=lambda images: SimpleNamespace(tokens=images),
        image_keys=lambda tokens: list(current),
    )
    result = vqa.vqa_probe(model, stream(), scenes, tokenizer, max_tokens=32)
    assert result.metrics["vqa_accuracy"] == 100
    assert result.metrics["shuffled_vqa_accuracy"] < 60
    assert result.counts == {"num_samples": 16, "num_questions": len(asked)}
    expected = 100 * blind_answer_accuracy(asked)["all"]
    assert result.chance["vqa_accuracy"] == pytest.approx(expected)


@torch.no_grad()
def test_answers_of_an_encoder_and_decoder_encode_each_question_once():
    torch.manual_seed(0)
    model = create_model("pali", "tiny", vocab_size=20, image_size=16).eval()
    nn.init.normal_(model.lm_head.weight)
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    shown = torch.tensor([1, 0, 1])
    prompt = Ragged.from_lists([[1, 5, 6, 2], [1, 7, 2], [1, 2]])
    tokenizer = SimpleNamespace(start_id=1, end_id=2, decode=list)
    keys, calls = model.image_keys(model.encode_image(images).tokens), []
    model.fusion.encoder.register_forward_hook(lambda *_: calls.append(1))
    said = vqa.answers(model, keys, shown, prompt, tokenizer)
    assert calls == [1]
    options = {"start_id": 1, "end_id": 2, "max_tokens": vqa.MAX_ANSWER + 1}
    written = model.generate(images[shown], prompt=prompt, **options).text
    for row, ids in enumerate(said):
        expected = written.select(torch.tensor([row])).values[1:].tolist()
        assert ids == [i for i in expected if i != 2]
    assert len({tuple(ids) for ids in said}) == 3


@pytest.mark.parametrize("task", ["vqa", "entailment"])
def test_an_answer_head_chooses_among_the_runs_answers(scenes, task):
    """A head that always tells one answer is right as often as that answer is."""
    tokenizer, loader = batches(scenes, train=False)
    named = [answer for i in range(16) for _, answer in examples(scenes.record(i), task)]
    names = sorted(set(named))
    model = create_model("vilt", "tiny", vocab_size=512, image_size=16, answers=len(names)).eval()
    nn.init.zeros_(model.answer_head.answers.weight)
    with torch.no_grad():
        model.answer_head.answers.bias[1] = 1.0
    options = {"max_tokens": 32, "task": task, "names": names}
    result = vqa.vqa_probe(model, list(loader), scenes, tokenizer, **options)
    expected = 100 * named.count(names[1]) / len(named)
    assert result.metrics[f"{task}_accuracy"] == pytest.approx(expected)
    assert result.metrics[f"shuffled_{task}_accuracy"] == pytest.approx(expected)
    assert result.chance[f"{task}_accuracy"] >= expected
    assert result.counts["num_questions"] == len(named)


@torch.no_grad()
def test_choices_are_those_of_each_question_alone():
    torch.manual_seed(0)
    model = create_model("vilt", "tiny", vocab_size=20, image_size=16, answers=5).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    keys = model.image_keys(model.encode_image(images).tokens)
    question, rows = Ragged.from_lists([[1, 5, 6, 2], [1, 7, 2], [1, 9, 2]]), [1, 0, 1]
    said = vqa.choices(model, keys, torch.tensor(rows), question, "abcde")
    for row, image in enumerate(rows):
        one = question.select(torch.tensor([row]))
        own = model.image_keys(model.encode_image(images[image : image + 1]).tokens)
        assert vqa.choices(model, own, torch.tensor([0]), one, "abcde") == said[row : row + 1]
    assert len(set(said)) > 1


def test_answers_of_another_task_say_so(scenes):
    """Not zero percent."""
    tokenizer, loader = batches(scenes, train=False)
    model = create_model("vilt", "tiny", vocab_size=512, image_size=16, answers=2).eval()
    options = {"max_tokens": 32, "task": "entailment", "names": ("red", "3")}
    with pytest.raises(ValueError, match=r"entailment: none of the data's answers .* from 'red'"):
        vqa.vqa_probe(model, list(loader), scenes, tokenizer, **options)


def test_a_run_without_names_of_its_answers_says_so(scenes):
    model = create_model("vilt", "tiny", vocab_size=512, image_size=16, answers=5)
    tokenizer, _ = batches(scenes)
    with pytest.raises(ValueError, match=r"tells 5 answers by number, and names of 0 are known"):
        evaluate_model(model, scenes, tokenizer, ("entailment",), data=CONFIG)


def told_by(
    index: Index,
    task: str,
    names: list[str],
    images: int = 1,
    told: int = 0,
    encoded: list[int] | None = None,
):
    """What a head that always tells `names[told]` reaches on `index`; `encoded` gets how many
    images each call of the tower has.
    """
    config = DataConfig(path="", tasks=(task,), workers=1, vocab_size=300, max_tokens=32)
    tokenizer = make_tokenizer(config, index)
    model = create_model(
        "albef",
        "tiny",
        vocab_size=tokenizer.vocab_size,
        image_size=32,
        answers=len(names),
        answer_images=images,
    )
    if encoded is not None:
        model.vision.register_forward_hook(lambda _m, args, _o: encoded.append(len(args[0])))
    nn.init.zeros_(model.answer_head.answers.weight)
    with torch.no_grad():
        model.answer_head.answers.bias[told] = 1.0
    return evaluate_model(model, index, tokenizer, (task,), data=config, answers=tuple(names))[task]


def write_pictures(folder, count: int) -> None:
    for i in range(count):
        (folder / f"{i}.png").write_bytes(encode(picture(i), "PNG"))


def test_what_ten_people_said_counts_in_part(tmp_path):
    """As VQA counts it, and the answers are written for a server; also where none are known."""
    write_pictures(tmp_path, 2)
    said = [["red"] * 2 + ["blue"] * 8, ["red"] * 9 + ["a dog"]]
    rows = [
        {"image": f"{i}.png", "question": "what?", "answer": answer, "question_id": 50 + i}
        for i, answer in enumerate(said)
    ]
    index = Index.open(write_jsonl(tmp_path / "q.jsonl", rows), require_captions=False)
    result = told_by(index, "vqa", ["red", "blue"])
    shares = [accuracies(answer)["red"] for answer in said]
    assert shares == pytest.approx([0.6, 1.0])
    assert result.metrics["vqa_accuracy"] == pytest.approx(80)
    # Always red, or always blue: 1.6 and 1.0 of two.
    assert result.chance["vqa_accuracy"] == pytest.approx(80)
    told = [{"question_id": 50, "answer": "red"}, {"question_id": 51, "answer": "red"}]
    path = save(result, tmp_path / "eval")
    assert json.loads((tmp_path / "eval" / "answers" / path.name).read_text()) == told
    assert "answers" not in json.loads(path.read_text())
    for row in rows:
        del row["answer"]
    index = Index.open(write_jsonl(tmp_path / "test.jsonl", rows), require_captions=False)
    result = told_by(index, "vqa", ["red", "blue"], told=1)
    assert (result.metrics, result.chance) == ({}, {})
    assert [row["answer"] for row in result.answers] == ["blue", "blue"]
    assert "2 questions" in result.table()
    save(result, tmp_path / "eval")


def test_an_image_is_encoded_once_and_every_question_answered(tmp_path):
    """Also those that have no other image to compare: a server wants them all."""
    write_pictures(tmp_path, 2)
    rows = [
        {"image": f"{int(i > 2)}.png", "question": f"{i}?", "answer": "red", "question_id": i}
        for i in range(5)
    ]
    index = Index.open(write_jsonl(tmp_path / "q.jsonl", rows), require_captions=False)
    result = told_by(index, "vqa", ["red"], encoded=(encoded := []))
    assert encoded == [2]
    assert [row["question_id"] for row in result.answers] == [0, 1, 2, 3, 4]
    # Of three and two rows about the same image, one has no partner that shows another.
    assert result.counts == {"num_samples": 4, "num_questions": 4}
    assert result.metrics["vqa_accuracy"] == 100


def test_statements_about_two_images(tmp_path):
    write_pictures(tmp_path, 3)
    rows = [
        {"images": [f"{i}.png", f"{2 - i}.png"], "sentence": "both", "label": label}
        for i, label in enumerate((True, False, True))
    ]
    index = Index.open(write_jsonl(tmp_path / "n.jsonl", rows), require_captions=False)
    result = told_by(index, "nlvr", ["false", "true"], images=2, told=1)
    assert result.metrics["nlvr_accuracy"] == pytest.approx(200 / 3)
    assert result.metrics["shuffled_nlvr_accuracy"] == pytest.approx(200 / 3)
    assert result.chance["nlvr_accuracy"] == pytest.approx(200 / 3)
    with pytest.raises(ValueError, match=r"nlvr: the model .* 1 of the data's .* are about 2"):
        told_by(index, "nlvr", ["false", "true"])


@torch.no_grad()
def test_choices_about_two_images_are_those_of_each_question_alone():
    torch.manual_seed(0)
    options = {"vocab_size": 20, "image_size": 16, "answers": 5, "answer_images": 2}
    model = create_model("vilt", "tiny", **options).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    nn.init.normal_(model.answer_head.answers.weight)
    nn.init.normal_(model.text.embedding.token)
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    keys = model.image_keys(model.encode_image(images).tokens)
    question = Ragged.from_lists([[1, 5, 6, 2], [1, 7, 2], [1, 9, 2]])
    shown = torch.tensor([[1, 0, 2], [0, 2, 1]])
    said = vqa.choices(model, keys, shown.flatten(), question, "abcde")
    for row in range(3):
        one = question.select(torch.tensor([row]))
        assert vqa.choices(model, keys, shown[:, row], one, "abcde") == said[row : row + 1]
        head = model.answer_head
        pooled = []
        for image in shown[:, row].tolist():
            tokens = model.encode_text(one, num_embedded=0).tokens
            fused = model.fuse_pairs(tokens, keys, torch.tensor([image]))
            pooled.append(model.pool(*model.first_tokens(fused)))
        logits = head.answers(head.norm(nn.functional.gelu(head.dense(torch.cat(pooled, 1))))[0])
        assert "abcde"[int(logits.argmax())] == said[row]
    assert len(set(said)) > 1

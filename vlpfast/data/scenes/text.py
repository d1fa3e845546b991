"""Sentences about scenes, each with its truth: captions, swaps, questions, entailment.

What a relational sentence says is a `Claim`; its `holds` decides it: none is merely assumed false.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vlpfast.data.scenes.space import (
    COLORS,
    HELD_OUT,
    OPPOSITE,
    PLACES,
    SEEN,
    SHAPES,
    SIZES,
    TEXT,
    TEXTURES,
    Claim,
    Draw,
    Object,
    Phrase,
    Scene,
    allowed,
    draw_combination,
    draws,
    pick,
    relations,
    shuffled,
    unique,
)

ANSWERS = (*COLORS, *SHAPES, *SIZES, *TEXTURES, *PLACES, *"01234", "yes", "no")
LABELS = ("entailment", "neutral", "contradiction")


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _combination(o: Object) -> tuple[str, str]:
    return o.shape, o.color


class Relation(NamedTuple):
    """A true claim about objects `a` and `b`.

    `false` are claims of the same words that do not hold: "place" or a field of `Phrase` -> the
    claim with these of the two objects exchanged.
    """

    a: Object
    b: Object
    claim: Claim
    false: dict[str, Claim]


def relate(scene: Scene, draw: Draw) -> Relation | None:
    """A relation of two random objects; None where there is a single one."""
    if len(scene.objects) < 2:
        return None
    a, b = shuffled(draw, scene.objects)[:2]
    with_size, with_texture = draw() < 0.5, draw() < 0.5
    first, second = (
        # "plain" goes without saying.
        Phrase(
            o.size if with_size else "",
            o.texture if with_texture and o.texture != "plain" else "",
            o.color,
            o.shape,
        )
        for o in (a, b)
    )
    claim = Claim(first, pick(draw, relations(a, b)), second)
    exchanges = {"place": (second, first)}
    for field in Phrase._fields:
        x, y = getattr(first, field), getattr(second, field)
        if x and y and x != y:
            exchanges[field] = first._replace(**{field: y}), second._replace(**{field: x})
    options = allowed(scene.split)
    false = {
        field: swapped
        for field, (x, y) in exchanges.items()
        if (x.shape, x.color) in options
        and (y.shape, y.color) in options
        and not (swapped := Claim(x, claim.relation, y)).holds(scene)
    }
    return Relation(a, b, claim, false)


def _claims(scene: Scene, draw: Draw) -> tuple[Claim, Claim | None] | None:
    """A true claim about two objects and a false one of the same words, where there are."""
    if scene.claims is not None:
        return scene.claims
    found = relate(scene, draw)
    if found is None:
        return None
    return found.claim, (pick(draw, list(found.false.values())) if found.false else None)


def describe(scene: Scene) -> list[str]:
    """True captions of a scene.

    The first two state everything (two scenes share them only with their `image_id`), the third
    names colors and shapes, the fourth, where there are two objects and more, relates two of them.
    """
    return _captions(scene, draws(scene.seed, scene.split, scene.number, TEXT))[0]


def misses(told: Scene, scene: Scene) -> bool:
    """Whether all captions of `told` are false of `scene`."""
    shown = Counter(map(_combination, scene.objects))
    pair = _captions(told, draws(told.seed, told.split, told.number, TEXT))[1]
    # Where its colors and shapes are false, so is all that says more.
    return not Counter(map(_combination, told.objects)) <= shown and not (
        pair and pair[0].holds(scene)
    )


def _captions(scene: Scene, draw: Draw) -> tuple[list[str], tuple[Claim, Claim | None] | None]:
    mixed = shuffled(draw, scene.objects)
    captions = [
        _join(
            [f"a {o.size} {o.texture} {o.color} {o.shape} at the {o.place}" for o in scene.objects]
        ),
        ", ".join([f"{o.place} {o.size} {o.texture} {o.color} {o.shape}" for o in mixed]),
        _join([f"a {o.color} {o.shape}" for o in mixed]),
    ]
    pair = _claims(scene, draw)
    if pair:
        captions.append(str(pair[0]))
    return captions, pair


def _questions(scene: Scene, draw: Draw) -> list[dict[str, str]]:
    """One question of each type that the scene allows; "the ..." points at exactly one object."""
    objects = scene.objects
    questions: list[dict[str, str]] = []

    def ask(kind: str, question: str, answer: str) -> None:
        questions.append({"type": kind, "question": question, "answer": answer})

    by_shape, by_color = unique(objects, lambda o: o.shape), unique(objects, lambda o: o.color)
    named = unique(objects, _combination)

    if by_shape and draw() < 0.5:
        o = pick(draw, by_shape)
        ask("color", f"what colour is the {o.shape}?", o.color)
    else:
        o = pick(draw, objects)
        ask("color", f"what colour is the shape at the {o.place}?", o.color)
    if by_color and draw() < 0.5:
        o = pick(draw, by_color)
        ask("shape", f"what shape is {o.color}?", o.shape)
    else:
        o = pick(draw, objects)
        ask("shape", f"what shape is at the {o.place}?", o.shape)

    if draw() < 0.5:
        ask("count", "how many shapes are there?", str(len(objects)))
    else:
        color = pick(draw, objects).color if draw() < 0.7 else pick(draw, COLORS)
        count = sum(o.color == color for o in objects)
        ask("count", f"how many {color} shapes are there?", str(count))

    present = [_combination(o) for o in objects]
    if draw() < 0.5:
        (shape, color), answer = pick(draw, present), "yes"
    else:
        while (pair := draw_combination(draw, scene.split, len(objects))) in present:
            pass
        (shape, color), answer = pair, "no"
    ask("exists", f"is there a {color} {shape}?", answer)

    if named:
        o = pick(draw, named)
        ask("size", f"what size is the {o.color} {o.shape}?", o.size)
        o = pick(draw, named)
        ask("texture", f"what texture does the {o.color} {o.shape} have?", o.texture)
        o = pick(draw, named)
        ask("place", f"where is the {o.color} {o.shape}?", o.place)
    if len(named) > 1:
        a, b = shuffled(draw, named)[:2]
        relation = pick(draw, relations(a, b))
        answer = "yes" if draw() < 0.5 else "no"
        relation = relation if answer == "yes" else OPPOSITE[relation]
        text = f"is the {a.color} {a.shape} {relation} the {b.color} {b.shape}?"
        ask("relation", text, answer)
    return questions


def _entailment(scene: Scene, draw: Draw) -> list[dict[str, str]]:
    """One sentence of each label, all of one form, so that neither form nor words tell the label.

    entailment: true.  contradiction: the image shows the thing spoken of and it is otherwise.
    neutral: the image does not show the thing spoken of, so it neither supports nor denies it.
    """
    objects = scene.objects
    present = {o.shape for o in objects}
    color_of = {o.shape: o.color for o in unique(objects, lambda o: o.shape)}
    # All three or none speak of a held-out combination, which would else be a hint at "true".
    options = HELD_OUT if scene.split == "heldout" and draw() < 0.5 else SEEN
    true = [pair for pair in color_of.items() if pair in options]
    false = [
        (shape, color) for shape, color in options if shape in color_of and color != color_of[shape]
    ]
    if true and false and draw() < 0.5:
        # The subject is named by its shape.
        unknown = [pair for pair in options if pair[0] not in present]
        chosen = [pick(draw, pairs) for pairs in (true, unknown, false)]
        texts = [f"the {shape} is {color}" for shape, color in chosen]
    else:
        # The subject is named by its place.
        o, other = pick(draw, objects), pick(draw, objects)
        taken = [o.place for o in objects]
        empty = pick(draw, [place for place in PLACES if place not in taken])
        words, field, some = pick(draw, ((COLORS, "color", "something"), (SHAPES, "shape", "a")))
        false = pick(draw, [word for word in words if word != getattr(other, field)])
        texts = [
            f"at the {o.place} is {some} {getattr(o, field)}",
            f"at the {empty} is {some} {pick(draw, words)}",
            f"at the {other.place} is {some} {false}",
        ]
    return [{"sentence": t, "label": label} for t, label in zip(texts, LABELS, strict=True)]


def record(scene: Scene) -> dict[str, object]:
    """The JSON record stored beside the image: captions, identity, objects, swap, questions, ...

    `relational` is a true caption of two objects, `swapped` a false one of exactly the same words;
    either may be None.
    """
    draw = draws(scene.seed, scene.split, scene.number, TEXT)
    captions, pair = _captions(scene, draw)
    claim, swapped = pair or (None, None)
    return {
        "captions": captions,
        "image_id": scene.image_id,
        "number": scene.number,
        "split": scene.split,
        "objects": [
            {
                "shape": o.shape,
                "color": o.color,
                "size": o.size,
                "texture": o.texture,
                "place": o.place,
                "box": o.box,
            }
            for o in scene.objects
        ],
        "relational": str(claim) if claim else None,
        "swapped": str(swapped) if swapped else None,
        "questions": _questions(scene, draw),
        "entailment": _entailment(scene, draw),
    }


def blind_answer_accuracy(questions: Iterable[dict[str, str]]) -> dict[str, float]:
    """Accuracy of always giving a question type's most frequent answer, by type and over "all".

    What a model that does not look at the image reaches without effort.

    Args:
        questions: dicts with `type` and `answer`, as in a record's `questions`.
    """
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        answers[question["type"]][question["answer"]] += 1
    best = {kind: max(counts.values()) for kind, counts in answers.items()}
    totals = {kind: counts.total() for kind, counts in answers.items()}
    if not totals:
        raise ValueError("questions: expected at least one")
    by_type = {kind: best[kind] / totals[kind] for kind in sorted(best)}
    return by_type | {"all": sum(best.values()) / sum(totals.values())}

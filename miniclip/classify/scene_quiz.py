"""The scene quiz: which colour or shape is on one side of a scene, and on which side is the red star?

With the rest of the scene given, a class describes all of it; alone, it is the mean of some with a random rest."""

import random

import numpy as np

from miniclip.classify.zero_shot import embed_classes
from miniclip.datasets.shapes import COLORS, COUNTS, OPPOSITE, RELATIONS, SHAPES, SIZES, Group, Scene, captions

CLASSES = {"colour": list(COLORS), "shape": list(SHAPES), "position": list(RELATIONS)}
DRAWN = 32  # descriptions of a class whose rest is drawn at random
EITHER = 0.5  # of the descriptions name the second group first: their order tells nothing


def replaced(scene: Scene, question: str, which: int, answer: str) -> Scene:
    """Returns the scene with another answer to a question about its first (0) or second (1) group."""
    groups = list(scene[:2])
    if question != "position":
        groups[which] = groups[which]._replace(**{"color" if question == "colour" else "shape": answer})
        return Scene(*groups, scene.relation)
    mine, other = groups[which], groups[1 - which]
    return Scene(mine, other, answer) if answer in ("left", "above") else Scene(other, mine, OPPOSITE[answer])


def right_answer(scene: Scene, question: str, which: int) -> str:
    group, place = scene[which], OPPOSITE[scene.relation] if which else scene.relation
    return {"colour": group.color, "shape": group.shape, "position": place}[question]


def drawn_scenes(scene: Scene, question: str, which: int) -> list[Scene]:
    """Returns random scenes that share only the subject of the question, its place or its kind, with this one."""
    rng, scenes = random.Random(0), []
    for _ in range(DRAWN):
        groups = [Group(*(rng.choice(list(values)) for values in (COUNTS, SIZES, COLORS, SHAPES))) for _ in range(2)]
        if question == "position":
            groups[which] = groups[which]._replace(color=scene[which].color, shape=scene[which].shape)
        scenes.append(Scene(*groups, scene.relation if question != "position" else "left"))
    return scenes


def quiz(model, tokenizer, scenes: list[Scene], image_embeds, alone: bool) -> dict[str, float]:
    """Returns the accuracy for each question, given the embeddings (N, E) of N scenes. `alone`: without the rest."""
    asked, accuracies = [(scene, which) for scene in scenes for which in (0, 1)], {}
    for question, answers in CLASSES.items():
        keys, first, sentences = [], {}, []
        for scene, which in asked:
            fixed = scene[which].kind if question == "position" else scene.relation
            keys.append((which, fixed if alone else scene))
            first.setdefault(keys[-1], (scene, which))  # many scenes ask the same question
        for scene, which in first.values():
            given = drawn_scenes(scene, question, which) if alone else [scene]
            for answer in answers:
                variants = [replaced(one, question, which, answer) for one in given]
                rngs = (random.Random(f"{scene} {n}") for n in range(len(variants)))  # the same for all answers
                sentences.append([captions(one, rng, 1, EITHER)[0] for one, rng in zip(variants, rngs)])
        classes = embed_classes(model, tokenizer, sentences).T.numpy().reshape(len(first), len(answers), -1)
        classes = dict(zip(first, classes))
        best = [int(np.argmax(classes[key] @ image_embeds[n // 2])) for n, key in enumerate(keys)]
        right = [answers[n] == right_answer(scene, question, which) for n, (scene, which) in zip(best, asked)]
        accuracies[question] = sum(right) / len(right)
    return accuracies

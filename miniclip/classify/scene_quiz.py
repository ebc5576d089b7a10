"""What does the demo's model see in a scene that it was not trained on?

The built-in scenes (shapes.py) are known to the last shape, so that zero-shot classification can be marked:

    colour     what colour is what stands on the left (or right, top, bottom)?    8 classes
    shape      what shape is it?                                                  6 classes
    position   where is the red star?                                             4 classes

    python -m miniclip scene_quiz --model runs/demo

Each is asked in two ways. With the rest told, a class is a description of the whole scene, in which but the answer
differs. Alone, nothing else is told: a class is the mean of descriptions in which the rest is drawn at random.
"""

from __future__ import annotations

import random

from miniclip.datasets.shapes import COLORS, COUNTS, OPPOSITE, RELATIONS, SHAPES, SIZES, Group, Scene, captions

CLASSES = {"colour": list(COLORS), "shape": list(SHAPES), "position": list(RELATIONS)}
DRAWN = 32  # descriptions of a class where the rest is drawn


def replaced(scene: Scene, question: str, which: int, answer: str) -> Scene:
    """The scene as it would be with another answer to a question about its first (0) or second (1) group."""
    groups = [scene.first, scene.second]
    if question != "position":
        groups[which] = groups[which]._replace(**{"color" if question == "colour" else "shape": answer})
        return Scene(*groups, scene.relation)
    mine, other = groups[which], groups[1 - which]
    return Scene(mine, other, answer) if answer in ("left", "above") else Scene(other, mine, OPPOSITE[answer])


def right_answer(scene: Scene, question: str, which: int) -> str:
    """The class that is right."""
    place = scene.relation if which == 0 else OPPOSITE[scene.relation]
    group = (scene.first, scene.second)[which]
    return {"colour": group.color, "shape": group.shape, "position": place}[question]


def drawn_scenes(scene: Scene, question: str, which: int) -> list[Scene]:
    """Scenes that have what the question is about, its place or its kind, and else nothing, in common with this one."""
    rng, scenes = random.Random(0), []
    for _ in range(DRAWN):
        groups = [Group(*(rng.choice(list(values)) for values in (COUNTS, SIZES, COLORS, SHAPES))) for _ in range(2)]
        if question == "position":
            color, shape = (scene.first, scene.second)[which].kind
            groups[which] = groups[which]._replace(color=color, shape=shape)
        scenes.append(Scene(*groups, scene.relation if question != "position" else "left"))
    return scenes


def quiz(model, tokenizer, scenes: list[Scene], image_embeds, alone: bool) -> dict[str, float]:
    """The share of right answers to each question, as a fraction of 1, from the embeddings (N, E) of N scenes."""
    import numpy as np

    from miniclip.classify.zero_shot import embed_classes

    asked = [(row, scene, which) for row, scene in enumerate(scenes) for which in (0, 1)]
    found = {}
    for question, answers in CLASSES.items():
        place, sentences, keys = {}, [], []  # many scenes put the same question
        for _, scene, which in asked:
            fixed = (scene.first, scene.second)[which].kind if question == "position" else scene.relation
            keys.append((which, fixed if alone else scene))
            if keys[-1] not in place:
                place[keys[-1]] = len(place)
                told = drawn_scenes(scene, question, which) if alone else [scene]
                for answer in answers:
                    variants = [replaced(one, question, which, answer) for one in told]
                    sentences.append([captions(one, random.Random(n), 1)[0] for n, one in enumerate(variants)])
        classes = embed_classes(model, tokenizer, sentences).T.numpy().reshape(len(place), len(answers), -1)
        right = []
        for (row, scene, which), key in zip(asked, keys):
            best = int(np.argmax(classes[place[key]] @ image_embeds[row]))  # of equal ones the first
            right.append(answers[best] == right_answer(scene, question, which))
        found[question] = sum(right) / len(right)
    return found

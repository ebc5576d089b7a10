"""What is zero-shot classification worth? Prints what docs/classify.md says.

    python benchmarks/zero_shot.py --model runs/encoders_unlocked --demo runs/demo --flickr8k data/flickr8k \
        --others runs/encoders_multilingual runs/encoders_cn runs/flickr8k runs/flickr8k_cn

The others are asked for the classes alone, in each language.

Flickr8k has captions and no classes. A picture counts as one of a class where four or five of its five captions name
it, and none names another class. The demo's scenes are known to the last shape.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from miniclip.classify import linear_probe, moderate
from miniclip.classify.prompts import TEMPLATES, describe_coverage, tokenizer_coverage
from miniclip.classify.zero_shot import build_zero_shot_classifier, embed_classes, probabilities
from miniclip.datasets.shapes import drawn
from miniclip.inference.embed import embed_images
from miniclip.inference.fast import inference_copy
from miniclip.inference.load import load
from miniclip.reports.confusion import classification_metrics, format_metrics

WORDS = {  # English, Chinese, French, Spanish, and how captions say it
    "dog": ("狗", "chien", "perro", "dogs?"), "bicycle": ("自行车", "vélo", "bicicleta", r"bi(ke|cycl)\w*"),
    "beach": ("海滩", "plage", "playa", "beach"), "snow": ("雪", "neige", "nieve", r"snow\w*"),
    "football": ("足球", "football", "fútbol", "football|soccer"), "tennis": ("网球", "tennis", "tenis", "tennis"),
    "basketball": ("篮球", "basket-ball", "baloncesto", "basketball"), "pool": ("游泳池", "piscine", "piscina", "pool"),
    "baby": ("婴儿", "bébé", "bebé", "baby|infant"), "swing": ("秋千", "balançoire", "columpio", "swing"),
    "climbing rock": ("攀岩", "escalade", "escalada", r"climb\w*"),
    "skateboard": ("滑板", "planche à roulettes", "monopatín", r"skateboard\w*"),
}  # fmt: skip
ASKED = ["dog", "bicycle", "beach", "snow", "pool", "baby", "skateboard"]


def named(record: dict, word: str) -> int:
    """How many of a picture's captions name a class."""
    return sum(bool(re.search(rf"\b({WORDS[word][3]})\b", text.lower())) for text in record["caption"])


def auc(scores: np.ndarray, yes: np.ndarray) -> float:
    """The share of pairs, one with and one without, of which the one with has the higher score."""
    return float(np.mean(scores[yes][:, None] > scores[~yes][None]))


def ask_in_languages(name: str, paths: list[Path], truth: np.ndarray):
    """Prints the accuracies of a model, of pictures whose classes are known, in each language."""
    model, preprocess, tokenizer = load(name)
    fast = inference_copy(model)
    images = embed_images(fast, preprocess, paths)
    print(f"\n{name}, temperature {1 / model.logit_scale.exp().item():.4f}")
    for number, language in enumerate(TEMPLATES):
        words = list(WORDS) if language == "en" else [value[number - 1] for value in WORDS.values()]
        reading = describe_coverage(tokenizer_coverage(tokenizer, words))
        for templates in [TEMPLATES[language]] + [TEMPLATES[language][:1]] * (language == "en"):
            classifier = build_zero_shot_classifier(fast, tokenizer, words, templates)
            order = (-images @ classifier.numpy()).argsort(axis=1, kind="stable")
            text = format_metrics(classification_metrics(order, truth, len(words))[0], len(words))
            print(f"{language}, {len(templates)} templates: {text}; {reading}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--demo", required=True)
    parser.add_argument("--flickr8k", required=True)
    parser.add_argument("--others", nargs="*", default=[], help="models that are asked for the classes alone")
    options = parser.parse_args()
    model, preprocess, tokenizer = load(options.model)
    fast, root = inference_copy(model), Path(options.flickr8k)
    records = json.loads((root / "en_val.json").read_text())
    paths = [root / record["image"].replace("\\", "/") for record in records]
    start = time.perf_counter()
    embeds = embed_images(fast, preprocess, paths)
    print(f"{len(paths) / (time.perf_counter() - start):.0f} pictures a second")
    counts = np.array([[named(record, word) for word in WORDS] for record in records])
    clear = (counts.max(axis=1) >= 4) & ((counts > 0).sum(axis=1) == 1)
    truth = counts.argmax(axis=1)[clear]
    print(f"\n{len(truth)} pictures, {dict(zip(WORDS, np.bincount(truth).tolist()))}")
    clear_paths = [path for path, kept in zip(paths, clear) if kept]
    for name in (options.model, *options.others):
        ask_in_languages(name, clear_paths, truth)
    start = time.perf_counter()
    build_zero_shot_classifier(fast, tokenizer, [f"thing {number}" for number in range(1000)], TEMPLATES["en"])
    print(f"1,000 classes: {1000 / (time.perf_counter() - start):.0f} classes a second")

    print("\nIs there any? Area under the ROC curve, and the shares right at 0.5 with it and without")
    harmless = moderate.CATEGORIES[moderate.HARMLESS]
    for against in ("nothing", "harmless", "without"):
        rows = []
        for word in ASKED:
            count = counts[:, list(WORDS).index(word)]
            kept = (count >= 4) | (count == 0)
            without = [f"a photo without {word}", f"no {word}"]
            texts = {"nothing": None, "harmless": harmless, "without": without}[against]
            scores, yes = moderate.ask(fast, tokenizer, embeds[kept], word, texts), count[kept] >= 4
            rows.append([auc(scores, yes), (scores[yes] >= 0.5).mean(), (scores[~yes] < 0.5).mean()])
        print(f"against {against}: {np.mean(rows, axis=0).round(3).tolist()}")

    scores = moderate.category_scores(fast, tokenizer, embeds, moderate.CATEGORIES)
    limits = {name: {"threshold": moderate.THRESHOLD, "review": moderate.REVIEW} for name in scores}
    status = [moderate.decide({k: v[i] for k, v in scores.items()}, limits)["status"] for i in range(len(embeds))]
    found = {kind: status.count(kind) for kind in sorted(set(status))}
    print(f"\nmoderation of {len(status)} pictures of everyday life: {found}")
    phrases = [[f"{text} {name}" for text in ("a photo containing", "an image showing", "picture with")]
               for name in moderate.CATEGORIES if name != moderate.HARMLESS]  # fmt: skip
    shares = probabilities(fast, embeds, embed_classes(fast, tokenizer, phrases))
    print(f"among the banned classes alone, above 0.3: {(shares.max(axis=1) > 0.3).mean():.1%} rejected")

    with tempfile.TemporaryDirectory() as scratch:
        half = {}
        for path, row in zip(clear_paths, truth):
            half[row] = half.get(row, 0) + 1
            folder = Path(scratch) / ("train", "test")[half[row] % 2] / list(WORDS)[row]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / path.name).symlink_to(path.resolve())
        print("\nlinear probe, Flickr8k: half of those pictures are examples, the others are measured")
        how = ["--output_dir", f"{scratch}/out", "--shots", "1", "2", "4", "8", "16"]
        halves = ["--examples", f"{scratch}/train", "--images", f"{scratch}/test"]
        linear_probe.main(["--model", options.model, *halves, *how])
        for split, number in (("train", 1500), ("eval", 600)):
            for index, (scene, picture, _) in enumerate(drawn(split, number)):
                if scene.relation == "left":
                    folder = Path(scratch) / "scenes" / split / scene.first.shape
                    folder.mkdir(parents=True, exist_ok=True)
                    picture.save(folder / f"{index}.png")
        print("\nlinear probe, the demo: which shape is on the left?")
        Path(scratch, "templates.txt").write_text("{} on the left\na {} on the left\ntwo small {}s on the left\n")
        how += ["--templates", f"{scratch}/templates.txt", "--shots", "1", "4", "16", "64"]
        scenes = ["--examples", f"{scratch}/scenes/train", "--images", f"{scratch}/scenes/eval"]
        linear_probe.main(["--model", options.demo, *scenes, *how])


if __name__ == "__main__":
    main()

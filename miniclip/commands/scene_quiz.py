"""TODO docstring."""

from __future__ import annotations

import argparse
from pathlib import Path

from miniclip.classify.scene_quiz import CLASSES, quiz
from miniclip.datasets.shapes import drawn
from miniclip.utils.errors import InputError


def main(argv: list[str]):
    parser = argparse.ArgumentParser(
        "python -m miniclip scene_quiz", description="Asks a model for colours, shapes and places in held-out scenes."
    )
    parser.add_argument("--model", required=True, help="folder of a model that was trained on the built-in scenes")
    parser.add_argument("--eval", type=int, default=600, help="number of scenes (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="that of the data which the model was trained on")
    parser.add_argument("--output_file", help="where the JSON goes (default: scene_quiz.json in the model's folder)")
    options = parser.parse_args(argv)
    if not Path(options.model).is_dir():
        raise InputError(f"--model {options.model}: there is no such folder; make demo makes runs/demo")
    if options.eval < 1:
        raise InputError("--eval is 1 or more")

    import torch

    from miniclip.inference.fast import inference_copy
    from miniclip.inference.load import load
    from miniclip.utils.files import write_json

    model, preprocess, tokenizer = load(options.model)
    fast = inference_copy(model)
    scenes, pictures, _ = zip(*drawn("eval", options.eval, options.seed))
    pixel_values = torch.stack([preprocess(picture) for picture in pictures])
    embeds = torch.cat([fast.encode_image(batch, normalize=True) for batch in pixel_values.split(64)]).numpy()
    told, alone = (quiz(fast, tokenizer, list(scenes), embeds, alone) for alone in (False, True))
    print(f"{options.model}, zero-shot, {len(scenes)} held-out scenes with two groups each, right answers in percent:")
    print("| asked for | the rest told | alone | chance |\n|---|---|---|---|")
    for name, classes in CLASSES.items():
        print(f"| {name} | {100 * told[name]:.1f} | {100 * alone[name]:.1f} | {100 / len(classes):.1f} |")
    output = Path(options.output_file or Path(options.model) / "scene_quiz.json")
    about = {"model": str(options.model), "scenes": len(scenes), "seed": options.seed}
    write_json(output, {**about, "told": told, "alone": alone})
    print(f"written to {output}")

"""The command `scene_quiz`: what the demo's model sees in held-out scenes."""

import argparse
from pathlib import Path

from miniclip.utils.errors import InputError


def main(argv: list[str]):
    parser = argparse.ArgumentParser(
        "python -m miniclip scene_quiz",
        description="Asks a model about colours, shapes and positions in held-out scenes.",
    )
    parser.add_argument("--model", required=True, help="folder of a model trained on the built-in scenes")
    parser.add_argument("--eval", type=int, default=600, help="number of scenes (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data that the model was trained on")
    parser.add_argument("--output_file", help="the JSON file to write (default: scene_quiz.json in the model's folder)")
    options = parser.parse_args(argv)
    if not Path(options.model).is_dir():
        raise InputError(f"--model {options.model}: no such folder; `make demo` creates runs/demo")
    if options.eval < 1:
        raise InputError("--eval must be at least 1")

    import torch

    from miniclip.classify.scene_quiz import CLASSES, quiz
    from miniclip.datasets.shapes import drawn
    from miniclip.inference.fast import inference_copy
    from miniclip.inference.load import load
    from miniclip.utils.files import write_json

    model, preprocess, tokenizer = load(options.model)
    fast = inference_copy(model)
    scenes, images, _ = zip(*drawn("eval", options.eval, options.seed))
    pixel_values = torch.stack([preprocess(image) for image in images])
    embeds = torch.cat([fast.encode_image(batch, normalize=True) for batch in pixel_values.split(64)]).numpy()
    given, alone = (quiz(fast, tokenizer, list(scenes), embeds, alone) for alone in (False, True))
    print(f"{options.model}, zero-shot, {len(scenes)} held-out scenes with two groups each, accuracy in percent:")
    print("| question about | with the rest of the scene given | question alone | chance |\n|---|---|---|---|")
    for name, classes in CLASSES.items():
        print(f"| {name} | {100 * given[name]:.1f} | {100 * alone[name]:.1f} | {100 / len(classes):.1f} |")
    output = Path(options.output_file or Path(options.model) / "scene_quiz.json")
    about = {"model": str(options.model), "scenes": len(scenes), "seed": options.seed}
    write_json(output, {**about, "told": given, "alone": alone})
    print(f"written to {output}")

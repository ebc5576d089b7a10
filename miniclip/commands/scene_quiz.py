"""A quiz on colours, shapes and positions in held-out scenes of the demo data set.

Reads a model that was trained on that data set, prints its zero-shot accuracy and writes it to a JSON file."""

from pathlib import Path

from miniclip.utils.command_line import Parser, at_least, print_json, starting
from miniclip.utils.errors import InputError


def main(argv: list[str]):
    parser = Parser.command("scene_quiz", __doc__, "--model runs/demo")
    parser.share("model", required=True, help="folder of a model that was trained on the demo data set")
    parser.add_argument("--eval", type=at_least(1), default=600, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training data set")
    parser.add_argument("--output_file", help="JSON file to write (default: scene_quiz.json in the model's folder)")
    parser.share("json")
    options = parser.parse_args(argv)
    if not Path(options.model).is_dir():
        raise InputError(f"--model {options.model}: there is no such folder. `make demo` makes runs/demo")
    with starting():
        import torch

        from miniclip.classify.scene_quiz import CLASSES, quiz
        from miniclip.datasets.shapes import drawn
        from miniclip.inference.load import load
        from miniclip.utils.files import write_json

    model, preprocess, tokenizer = load(options.model, precision="fp32")
    scenes, images, _ = zip(*drawn("eval", options.eval, options.seed))
    pixel_values = torch.stack([preprocess(image) for image in images])
    embeds = torch.cat([model.encode_image(batch, normalize=True) for batch in pixel_values.split(64)]).numpy()
    given, alone = (quiz(model, tokenizer, list(scenes), embeds, alone) for alone in (False, True))
    print(f"{options.model}, zero-shot accuracy in percent on {len(scenes)} held-out scenes with two groups each:")
    print("| question | with the rest of the scene given | question alone | chance |\n|---|---|---|---|")
    for name, classes in CLASSES.items():
        print(f"| {name} | {100 * given[name]:.1f} | {100 * alone[name]:.1f} | {100 / len(classes):.1f} |")
    output = Path(options.output_file or Path(options.model) / "scene_quiz.json")
    about = {"model": str(options.model), "scenes": len(scenes), "seed": options.seed, "told": given, "alone": alone}
    write_json(output, about)
    print(f"written to {output}")
    print_json(options, about)

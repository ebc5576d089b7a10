"""Upload of a model to the Hugging Face hub, with a model card.

Reads a model and what its folder records of training and results, and writes to the hub what MiniCLIP, OpenCLIP and
transformers load. Checkpoints, logs and paths of your data are never uploaded.
"""

from pathlib import Path

from miniclip.commands.common import check_folder_or_weights
from miniclip.utils.command_line import Parser, starting


def main(argv: list[str]):
    parser = Parser.command("push", __doc__, "--model runs/mine --repo org/name --license mit")
    parser.share("model", required=True)
    parser.share("pretrained")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME", help="repository, made if it does not exist")
    licence = "licence that you give the weights, required: mit, apache-2.0, cc-by-4.0, ..."
    parser.add_argument("--license", help=licence)
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to upload to (default: main)")
    options = parser.parse_args(argv)
    check_folder_or_weights("--model", options.model, options.pretrained)
    with starting():
        from miniclip.inference.load import load
        from miniclip.weights.push import check_license

    check_license(options.license)
    model, *_ = load(options.model, options.pretrained)
    run = options.model if Path(options.model).is_dir() and not options.pretrained else None
    private = options.private or None  # None: as the organisation's default is
    how = {"license": options.license, "private": private, "revision": options.revision, "run": run}
    print(f"uploaded: {model.push_to_hub(options.repo, **how)}")

"""Published weights: the models and tags for --model and --pretrained, and where they come from.

With a model and a tag, downloads the weights into the cache and prints their path: for machines without a network.
"""

from miniclip.utils.command_line import Parser, print_json, starting


def main(argv: list[str]):
    parser = Parser.command("pretrained", __doc__, "ViT-B-32")
    parser.add_argument("MODEL", nargs="?", help="list the tags of this model only")
    parser.add_argument("TAG", nargs="?", help="download these weights")
    parser.add_argument("--cache_dir", help="folder to download to (default: the Hugging Face cache)")
    parser.share("json")
    options = parser.parse_args(argv)
    with starting():
        from miniclip.weights import pretrained

    if options.MODEL:
        pretrained.check_model(options.MODEL)
    if options.TAG:
        facts = pretrained.get_pretrained_cfg(options.MODEL, options.TAG)
        path = str(pretrained.download_pretrained(facts, cache_dir=options.cache_dir))
        print(path)
        return print_json(options, {"path": path})
    pairs = [pair for pair in pretrained.list_pretrained() if options.MODEL in (None, pair[0])]
    rows = [{"model": m, "tag": t} | pretrained.get_pretrained_cfg(m, t) for m, t in pairs]
    print_json(options, rows)
    if not rows:
        print(f"no published weights of {options.MODEL} are known: train it, or name a file of weights")
    for row in rows:
        activation = "QuickGELU" if row["quick_gelu"] else "GELU"
        source = f"hf-hub:{row['hf_hub'].rstrip('/')}" if row["hf_hub"] else row["url"]
        print(f"{row['model']:<29} {row['tag']:<29} {activation:<10} {source}")

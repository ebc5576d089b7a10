"""Moderation: whether images show a thing, or something that should not be shown.

Reads images, and writes moderation.json and moderation.md to --output_dir."""

from miniclip.commands import common
from miniclip.utils.command_line import Parser, cell, printable, starting
from miniclip.utils.errors import InputError


def main(argv: list[str]):
    parser = Parser.command("moderate", __doc__, '--model runs/mine --images photos --ask "a dog"')
    parser.add_argument("--ask", metavar="THING", help='ask a yes/no question: "a dog" (default: all categories)')
    parser.add_argument("--against", nargs="+", help="texts that stand for no, with --ask (default: a photo, ...)")
    parser.add_argument("--categories", help="JSON file of categories and their texts (docs/classify.md)")
    parser.add_argument("--examples", help="labelled images to set thresholds: folders yes and no, or by category")
    common.share_image_flags(parser, "moderation")
    options = parser.parse_args(argv)
    if not all(text is None or text.strip() for text in (options.ask, *(options.against or ()))):
        raise InputError('--ask or --against is empty. Name a thing: --ask "a dog"')
    if options.ask and options.categories or options.against and not options.ask:
        raise InputError("--against needs --ask, and --ask excludes --categories")
    with starting():
        from miniclip.classify import moderate as rules
        from miniclip.classify.images import find_images
        from miniclip.classify.prompts import warn_of_poor_coverage
        from miniclip.utils.bad_samples import BadSamples

    categories = rules.read_categories(options.categories) if options.categories else rules.CATEGORIES
    images = find_images(options.images)
    model, preprocess, tokenizer = common.open_model(options)
    bad_samples = BadSamples()
    if options.ask:
        wanted, no = ["yes"], "no"
        score = lambda embeds: {"yes": rules.ask(model, tokenizer, embeds, options.ask, options.against)}  # noqa: E731
    else:
        wanted, no = [name for name in categories if name != rules.HARMLESS], rules.HARMLESS
        score = lambda embeds: rules.category_scores(model, tokenizer, embeds, categories)  # noqa: E731
    warn_of_poor_coverage(tokenizer, [options.ask] if options.ask else wanted)
    default = {"threshold": rules.THRESHOLD, "review": rules.THRESHOLD if options.ask else rules.REVIEW}
    thresholds = {name: default for name in wanted}
    embed = lambda images: common.embed_usable(options, model, preprocess, images, bad_samples)  # noqa: E731
    if options.examples:
        thresholds |= rules.calibrate_from(options.examples, wanted, no, score, embed)
    images, embeds = embed(images)
    scores, results = score(embeds), []
    for row, (path, _) in enumerate(images):
        each = {name: float(values[row]) for name, values in scores.items()}
        if options.ask:
            answer = {"answer": "yes" if each["yes"] >= thresholds["yes"]["threshold"] else "no", "score": each["yes"]}
        else:
            answer = {**rules.decide(each, thresholds), "scores": each}
        results.append({"image": path, **answer})
    verdict, number = ("answer", "score") if options.ask else ("status", "confidence")
    lines = [f"| image | {verdict} | reason | {number} |", "|---|---|---|---|"]
    for r in results:
        lines.append(f"| {cell(r['image'])} | {r[verdict]} | {cell(r.get('reason', options.ask))} | {r[number]:.2f} |")
    counts = {kind: sum(r[verdict] == kind for r in results) for kind in dict.fromkeys(r[verdict] for r in results)}
    about = {"model": str(options.model), "ask": options.ask, "calibrated": bool(options.examples)}
    results = {**about, "thresholds": thresholds, "pictures": results}
    said = [common.first_rows(lines)]
    for name, limits in thresholds.items():
        on = f"balanced accuracy {limits['balanced_accuracy']:.2f} on" if len(limits) > 2 else "without"
        review = "" if options.ask else f", review from {limits['review']:.3f}"
        said.append(f"{printable(name)}: threshold {limits['threshold']:.3f}{review} ({on} examples)")
    said.append(f"{counts} of {len(images)} images")
    common.finish(options, "moderation", results, "\n".join(lines), bad_samples, "\n".join(said))

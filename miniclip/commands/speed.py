"""What this machine gives: milliseconds per image and caption in each precision, beside its limit.

Takes some seconds; no data are needed. The limit is the speed of large matrix products, which take turns with the
model; the share of it is a ratio of processor times, which other programs change little. Writes nothing."""

import warnings

from miniclip.utils.command_line import Parser, find_device, print_json, starting
from miniclip.utils.machine import processor

BATCHES = 1, 32


def main(argv: list[str]):
    parser = Parser.command("speed", __doc__, "--model runs/mine")
    parser.share("model", default="TinyCLIP-ViT-40M-32-Text-19M")
    parser.share("pretrained", "device", "json")
    options = parser.parse_args(argv)
    with starting():
        import torch

        from miniclip.inference.load import load
        from miniclip.inference.peak import SQUARE, model_flops, products
        from miniclip.inference.precision import compare, made_up, settle
        from miniclip.utils.weight_files import refuse_export

    refuse_export(options.model)
    device = find_device(options.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights are as fast
        model, _, _ = load(options.model, options.pretrained, device)
    name, square = (torch.cuda.get_device_name(device), 4 * SQUARE) if device.type == "cuda" else (processor(), SQUARE)
    multiply, cases = products(device, square), [(kind, n) for kind in ("image", "text") for n in BATCHES]
    seconds, cosines = compare(model, tuple(multiply), cases, **multiply)
    peak = {precision: 2 * square**3 / seconds[precision].wall for precision in multiply}
    inputs = made_up(model, max(BATCHES))
    flops = {"image": model_flops(model.encode_image, inputs["image"][:1]),
             "text": model_flops(model.encode_text, inputs["text"]) / max(BATCHES)}  # fmt: skip
    limits = ", ".join(f"{precision} {speed / 1e9:,.0f}" for precision, speed in peak.items())
    print(f"{name}, {torch.get_num_threads()} threads: {limits} GFLOP/s in large matrix products")
    print(f"{options.model}, ms each (share of that speed); captions of {inputs['text'].shape[1]} tokens")
    heads = [f"{n} {'image' if kind == 'image' else 'caption'}{'s' * (n > 1)}" for kind, n in cases]
    print("      " + "".join(f"{head:>17}" for head in heads) + "   cosine to fp32")
    rows = {}
    for precision in peak:
        rows[precision] = {"cosine": cosines[precision]}
        cells = []
        for head, (kind, n) in zip(heads, cases):
            took, least = seconds[precision, (kind, n)], seconds[precision].busy * flops[kind] / (2 * square**3)
            rows[precision][head] = {"ms": 1e3 * took.wall / n, "share": n * least / took.busy}
            cells.append("{ms:.2f} ({share:.0%})".format(**rows[precision][head]))
        print(f"{precision:6}" + "".join(f"{cell:>17}" for cell in cells) + f"   {cosines[precision]:.5f}")
    chosen = settle(model, "auto")
    print_json(options, {"machine": name, "peak": peak, "flops": flops, "precisions": rows, "auto": chosen})

"""How does one measure retrieval with OpenCLIP? The job of `evaluate.py`, written as a user of OpenCLIP would.

peers/bin/python benchmarks/peer_evaluate.py --model MODEL.json --pretrained WEIGHTS --eval_file CAPTIONS.json
"""

import argparse
import json
from pathlib import Path

import torch
from contestants import ImageFiles, import_open_clip, load_open_clip
from torch.utils.data import DataLoader


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pretrained", type=Path, required=True)
    parser.add_argument("--eval_file", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=0)
    options = parser.parse_args()
    model, preprocess, tokenizer = load_open_clip(import_open_clip(), options.model, options.pretrained)

    records = json.loads(options.eval_file.read_text())
    paths = [options.eval_file.parent / record["image"] for record in records]
    captions = [caption for record in records for caption in record["caption"]]
    image_of_text = torch.tensor([i for i, record in enumerate(records) for _ in record["caption"]])
    loader = DataLoader(ImageFiles(paths, preprocess), options.batch_size, num_workers=options.num_workers)
    image_embeds = torch.cat([model.encode_image(images, normalize=True) for images in loader])
    text_embeds = torch.cat([
        model.encode_text(tokenizer(captions[i : i + options.batch_size]), normalize=True)
        for i in range(0, len(captions), options.batch_size)
    ])  # fmt: skip

    scores = text_embeds @ image_embeds.T
    print(f"{len(paths)} images, {len(captions)} captions")
    print(f"{'':14}  {'R@1':>7}  {'R@5':>7}  {'R@10':>7}")
    for direction, table in (("image to text", scores.T), ("text to image", scores)):
        found = table.topk(min(10, table.shape[1])).indices
        if direction == "image to text":
            hits = image_of_text[found] == torch.arange(len(paths))[:, None]
        else:
            hits = found == image_of_text[:, None]
        recalls = [100 * hits[:, :k].any(dim=1).float().mean().item() for k in (1, 5, 10)]
        print(f"{direction:14}  " + "  ".join(f"{recall:7.1f}" for recall in recalls))


if __name__ == "__main__":
    main()

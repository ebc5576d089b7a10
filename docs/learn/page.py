"""Makes clip.html, the page to play with: clip.template.html with the numbers of chapter 0's model in it.

    python docs/learn/page.py           trains the model as chapter 0 does (a minute), and writes clip.html
    python docs/learn/page.py --keep    keeps the numbers that clip.html has: for changes of the template
"""

import base64
import json
import os
import re
import sys
from pathlib import Path

LEARN = Path(__file__).resolve().parent
sys.path.insert(0, str(LEARN.parents[1]))

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: threads that wait for one another spin only briefly

import torch  # noqa: E402

import miniclip  # noqa: E402
from docs.learn.scenes import embed, make_pairs, train  # noqa: E402
from miniclip.tokenizer import WORD, clean, load_table  # noqa: E402

EIGHT, STEPS = 8, 200


def merge_steps(word: str) -> list[list[int]]:
    """The ids of a word after each merge, from its bytes to its tokens (chapter 4)."""
    byte_ids, merges, _ = load_table()
    *inner, last = (byte_ids[byte] for byte in word.encode())
    steps = [[*inner, last + 256]]
    while possible := [(merges[pair], i) for i, pair in enumerate(zip(steps[-1], steps[-1][1:])) if pair in merges]:
        new, i = min(possible)
        steps.append([*steps[-1][:i], new, *steps[-1][i + 2 :]])
    return steps


def describe(levels: torch.Tensor, caption: str) -> dict:
    """A scene: its pixels (channel, row, column), its caption, and the merges of each of the caption's words."""
    pixels = base64.b64encode(levels.numpy().tobytes()).decode()
    return {"pixels": pixels, "caption": caption, "words": [merge_steps(word) for word in WORD.findall(clean(caption))]}


def matrices(model: miniclip.MiniClip, images: torch.Tensor, texts: list[list[str]]) -> dict:
    """The embeddings of scenes and captions, of unit length, and the model's logit scale."""
    image, text = ([[round(x, 6) for x in row] for row in part.tolist()] for part in embed(model, images, texts))
    return {"scale": model.logit_scale.exp().item(), "image": image, "text": text}


def untrained() -> tuple[miniclip.MiniClip, dict]:
    """The model with random weights, and all of the page's numbers that do not need a trained one."""
    torch.manual_seed(0)
    model = miniclip.MiniClip(miniclip.MiniClipConfig.from_json(LEARN / "small.json")).eval()
    images, texts = make_pairs("eval", EIGHT)
    scenes = [describe(levels, captions[0]) for levels, captions in zip(images, texts)]
    pieces = load_table()[2]
    used = sorted({id for scene in scenes for word in scene["words"] for step in word for id in step})
    vision, preprocess = model.config.vision_cfg, model.config.preprocess_cfg
    return model, {
        "size": vision.image_size, "patch": vision.patch_size, "width": vision.width, "steps": STEPS,
        "mean": preprocess.mean, "std": preprocess.std, "context": model.config.text_cfg.context_length,
        "start": miniclip.Tokenizer.sot_token_id, "end": miniclip.Tokenizer.eot_token_id,
        "pieces": {id: pieces[id].decode().replace(" ", "_") for id in used}, "scenes": scenes,
        "before": matrices(model, images, texts),
    }  # fmt: skip


def trained() -> dict:
    """All numbers of the page."""
    model, data = untrained()
    train(model, *make_pairs("train", 3000), STEPS)
    return data | {"after": matrices(model, *make_pairs("eval", EIGHT))}


def fill(template: str, data: dict) -> str:
    return template.replace("{DATA}", json.dumps(data).replace("<", "\\u003c"))


def read(page: str) -> dict:
    """The numbers in a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def main(argv: list[str]):
    if argv not in ([], ["--keep"]):
        sys.exit(__doc__)
    os.chdir(LEARN.parents[1])
    page = LEARN / "clip.html"
    data = read(page.read_text(encoding="utf-8")) if argv else trained()
    page.write_text(fill((LEARN / "clip.template.html").read_text(encoding="utf-8"), data), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

"""What the chapters share: scenes held in memory, and a training loop short enough to read (chapters 0, 3 and 5).

Start `python` in the root of the repository, then `from docs.learn.scenes import make_pairs, recall, train`.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: threads that wait for one another spin only briefly

import torch  # noqa: E402

import miniclip  # noqa: E402
from miniclip.datasets.shapes import captions, drawn  # noqa: E402


def make_pairs(split: str, number: int, size: int = 64) -> tuple[torch.Tensor, list[list[str]]]:
    """Scenes of the split "train" or "eval": uint8 images (number, 3, size, size), and five captions of each."""
    preprocess = miniclip.Preprocess(miniclip.MiniClipConfig.from_json("docs/learn/small.json").preprocess_cfg)
    scenes = [(preprocess.levels(image), captions(scene, rng)) for scene, image, rng in drawn(split, number, size=size)]
    return torch.stack([image for image, _ in scenes]), [texts for _, texts in scenes]


def train(model, images, texts, steps: int, batch: int = 128, learning_rate: float = 1e-3, seed: int = 0) -> list:
    """Trains a model on pairs with CLIP's loss; returns the loss of each step."""
    torch.manual_seed(seed)
    normalize, tokenizer = miniclip.Preprocess(model.config.preprocess_cfg).normalize, model.text.tokenizer
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    model.train()
    losses = []
    for _ in range(steps):
        rows = torch.randperm(len(images))[:batch].tolist()
        chosen = [texts[row][torch.randint(len(texts[row]), ()).item()] for row in rows]  # one caption of each
        image_embeds, text_embeds, scale, _ = model(normalize(images[rows]), tokenizer(chosen, trim=True))
        loss = miniclip.clip_loss(image_embeds, text_embeds, scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(0, miniclip.model.MAX_LOGIT_SCALE)
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def embed(model, images, texts) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings of images and of the first caption of each, of unit length."""
    pixels = miniclip.Preprocess(model.config.preprocess_cfg).normalize(images)
    ids = model.text.tokenizer([of_image[0] for of_image in texts], trim=True)
    return model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)


def recall(model, images, texts) -> float:
    """Mean recall, in percent, over K = 1, 5, 10 and both directions: do captions find their images, and back?"""
    image_embeds, text_embeds = embed(model, images, texts)
    metrics = miniclip.retrieval_metrics(image_embeds.numpy(), text_embeds.numpy(), list(range(len(images))))
    return 100 * metrics["mean_recall"]

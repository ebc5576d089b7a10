"""Draws the illustrations of chapters 1, 2, 4 and 5; plots of results are drawn in the chapters."""

import matplotlib.pyplot as plt
import torch

GREY, BLUE, ORANGE, GREEN = "#5b6470", "#dbe7ff", "#ffe8cc", "#dff3e4"
HEIGHTS = [8.6, 6.9, 5.4, 3.9, 2.4]
COLUMNS = (  # x, colour, boxes, arrows between them
    (2.5, BLUE,
     ["", "pixel_values  (B, 3, 64, 64)", "sequence  (B, 1 + 16, 128)", "class token  (B, 128)",
      "image_embeds  (B, 96)"],
     ["resize, crop, normalise (transforms.py)", "cut into patches, add positions",
      "4 blocks, all positions see all; read the first", "projection, length 1"]),
    (7.5, ORANGE,
     ['"two small red circles ..."', "input_ids  (B, L)", "sequence  (B, L, 64)", "end token  (B, 64)",
      "text_embeds  (B, 96)"],
     ["byte-pair encoding (tokenizer.py)", "look up tokens, add positions", "2 blocks, causal; read the end token",
      "projection, length 1"]),
)  # fmt: skip


def draw_data_flow(image):
    """Chapter 1: from a JPEG, `image` (Pillow), and a caption to the loss, with shapes."""
    figure, axis = plt.subplots(figsize=(9, 8.4), layout="constrained")
    axis.set(xlim=(0, 10), ylim=(-0.6, 9.4))
    axis.axis("off")

    def box(x, y, text, colour):
        style = {"boxstyle": "round,pad=0.45", "facecolor": colour, "edgecolor": GREY}
        axis.text(x, y, text, ha="center", va="center", bbox=style, fontsize=10)

    def arrow(start, end, text=""):
        axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": GREY, "shrinkA": 0, "shrinkB": 0})
        axis.text(start[0] + 0.12, (start[1] + end[1]) / 2, text, va="center", fontsize=8.5, color=GREY)

    for x, colour, names, ways in COLUMNS:
        for y, name in zip(HEIGHTS, names):
            if name:
                box(x, y, name, colour)
        for top, bottom, way in zip(HEIGHTS, HEIGHTS[1:], ways):
            arrow((x, top - (0.65 if top == HEIGHTS[0] and x < 5 else 0.32)), (x, bottom + 0.32), way)
    picture = axis.inset_axes([1.85, 7.98, 1.3, 1.3], transform=axis.transData)
    picture.imshow(image)
    picture.set_axis_off()
    axis.text(1.75, 8.6, "JPEG", ha="right", va="center")
    box(5, 0.9, "logits = logit_scale x image_embeds x text_embeds$^T$   (B, B)", GREEN)
    arrow((2.5, 2.08), (3.6, 1.22))
    arrow((7.5, 2.08), (6.4, 1.22))
    arrow((5, 0.58), (5, 0.08), "cross-entropy of rows and of columns (loss.py)")
    box(5, -0.25, "loss  (one number)", GREEN)
    figure.savefig("docs/learn/figures/data_flow.png", dpi=110)


def draw_three_by_three(logits: torch.Tensor):
    """Chapter 2: logits (3, 3), and the softmax of their rows and of their columns."""
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), layout="constrained")
    titles = "logits", "softmax of each row\n(image to text)", "softmax of each column\n(text to image)"
    for axis, title, values in zip(axes, titles, (logits, logits.softmax(1), logits.softmax(0))):
        axis.imshow(values, cmap="Blues", vmin=0, vmax=values.max() * 1.3)
        for i in range(3):
            for j in range(3):
                label = f"{values[i, j]:.3g}" if title == "logits" else f"{values[i, j]:.0%}"
                axis.text(j, i, label, ha="center", va="center")
            frame = {"fill": False, "edgecolor": "C1", "linewidth": 2.5}
            axis.add_patch(plt.Rectangle((i - 0.48, i - 0.48), 0.96, 0.96, **frame))
        axis.set_xticks(range(3), ['"a dog"', '"a cat"', '"a car"'])
        axis.set_yticks(range(3), ["dog", "cat", "car"])
        axis.set_title(title)
    figure.savefig("docs/learn/figures/loss_3x3.png", dpi=110)


def draw_causal_mask(words: list[str]):
    """Chapter 4: which positions each position sees."""
    n = len(words)
    figure, axis = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
    axis.imshow(torch.ones(n, n).tril(), cmap="Blues", vmax=1.6)
    frame = {"fill": False, "edgecolor": "C1", "linewidth": 2.5}
    axis.add_patch(plt.Rectangle((-0.48, n - 1.48), n - 0.04, 0.96, **frame))
    axis.set_xticks(range(n), words, rotation=45, ha="right")
    axis.set_yticks(range(n), words)
    axis.set(xlabel="can see", ylabel="position")
    axis.set_title("The causal mask: only the end token sees all", fontsize=10)
    figure.savefig("docs/learn/figures/causal_mask.png", dpi=110)


def draw_patches(levels: torch.Tensor, patches: torch.Tensor):
    """Chapter 5: an image, levels (3, 64, 64), with its grid, and its patches (16, 3, 16, 16) in a row."""
    figure = plt.figure(figsize=(9.5, 3.1), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 2.2])
    axis = left.subplots()
    axis.imshow(levels.permute(1, 2, 0), extent=(0, 64, 64, 0))
    axis.set(xticks=range(0, 65, 16), yticks=range(0, 65, 16))
    axis.grid(color="black", linewidth=1)
    for i in range(len(patches)):
        axis.text(i % 4 * 16 + 1, i // 4 * 16 + 5, str(i + 1), fontsize=9)
    axis.set_title("64 x 64 pixels, 16 patches", fontsize=10)
    for position, cell in enumerate(right.subplots(2, 9).flat):
        cell.set_axis_off()
        if position <= len(patches):
            cell.imshow(patches[position - 1].permute(1, 2, 0) if position else torch.ones(16, 16, 3))
            cell.set_title(str(position), fontsize=9)
        if position == 0:
            cell.text(7.5, 7.5, "class\ntoken", ha="center", va="center", fontsize=9)
    right.suptitle("the sequence: 17 positions", fontsize=10)
    figure.savefig("docs/learn/figures/patches.png", dpi=110)

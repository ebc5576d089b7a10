"""Draws figures/data_flow.png, the picture of chapter 1: from a JPEG and a caption to the loss, with shapes."""

import matplotlib.pyplot as plt

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


def draw_data_flow(image, path: str):
    """Draws the flow with `image` (a Pillow image) as its JPEG into the file `path`."""
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
    figure.savefig(path, dpi=110)

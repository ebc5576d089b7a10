"""Embeds an image and captions with an exported folder, without torch: python onnx_consumer.py DIR IMAGE CAPTION ...

pip install numpy pillow onnxruntime tokenizers
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from tokenizers import Tokenizer

folder, picture, captions = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
pre, about = (json.loads((folder / name).read_text()) for name in ("preprocess.json", "export.json"))
assert pre["resize_mode"] == "shortest", "see the steps in preprocess.json"

image, size, to = ImageOps.exif_transpose(Image.open(picture)).convert("RGB"), pre["size"], pre["resize_to"]
width, height = (int(to * side / min(image.size)) for side in image.size)
image = image.resize((width, height), Image.Resampling[pre["interpolation"].upper()])
half = round if pre["center_crop"] == "torchvision" else int
left, top = half((width - size) / 2), half((height - size) / 2)
levels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32)
pixel_values = ((levels / 255 - np.float32(pre["mean"])) / np.float32(pre["std"])).transpose(2, 0, 1)[None]
input_ids = np.array([text.ids for text in Tokenizer.from_file(f"{folder}/tokenizer.json").encode_batch(captions)])

image_embeds = onnxruntime.InferenceSession(folder / "image.onnx").run(None, {"pixel_values": pixel_values})[0]
text_embeds = onnxruntime.InferenceSession(folder / "text.onnx").run(None, {"input_ids": input_ids})[0]
scores = np.exp(about["logit_scale"] * image_embeds @ text_embeds.T)[0]
found = {"image": image_embeds, "text": text_embeds, "shares": scores / scores.sum()}
print(json.dumps({name: values.tolist() for name, values in found.items()}))

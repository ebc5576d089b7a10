"""Do OpenCLIP, transformers and sentence-transformers compute what MiniCLIP does, from the file to the vector?

The last and OpenCLIP are not required. In an environment with them:

    pip install open_clip_torch sentence-transformers
    python -m pytest tests/weights/test_exports.py -s     # prints the largest differences
"""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.image_utils import load_image

import miniclip
from miniclip.config import MiniClipConfig
from miniclip.inference.embed import embed_images, embed_texts
from miniclip.model import MiniClip
from miniclip.tokenizer import Tokenizer
from miniclip.transforms import Preprocess
from miniclip.utils.errors import CheckpointError
from miniclip.weights.clip_tokenizer import clip_tokenizer, write_tokenizer
from miniclip.weights.convert import convert

TEXTS = [
    "a dog", "", "Two DOGS, 3 cats' tails & a bird's nest!", "a long caption " * 40, "tabs\tand\nlines\x00",
    "两只狗在草地上奔跑。", "“引号”，ＡＢＣ１２　ﾊﾟﾘ", "🐶👩‍👩‍👧 👍🏽", "It’s a “ﬁne” day…",
    "cafe\u0301 ÉCOLE Straße ΟΔΟΣ ΟΔΟΣ.",
    "Tom &amp; Jerry &lt;3 &quot;x&quot; &amp;amp; it&#39;s&nbsp;on",
]  # fmt: skip
# With a crop to 32, margins 0 to 7, above and beside; smaller than the crop; far larger.
SIZES = [
    (32, 32),
    (35, 32),
    (39, 32),
    (32, 35),
    (32, 39),
    (33, 32),
    (70, 64),
    (78, 64),
    (17, 21),
    (21, 300),
    (400, 299),
]


@pytest.fixture(scope="module", params=["context 32", "QuickGELU"])
def exported(request, tmp_path_factory):
    """A saved model, its conversions beside it, images and MiniCLIP's own vectors."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("exported")
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
    text = {"width": 48, "heads": 3, "layers": 2} | ({"context_length": 32} if request.param == "context 32" else {})
    values = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "quick_gelu": request.param == "QuickGELU"}
    torch.manual_seed(0)
    model = MiniClip(MiniClipConfig.from_dict(values)).eval()
    model.save_pretrained(folder / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for form in ("openclip", "hf", "sentence-transformers"):
            convert(folder / "ours", folder / form, form)
        convert(folder / "ours", folder / "tiny.pt", "openclip")
    (folder / "tiny.json").write_text(json.dumps(read_model_cfg(folder)))
    files = []
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate(SIZES):
        image = Image.fromarray(rng.integers(0, 256, (height // 2, width // 2, 3), dtype=np.uint8))
        image.resize((width, height)).save(file := folder / f"{i}.png")
        files.append(file)
    Image.open(files[-1]).convert("L").save(grey := folder / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.open(files[7]).save(turned := folder / "turned.jpg", quality=95, exif=exif)
    files += [grey, turned]
    _, preprocess, tokenizer = miniclip.load(folder / "ours")
    ours = embed_images(model, Preprocess(preprocess.cfg, "full"), files), embed_texts(model, tokenizer, TEXTS)
    return folder, files, ours


def read_model_cfg(folder) -> dict:
    return json.loads((folder / "openclip" / "open_clip_config.json").read_text())["model_cfg"]


def unit(embeds) -> np.ndarray:
    return torch.nn.functional.normalize(torch.as_tensor(embeds).detach().float(), dim=-1).numpy()


def largest(name: str, theirs: tuple, ours: tuple) -> float:
    """The largest difference of image and text vectors, also printed."""
    differences = [float(np.abs(a - b).max()) for a, b in zip(theirs, ours, strict=True)]
    print(f"\n{name}: images {differences[0]:.1e}, texts {differences[1]:.1e}")
    return max(differences)


@pytest.mark.parametrize("processor_class", [CLIPProcessor, AutoProcessor])
def test_transformers(exported, processor_class):
    folder, files, ours = exported
    model = CLIPModel.from_pretrained(folder / "hf").eval()
    processor = processor_class.from_pretrained(folder / "hf", trust_remote_code=True)
    inputs = processor(
        images=[load_image(str(file)) for file in files], text=TEXTS, return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        output = model(**inputs)
    assert largest("transformers", (output.image_embeds.numpy(), output.text_embeds.numpy()), ours) < 1e-5
    assert type(AutoModel.from_pretrained(folder / "hf")) is CLIPModel
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    context = model.config.text_config.max_position_embeddings
    assert tokenizer.model_max_length == context and len(tokenizer) == 49408
    padded = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    assert padded.shape == (len(TEXTS), context) and tokenizer.decode(padded[0], skip_special_tokens=True) == "a dog"


def test_transformers_without_code(exported):
    """Margins of 3, 7, ... are cropped one pixel elsewhere, all others alike; no code of the folder runs."""
    folder, files, (ours, _) = exported
    model = CLIPModel.from_pretrained(folder / "hf").eval()
    processor = AutoProcessor.from_pretrained(folder / "hf", backend="pil")
    pixel_values = processor(images=[load_image(str(file)) for file in files], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        difference = np.abs(unit(model.get_image_features(pixel_values=pixel_values).pooler_output) - ours).max(axis=1)
    sides = [sorted(load_image(str(file)).size) for file in files]
    elsewhere = np.array([int(32 * long / short) % 4 == 3 for short, long in sides])
    assert elsewhere.sum() > 5 and (difference[~elsewhere] < 1e-5).all() and (difference[elsewhere] > 1e-4).all()


def test_the_zero_shot_pipeline(exported):
    folder, files, (images, texts) = exported
    classify = pipeline("zero-shot-image-classification", str(folder / "hf"), trust_remote_code=True)
    labels = [text for text in TEXTS if len(text) < 100]  # the pipeline does not cut longer ones
    rows = [TEXTS.index(label) for label in labels]
    scale = float(CLIPModel.from_pretrained(folder / "hf").logit_scale.detach().exp())
    answers = classify([str(file) for file in files], candidate_labels=labels, hypothesis_template="{}")
    for image, answer in zip(images, answers, strict=True):
        expected = torch.softmax(torch.from_numpy(scale * texts[rows] @ image), dim=0).tolist()
        scores = {each["label"]: each["score"] for each in answer}
        assert max(abs(scores[label] - e) for label, e in zip(labels, expected, strict=True)) < 1e-5


@pytest.mark.parametrize("form", ["openclip", "tiny.pt"])
def test_openclip(exported, form):
    open_clip = pytest.importorskip("open_clip", reason="pip install open_clip_torch: see the top of this file")
    folder, files, ours = exported
    if form == "openclip":
        name, weights = f"local-dir:{folder / form}", None
    else:
        open_clip.add_model_config(folder / "tiny.json")
        name, weights = "tiny", str(folder / form)
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    with torch.no_grad():
        images = torch.stack([preprocess(ImageOps.exif_transpose(Image.open(file))) for file in files])
        theirs = model.encode_image(images), model.encode_text(tokenizer(TEXTS))
    assert largest(f"OpenCLIP, {form}", tuple(map(unit, theirs)), ours) < 1e-5


def test_sentence_transformers(exported):
    reason = "pip install sentence-transformers: see the top of this file"
    sentence_transformers = pytest.importorskip("sentence_transformers", reason=reason)
    folder, files, ours = exported
    path = str(folder / "sentence-transformers")
    model = sentence_transformers.SentenceTransformer(path, device="cpu", trust_remote_code=True)
    images = [load_image(str(file)) for file in files]
    assert largest("sentence-transformers", (model.encode(images), model.encode(TEXTS)), ours) < 1e-5
    plain = sentence_transformers.SentenceTransformer(path, device="cpu")  # runs without the code, too
    assert largest("sentence-transformers without trust_remote_code", (plain.encode(images), ours[1]), ours) > 1e-5


def test_back_again(exported):
    """Center crop, activation and sizes survive the way through transformers."""
    folder, *_ = exported
    convert(folder / "sentence-transformers", folder / "back", "miniclip", force=True)
    assert MiniClip.from_pretrained(folder / "back").config == MiniClip.from_pretrained(folder / "ours").config


def test_token_ids_on_flickr8k(flickr8k):
    tokenizer, ours = clip_tokenizer(), Tokenizer()
    for name in ("en_val", "cn_val"):
        captions = [
            text for record in json.loads((flickr8k / f"{name}.json").read_text()) for text in record["caption"]
        ]
        assert len(captions) == 5000
        rows = [encoding.ids for encoding in tokenizer.encode_batch(captions)]
        assert rows == ours.rows(captions, 1 << 20)


def test_token_ids_of_random_text(tmp_path):
    """All but broken encodings, which nothing else repairs: hence no accented letter before a sign of Windows-1252."""
    write_tokenizer(tmp_path, 77)
    tokenizer, ours = PreTrainedTokenizerFast.from_pretrained(tmp_path), Tokenizer()
    signs = [
        *"aA zZ'sSK&;<>\"t09.,!@#|_",
        *"你好，。！（）“”‘’ＡｂＣ１２ｶﾞ한ａéñŉﬁ…—🐶👍🏽\u200d\ufe0f\u00a0\u3000\t\n\x93\u212bİıſßẞΣσ",
    ]
    rng = np.random.default_rng(0)
    pieces = [*signs, "&amp;", "&lt;", "&#39;", "'re", "<|endoftext|>", "<|startoftext|>", "ΟΣ"]
    texts = ["".join(rng.choice(pieces, rng.integers(0, 12))) for _ in range(1000)]
    texts = [text for text in texts if text.isascii() or not {"\x93", "Σ"} & {*text}] + ["\x93a\x93 ΟΔΟΣ"]
    assert tokenizer(texts)["input_ids"] == ours.rows(texts, 1 << 20)


def test_what_the_forms_cannot_hold(tiny_config, tmp_path):
    tiny_config.text_cfg.vocab_size = 100
    MiniClip(tiny_config).save_pretrained(tmp_path / "few")
    with pytest.warns(UserWarning, match="no tokenizer is written: the text tower has 100 tokens"):
        convert(tmp_path / "few", tmp_path / "hf", "hf")
    assert not (tmp_path / "hf" / "tokenizer.json").exists()
    values = tiny_config.to_dict() | {"preprocess_cfg": {"resize_mode": "longest"}}
    MiniClip(MiniClipConfig.from_dict(values)).save_pretrained(tmp_path / "padded")
    values = tiny_config.to_dict() | {"init_logit_bias": -10.0}  # trained with SigLIP's loss
    MiniClip(MiniClipConfig.from_dict(values)).save_pretrained(tmp_path / "biased")
    for form in ("hf", "sentence-transformers"):
        with pytest.raises(CheckpointError, match="resize_mode 'longest'"):
            convert(tmp_path / "padded", tmp_path / "x", form)
        assert not (tmp_path / "x").exists()
        with pytest.raises(CheckpointError, match="the bias of SigLIP's loss, which this form cannot hold: OpenCLIP's"):
            convert(tmp_path / "biased", tmp_path / "x", form)

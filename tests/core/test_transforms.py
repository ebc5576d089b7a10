import io
import json
import random
import zlib

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from benchmarks.make_transforms_golden import GOLDEN, MODES, SETTINGS, formula_image, image_sizes, small_sizes
from miniclip.config import PreprocessConfig
from miniclip.training.augment import TrainTransform
from miniclip.transforms import Preprocess
from miniclip.utils.image_files import ImageError, open_image

RECORDED = json.loads(GOLDEN.read_text())
PILLOW = RECORDED["versions"]["pillow"]
as_recorded = pytest.mark.skipif(
    PIL.__version__.split(".")[0] != PILLOW.split(".")[0],
    reason=f"the pixels were recorded with Pillow {PILLOW}; {PIL.__version__} resizes otherwise, in any library",
)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def solid(size, mode, color, path, **save):
    Image.new(mode, size, color).save(path, **save)
    return path


def check_against_peers(longest_side: int):
    """Compares the levels of OpenCLIP's and timm's transforms, as recorded, with ours, bit for bit."""
    for number, (setting, digests) in enumerate(zip(SETTINGS, RECORDED["settings"], strict=True)):
        preprocess = Preprocess(PreprocessConfig(**setting))
        recorded = zip(image_sizes(number), digests, strict=True)
        for size, digest in ((size, digest) for size, digest in recorded if max(size) <= longest_side):
            levels = preprocess.levels(formula_image(*size))
            assert zlib.crc32(levels.numpy().tobytes()) == digest, f"{size} by {setting}"


@as_recorded
def test_pixels_are_those_of_openclip_and_timm():
    check_against_peers(300)


@as_recorded
@pytest.mark.slow
def test_pixels_are_those_of_openclip_and_timm_at_two_thousand_sizes():
    assert sum(map(len, RECORDED["settings"])) >= 2000
    check_against_peers(4000)


@as_recorded
@pytest.mark.parametrize("mode", MODES)
def test_files_can_be_read_as_openclip_does(mode, tmp_path):
    """Of images with transparency or a palette it gives other pixels than a viewer shows."""
    preprocess, differ = Preprocess(PreprocessConfig(size=224), "openclip"), 0
    for size, digest in zip(small_sizes(), RECORDED["modes"][mode], strict=True):
        formula_image(*size, mode).save(tmp_path / "x.tif")
        levels = preprocess.levels(open_image(tmp_path / "x.tif", as_stored=True))
        assert zlib.crc32(levels.numpy().tobytes()) == digest, size
        differ += not torch.equal(
            preprocess.normalize(levels), Preprocess(preprocess.cfg, "full").load(tmp_path / "x.tif")
        )
    assert (differ > 15) == (mode not in ("L", "CMYK"))


def test_openclip_does_not_turn_photos(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(60, 40).save(tmp_path / "x.png", exif=exif)
    cfg = PreprocessConfig(size=32)
    assert torch.equal(Preprocess(cfg, "openclip").load(tmp_path / "x.png"), Preprocess(cfg)(noise(60, 40)))
    turned = noise(60, 40).transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(Preprocess(cfg).load(tmp_path / "x.png"), Preprocess(cfg)(turned))


@pytest.mark.parametrize("size", [32, 63, 224])
def test_evaluation_pipeline_is_bit_equal_to_transformers(size):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    reference = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    ours = Preprocess(PreprocessConfig(size=size, center_crop="transformers"))
    rng = random.Random(0)
    sizes = [(500, 375), (375, 500), (333, 500), (1, 1), (3, 7), (size, size), (size + 1, size), (224, 223), (1000, 20)]
    sizes += [(rng.randint(10, 600), rng.randint(10, 600)) for _ in range(20)]
    for number, (width, height) in enumerate(sizes):
        image = noise(width, height, number)
        expected = reference(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(ours(image), expected), (width, height)


def test_bilinear_differs_and_unknown_settings_raise():
    image = noise(100, 80)
    assert not torch.equal(
        Preprocess(PreprocessConfig(size=32))(image),
        Preprocess(PreprocessConfig(size=32, interpolation="bilinear"))(image),
    )
    with pytest.raises(ValueError, match="'lanczos'.*bicubic"):
        Preprocess(PreprocessConfig(size=32, interpolation="lanczos"))
    with pytest.raises(ValueError, match="'stretch'"):
        Preprocess(PreprocessConfig(size=32, resize_mode="stretch"))
    with pytest.raises(ValueError, match="decode 'exact' is not one of fast, full, openclip"):
        Preprocess(PreprocessConfig(size=32), "exact")


def test_resize_modes_by_hand():
    """A picture twice as wide as high: red, green, green, blue quarters from left to right."""
    image = Image.new("RGB", (64, 32), "lime")
    image.paste("red", (0, 0, 16, 32))
    image.paste("blue", (48, 0, 64, 32))
    levels = {}
    for mode in ("shortest", "longest", "squash"):
        plain = PreprocessConfig(size=32, resize_mode=mode, mean=(0, 0, 0), std=(1, 1, 1), fill_color=51)
        levels[mode] = Preprocess(plain)(image)
    assert (levels["shortest"][1, 16, 2:30] == 1).all()  # the middle: green only
    assert torch.equal(levels["squash"][:, 16, 2], torch.tensor([1.0, 0, 0]))
    assert torch.equal(levels["squash"][:, 16, 29], torch.tensor([0.0, 0, 1]))
    assert torch.allclose(levels["longest"][:, 2, 16], torch.full((3,), 51 / 255))  # padding above
    assert torch.allclose(levels["longest"][:, 29, 16], torch.full((3,), 51 / 255))
    assert torch.equal(levels["longest"][:, 16, 2], torch.tensor([1.0, 0, 0]))
    # OpenCLIP pads with 0 in the file's own colours, and no ink is white.
    longest = PreprocessConfig(size=32, resize_mode="longest", mean=(0, 0, 0), std=(1, 1, 1))
    for decode, padding in (("openclip", 1), ("full", 0)):
        assert (Preprocess(longest, decode)(image.convert("CMYK"))[:, 2] == padding).all()


def test_training_crop_is_reproducible_and_of_the_asked_share():
    transform = TrainTransform(PreprocessConfig(size=32), hflip=0.5, color_jitter=(0.4, 0.4, 0.4, 0.1))
    image = noise(100, 80)
    same = [transform(image, random.Random("0 1 2")) for _ in range(2)]
    assert torch.equal(*same) and same[0].shape == (3, 32, 32)
    assert not torch.equal(same[0], transform(image, random.Random("0 2 2")))
    rng = random.Random(0)
    for _ in range(200):
        left, top, right, bottom = transform.crop_box(100, 80, rng)
        assert 0 <= left < right <= 100 and 0 <= top < bottom <= 80
        assert 0.88 < (right - left) * (bottom - top) / 8000 <= 1
        assert 0.73 < (right - left) / (bottom - top) < 1.36


def test_crop_of_a_long_picture_falls_back_to_the_middle():
    transform = TrainTransform(PreprocessConfig(size=32))
    assert transform.crop_box(1000, 90, random.Random(0)) == (440, 0, 560, 90)  # 4 : 3


def test_flip_and_jitter_do_what_they_say():
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 16, 32))
    plain = PreprocessConfig(size=32, mean=(0, 0, 0), std=(1, 1, 1))
    flipped = TrainTransform(plain, scale=(1, 1), hflip=1.0)(image, random.Random(0))
    assert torch.equal(flipped, Preprocess(plain)(image).flip(2))
    gray = Image.new("RGB", (32, 32), (100, 100, 100))
    bright = [
        TrainTransform(plain, scale=(1, 1), color_jitter=(0.5, 0, 0, 0))(gray, random.Random(i)).mean() * 255
        for i in range(30)
    ]
    assert 49 <= min(bright) < 80 and 120 < max(bright) <= 151
    red = Image.new("RGB", (32, 32), (200, 20, 20))
    turned = [TrainTransform(plain, scale=(1, 1), color_jitter=(0, 0, 0, 0.5))(red, random.Random(i)) for i in range(9)]
    assert any(t[0].mean() < t[1:].amax(dim=0).mean() for t in turned)  # some other channel leads
    with pytest.raises(ValueError, match="scale"):
        TrainTransform(plain, scale=(0, 1))


def test_modes_look_as_a_person_would_expect(tmp_path):
    red = (255, 0, 0)
    cases = {
        "rgb.png": ("RGB", red, red),
        "gray.png": ("L", 100, (100,) * 3),
        "half_transparent.png": ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
        "transparent.png": ("RGBA", (255, 0, 0, 0), (255,) * 3),
        "gray_alpha.png": ("LA", (0, 0), (255,) * 3),
        "one_bit.png": ("1", 1, (255,) * 3),
        "sixteen_bit.png": ("I;16", 257 * 100, (100,) * 3),
        "float.tiff": ("F", 0.5, (128,) * 3),
        "float_255.tiff": ("F", 100.0, (100,) * 3),
        "picture.webp": ("RGB", red, red),
    }
    for name, (mode, color, expected) in cases.items():
        lossless = {"lossless": True} if name.endswith("webp") else {}
        image = open_image(solid((8, 6), mode, color, tmp_path / name, **lossless))
        assert image.mode == "RGB" and image.size == (8, 6), name
        assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1, (name, image.getpixel((0, 0)))
    cmyk = open_image(solid((8, 8), "CMYK", (0, 255, 255, 0), tmp_path / "cmyk.jpg"))
    assert cmyk.getpixel((4, 4))[0] > 240 and max(cmyk.getpixel((4, 4))[1:]) < 15


def test_palette_with_transparency_and_first_frame(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.save(tmp_path / "palette.png", transparency=1)
    assert open_image(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255)
    frames = [Image.new("RGB", (4, 4), color) for color in ("blue", "red")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((0, 0)) == (0, 0, 255)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = open_image(tmp_path / "turned.jpg")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5))[0] > 200 and upright.getpixel((10, 35))[2] > 200


def test_what_is_no_usable_picture_says_which_and_why(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    buffer = io.BytesIO()
    noise(300, 200).save(buffer, "JPEG")
    (tmp_path / "half.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
    Image.new("L", (4000, 1)).save(tmp_path / "sliver.png")
    for name, reason in {
        "empty.jpg": "empty file", "page.jpg": "<html>", "half.jpg": "damaged", "bomb.png": "200000000 pixels",
        "sliver.png": "4000 x 1", "missing.jpg": "no such file",
    }.items():  # fmt: skip
        with pytest.raises(ImageError, match=rf"{name}.*{reason}"):
            open_image(tmp_path / name)


def test_rgb_is_not_copied(tmp_path):
    image = noise(20, 20)
    from miniclip.utils.image_files import to_rgb

    assert to_rgb(image) is image


def test_longest_rounds_as_openclip_does():
    """320 x 45 to 224: the height 31.5 exactly is a tie, which 45 / (320 / 224) brings to 32 and 45 * 0.7 to 31."""
    plain = PreprocessConfig(size=224, resize_mode="longest", mean=(0, 0, 0), std=(1, 1, 1))
    rows = Preprocess(plain)(Image.new("RGB", (320, 45), "white"))[0, :, 100]
    assert rows.sum() == round(45 / (320 / 224)) == 32


def test_a_sliver_is_refused_by_preprocess_too():
    with pytest.raises(ImageError, match="4000 x 1 .*100:1"):
        Preprocess(PreprocessConfig(size=224))(Image.new("RGB", (4000, 1)))
    squash = PreprocessConfig(size=32, resize_mode="squash")
    assert Preprocess(squash)(Image.new("RGB", (4000, 1))).shape == (3, 32, 32)  # here it does no harm


def test_nothing_outside_the_crop_bleeds_in(monkeypatch):
    transform = TrainTransform(PreprocessConfig(size=16, mean=(0, 0, 0), std=(1, 1, 1)))
    monkeypatch.setattr(transform, "crop_box", lambda width, height, rng: (16, 16, 64, 64))
    image = Image.new("RGB", (80, 80), "white")
    image.paste("black", (16, 16, 64, 64))
    assert transform(image, random.Random(0)).abs().max() == 0


def test_color_jitter_wants_four_strengths():
    with pytest.raises(ValueError, match="brightness, contrast, saturation, hue"):
        TrainTransform(PreprocessConfig(size=16), color_jitter=(0.4, 0.4, 0.4))


def test_wide_ranges_of_gray_are_scaled_not_clipped(tmp_path):
    for name, mode, levels, expected in (
        ("int.tiff", "I", [0, 257 * 100, 65535], [0, 100, 255]),
        ("float_16.tiff", "F", [0.0, 257 * 100.0, 65535.0], [0, 100, 255]),
        ("float_any.tiff", "F", [0.0, 5e5, 1e6], [0, 128, 255]),
        ("float_holes.tiff", "F", [float("nan"), 0.5, 1.0], [0, 128, 255]),
    ):
        array = np.array([levels], np.int32 if mode == "I" else np.float32)
        Image.fromarray(array).save(tmp_path / name)
        assert np.asarray(open_image(tmp_path / name))[0, :, 1].tolist() == expected, name


def test_a_folder_is_not_called_damaged(tmp_path):
    with pytest.raises(ImageError, match=r"cannot be opened \(Is a directory\)"):
        open_image(tmp_path)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "gif", "bmp", "tiff"])
def test_truncation_is_found_at_any_scale(tmp_path, extension):
    whole, cut = tmp_path / f"whole.{extension}", tmp_path / f"cut.{extension}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)).save(whole)
    data = whole.read_bytes()
    for share in (0.3, 0.6, 0.95):
        cut.write_bytes(data[: int(len(data) * share)])
        for scale in (None, 32):
            assert open_image(whole, scale).mode == "RGB"
            with pytest.raises(ImageError, match=f"cut.{extension}"):
                open_image(cut, scale)


def test_large_pictures_below_the_limit_are_read_without_a_warning(tmp_path, run_script):
    path = solid((15, 10), "RGB", "red", tmp_path / "large.png")
    code = (
        "from miniclip.transforms import open_image; from PIL import Image; Image.MAX_IMAGE_PIXELS = 100;"
        f"print(open_image({str(path)!r}).size)"
    )
    done = run_script("-c", code)
    assert done.stdout == "(15, 10)\n" and "Warning" not in done.stderr


def photo(width: int, height: int) -> Image.Image:
    """Smooth on the whole, with some grain, as photographs are."""
    coarse = noise(max(2, width // 60), max(2, height // 60)).resize((width, height), Image.Resampling.BICUBIC)
    return Image.blend(coarse, noise(width, height, seed=1), 0.1)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_large_jpegs_are_decoded_small_and_nearly_the_same(tmp_path, orientation, resize_mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(1600, 1200).save(tmp_path / "large.jpg", quality=90, exif=exif)
    cfg = PreprocessConfig(size=64, resize_mode=resize_mode)
    quick, exact = Preprocess(cfg), Preprocess(cfg, "full")
    assert min(open_image(tmp_path / "large.jpg", quick.scale).size) == 150  # an eighth: not below 2 x 64
    assert min(open_image(tmp_path / "large.jpg", exact.scale).size) == 1200
    difference = (quick.load(tmp_path / "large.jpg") - exact.load(tmp_path / "large.jpg")).abs() * exact.std * 255
    assert 0 < difference.mean() < 1 and difference.max() < 8
    image = open_image(tmp_path / "large.jpg")
    assert torch.equal(exact.load(tmp_path / "large.jpg"), exact(image))
    assert torch.equal(quick.normalize(quick.levels(image)), exact(image))


def test_small_jpegs_and_other_formats_are_decoded_exactly(tmp_path):
    photo(250, 180).save(tmp_path / "small.jpg")
    photo(800, 600).save(tmp_path / "large.png")
    cfg = PreprocessConfig(size=64)
    for name in ("small.jpg", "large.png"):
        assert torch.equal(Preprocess(cfg).load(tmp_path / name), Preprocess(cfg, "full").load(tmp_path / name))


def test_the_smallest_crop_of_a_drafted_picture_has_pixels_enough(tmp_path):
    photo(1600, 1200).save(tmp_path / "large.jpg")
    for least in (0.08, 0.25, 0.9):
        transform = TrainTransform(PreprocessConfig(size=64), scale=(least, least))
        image = open_image(tmp_path / "large.jpg", transform.scale)
        for seed in range(20):
            left, top, right, bottom = transform.crop_box(*image.size, random.Random(seed))
            assert min(right - left, bottom - top) >= min(2 * 64, 1200) * 0.98

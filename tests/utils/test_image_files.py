"""Images that every viewer shows are read, whatever surrounds their pixels; damaged ones are refused by name."""

import io
import struct
import sys
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from miniclip.classify.images import find_images
from miniclip.datasets.convert import convert
from miniclip.datasets.read import read_source
from miniclip.datasets.records import ImageRoot
from miniclip.index import build
from miniclip.utils.bad_samples import CaptionFileError
from miniclip.utils.image_files import ENDINGS, EXTENSIONS, FORMATS, HEIC, ImageError, identify, open_image

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((64, 48))
TURNED = (0x112, 3, 1, struct.pack("<H", 6))  # orientation: to be turned by 90 degrees clockwise
ODD_TAGS = {
    "none": None, "x resolution as text": (0x11A, 2, 3, b"72\0"), "date as a ratio": (0x132, 5, 1, bytes(8)),
    "width as text": (0x100, 2, 3, b"48\0"), "unknown type": (0x10E, 99, 1, b"abcd"),
    "text of 4 GB": (0x10E, 2, 0xFFFFFFF0, b"\xff" * 4), "sub-IFD outside": (0x8769, 4, 1, b"\xff\xff\xff\x0f"),
}  # fmt: skip


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif(*entries) -> bytes:
    start = 8 + 2 + 12 * len(entries) + 4
    head, more = struct.pack("<H", len(entries)), b""
    for tag, kind, count, value in sorted(entries):
        if len(value) > 4:
            value, more = struct.pack("<I", start + len(more)), more + value
        head += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + head + bytes(4) + more


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def chunk(kind: bytes, content: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ wrong)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "MPO"])
def test_photos_are_turned_whatever_else_their_exif_holds(tmp_path, format):
    options = {"lossless": True} if format == "WEBP" else {}
    for name, tag in ODD_TAGS.items():
        (tmp_path / "a").write_bytes(encoded(PHOTO, format, exif=exif(TURNED, *[tag] * bool(tag)), **options))
        upright = open_image(tmp_path / "a")
        assert upright.size == (48, 64), name
        with Image.open(tmp_path / "a") as stored:
            assert upright.tobytes() == stored.convert("RGB").transpose(Image.Transpose.ROTATE_270).tobytes(), name
    (tmp_path / "a").write_bytes(encoded(PHOTO, format, exif=b"Exif\0\0neither", **options))
    assert open_image(tmp_path / "a").size == (64, 48)


def test_a_png_is_as_sound_as_its_pixels(tmp_path):
    sound, large = encoded(PHOTO, "PNG"), b"x" * (2 << 20)
    texts = {"zTXt": PngImagePlugin.PngInfo(), "iTXt": PngImagePlugin.PngInfo()}
    texts["zTXt"].add_text("workflow", large, zip=True)
    texts["iTXt"].add_itxt("XML:com.adobe.xmp", large, zip=True)
    files = {name: encoded(PHOTO, "PNG", pnginfo=text) for name, text in texts.items()}
    files["profile"] = encoded(PHOTO, "PNG", icc_profile=large)
    at, end = sound.index(b"IDAT") - 4, sound.index(b"IEND") - 4
    for place, name in (at, "before"), (end, "after"):
        for kind, content in (b"tEXt", b"note\0hello"), (b"zTXt", b"a\0\0" + zlib.compress(large)), (b"eXIf", b"II*"):
            files[f"wrong {kind} {name}"] = sound[:place] + chunk(kind, content, wrong=1) + sound[place:]
            files[f"{kind} {name}"] = sound[:place] + chunk(kind, content) + sound[place:]
    files["no end mark"] = sound[:end]
    files["short transparency"] = sound[:at] + chunk(b"tRNS", b"\0") + sound[at:]
    for name, data in files.items():
        (tmp_path / "a.png").write_bytes(data)
        assert open_image(tmp_path / "a.png").tobytes() == PHOTO.tobytes(), name
        assert identify(tmp_path / "a.png").size == PHOTO.size
    turned = encoded(PHOTO, "PNG", exif=exif(TURNED), pnginfo=texts["zTXt"])
    (tmp_path / "a.png").write_bytes(turned)
    assert open_image(tmp_path / "a.png").size == (48, 64), "EXIF stays"
    clear = encoded(Image.new("L", (9, 9), 7), "PNG", transparency=7, pnginfo=texts["iTXt"])
    (tmp_path / "a.png").write_bytes(clear)
    assert open_image(tmp_path / "a.png").getpixel((4, 4)) == (255,) * 3, "and transparency"
    for name, data in {
        "header": sound.replace(b"IHDR\0", b"IHDR\1"), "pixels": sound[: at + 60], "both": files["zTXt"][:-200]
    }.items():  # fmt: skip
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(ImageError, match="a.png: "):
            open_image(tmp_path / "a.png")
            pytest.fail(name)


@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO")
def test_a_jpeg_is_as_sound_as_its_pixels(tmp_path):
    sound = encoded(PHOTO, "JPEG")
    for content in (
        segment(0xE2, b"ICC_PROFILE\0"), segment(0xE0, b"JFIF"), segment(0xEE, b"Adobe"), segment(0xE2, b"MPF\0II*"),
        segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"), segment(0xFE, b"\xff" * 99), b"\xff\xff\xff",
    ):  # fmt: skip
        (tmp_path / "a.jpg").write_bytes(sound[:2] + content + sound[2:])
        for scale in (None, 16):
            assert np.asarray(open_image(tmp_path / "a.jpg", scale)).mean() == pytest.approx(
                np.asarray(PHOTO).mean(), abs=2
            )
    photoshop = encoded(PHOTO.convert("CMYK"), "JPEG")  # Adobe's segment says that its inks are inverted
    (tmp_path / "a.jpg").write_bytes(photoshop[:2] + segment(0xE0, b"JFIF") + photoshop[2:])
    assert np.abs(np.asarray(open_image(tmp_path / "a.jpg"), int) - np.asarray(PHOTO)).mean() < 8


def test_only_the_end_mark_of_a_jpeg_may_be_missing(tmp_path):
    whole = encoded(PHOTO, "JPEG")
    (tmp_path / "a.jpg").write_bytes(whole)
    expected = open_image(tmp_path / "a.jpg").tobytes()
    for cut in (1, 2):
        (tmp_path / "a.jpg").write_bytes(whole[:-cut])
        assert open_image(tmp_path / "a.jpg").tobytes() == expected
        assert open_image(tmp_path / "a.jpg", 16).size == (32, 24)
    for cut in (5, 6, 8, 12, 20, 100, len(whole) // 3):
        (tmp_path / "a.jpg").write_bytes(whole[:-cut])
        with pytest.raises(ImageError, match="a.jpg: damaged"):
            open_image(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").write_bytes(encoded(PHOTO, "JPEG", progressive=True)[:-2])
    with pytest.raises(ImageError, match="a.jpg: damaged"):  # whole scans may be missing
        open_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind, white", [
    *((np.uint16, white) for white in (255, 1023, 4095, 16383, 65535)),
    *((np.int32, white) for white in (255, 4095, 65535, 10**6)),
    *((np.float32, white) for white in (1, 255, 4095, 65535, 1.05)),
])  # fmt: skip
def test_greyscale_of_any_depth_goes_from_black_to_white(tmp_path, kind, white):
    ramp = np.tile(np.linspace(0, white, 64), (8, 1)).astype(kind)
    for format in ("TIFF", "PNG") if kind == np.uint16 else ("TIFF",):
        (tmp_path / "a").write_bytes(encoded(Image.fromarray(ramp), format))
        levels = np.asarray(open_image(tmp_path / "a"))[0, :, 1].astype(int)
        assert np.abs(levels - np.linspace(0, 255, 64)).max() < (2 if white != 1.05 else 14)


def png16(pixels: np.ndarray) -> bytes:
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff16(pixels: np.ndarray, compression: int) -> bytes:
    height, width, channels = pixels.shape
    data = pixels.astype("<u2").tobytes()
    data = zlib.compress(data) if compression == 8 else data
    values = {256: width, 257: height, 259: compression, 262: 2, 277: channels, 278: height}
    entries = [(tag, 3, 1, struct.pack("<H", value)) for tag, value in values.items()]
    entries += [(258, 3, channels, struct.pack("<H", 16) * channels), (279, 4, 1, struct.pack("<I", len(data)))]
    entries += [(338, 3, 1, struct.pack("<H", 2))] if channels == 4 else []
    start = len(exif(*entries, (273, 4, 1, bytes(4)))) - 6
    return exif(*entries, (273, 4, 1, struct.pack("<I", start)))[6:] + data


@pytest.mark.parametrize("white", [255, 1023, 4095, 16383, 65535])
@pytest.mark.parametrize("channels", [2, 3, 4])  # grey with alpha, colours, both
def test_colours_of_any_depth_go_from_black_to_white(tmp_path, channels, white):
    ramp = np.linspace(0, white, 64)
    colours = [ramp, white - ramp, ramp / 2][: 1 if channels == 2 else 3]
    expected = np.stack((colours * 3)[:3], -1) * (255 / white)
    for opaque in (white, 65535)[: 2 if channels % 2 == 0 else 1]:
        channel = [*colours, np.full(64, opaque)][:channels]
        pixels = np.tile(np.stack(channel, -1).round().astype(np.uint16), (8, 1, 1))
        files = [png16(pixels), *(tiff16(pixels, how) for how in (1, 8) if channels > 2)]
        for file in files:
            (tmp_path / "a").write_bytes(file)
            assert np.abs(np.asarray(open_image(tmp_path / "a"))[0] - expected).max() < 1.5
            with Image.open(tmp_path / "a") as stored:  # as other libraries read it
                assert open_image(tmp_path / "a", as_stored=True).tobytes() == stored.tobytes()


def test_dark_greyscale_that_is_known_to_have_16_bits_stays_dark(tmp_path):
    eight = np.tile(np.arange(0, 20, dtype=np.uint16), (8, 1))
    (tmp_path / "a.png").write_bytes(encoded(Image.fromarray(eight * 257), "PNG"))
    (tmp_path / "a.pgm").write_bytes(b"P5\n20 8\n65535\n" + (eight * 250).astype(">u2").tobytes())
    for name in ("a.png", "a.pgm"):
        assert np.abs(np.asarray(open_image(tmp_path / name))[0, :, 0].astype(int) - np.arange(20)).max() <= 1
    (tmp_path / "b.png").write_bytes(png16(np.stack([eight * 257] * 3, -1)))
    assert np.asarray(open_image(tmp_path / "b.png"))[0, :, 0].tolist() == list(range(20))
    image = Image.fromarray(np.array([[0, 4095]], np.uint16))
    (tmp_path / "a.tif").write_bytes(encoded(image, "TIFF", tiffinfo={262: 0}))  # white is zero
    assert np.asarray(open_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [255, 0]


def test_every_extension_of_a_known_format_is_listed(tmp_path):
    Image.init()
    assert ENDINGS >= {end for end, format in Image.registered_extensions().items() if format in FORMATS}
    assert len(EXTENSIONS) == len(ENDINGS) and set(HEIC) < set(EXTENSIONS)


def test_images_are_found_by_any_of_their_extensions(tmp_path):
    names = ("a.jfif", "b.JFIF", "c.jpe", "d.apng", "e.mpo", "f.jif", "g.pgm", "h.j2k")
    formats = ("JPEG", "JPEG", "JPEG", "PNG", "MPO", "JPEG", "PPM", "JPEG2000")
    (tmp_path / "f").mkdir()
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, format in zip(names, formats):
            (tmp_path / "f" / name).write_bytes(encoded(PHOTO, format))
            (tmp_path / "f" / f"{name[0]}.txt").write_text(f"caption {name[0]}")
            for file in (name, f"{name[0]}.txt"):
                tar.add(tmp_path / "f" / file, file)
    assert [r["caption"] for r in read_source(str(tmp_path / "f"))] == [[f"caption {name[0]}"] for name in names]
    shards = read_source(str(tmp_path / "0.tar"))
    assert len(shards) == len(names) and all(open_image(record["image"]).size == PHOTO.size for record in shards)
    assert len(find_images([str(tmp_path / "f")])) == len(names)
    assert build.find_images(ImageRoot(tmp_path / "f", False), (1, 1))[0] == sorted(names)


@pytest.fixture
def photos(tmp_path):
    """A HEIC photo, turned, with a caption; one beside the JPEG that was made of it; one alone."""
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed: requirements-heic.txt")
    orientation = Image.Exif()
    orientation[0x112] = 6
    heif.from_pillow(PHOTO).save(tmp_path / "a.HEIC", exif=orientation.tobytes())
    for name in ("b.heic", "c.heif"):
        heif.from_pillow(PHOTO).save(tmp_path / name)
    PHOTO.save(tmp_path / "b.jpg")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"caption {name}")
    return tmp_path


def test_heic_is_read(photos, tmp_path):
    (photos / "c.txt").write_text("caption c")
    records = read_source(str(photos))
    assert [str(record["image"]).rpartition("/")[2] for record in records] == ["a.HEIC", "b.jpg", "c.heif"]
    image = open_image(records[0]["image"])
    assert image.mode == "RGB" and image.size == (48, 64)
    expected = np.asarray(PHOTO.transpose(Image.Transpose.ROTATE_270), int)
    assert np.abs(np.asarray(image) - expected).mean() < 10
    assert open_image(records[2]["image"], 16).size == PHOTO.size, "the whole image, not its thumbnail"
    assert convert(records, str(tmp_path / "0.tar")) == 3
    shards = read_source(str(tmp_path / "0.tar"))
    assert open_image(shards[0]["image"]).size == (48, 64) and str(shards[0]["image"]).endswith(".heic")
    data = (photos / "c.heif").read_bytes()
    for share in (0.3, 0.95):
        (photos / "c.heif").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ImageError, match="c.heif: damaged"):
            open_image(photos / "c.heif")


def test_without_pillow_heif_it_is_said_what_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    heic = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic" + bytes(40)
    for name, data in {"a.HEIC": heic, "b.jpg": heic, "c.png": encoded(PHOTO, "PNG")}.items():
        (tmp_path / name).write_bytes(data)
        (tmp_path / f"{name[0]}.txt").write_text("a caption")
    with pytest.raises(CaptionFileError, match="2 of 3 .*(.|\n)*a.HEIC: HEIC, .*pip install -r requirements-heic.txt"):
        read_source(str(tmp_path))

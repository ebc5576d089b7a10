"""Tokenizers from transformers."""

import hashlib
import html
import json
import os
import string
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path

import ftfy
import torch
from torch import Tensor

from miniclip.tokenizer import BaseTokenizer
from miniclip.utils.errors import InputError


def clean(text: str) -> str:
    """A caption with broken encoding, HTML entities and runs of white space repaired."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def canonicalize(text: str) -> str:
    """A repaired caption in lower case and without ASCII's punctuation, as SigLIP was trained on."""
    return " ".join(clean(text).replace("_", " ").translate(PUNCTUATION).lower().split())


PUNCTUATION = str.maketrans("", "", string.punctuation)
TOKENIZER_FILES = "tokenizer.json", "spiece.model"
CLEAN = {"whitespace": clean, "lower": lambda text: clean(text).lower(), "canonicalize": canonicalize}


def tokenizer_folder(directory: Path, name: str = "tokenizer") -> Path:
    """The folder of a saved model's tokenizer. Raises InputError if it is missing."""
    if not (folder := directory / name).is_dir():
        missing = f"the folder {name}, which the text tower needs, is missing"
        raise InputError(f"{directory}: {missing}: copy the model again")
    return folder


class HfTokenizer(BaseTokenizer):
    """A tokenizer from transformers. Captions are repaired as OpenCLIP does (encoding, HTML entities, white space);
    upper case is left to the tokenizer, except with the other keys of CLEAN."""

    def __init__(self, tokenizer, context_length: int, clean: str = "whitespace"):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and forked data workers do not mix
        super().__init__(context_length)
        self.clean = clean
        self.tokenizer, self.pad_token_id, self.unk_token_id = tokenizer, tokenizer.pad_token_id, tokenizer.unk_token_id

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(CLEAN[self.clean](text), add_special_tokens=False, verbose=False)["input_ids"]

    def rows(self, texts: list[str], length: int) -> list[list[int]]:
        texts = [CLEAN[self.clean](text) for text in texts]
        rows = self.tokenizer(texts, verbose=False)["input_ids"] if texts else []
        for i in [i for i, row in enumerate(rows) if len(row) > length]:
            rows[i] = self.tokenizer(texts[i], truncation=True, max_length=length)["input_ids"]
            self.truncated += 1
        return rows

    def lengths(self, ids: Tensor) -> Tensor:  # up to the last word: "[PAD]" may be typed, or padding be the end token
        found = (ids != self.pad_token_id).flip(1).cumsum(dim=1).count_nonzero(dim=1)
        return (found + (self.pad_token_id == self.tokenizer.eos_token_id)).clamp_max(ids.shape[1])

    def text_of(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()

    def fingerprint(self) -> str:
        if (inner := getattr(self.tokenizer, "backend_tokenizer", None)) is not None:
            inner.no_truncation()  # each call sets both anew: what the last one left there decides nothing
            inner.no_padding()
        text = inner.to_str() if inner is not None else json.dumps(sorted(self.tokenizer.get_vocab().items()))
        text += "" if self.clean == "whitespace" else self.clean
        return hashlib.sha256(f"{self.context_length} {text}".encode()).hexdigest()

    def fast(self):
        """Its form in the library `tokenizers`, which repairs no encodings nor HTML. Raises InputError without one."""
        from tokenizers import Regex, Tokenizer, normalizers

        if (inner := getattr(self.tokenizer, "backend_tokenizer", None)) is None:
            raise InputError(f"{type(self.tokenizer).__name__} has no fast form, which tokenizer.json needs")
        tokenizer, steps = Tokenizer.from_str(inner.to_str()), []
        if self.clean == "canonicalize":
            steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")]
        if self.clean != "whitespace":
            steps += [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
            tokenizer.normalizer = normalizers.Sequence(steps + [tokenizer.normalizer] * bool(tokenizer.normalizer))
        return tokenizer

    def __deepcopy__(self, memo) -> "HfTokenizer":
        return self  # copies of a model share it


class JointTokenizer(BaseTokenizer):
    """The tokenizers of text encoders side by side. Their ids take turns: the first token of each encoder, the second
    of each and so on, `context_length` in all. Each one's ids begin at another of `firsts`; 0 is the padding of all."""

    tokenizer = None  # of transformers: there is no single one

    def __init__(self, parts: Sequence[HfTokenizer], firsts: Sequence[int]):
        super().__init__(sum(part.context_length for part in parts))
        self.parts, self.firsts = list(parts), list(firsts)
        self.unk_token_id = None if parts[0].unk_token_id is None else parts[0].unk_token_id + firsts[0]

    def turns(self, rows: Sequence[list[int]]) -> list[int]:
        own = ([first + i for i in row] for first, row in zip(self.firsts, rows))
        return list(chain.from_iterable(zip_longest(*own, fillvalue=self.pad_token_id)))

    def encode(self, text: str) -> list[int]:
        return self.turns([part.encode(text) for part in self.parts])

    def rows(self, texts: list[str], length: int) -> list[list[int]]:
        before, each = [part.truncated for part in self.parts], length // len(self.parts)
        found = [self.turns(rows) for rows in zip(*(part.rows(texts, each) for part in self.parts))]
        self.truncated += max(part.truncated - n for part, n in zip(self.parts, before))
        return found

    def lengths(self, ids: Tensor) -> Tensor:
        return (torch.arange(1, ids.shape[1] + 1) * (ids != self.pad_token_id)).amax(dim=1)  # padding is inside too

    def text_of(self, ids: list[int]) -> str:
        """The text that the encoder of the first id reads."""
        if not (ids := [i for i in ids if i != self.pad_token_id]):
            return ""
        number = max(n for n, first in enumerate(self.firsts) if first <= ids[0])
        first, end = [*self.firsts, 1 << 62][number : number + 2]
        return self.parts[number].text_of([i - first for i in ids if first <= i < end])

    def vocabulary(self) -> list[dict[str, int]]:
        return [part.vocabulary() for part in self.parts]

    def fingerprint(self) -> str:
        return " ".join(part.fingerprint() for part in self.parts)

    def fast(self):
        raise InputError("several tokenizers side by side have no fast form, which tokenizer.json needs")

    __deepcopy__ = HfTokenizer.__deepcopy__

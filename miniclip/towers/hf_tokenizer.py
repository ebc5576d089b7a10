"""Tokenizers from transformers."""

import hashlib
import html
import json
import os

import ftfy
from torch import Tensor

from miniclip.tokenizer import BaseTokenizer


class HfTokenizer(BaseTokenizer):
    """A tokenizer from transformers. Captions are repaired as OpenCLIP does (encoding, HTML entities, white space);
    upper case is left to the tokenizer."""

    def __init__(self, tokenizer, context_length: int):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and forked data workers do not mix
        super().__init__(context_length)
        self.tokenizer, self.pad_token_id, self.unk_token_id = tokenizer, tokenizer.pad_token_id, tokenizer.unk_token_id

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(clean(text), add_special_tokens=False, verbose=False)["input_ids"]

    def rows(self, texts: list[str], length: int) -> list[list[int]]:
        texts = [clean(text) for text in texts]
        rows = self.tokenizer(texts, verbose=False)["input_ids"] if texts else []
        for i in [i for i, row in enumerate(rows) if len(row) > length]:
            rows[i] = self.tokenizer(texts[i], truncation=True, max_length=length)["input_ids"]
            self.truncated += 1
        return rows

    def lengths(self, ids: Tensor) -> Tensor:
        return (ids != self.pad_token_id).sum(dim=1)

    def text_of(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def vocabulary(self) -> dict[str, int]:
        return self.tokenizer.get_vocab()

    def fingerprint(self) -> str:
        inner = getattr(self.tokenizer, "backend_tokenizer", None)
        text = inner.to_str() if inner is not None else json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(f"{self.context_length} {text}".encode()).hexdigest()

    def __deepcopy__(self, memo) -> "HfTokenizer":
        return self  # copies of a model share it


def clean(text: str) -> str:
    """A caption with broken encoding, HTML entities and runs of white space repaired."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())

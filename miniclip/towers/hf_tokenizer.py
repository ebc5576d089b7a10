"""TODO docstring."""

import hashlib
import html
import json
import os

import ftfy
import torch
from torch import Tensor


class HfTokenizer:
    """A tokenizer of transformers, called as CLIP's own is: `(["a dog", "two cats"])` gives a LongTensor (2, L).

    Captions are repaired as OpenCLIP does (encoding, HTML entities, white space); what becomes of upper case is the
    tokenizer's matter. `truncated` counts the captions cut so far, by this object.
    """

    def __init__(self, tokenizer, context_length: int):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and forked data workers do not go well
        self.tokenizer, self.context_length, self.truncated = tokenizer, context_length, 0
        self.pad_token_id, self.unk_token_id = tokenizer.pad_token_id, tokenizer.unk_token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of one caption: no special tokens, and never cut."""
        return self.tokenizer(clean(text), add_special_tokens=False, verbose=False)["input_ids"]

    def __call__(
        self, texts: str | list[str], context_length: int | None = None, trim: bool = False
    ) -> torch.LongTensor:
        """Token ids of captions with their special tokens, (n, context_length), padded at the end; with `trim` only as
        wide as the longest. Raises TypeError, with its index, for what is not a string."""
        texts = [texts] if isinstance(texts, (str, bytes)) or not hasattr(texts, "__iter__") else list(texts)
        length = self.context_length if context_length is None else context_length
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}] is {type(text).__name__} ({text!r:.40}); a caption must be str")
        texts = [clean(text) for text in texts]
        rows = self.tokenizer(texts, verbose=False)["input_ids"] if texts else []
        for i in [i for i, row in enumerate(rows) if len(row) > length]:
            rows[i] = self.tokenizer(texts[i], truncation=True, max_length=length)["input_ids"]
            self.truncated += 1
        ids = torch.full((len(rows), max(map(len, rows), default=length) if trim else length), self.pad_token_id)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return ids

    def lengths(self, ids: Tensor) -> Tensor:
        """How many tokens of each row (n, L) are no padding: (n,)."""
        return (ids != self.pad_token_id).sum(dim=1)

    def decode(self, ids: list[int] | Tensor) -> str:
        """Text of one row of ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def fingerprint(self) -> str:
        """sha256 of all that decides about the ids of a caption."""
        inner = getattr(self.tokenizer, "backend_tokenizer", None)
        text = inner.to_str() if inner is not None else json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(f"{self.context_length} {text}".encode()).hexdigest()

    def __deepcopy__(self, memo) -> "HfTokenizer":
        return self  # a copy of a model reads what the model reads


def clean(text: str) -> str:
    """A caption with broken encoding, HTML entities and runs of white space repaired."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())

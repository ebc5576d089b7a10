"""How does a caption become the integer ids that CLIP was trained on?

    clean   repair the text (mojibake, curly quotes, HTML entities), lower it, split it at white space
    words   cut each piece into runs of letters, single digits and runs of other signs
    bpe     spell each word in bytes, then join neighbours in the order that was learned
    pack    start token + ids + end token, cut to the context length, padded with 0

Byte-pair encoding (Sennrich et al., arXiv:1508.07909) starts with one token per byte, so nothing is ever unknown, and
has learned 48,894 merges: merge k says which two neighbours become token 512 + k. The last byte of a word is a token of
its own kind, `</w>` in the table: so "cat" and the "cat" of "catch" have different ids, and ids keep the spaces. All
ids equal those of openai/CLIP and OpenCLIP, except that "<|endoftext|>" typed in a caption is text and ends nothing."""

import gzip
import html
from functools import cache, lru_cache
from heapq import heapify, heappop, heappush
from itertools import chain, pairwise, takewhile
from pathlib import Path

import ftfy
import regex
import torch

MERGES_FILE = Path(__file__).with_name("bpe_merges.txt.gz")  # one pair a line; see bpe_merges.LICENSE
# Contractions, letters of any script, one digit at a time, anything else. IGNORECASE for the long s (U+017F), its own
# lower case, which CLIP lets match in 's.
WORD = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)
Merges = dict[tuple[int, int], int]  # two neighbouring ids -> the id that replaces them; lowest id first


def bytes_to_unicode() -> dict[int, str]:
    """Gives each of the 256 bytes a visible character, in the order of the first 256 ids: bytes printable in Latin-1
    stand for themselves, the other 68 borrow characters from code point 256 on (a space is written "Ġ")."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


@cache  # about 0.1 s, once per process
def load_table() -> tuple[dict[int, int], Merges, list[bytes]]:
    """Read the merge table: byte -> id, the merges, and id -> the bytes it stands for (`</w>` a space)."""
    symbols = bytes_to_unicode()
    ids = {symbol: i for i, symbol in enumerate(symbols.values())}  # 0..255: a byte inside a word
    ids |= {symbol + "</w>": i + 256 for symbol, i in ids.items()}  # 256..511: a byte that ends a word
    pieces = [bytes([byte]) for byte in symbols] + [bytes([byte, 32]) for byte in symbols]
    merges = {}
    for new, line in enumerate(gzip.decompress(MERGES_FILE.read_bytes()).decode("utf-8").splitlines(), 512):
        left, right = line.split(" ")
        a, b = ids[left], ids[right]
        merges[a, b] = ids[left + right] = new
        pieces.append(pieces[a] + pieces[b])
    return {byte: ids[symbol] for byte, symbol in symbols.items()}, merges, pieces


def clean(text: str) -> str:
    """Repairs and lowers a caption as openai/CLIP does. Printable ASCII without "&", as nearly every English caption,
    skips the repair, which would change nothing and costs more than all the rest."""
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))  # twice: "&amp;lt;" is a common accident
    return text.lower()


def bpe(ids: tuple[int, ...], merges: Merges) -> tuple[int, ...]:
    """Joins neighbouring ids, always everywhere the pair that was learned first, until no pair is known. A merge makes
    only pairs that were learned later, so a heap holds the next one; a "word" of a million letters takes seconds."""
    n = len(ids)
    joined = list(ids)  # None where a token has become part of the one on its left
    left, right = list(range(-1, n - 1)), list(range(1, n + 1))  # the remaining neighbours of each place
    heap = [(merges[pair], i) for i, pair in enumerate(pairwise(ids)) if pair in merges]
    heapify(heap)
    while heap:
        new, i = heappop(heap)
        j = right[i]
        if j == n or joined[i] is None or merges.get((joined[i], joined[j])) != new:
            continue  # one of the two has been joined since
        joined[i], joined[j], right[i] = new, None, right[j]
        if right[i] < n:
            left[right[i]] = i
        for a, b in ((left[i], i), (i, right[i])):
            if a >= 0 and b < n and (joined[a], joined[b]) in merges:
                heappush(heap, (merges[joined[a], joined[b]], a))
    return tuple(token for token in joined if token is not None)


@lru_cache(maxsize=1 << 16)  # captions repeat their words; bounded, as a service may run for months
def encode_piece(piece: str) -> tuple[int, ...]:
    """Token ids of cleaned text without white space, such as "dog's." (the words dog, 's and the stop)."""
    byte_ids, merges, _ = load_table()
    ids = []
    for word in WORD.findall(piece):
        *inner, last = (byte_ids[byte] for byte in word.encode("utf-8"))
        ids += bpe((*inner, last + 256), merges)
    return tuple(ids)


class BaseTokenizer:
    """The tokenizer of any text tower. `truncated` counts the captions cut so far. A subclass defines

    encode(text)         token ids of one caption, without special tokens and never cut
    rows(texts, length)  the same with special tokens, cut to `length` and counted in `truncated`
    lengths(ids)         number of tokens in each row (n, L), special ones included and padding not: (n,)
    text_of(ids)         the text of one caption's ids
    vocabulary()         what the ids stand for; equal for two tokenizers whose ids mean the same
    fingerprint()        a hash of everything that decides the ids of a caption"""

    pad_token_id: int = 0
    unk_token_id: int | None = None  # what stands for unknown words; None where nothing is unknown

    def __init__(self, context_length: int = 77):
        self.context_length = context_length
        self.truncated = 0

    def __call__(self, texts, context_length: int | None = None, trim: bool = False) -> torch.LongTensor:
        """Token ids of captions, (n, context_length), special tokens included, padded at the end; a caption that is too
        long keeps its end token. `trim`: only as wide as the longest caption, which saves the text tower most of its
        work. Raises TypeError for what is not a string (naming its index)."""
        texts = [texts] if isinstance(texts, (str, bytes)) or not hasattr(texts, "__iter__") else list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}] is {type(text).__name__} ({text!r:.40}); a caption must be str")
        length = self.context_length if context_length is None else context_length
        rows = self.rows(texts, length)
        width = max(map(len, rows), default=length) if trim else length
        ids = chain.from_iterable(row + [self.pad_token_id] * (width - len(row)) for row in rows)
        return torch.tensor(list(ids), dtype=torch.long).view(len(rows), width)

    def decode(self, ids: list | torch.Tensor) -> str | list[str]:
        """The text of one row of ids; of a tensor (n, L) or a list of rows, a list of n texts."""
        if getattr(ids, "ndim", 1) == 2 or isinstance(ids, list) and ids and hasattr(ids[0], "__len__"):
            return [self.decode(row) for row in ids]
        return self.text_of(ids.tolist() if hasattr(ids, "tolist") else ids)


class Tokenizer(BaseTokenizer):
    """CLIP's tokenizer: `Tokenizer()(["a dog", "two cats"])` is a LongTensor (2, 77)."""

    sot_token_id, eot_token_id, vocab_size = 49406, 49407, 49408

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in clean(text).split():
            # Long pieces (a Chinese sentence, a URL) rarely come back: they would only fill the memo.
            ids += encode_piece(piece) if len(piece) <= 32 else encode_piece.__wrapped__(piece)
        return ids

    def rows(self, texts: list[str], length: int) -> list[list[int]]:
        if length < 2:
            raise ValueError(f"context_length is {length}, but the start and the end token alone need 2")
        encoded = [self.encode(text) for text in texts]
        self.truncated += sum(len(ids) > length - 2 for ids in encoded)
        return [[self.sot_token_id, *ids[: length - 2], self.eot_token_id] for ids in encoded]

    def lengths(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.argmax(dim=1) + 1  # the end token has the highest id; padding (0) may be the id of "!" too

    def text_of(self, ids: list[int]) -> str:
        """Text up to the end token, a space after each word ("dog 's"). Bytes that are not UTF-8 become U+FFFD."""
        pieces = self.vocabulary()
        words = [i for i in takewhile(lambda i: i != self.eot_token_id, ids) if i != self.sot_token_id]
        if unknown := [i for i in words if not 0 <= i < len(pieces)]:
            raise ValueError(f"token id {unknown[0]} is outside the vocabulary, 0 to {self.eot_token_id}")
        return b"".join(pieces[i] for i in words).decode("utf-8", errors="replace").strip()

    def vocabulary(self) -> list[bytes]:
        return load_table()[2]

    def fingerprint(self) -> str:
        return ""  # there is only one, so it adds nothing to the key of a feature cache

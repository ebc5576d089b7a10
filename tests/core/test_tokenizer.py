"""The tokenizer against ids that the OpenAI and OpenCLIP tokenizers gave (see make_tokenizer_golden.py)."""

import hashlib
import html
import itertools
import json
import multiprocessing
import pickle
import random

import ftfy
import pytest
import torch

from miniclip import tokenizer as module
from miniclip.tokenizer import Tokenizer, bpe, bytes_to_unicode, clean, load_table
from tests.conftest import ROOT

GOLDEN = json.loads((ROOT / "tests" / "data" / "tokenizer_golden.json").read_text("utf-8"))
SOT, EOT = 49406, 49407


@pytest.fixture
def tok() -> Tokenizer:
    return Tokenizer()


@pytest.mark.parametrize("string", GOLDEN["strings"], ids=lambda string: ascii(string["text"][:30]))
def test_hard_strings_match_openai_and_openclip(tok, string):
    ids = string["ids"]
    assert tok.encode(string["text"]) == ids
    row = tok(string["text"])[0].tolist()
    assert row == ([SOT, *ids[:75], EOT] + [0] * 77)[:77]
    assert tok.truncated == (len(ids) > 75)


@pytest.mark.parametrize("name", sorted(GOLDEN["flickr8k"]))
def test_every_flickr8k_caption_matches_openai_and_openclip(tok, flickr8k, name):
    records = json.loads((flickr8k / name).read_text("utf-8"))
    captions = [caption for record in records for caption in record["caption"]]
    expected = GOLDEN["flickr8k"][name]
    assert len(captions) == expected["captions"]
    assert hashlib.sha256(tok(captions).numpy().astype("<i8").tobytes()).hexdigest() == expected["sha256"]


def test_whole_vocabulary_matches():
    pieces = load_table()[2]
    assert len(pieces) == SOT == Tokenizer.vocab_size - 2
    assert hashlib.sha256(b"\n".join(pieces)).hexdigest() == GOLDEN["vocabulary"]


def test_batch_is_int64_padded_with_zeros(tok):
    rows = tok(["i am a handsome boy", ""])
    assert rows.dtype == torch.long and rows.shape == (2, 77)
    assert rows[0].tolist() == [49406, 328, 687, 320, 7438, 1876, 49407] + [0] * 70
    assert rows[1].tolist() == [SOT, EOT] + [0] * 75


def test_trim_is_as_wide_as_the_longest(tok):
    captions = ["a dog", "i am a handsome boy", ""]
    rows = tok(captions, trim=True)
    assert rows.shape == (3, 7)
    assert torch.equal(rows, tok(captions)[:, :7])
    assert tok(["word " * 200], trim=True).shape == (1, 77)


def test_no_captions(tok):
    assert tok([]).shape == (0, 77) and tok([]).dtype == torch.long
    assert tok([], trim=True).shape[0] == 0


def test_truncation_keeps_the_end_token_and_is_counted(tok):
    rows = tok(["a", "word " * 75, "word " * 76, "word " * 200])
    assert tok.truncated == 2
    assert rows[1:, -1].tolist() == [EOT] * 3 and torch.equal(rows[1], rows[2])
    assert tok(["a dog runs"], context_length=4).tolist() == [[SOT, 320, 1929, EOT]]
    assert tok.truncated == 3
    assert Tokenizer(context_length=3)("a dog").tolist() == [[SOT, 320, EOT]]
    assert tok(["a dog"], context_length=2).tolist() == [[SOT, EOT]]
    with pytest.raises(ValueError, match="context_length is 1"):
        tok("a", context_length=1)


@pytest.mark.parametrize("spelling", ["<|endoftext|>", "<|startoftext|>", "<end_of_text>", "<start_of_text>"])
def test_special_tokens_in_a_caption_are_text(tok, spelling):
    row = tok(f"a dog {spelling} and a cat")[0].tolist()
    assert row.count(SOT) == 1 and row.count(EOT) == 1 and row.index(EOT) > 9
    assert tok.decode(row).startswith("a dog <") and tok.decode(row).endswith("> and a cat")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", None], r"texts\[1\] is NoneType"),
        (["a", "b", float("nan")], r"texts\[2\] is float \(nan\)"),
        ([["nested"]], r"texts\[0\] is list"),
        (b"bytes", r"texts\[0\] is bytes"),
        (7, r"texts\[0\] is int"),
    ],
)
def test_what_is_not_a_string_is_named(tok, texts, message):
    with pytest.raises(TypeError, match=message):
        tok(texts)


def test_any_iterable_of_strings(tok):
    expected = tok(["a dog", "two cats"])
    assert torch.equal(tok(("a dog", "two cats")), expected)
    assert torch.equal(tok(caption for caption in ("a dog", "two cats")), expected)


def test_decode(tok):
    row = tok("Two  DOGS run, it\u2019s 2 \u72d7 \U0001f415 12")[0]
    assert tok.decode(row) == tok.decode(row.tolist()) == "two dogs run , it 's 2 \u72d7 \U0001f415 1 2"
    assert tok.decode([SOT, 320, EOT, 1929, 0, 0]) == "a"
    assert tok.decode([]) == ""
    both = tok(["two dogs", "a cat"])
    assert tok.decode(both) == tok.decode(both.tolist()) == tok.decode(list(both)) == ["two dogs", "a cat"]
    assert tok.decode(both[:0]) == [] and tok.decode(both[:1]) == ["two dogs"] and tok.decode(both[1]) == "a cat"
    assert tok.decode(tok.encode("\U0001f9ff")[:1]).endswith("\ufffd")  # half a character
    for unknown in (-1, 49408):
        with pytest.raises(ValueError, match=f"token id {unknown} "):
            tok.decode([320, unknown])


def test_decoded_captions_give_the_same_ids_again(tok):
    for string in GOLDEN["strings"]:
        text = tok.decode(string["ids"])
        if text.isascii() and "&" not in text and "'" not in text and "_" not in text:
            assert tok.encode(text) == string["ids"]


def test_bytes_to_unicode_is_visible_and_reversible():
    symbols = bytes_to_unicode()
    assert sorted(symbols) == list(range(256)) and len(set(symbols.values())) == 256
    assert all(symbol.isprintable() and not symbol.isspace() for symbol in symbols.values())
    assert symbols[ord("a")] == "a" and symbols[ord(" ")] == "\u0120" and next(iter(symbols)) == ord("!")


def test_bpe_joins_the_earliest_learned_pair_first():
    merges = {(1, 2): 10, (2, 3): 11, (10, 3): 12, (1, 1): 13}
    assert bpe((1, 2, 3), merges) == (12,)  # 1+2 was learned before 2+3
    assert bpe((2, 3, 1, 2, 2), merges) == (11, 10, 2)
    assert bpe((1, 1, 1), merges) == (13, 1)  # from the left, without overlap
    assert bpe((5,), merges) == (5,) and bpe((3, 2), merges) == (3, 2)


def slow_clean(text: str) -> str:
    """The cleaning of openai/CLIP without any short cut."""
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def test_fast_path_equals_ftfy():
    ascii_characters = [chr(code) for code in range(128)]
    texts = ascii_characters + ["".join(pair) for pair in itertools.product(ascii_characters, repeat=2)]
    rng = random.Random(0)
    risky = ["&", "&amp;", "&amp", "amp;", "#39;", "<", ">", ";", "'", "`", '"', "``", "\\u00e9", "\\x1b"]
    risky += ["\x1b[1m", "[0m", "=C3=A9", "%C3%A9", "+AOk-", "~", "^", "\t", "\r\n", "\x0b", "\x1c", "\0"]
    texts += ["".join(rng.choices(risky + ascii_characters, k=rng.randint(3, 12))) for _ in range(5000)]
    for text in texts:
        assert " ".join(clean(text).split()) == slow_clean(text), ascii(text)


def test_fast_path_spares_plain_captions_the_repair(monkeypatch):
    def repair(text):
        raise AssertionError(f"ftfy was called for {text!r}")

    monkeypatch.setattr(module.ftfy, "fix_text", repair)
    assert clean('A dog\'s <ball>, "red" & '.replace("&", "+")) == 'a dog\'s <ball>, "red" + '
    with pytest.raises(AssertionError):
        clean("caf\u00e9")


def test_memo_is_bounded(tok):
    info = module.encode_piece.cache_info()
    assert info.maxsize is not None and info.maxsize <= 1 << 17
    tok.encode("memo" * 100)  # one long piece is encoded, not remembered
    assert module.encode_piece.cache_info().currsize == info.currsize


def test_pickled_without_its_table(tok):
    tok("word " * 200)
    data = pickle.dumps(tok)
    assert len(data) < 300
    copy = pickle.loads(data)
    assert copy.truncated == 1 and torch.equal(copy("a dog"), tok("a dog"))


def test_works_in_a_process_that_starts_afresh(tok):
    """As in DataLoader workers on macOS and Windows, which inherit nothing."""
    captions = ["a dog", "two cats \U0001f408"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(tok.encode, captions) == [tok.encode(caption) for caption in captions]

"""Which ids do the real OpenAI and OpenCLIP tokenizers give? Writes tests/data/tokenizer_golden.json.

Run it in an environment of its own, because the project itself must never need those packages:

    python -m venv /tmp/golden
    /tmp/golden/bin/pip install torch numpy ftfy regex
    /tmp/golden/bin/pip install --no-deps clip-anytorch open_clip_torch
    /tmp/golden/bin/python benchmarks/make_tokenizer_golden.py --flickr8k DIR

DIR holds {en,cn}_{train,val}.json; without it, the checksums that the golden file has are kept. Both
tokenizers must agree on every string, or nothing is written.
"""

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
from pathlib import Path

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "data" / "tokenizer_golden.json"

HARD = [
    "i am a handsome boy", "", " ", "\t\n \r\n", "a", "!", "?!", "!!!!!!!!!!", "...", ". . .",
    "Two  dogs   run \t through\nthe\r\nsnow .  ",
    "A dog\u00a0with\u2003wide\u3000spaces\u2028and\u2029lines\u200band\ufeffnothing",
    "It's the DOGS' ball, they've won; I'm sure he'll say they'd've gone, don't you're 'tis rock'n'roll",
    "IT'S JOHN'S, THEY'LL, I'D", "it'\u017f \u017ftrange", "'s 't 're 've 'm 'll 'd 's's ''s",
    "snake_case __init__ _ a_b_1 foo-bar foo--bar e-mail@example.com https://example.com/a?b=1&c=2#d",
    "0 7 42 2023 3.14 1,000,000 1/2 50% $5 #1 10km 3d 2nd route66",
    "\u00bd \u00b2 \u2167 \u2460 \u0664\u0665 \u0967\u0968 \u4e00\u4e8c\u4e09",
    "\u201ccurly\u201d \u2018quotes\u2019 \u201elow\u201c \u00abguillemets\u00bb "
    "don\u2019t it\u2019s \u2032 \u2033",
    "en\u2013dash em\u2014dash ellipsis\u2026 bullet\u2022 hyphen\u2010non\u2011breaking soft\u00adhyphen",
    "a &amp; b", "a &amp;amp; b", "a &amp;amp;amp; b", "&lt;b&gt;bold&lt;/b&gt;", "&amp;lt;b&amp;gt;",
    "<b>caf&eacute;</b> &amp; t&eacute;", "caf&eacute; &EACUTE;",
    "&quot;hi&quot; &#39;there&#39; &#x1F600;",
    "AT&T R&D this&not that &copy 2020 &nbsp; a&nbsp;b &hellip;",
    "&#0; &#28; &#128; &#133; &#xD800; &#xfffe; &bogus;", "<a href=\"x\">&amp;&lt;</a>\n&lt;after&gt;",
    "<b> &amp;lt;", "<b> &amp;amp;lt;", "&amp;#38;amp;", "&&&", "& ;", "\U0001f600",
    "a dog \U0001f415\U0001f415 runs\U0001f3c3\u200d\u2640\ufe0f",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 family",
    "flags \U0001f1fa\U0001f1f8\U0001f1e8\U0001f1f3 "
    "keycap 1\ufe0f\u20e3 thumbs\U0001f44d\U0001f3fd \u2764\ufe0f \u2600",
    "\u4e00\u53ea\u68d5\u8272\u7684\u72d7\u5728\u96ea\u5730\u91cc\u5954\u8dd1\u3002",
    "\u4e24\u4e2a\u5c0f\u5b69\uff0c\u7a7f\u7740\u7ea2\u8863\u670d\uff01 "
    "mixed \u4e2d\u6587 and English123\u5b57",
    "\u5929" * 60,
    "\u732b\u304c\u597d\u304d \u30ab\u30bf\u30ab\u30ca "
    "\uff76\uff9e\uff77 \ud55c\uad6d\uc5b4 \u1112\u1161\u11ab",
    "\uff26\uff35\uff2c\uff2c\u3000\uff57\uff49\uff44\uff54\uff48\uff01\uff11\uff12\uff13 \uff04 \uffe5",
    "o\ufb03ce \ufb01re \ufb02ower \ufb06 \u0132 \u01c4 \u00e6 \u0153 \u00df \u1e9e",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m \u0130stanbul I\u0307 \u0131",
    "cafe\u0301 nai\u0308ve A\u030angstro\u0308m e\u0301\u0302\u0303 \u0301",
    "z\u0351\u036b\u0343\u036aa\u0315\u0327l\u0321go",
    "\u039f\u0394\u03a5\u03a3\u03a3\u0395\u03a5\u03a3 \u03a3 \u03a3\u03a3. \u03a3\u0301",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u041c\u0418\u0420",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643", "\u05e9\u05b8\u05dc\u05d5\u05b9\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u212aelvin \u212bngstrom \u2126hm \U0001d54f \U0001d4d0 \u1d2c \u02b0",
    "caf\u00c3\u00a9 \u00e2\u20ac\u0153quoted\u00e2\u20ac\u009d don\u00e2\u20ac\u2122t",
    "voil\u00c3 le travail", "\u00e2\u0153\u201d No problems",
    "\u00c3\u00a2\u00e2\u201a\u00ac\u00e2\u201e\u00a2 twice", "\u00ef\u00bf\u00bd", "\ufffd",
    "\u00f0\u0178\u02dc\u20ac", "\u0420\u045f\u0421\u0402\u0420\u0451\u0420\u0406\u0420\u00b5\u0421\u201a",
    "a\x00b\x01c\x08d\x0be\x0cf\x1bg\x1ch\x1fi\x7fj", "\x1b[36;44mblue\x1b[0m", "\x1c \x1d \x1e \x1f",
    "\x80\x85\x9f\xa0 next\x85line", "\ud83d\ude00 surrogates \ud800 alone",
    "\ufdd0 \ufffe \U0010ffff \ue000", "\u202eright to left\u202c \u2066x\u2069",
    "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 4, " ".join(["word"] * 75),
    " ".join(["word"] * 76), " ".join(["dog's"] * 200), "a photo of a " + "very " * 200 + "long caption .",
    "pneumonoultramicroscopicsilicovolcanoconiosis " * 3, "x" * 300, "aB" * 100, "-" * 200, "!?" * 100,
    "~`!@#$%^&*()_+-={}[]|\\:\";'<>?,./", "C:\\dogs\\photo.jpg", "{\"json\": [1, 2, null]}", "</w> a</w>b",
    "<|startoftext", "<| endoftext |>", "<start_of_text", "[PAD] <pad> <unk> </s>",
]  # fmt: skip
# Each library lets the spelling of its own special tokens through, wherever it stands; the other library
# reads it as the text that it is, and that is what a caption should give.
NOT_SPECIAL = {
    "openclip": ["<|endoftext|>", "a dog <|endoftext|> and a cat",
                 "<|startoftext|>a<|ENDOFTEXT|>b<|endoftext|>"],
    "openai": ["<end_of_text>", "a dog <end_of_text> and a cat",
               "<start_of_text>a<END_OF_TEXT>b<end_of_text>"],
}  # fmt: skip


def load(package: str, module: str):
    """The tokenizer file of a package alone: importing the package would need torchvision."""
    folder = importlib.util.find_spec(package).submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location(f"{package}_{module}", Path(folder) / f"{module}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded.SimpleTokenizer()


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--flickr8k", type=Path, help="folder with {en,cn}_{train,val}.json")
    args = parser.parse_args()
    real = {"openai": load("clip", "simple_tokenizer"), "openclip": load("open_clip", "tokenizer")}

    def agreed(text: str) -> list[int]:
        ids = [tokenizer.encode(text) for tokenizer in real.values()]
        assert ids[0] == ids[1], f"the two libraries differ on {text!r}: {ids}"
        return ids[0]

    strings = [{"text": text, "ids": agreed(text)} for text in HARD]
    for name, texts in NOT_SPECIAL.items():
        strings += [{"text": text, "ids": real[name].encode(text)} for text in texts]

    vocabularies = [
        [
            bytes(tokenizer.byte_decoder[c] for c in symbol.removesuffix("</w>")) + b" " * ("</w>" in symbol)
            for symbol in list(tokenizer.encoder)[:49406]
        ]
        for tokenizer in real.values()
    ]
    assert vocabularies[0] == vocabularies[1], "the two libraries have different merge tables"
    vocabulary = hashlib.sha256(b"\n".join(vocabularies[0])).hexdigest()

    checksums = json.loads(GOLDEN.read_text("utf-8"))["flickr8k"] if GOLDEN.exists() else {}
    for path in sorted(args.flickr8k.glob("??_*.json")) if args.flickr8k else []:
        records = json.loads(path.read_text("utf-8"))
        captions = [caption for record in records for caption in record["caption"]]
        for caption in captions:
            agreed(caption)
        rows = real["openclip"](captions).numpy().astype("<i8")  # OpenCLIP's own packing, 77 wide
        digest = hashlib.sha256(rows.tobytes()).hexdigest()
        checksums[path.name] = {"captions": len(captions), "sha256": digest}

    packages = ["clip-anytorch", "open_clip_torch", "ftfy", "regex"]
    versions = {package: importlib.metadata.version(package) for package in packages}
    lines = ",\n".join("  " + json.dumps(string) for string in strings)
    head = f'"made_with": {json.dumps(versions)},\n"vocabulary": "{vocabulary}",\n'
    head += f'"flickr8k": {json.dumps(checksums, indent=1)}'
    GOLDEN.write_text(f'{{{head},\n"strings": [\n{lines}\n]}}\n', "utf-8")
    print(f"{GOLDEN}: {len(strings)} strings, {sum(c['captions'] for c in checksums.values())} captions")


if __name__ == "__main__":
    main()

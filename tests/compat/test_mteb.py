"""Does MTEB measure a MiniCLIP model as evaluate.py does?

pip install mteb
python -m pytest tests/compat/test_mteb.py
"""

import sys

import numpy as np
import pytest

import miniclip
from miniclip.compat.mteb import MtebEncoder
from miniclip.inference.embed import embed_images, embed_texts
from miniclip.retrieval import retrieval_metrics
from miniclip.utils.errors import InputError


def test_what_is_missing_is_said(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    monkeypatch.setitem(sys.modules, "mteb.models.model_meta", None)
    with pytest.raises(InputError, match="pip install mteb"):
        MtebEncoder(tmp_path)


def test_a_task_from_a_caption_file(tiny_model, caption_set, tmp_path):
    mteb = pytest.importorskip("mteb", reason="pip install mteb")
    from datasets import Dataset, Image
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    records = miniclip.read_captions(caption_set / "captions.json")
    files = [str(caption_set / f"{i}.png") for i in range(len(records))]
    captions = [text for record in records for text in record["caption"]]
    owners = [i for i, record in enumerate(records) for _ in record["caption"]]

    class Captions(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="Captions", description="Images by their captions", dataset={"path": "none", "revision": "none"},
            type="Any2AnyRetrieval", category="t2i", modalities=["text", "image"], eval_splits=["test"],
            eval_langs=["eng-Latn"], main_score="hit_rate_at_1",
        )  # fmt: skip

        def load_data(self, **kwargs):
            corpus = {"id": [f"image {i}" for i in range(len(files))], "image": files}
            queries = {"id": [f"text {i}" for i in range(len(captions))], "text": captions}
            self.dataset = {"default": {"test": {
                "corpus": Dataset.from_dict(corpus).cast_column("image", Image()),
                "queries": Dataset.from_dict(queries), "top_ranked": None,
                "relevant_docs": {f"text {i}": {f"image {owner}": 1} for i, owner in enumerate(owners)},
            }}}  # fmt: skip
            self.data_loaded = True

    tiny_model.save_pretrained(tmp_path / "model")
    encoder = MtebEncoder(tmp_path / "model")
    results = mteb.evaluate(encoder, [Captions()], cache=None, co2_tracker=False)
    scores = results[0].scores["test"][0]
    model, preprocess, tokenizer = miniclip.load(tmp_path / "model")
    texts, images = embed_texts(model, tokenizer, captions), embed_images(model, preprocess, files)
    ours = retrieval_metrics(images, texts, owners)
    for k in (1, 5, 10):
        assert scores[f"hit_rate_at_{k}"] == pytest.approx(ours[f"text_to_image_R@{k}"], abs=1e-5)
    pil = [miniclip.open_image(file) for file in files[:3]]
    both = encoder.encode([{"text": captions[:3], "image": pil}])
    sums = texts[:3] + images[:3]
    assert both == pytest.approx(sums / np.linalg.norm(sums, axis=1, keepdims=True), abs=1e-5)
    assert encoder.similarity(texts, images).shape == (len(texts), len(images))
    assert encoder.similarity_pairwise(texts[:3], texts[:3]).tolist() == pytest.approx([1] * 3)

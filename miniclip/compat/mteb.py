"""A MiniCLIP model for MTEB, which has 130 tasks of images and texts: `mteb.evaluate(MtebEncoder("runs/mine"), tasks)`.

The interface is mteb's EncoderProtocol, of version 2."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from miniclip.inference.embed import embed_texts
from miniclip.inference.load import load
from miniclip.utils.errors import InputError


class MtebEncoder:
    """Embeds the texts and images of MTEB's tasks; where an item has both, it is the direction of their sum.

    `model_name` is what `miniclip.load` takes, and `name` what results are stored under ("organisation/model")."""

    def __init__(
        self, model_name: str | Path, revision: str | None = None, *, device: str | None = None, name: str = ""
    ):
        try:
            from mteb.models.model_meta import ModelMeta
        except ImportError:
            raise InputError("MTEB is missing: pip install mteb") from None
        self.model, self.preprocess, self.tokenizer = load(model_name, device=device or "cpu")
        values = {"name": name or f"miniclip/{Path(model_name).name}", "revision": revision or "local"}
        values |= {"embed_dim": self.model.config.embed_dim, "max_tokens": self.tokenizer.context_length}
        self.mteb_model_meta = ModelMeta.create_empty(values | {"modalities": ["image", "text"]})

    def encode(self, inputs, **kwargs) -> np.ndarray:
        """The unit-length embeddings (n, E) of a DataLoader whose batches have the key "text", "image" or both."""
        return np.concatenate([self._encode(batch) for batch in inputs])

    @torch.inference_mode()
    def _encode(self, batch: dict) -> np.ndarray:
        embeds, device = 0, self.model.logit_scale.device
        if "text" in batch:
            embeds = embeds + torch.from_numpy(embed_texts(self.model, self.tokenizer, batch["text"]))
        if "image" in batch:
            pixel_values = torch.stack([self.preprocess(image) for image in batch["image"]]).to(device)
            embeds = embeds + self.model.encode_image(pixel_values, normalize=True).cpu()
        return F.normalize(embeds, dim=-1).numpy()

    def similarity(self, embeddings1, embeddings2) -> torch.Tensor:
        return torch.as_tensor(embeddings1) @ torch.as_tensor(embeddings2).T

    def similarity_pairwise(self, embeddings1, embeddings2) -> torch.Tensor:
        return (torch.as_tensor(embeddings1) * torch.as_tensor(embeddings2)).sum(dim=-1)

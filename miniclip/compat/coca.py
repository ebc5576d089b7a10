"""A CoCa model behind OpenCLIP's calls and results."""

import torch.nn.functional as F
from torch import Tensor

from miniclip.compat.model import CLIP
from miniclip.towers.coca import CoCa as Model
from miniclip.utils.errors import InputError


class CoCa(CLIP):
    """OpenCLIP's CoCa: embeddings are of unit length by default, and a call returns a dict."""

    def __init__(self, model: Model):
        super().__init__(model, output_dict=True, custom_text=True)
        model.text_decoder.requires_grad_(True)  # as there; with MiniCLIP's own losses only coca trains it

    text_decoder = property(lambda self: self.miniclip.text_decoder)
    pad_id = property(lambda self: self.miniclip.config.text_cfg.pad_id)

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        return super().encode_image(images, normalize)

    def encode_text(self, text: Tensor, normalize: bool = True) -> Tensor:
        return super().encode_text(text, normalize)

    def forward(
        self, image: Tensor | None, text: Tensor | None = None, image_latent: Tensor | None = None,
        image_embs: Tensor | None = None, output_labels: bool = True,
    ) -> dict[str, Tensor]:  # fmt: skip
        """`logits` (B, L - 1, vocabulary) of the tokens after each but the last, and those tokens as `labels`; without
        `output_labels` (B, L, vocabulary). Of images alone `image_features` and `image_embs`, to be given back."""
        if image_latent is None or image_embs is None:
            image_latent, image_embs = self.visual.with_tokens(image.to(self.dtype))
            image_latent = F.normalize(image_latent, dim=-1)
        if text is None:
            return {"image_features": image_latent, "image_embs": image_embs}
        text_latent, tokens = self.text.with_tokens(text)
        logits = self.text_decoder(tokens[:, :-1] if output_labels else tokens, image_embs)
        found = {"image_features": image_latent, "text_features": F.normalize(text_latent, dim=-1), "logits": logits}
        found |= {"logit_scale": self.logit_scale.exp()} | ({"labels": text[:, 1:]} if output_labels else {})
        return found | ({} if self.logit_bias is None else {"logit_bias": self.logit_bias})

    def generate(
        self, image: Tensor, text: Tensor | None = None, seq_len: int = 30, max_seq_len: int = 77,
        temperature: float = 1.0, generation_type: str = "beam_search", top_p: float = 0.1, top_k: int = 1,
        pad_token_id: int | None = None, eos_token_id: int | None = None, sot_token_id: int | None = None,
        num_beams: int = 6, num_beam_groups: int = 3, min_seq_len: int = 5, stopping_criteria=None,
        repetition_penalty: float = 1.0, fixed_output_length: bool = False,
    ) -> Tensor:  # fmt: skip
        """Captions (B, T) as token ids: see `miniclip.towers.coca.CoCa.generate`."""
        if stopping_criteria is not None or max_seq_len < seq_len:
            raise InputError("stopping_criteria and a max_seq_len below seq_len cannot be honoured: lower seq_len")
        return self.miniclip.generate(
            image.to(self.dtype), text, seq_len, generation_type=generation_type, num_beams=num_beams,
            num_beam_groups=num_beam_groups, temperature=temperature, top_p=top_p, top_k=top_k,
            min_seq_len=min_seq_len, repetition_penalty=repetition_penalty, fixed_output_length=fixed_output_length,
            sot_token_id=sot_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id,
        )  # fmt: skip

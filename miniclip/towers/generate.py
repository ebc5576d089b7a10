"""Decoding: the logits of each next token, one position at a time, and beam search and sampling by them.

Both do what OpenCLIP's `generate` does. Two things in it are its own: a beam's score is the sum of logits, not of log
probabilities; and its groups of beams, without a penalty for being alike, all find the same, so one is computed."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LogitsProcessorList, MinLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from miniclip.towers.registry import altered, attend

# Token ids (N, T), and which text of the last call each continues, (N,), or None if all do in order, to the logits of
# the next tokens (N, vocabulary).
NextLogits = Callable[[Tensor, Tensor | None], Tensor]


class GrowingAttention(nn.Module):
    """A block's attention, which keeps the keys and values of earlier positions and takes only the new ones."""

    def __init__(self, attn: nn.Module):
        super().__init__()
        self.attn, self.kept = attn, []

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, *new = self.attn.in_proj(x).chunk(3, dim=2)
        self.kept = [torch.cat(both, dim=1) for both in zip(self.kept, new)] or new
        return self.attn.out_proj(attend(q, *self.kept, self.attn.heads, mask))


class Writer:
    """The NextLogits of a CoCa's text tower and decoder. What it computes of an image serves all texts about it, and of
    a text's earlier positions all later ones."""

    def __init__(self, text: nn.Module, decoder: nn.Module, image_tokens: Tensor):
        self.text, self.decoder, self.images, self.length = text, decoder, len(image_tokens), 0
        self.readers = [altered(block, {"attn": GrowingAttention(block.attn)}) for block in text.blocks]
        self.blocks = [altered(block, {"attn": GrowingAttention(block.attn)}) for block in decoder.blocks]
        self.keys = [block.keys(image_tokens) for block in decoder.cross_attn]

    def __call__(self, ids: Tensor, rows: Tensor | None = None) -> Tensor:
        start, self.length = self.length, ids.shape[1]
        if rows is not None:
            for block in (*self.readers, *self.blocks):
                block.attn.kept = [t[rows] for t in block.attn.kept]
        mask = self.text.mask(ids)[:, :, start:-1, :-1]  # without the class token, which no other position sees
        x = self.text.token_embedding(ids[:, start:]) + self.text.positional_embedding[start : self.length]
        for block in self.readers:
            x = block(x, mask)
        mask = torch.ones_like(mask[0, 0]).tril(start)
        for block, cross, keys in zip(self.blocks, self.decoder.cross_attn, self.keys):
            x = block(x, mask)
            x = cross(x.reshape(self.images, -1, x.shape[2]), keys).view_as(x)  # all texts about an image at once
        return self.decoder.text_projection(self.decoder.ln_final(x[:, -1]))


def processors(eos: int, min_seq_len: int, repetition_penalty: float, device, *warpers) -> LogitsProcessorList:
    """What changes the logits: no end before `min_seq_len` tokens, and a penalty on tokens that were there before."""
    no_end = MinLengthLogitsProcessor(min_seq_len, eos, device)
    return LogitsProcessorList([no_end, RepetitionPenaltyLogitsProcessor(float(repetition_penalty)), *warpers])


def beam_search(
    next_logits: NextLogits, processors: Callable, images: int, beams: int, sot: int, eos: int, pad: int, seq_len: int,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Token ids (images, T), T up to `seq_len`: of each image the text with the highest mean score of a token."""
    ids = torch.full((images * beams, 1), sot, device=device)
    rows = None
    scores = torch.tensor([0.0] + [-1e9] * (beams - 1), device=device).repeat(images)  # all begin alike: one counts
    ended: list[list[tuple[float, Tensor]]] = [[] for _ in range(images)]  # (mean score, ids) of the best texts
    done = [False] * images
    while not all(done) and ids.shape[1] < seq_len:
        logits = processors(ids, next_logits(ids, rows))
        words, length = logits.shape[1], ids.shape[1] + 1
        totals = (logits.float() + scores[:, None]).view(images, -1)
        totals, places = (t.tolist() for t in totals.topk(2 * beams, dim=1))  # enough, were all beams to end
        kept = []
        for image in range(images):
            going = []
            for rank, (total, place) in enumerate(zip(totals[image], places[image])):
                row, token = image * beams + place // words, place % words
                if token != eos:
                    going.append((row, token, total))
                elif rank < beams and not done[image]:
                    keep_best(ended[image], beams, total / length, ids[row])
            done[image] |= len(ended[image]) == beams and ended[image][-1][0] >= totals[image][0] / length
            kept += going[:beams]
        rows, tokens, scores = (torch.tensor(column, device=device) for column in zip(*kept))
        ids = torch.cat([ids[rows], tokens[:, None]], dim=1)
    for image in range(images):
        for row in range(image * beams, (image + 1) * beams) if not done[image] else ():
            keep_best(ended[image], beams, scores[row].item() / ids.shape[1], ids[row])
    best = [F.pad(sorted(texts, key=lambda text: text[0])[-1][1], (0, 1), value=eos) for texts in ended]
    return nn.utils.rnn.pad_sequence(best, batch_first=True, padding_value=pad)[:, :seq_len]


def keep_best(texts: list[tuple[float, Tensor]], count: int, score: float, ids: Tensor):
    """Adds a text to the `count` best ones, best first, if it is one of them."""
    texts.append((score, ids))
    texts.sort(key=lambda text: -text[0])
    del texts[count:]


def sample(
    next_logits: NextLogits, processors: Callable, ids: Tensor, temperature: float, eos: int, pad: int, seq_len: int
) -> Tensor:
    """Texts that begin with `ids` (images, T), (images, up to `seq_len`), each token drawn from the softmax of logits
    over the temperature. One of `seq_len` tokens ends with `eos`; a shorter one is padded."""
    while ids.shape[1] < seq_len:
        going = ((ids[:, -1] != eos) & (ids[:, -1] != pad)).nonzero()[:, 0]
        if not len(going):
            break
        ids = F.pad(ids, (0, 1), value=pad)
        if ids.shape[1] == seq_len:
            ids[going, -1] = eos
        else:
            logits = processors(ids[going, :-1], next_logits(ids[:, :-1], None)[going])
            ids[going, -1] = torch.multinomial((logits / temperature).softmax(dim=1), 1)[:, 0]
    return ids

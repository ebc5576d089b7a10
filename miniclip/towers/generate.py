"""Decoding: beam search and sampling from a model that gives the logits of each next token.

Both do what OpenCLIP's `generate` does. Two things in it are its own: a beam's score is the sum of logits, not of log
probabilities; and its groups of beams, without a penalty for being alike, all find the same, so one is computed.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessorList, MinLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

# Token ids (N, T), and the image of each of the N texts, (N,), to the logits of the next tokens (N, vocabulary).
NextLogits = Callable[[Tensor, Tensor], Tensor]


def processors(eos: int, min_seq_len: int, repetition_penalty: float, *warpers) -> LogitsProcessorList:
    """What changes the logits: no end before `min_seq_len` tokens, and a penalty on tokens that were there before."""
    rules = MinLengthLogitsProcessor(min_seq_len, eos), RepetitionPenaltyLogitsProcessor(float(repetition_penalty))
    return LogitsProcessorList([*rules, *warpers])


def beam_search(
    next_logits: NextLogits, processors: Callable, images: int, beams: int, sot: int, eos: int, pad: int, seq_len: int,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Token ids (images, T), T up to `seq_len`: of each image the text with the highest mean score of a token."""
    ids = torch.full((images * beams, 1), sot, device=device)
    of_image = torch.arange(images, device=device).repeat_interleave(beams)
    scores = torch.tensor([0.0] + [-1e9] * (beams - 1), device=device).repeat(images)  # all begin alike: one counts
    ended: list[list[tuple[float, Tensor]]] = [[] for _ in range(images)]  # (mean score, ids) of the best texts
    done = [False] * images
    while not all(done) and ids.shape[1] < seq_len:
        logits = processors(ids, next_logits(ids, of_image))
        words, length = logits.shape[1], ids.shape[1] + 1
        totals = (logits.float() + scores[:, None]).view(images, -1)
        totals, places = (t.tolist() for t in totals.topk(2 * beams, dim=1))  # enough, were all beams to end
        rows, tokens, kept = [], [], []
        for image in range(images):
            going = []
            for rank, (total, place) in enumerate(zip(totals[image], places[image])):
                row, token = image * beams + place // words, place % words
                if token != eos:
                    going.append((row, token, total))
                elif rank < beams and not done[image]:
                    keep_best(ended[image], beams, total / length, ids[row])
            done[image] |= len(ended[image]) == beams and worst(ended[image]) >= totals[image][0] / length
            for row, token, total in going[:beams]:
                rows.append(row)
                tokens.append(token)
                kept.append(total)
        ids = torch.cat([ids[rows], torch.tensor(tokens, device=device)[:, None]], dim=1)
        scores = torch.tensor(kept, device=device)
    for image in range(images):
        for row in range(image * beams, (image + 1) * beams) if not done[image] else ():
            keep_best(ended[image], beams, scores[row].item() / ids.shape[1], ids[row])
    best = [sorted(texts, key=lambda text: text[0])[-1][1] for texts in ended]
    width = min(max(map(len, best)) + 1, seq_len)
    out = torch.full((images, width), pad, device=device)
    for row, text in zip(out, best):
        row[: len(text)] = text
        row[len(text) : len(text) + 1] = eos
    return out


def keep_best(texts: list[tuple[float, Tensor]], count: int, score: float, ids: Tensor):
    """Adds a text to the `count` best ones, if it is one of them."""
    if len(texts) < count or score > worst(texts):
        texts.append((score, ids))
        if len(texts) > count:
            del texts[min(range(len(texts)), key=lambda i: texts[i][0])]


def worst(texts: list[tuple[float, Tensor]]) -> float:
    return min(score for score, _ in texts)


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
            before = ids[going, :-1]
            logits = processors(before, next_logits(before, going))
            ids[going, -1] = torch.multinomial((logits / temperature).softmax(dim=1), 1)[:, 0]
    return ids

"""Projections between two frozen encoders in closed form: regularised canonical correlation analysis (CCA).

With features x of images and y of captions, less their means, and their covariances C,

    Wx = Rx^-1/2 U S^p,   Wy = Ry^-1/2 V S^p,   U S V' = svd(Rx^-1/2 Cxy Ry^-1/2)

where Rx is Cxx plus `reg_x` times its mean eigenvalue on the diagonal, Ry likewise, and p is 1/2. The rows of Wx and Wy
are pairs of directions along which images and captions vary together, weighted by how much. (Hotelling, "Relations
between two sets of variates", 1936; weights by powers of S: Gong et al., arXiv 1212.4522.) Each image counts once, and
each of its captions as a share of it, as when training draws one caption at random.

Layers without a bias cannot subtract the means. For them C are second moments, less nothing (the regularisation stays
the same), and the first pair of directions, which then is the means' and tells nothing, is left out."""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler

from miniclip.data import image_id
from miniclip.model import MAX_LOGIT_SCALE, ClipOutput, MiniClip
from miniclip.retrieval import retrieval_metrics
from miniclip.training.losses import make_loss
from miniclip.weights.pretrained import is_folder

CHUNK = 4096  # images whose features are float64 at a time
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of regularisation
TRUST = (0.0, 0.1, 0.3, 1.0)  # in the names of classes
FOLDS = 5
SCORED = 1500  # images that are held out in all, at most
ENOUGH = 6000  # images that are trained on while others are held out, at most
FEW = 10  # images, below which nothing is held out


class Pairs(NamedTuple):
    """Features of n images (n, X) and of their m captions (m, Y), by image, from `starts` (n + 1,) on."""

    images: Tensor
    texts: Tensor
    starts: Tensor

    def owner(self) -> Tensor:  # the image of each caption, (m,)
        return torch.arange(len(self.images)).repeat_interleave(self.starts.diff())

    def take(self, rows: Tensor) -> "Pairs":
        counts = self.starts.diff()[rows]
        starts = F.pad(counts.cumsum(0), (1, 0))
        captions = torch.arange(starts[-1]) + (self.starts[rows] - starts[:-1]).repeat_interleave(counts)
        return Pairs(self.images[rows], self.texts[captions], starts)


class Moments(NamedTuple):
    """Sums over images, in float64: how many, x, y, xx', yy' and xy', where y is the mean over an image's captions."""

    n: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor

    @classmethod
    def of(cls, pairs: Pairs) -> "Moments":
        total = None
        for rows in torch.arange(len(pairs.images)).split(CHUNK):
            part = pairs.take(rows)
            owner = part.owner()
            x, y = part.images.double(), part.texts.double()
            shares = y / part.starts.diff()[owner, None]
            mean = torch.zeros(len(x), y.shape[1], dtype=y.dtype).index_add_(0, owner, shares)
            sums = torch.tensor(len(x)), x.sum(0), mean.sum(0), x.T @ x, shares.T @ y, x.T @ mean
            total = sums if total is None else [a.add_(b) for a, b in zip(total, sums)]
        return cls(*total)

    def without(self, others: "Moments") -> "Moments":
        return Moments(*(a - b for a, b in zip(self, others)))

    def masked(self, mask: Tensor) -> "Moments":
        """Those of the features x * mask, (X,) of zeros and ones."""
        return self._replace(x=self.x * mask, xx=self.xx * mask.outer(mask), xy=self.xy * mask[:, None])


class ClosedForm:
    """The projections of some moments, for any strength of regularisation; for layers with a bias, or without. `prior`
    (X, Y) maps images to captions by knowledge from elsewhere; without trust in it, the features that it maps are left
    out. `images` (n, X), those of the moments, save time if they are fewer than their features."""

    def __init__(self, moments: Moments, bias: bool = True, prior: Tensor | None = None, images: Tensor | None = None):
        n, x, y, xx, yy, xy = moments
        x, y = x / n, y / n
        self.first = 0 if bias else 1  # without a bias the first pair of directions is the means'
        self.unit_x, self.unit_y = ((m.trace() / n - mean @ mean) / len(m) for m, mean in ((xx, x), (yy, y)))
        self.mean_x, self.mean_y = bias * x, bias * y  # what is subtracted
        self.cxx = xx / n - self.mean_x.outer(self.mean_x)
        few = images is not None and len(images) < images.shape[1]
        self.factor = (images.double() - self.mean_x) / n.sqrt() if few else None  # Cxx is its square
        values, self.axes_y = torch.linalg.eigh(yy / n - self.mean_y.outer(self.mean_y))
        self.values_y = values.clamp_min(0)
        self.cxy = (xy / n - self.mean_x.outer(self.mean_y)) @ self.axes_y
        self.prior = None
        if prior is not None:
            mask = (~prior.any(dim=1)).double()
            rest = None if images is None else images * mask
            self.plain = cache(lambda: ClosedForm(moments.masked(mask), bias, images=rest))
            self.prior = prior.double() @ self.axes_y
            if not bias:
                self.prior -= x.outer(x @ self.prior) / (x @ x)  # what it says of all images alike
            self.spread = (xy / n - x.outer(y)).norm()
        self.maps = cache(self.maps)  # the costly half depends on reg_x alone

    def maps(self, reg_x: float) -> tuple[Tensor, Tensor | None]:
        """Rx^-1 Cxy and, with a prior P, Rx P. The former saves the roots of Rx, which is often the largest: what is
        left is the eigenvectors V of Ry^-1/2 Cyx Rx^-1 Cxy Ry^-1/2, whose eigenvalues are the squares of S."""
        ridge = reg_x * self.unit_x
        if (a := self.factor) is None:
            root = torch.linalg.cholesky(self.cxx + ridge * torch.eye(len(self.cxx), dtype=self.cxx.dtype))
            regression = torch.cholesky_solve(self.cxy, root)
        else:  # Woodbury's identity: n x n instead of X x X
            inner = torch.linalg.solve(a @ a.T + ridge * torch.eye(len(a), dtype=a.dtype), a @ self.cxy)
            regression = (self.cxy - a.T @ inner) / ridge
        if self.prior is None:
            return regression, None
        return regression, (self.cxx @ self.prior if a is None else a.T @ (a @ self.prior)) + ridge * self.prior

    def solve(self, reg_x: float, reg_y: float, dim: int, trust: float = 0.0) -> tuple[tuple[Tensor, Tensor], ...]:
        """Weight (dim, X), bias (dim,) of the images' projection, and those (dim, Y), (dim,) of the texts'. Rows beyond
        the number of directions are zero. `trust`: the size of Rx P, which a prior P adds to Cxy, relative to Cxy."""
        if self.prior is not None and not trust:
            return self.plain().solve(reg_x, reg_y, dim)
        regression, more = self.maps(reg_x)
        cxy = self.cxy
        if trust:
            share = trust * self.spread / more.norm()
            regression, cxy = regression + share * self.prior, cxy + share * more
        root = (self.values_y + reg_y * self.unit_y).rsqrt()
        squares, v = torch.linalg.eigh(root[:, None] * (cxy.T @ regression) * root)
        pairs = slice(self.first, min(self.first + dim, *self.cxy.shape))
        s = squares.flip(0)[pairs].clamp_min(1e-20).sqrt()
        v = root[:, None] * v.flip(1)[:, pairs]
        wx, wy = (regression @ v * s**-0.5).T, (self.axes_y @ v * s**0.5).T
        wx, wy = (F.pad(w, (0, 0, 0, dim - len(s))) for w in (wx, wy))
        return (wx, -wx @ self.mean_x), (wy, -wy @ self.mean_y)


def linear(projection: nn.Module) -> nn.Linear | None:
    """The only layer of a projection, if that is linear; dropout does not count."""
    layers = [module for module in projection.modules() if not isinstance(module, nn.Sequential | nn.Dropout)]
    return layers[0] if len(layers) == 1 and isinstance(layers[0], nn.Linear) else None


def pairs_of(records: Sequence[dict], images: np.ndarray, texts: np.ndarray) -> Pairs:
    """The features of each image once, and of all captions, whichever records they are in."""
    numbers: dict[int, int] = {}  # id of an image -> its place in the result
    rows, owner = [], []  # of each image the first record; of each caption the place of its image
    for row, record in enumerate(records):
        number = numbers.setdefault(image_id(record["image"]), len(numbers))
        rows += [row] * (number == len(rows))
        owner += [number] * len(record["caption"])
    owner = torch.tensor(owner)
    starts = F.pad(owner.bincount(minlength=len(rows)).cumsum(0), (1, 0))
    return Pairs(torch.from_numpy(images)[rows], torch.from_numpy(texts)[owner.argsort(stable=True)], starts)


def embed(heads: Sequence[nn.Module], images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    return F.normalize(heads[0](images), dim=1), F.normalize(heads[1](texts), dim=1)


@torch.no_grad()
def mean_recall(heads: Sequence[nn.Module], pairs: Pairs) -> float:
    images, texts = embed([head.eval() for head in heads], pairs.images, pairs.texts)
    return 100 * retrieval_metrics(images.numpy(), texts.numpy(), pairs.owner().numpy())["mean_recall"]


@torch.no_grad()
def fit_scale(heads: Sequence[nn.Module], pairs: Pairs, batch: int) -> float:
    """The logarithm of the scale at which CLIP's loss of held-out pairs, as many as in a batch, is lowest."""
    n = min(batch, len(pairs.images))
    images, texts = embed(heads, pairs.images[:n], pairs.texts[pairs.starts[:n]])
    losses = {s.item(): pair_loss(ClipOutput(images, texts, s.exp())) for s in torch.linspace(0, MAX_LOGIT_SCALE, 47)}
    return min(losses, key=losses.get)


def pair_loss(outputs: ClipOutput, batch: dict | None = None, sigmoid: bool = False) -> Tensor:
    """CLIP's loss, or SigLIP's, of a batch without duplicates that is all here. Other processes, whose rows the losses
    of a run gather, wait for what this one finds."""
    logits = outputs.logit_scale * outputs.image_embeds @ outputs.text_embeds.T
    own = torch.arange(len(logits))
    if sigmoid:
        return -F.logsigmoid((2 * torch.eye(len(own)) - 1) * (logits + outputs.logit_bias)).sum() / len(own)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def folds(n: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of n images that are trained on and those that are held out, for each fold. Of many images only as many
    are ever held out as are enough to measure."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    size = min(n // FOLDS, SCORED)
    for start in range(0, size * max(1, min(FOLDS, SCORED // size)), size):
        yield torch.cat([order[:start], order[start + size :]]), order[start : start + size]


def install(heads: Sequence[nn.Module], solution):
    """Sets projections to weights and biases. Each is scaled to the size of the weights that torch draws, which changes
    no direction: so a learning rate means the same for all encoders."""
    for head, (weight, bias) in zip(heads, solution):
        scale = (3 * weight.shape[1] * weight.square().mean()).rsqrt()
        linear(head).weight.data.copy_(scale * weight)
        if linear(head).bias is not None:
            linear(head).bias.data.copy_(scale * bias)


def train(heads: Sequence[nn.Module], logit: Sequence[nn.Parameter], pairs: Pairs, args, loss: Callable):
    """Trains projections and `logit`, a scale and perhaps a bias, on features like the run to come, without Trainer."""
    heads = nn.ModuleList(heads).train()
    scale = logit[0]
    generator = np.random.default_rng(args.seed)
    n = len(pairs.images)
    batch = min(args.train_batch_size * args.world_size * args.gradient_accumulation_steps, n)
    steps = args.max_steps if args.max_steps > 0 else int(args.num_train_epochs * (n // batch))
    decay = [{"params": [p for p in heads.parameters() if p.ndim > 1], "weight_decay": args.weight_decay},
             {"params": [*(p for p in heads.parameters() if p.ndim < 2), *logit], "weight_decay": 0.0}]  # fmt: skip
    betas = args.adam_beta1, args.adam_beta2
    optimizer = torch.optim.AdamW(decay, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon)
    warmup = args.get_warmup_steps(steps)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps, args.lr_scheduler_kwargs)
    for step in range(steps):
        if step % (n // batch) == 0:
            order = torch.from_numpy(generator.permutation(n))
        rows = order[step % (n // batch) * batch :][:batch]
        part = pairs.take(rows)
        drawn = part.starts[:-1] + torch.from_numpy(generator.integers(part.starts.diff().numpy()))
        outputs = ClipOutput(*embed(heads, part.images, part.texts[drawn]), scale.exp(), *logit[1:])
        loss(outputs, {"pair_ids": rows[:, None].expand(-1, 2)}).backward()
        nn.utils.clip_grad_norm_([*heads.parameters(), *logit], args.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        if isinstance(schedule, LambdaLR):  # others follow a metric, and nothing is measured meanwhile
            schedule.step()
        scale.data.clamp_(0, MAX_LOGIT_SCALE)


def choose(model: MiniClip, pairs: Pairs, args, loss: Callable, alone: bool, prior: Tensor | None):
    """Tries strengths of regularisation, then training, on held-out images. Returns the projections of all pairs, their
    logit scale, whether training improves on them, and a line about that. Unless projections are trained `alone`, but
    blocks of the encoders with them, training is not tried."""
    heads = [copy.deepcopy(tower.projection).cpu().float() for tower in (model.visual, model.text)]
    centred = all(linear(head).bias is not None for head in heads)
    n, dim = len(pairs.images), model.config.embed_dim
    logit = model.logit_scale, model.logit_bias
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    total = Moments.of(pairs)
    form = ClosedForm(total, centred, prior, pairs.images)
    if n < FEW:
        then = "not trained further" if alone else "then trained with the last blocks"
        line = f"projections: regularised CCA, {then}: {n} images are too few to hold any out"
        solution = form.solve(STRENGTHS[-1], STRENGTHS[-2], dim, trust=0.0 if prior is None else TRUST[-1])
        return solution, model.logit_scale.item(), not alone, line
    parts = [(kept, pairs.take(held)) for kept, held in folds(n, args.seed)]
    forms = [ClosedForm(total.without(Moments.of(held)), centred, prior, pairs.images[kept]) for kept, held in parts]
    axes = (STRENGTHS, STRENGTHS, TRUST[:1] if prior is None else TRUST)

    @cache
    def measure(place: tuple[int, int, int]) -> float:
        x, y, trust = (values[number] for values, number in zip(axes, place))
        found = []
        for one, (_, held) in zip(forms, parts):
            install(heads, one.solve(x, y, dim, trust=trust))
            found.append(mean_recall(heads, held))
        return sum(found) / len(found)

    best = (*((4, 2) if n < 1000 else (3, 1)), 2 * int(prior is not None))
    tried = None
    while best != tried:  # uphill, one at a time; where few images show no difference, to what is stronger
        tried = best
        for axis, values in reversed(list(enumerate(axes))):
            nearby = [(*best[:axis], best[axis] + d, *best[axis + 1 :]) for d in (1, 0, -1)]
            best = max((p for p in nearby if 0 <= p[axis] < len(values)), key=measure)
    *strengths, trust = (values[number] for values, number in zip(axes, best))
    scales, trained = [], []
    for one, (kept, held) in zip(forms, parts):
        install(heads, one.solve(*strengths, dim, trust=trust))
        scales.append(fit_scale(heads, held, batch))
        if alone:
            own = [nn.Parameter(p.detach().cpu().clone(), p.requires_grad) for p in logit if p is not None]
            if len(own) == 1 and own[0].requires_grad:
                own[0].data.fill_(scales[-1])
            train(heads, own, pairs.take(kept[:ENOUGH]), args, loss)
            trained.append(mean_recall(heads, held))
    before = measure(best)
    names = "" if prior is None else f", trust in class names {trust:g}"
    times = "1 fold" if len(parts) == 1 else f"{len(parts)} folds"
    line = (
        f"projections: regularised CCA (images {strengths[0]:g}, captions {strengths[1]:g}{names}), mean recall"
        f" {before:.1f} on {sum(len(held.images) for _, held in parts)} images held out for a moment in {times}"
    )
    if alone:
        after = sum(trained) / len(trained)
        then = "training goes on from there" if after > before else "nothing more is trained (one epoch at rate 0)"
        line += f", after training {after:.1f}: {then}"
    solution = form.solve(*strengths, dim, trust=trust)
    return solution, sum(scales) / len(scales), not alone or after > before, line


def may_start_in_closed_form(options) -> bool:
    """Whether options allow such a start: projections are untrained, and of encoders at most the last blocks learn."""
    trained = options.pretrained or is_folder(options.model) or options.check_gradients
    return not (trained or options.streaming or "none" in (options.freeze_image, options.freeze_text))


def starts_in_closed_form(model: MiniClip, options) -> bool:
    """Whether it takes place: if options allow it, encoders are pretrained, and each projection is one linear layer."""
    pretrained = model.config.vision_cfg.pretrained and model.config.text_cfg.pretrained
    one = all(linear(tower.projection) for tower in (model.visual, model.text))
    return bool(pretrained and one and may_start_in_closed_form(options))


def class_prior(model: MiniClip, names: np.ndarray) -> Tensor:
    """What the image encoders know, as a map (X, Y) from images to captions: from the probability of each of their own
    classes to its name, as the text tower reads it, `names` (classes, Y) (Norouzi et al., arXiv 1312.5650)."""
    prior = torch.zeros(model.visual.width, model.text.width)
    prior[list(model.visual.classes)] = torch.from_numpy(names - names.mean(axis=0))
    return prior


def start_in_closed_form(model: MiniClip, options, args, records, images: np.ndarray, texts: np.ndarray, names):
    """Sets a model's projections, from the features of its records, to their closed form, and the logit scale to what
    suits held-out pairs. Sets the learning rate to 0, for one epoch, if training projections alone does not help."""
    found: list = [None]
    prior = None if names is None else class_prior(model, names)
    if args.process_index == 0:
        loss = make_loss(model, options, args)
        loss = loss if args.world_size == 1 else partial(pair_loss, sigmoid=options.loss == "siglip")
        found = [choose(model, pairs_of(records, images, texts), args, loss, all(options.frozen), prior)]
    if dist.is_initialized():
        dist.broadcast_object_list(found)  # another process might find something else in the last bits
    solution, scale, trains, line = found[0]
    install((model.visual.projection, model.text.projection), solution)
    if model.logit_scale.requires_grad and model.logit_bias is None:
        model.logit_scale.data.fill_(scale)
    if not trains:
        args.learning_rate = 0.0
        args.num_train_epochs, args.max_steps = 1, -1
        args.lr_scheduler_type, args.lr_scheduler_kwargs = SchedulerType.CONSTANT, None
    if args.process_index == 0:
        print(line)

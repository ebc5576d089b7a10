"""How would a user of each library do it? The side of `cpu.py` that works: one process, one contestant, one case.

    contestants.py weights FOLDER CONFIG          makes the weights that all contestants load
    contestants.py NAME CASE FOLDER SETTINGS      works; NAME is a key of CONTESTANTS, SETTINGS is JSON

A worker says when it is ready, then waits for a line on its standard input, works once, and says how long that took:
so contestants in different Python environments can take turns on one machine.
"""

import json
import math
import os
import resource
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
RATE, DECAY = 1e-5, 0.1  # of training, for all
LAYOUTS = {"openclip": "openclip.safetensors", "hf": "hf"}  # name in the folder of each layout of the weights


class Turns:
    """The worker's end of the two pipes. What libraries print goes to standard error instead."""

    def __init__(self):
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **answer):
        print(json.dumps(answer), file=self.answers, flush=True)

    def begin(self) -> dict:
        """Waits until it is this worker's turn, and gives what is asked for. Ends the process when nothing is."""
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # from within a Trainer too
        request = json.loads(line)
        self.cpu, self.start = cpu_seconds(), time.perf_counter()
        return request

    def end(self, repeat: int = 1, result: np.ndarray | None = None, save: str | None = None, **more):
        """Says how long it took, after it has written the result where it is wanted."""
        seconds, cpu, peak = time.perf_counter() - self.start, cpu_seconds() - self.cpu, peak_gb()
        if save:
            np.save(save, result)
        self.say(seconds=seconds / repeat, cpu=cpu / repeat, peak_gb=peak, **more)


def cpu_seconds() -> float:
    return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def peak_gb() -> float:
    """The largest resident memory of this process so far. Not getrusage's, which begins with that of the parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


class Pairs(torch.utils.data.Dataset):
    """Pairs of a decoded image and a caption, the same `batch` ones again and again: whoever takes them in order sees
    the same batch in every step."""

    def __init__(self, captions: list[str], size: int, batch: int):
        rng = np.random.default_rng(0)
        self.pixels = [torch.from_numpy(rng.normal(size=(3, size, size)).astype(np.float32)) for _ in range(batch)]
        self.captions = captions[:batch]

    def __len__(self) -> int:
        return 1000 * len(self.captions)

    def __getitem__(self, index: int) -> dict:
        index %= len(self.captions)
        return {"pixel_values": self.pixels[index], "caption": self.captions[index]}


class MadePairs(Pairs):
    """Pairs that are made when they are asked for, so that no memory but the batch's is taken. Images are levels, as
    MiniCLIP's own data set gives them to its trainer, or floats."""

    def __init__(self, captions: list[str], size: int, batch: int, as_levels: bool):
        self.size, self.captions, self.as_levels = size, captions[:batch], as_levels

    def __getitem__(self, index: int) -> dict:
        draw = torch.Generator().manual_seed(index)
        levels = torch.randint(256, (3, self.size, self.size), dtype=torch.uint8, generator=draw)
        pixels = levels if self.as_levels else levels / 255
        return {"pixel_values": pixels, "caption": self.captions[index % len(self.captions)]}


class MiniClip:
    """This repository, as its README says."""

    def __init__(self, folder: Path, precision: str, training: bool):
        sys.path.insert(0, str(ROOT))
        import miniclip

        self.miniclip, self.folder = miniclip, folder
        inference = None if training else precision
        self.model, self.preprocess, self.tokenizer = miniclip.load(folder / "miniclip", precision=inference)

    def texts(self, captions: list[str], **options) -> np.ndarray:
        return self.miniclip.embed_texts(self.model, self.tokenizer, captions, **options)

    def images(self, paths: list[Path], **options) -> np.ndarray:
        return self.miniclip.embed_images(self.model, self.preprocess, paths, **options)

    def picture(self, paths: list[Path]) -> np.ndarray:
        return self.preprocess.load(paths[0]).numpy()

    def train(self, turns: Turns, pairs: Pairs, batch: int, precision: str, chunk: int = 0):
        from miniclip.training.arguments import RunArguments
        from miniclip.training.dataset import RunDataset
        from miniclip.training.trainer import RunTrainer

        class Wrapped(RunDataset):
            """Pairs as MiniCLIP's trainer wants them."""

            def __init__(self, pairs):
                super().__init__((), None)
                self.pairs = pairs

            def __len__(self) -> int:
                return len(self.pairs)

            def __getitem__(self, index: int) -> dict:
                return self.pairs[index]

        arguments = trainer_arguments(RunArguments, self.folder, batch, precision, grad_cache_chunk_size=chunk)
        train_in_turns(
            RunTrainer, turns, model=self.model, args=arguments, train_dataset=Wrapped(pairs),
            preprocess=self.preprocess, tokenizer=self.tokenizer,
        )  # fmt: skip


class Loop(MiniClip):
    """MiniCLIP's parts in a bare loop, without what Trainer and the data library take for themselves."""

    def train(self, turns: Turns, pairs: Pairs, batch: int, precision: str, chunk: int = 0):
        from miniclip.inference.matmul import fast_arithmetic
        from miniclip.loss import clip_loss
        from miniclip.training.grad_cache import wrap_towers

        model = wrap_towers(self.model.train(), self.preprocess.normalize, chunk)

        def loss_of(images: torch.Tensor, captions: list[str]) -> torch.Tensor:
            ids = self.tokenizer(captions, trim=True)
            return clip_loss(*model(images, ids)[:3])

        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
        with fast_arithmetic("cpu"):
            loop_in_turns(turns, pairs, batch, precision, loss_of, optimizer, model.logit_scale)


class Plain:
    """MiniCLIP's model as one would use it without having thought about speed: no padding cut off, torch's own
    arithmetic, one image after the other. What it lacks against MiniCLIP is what MiniCLIP does for speed."""

    def __init__(self, folder: Path, precision: str, training: bool):
        sys.path.insert(0, str(ROOT))
        import miniclip

        self.open_image = miniclip.open_image
        self.model, self.preprocess, self.tokenizer = miniclip.load(folder / "miniclip")

    @torch.inference_mode()
    def texts(self, captions: list[str], batch_size: int = 32) -> np.ndarray:
        return in_batches(lambda part: self.model.encode_text(self.tokenizer(part), True), captions, batch_size)

    @torch.inference_mode()
    def images(self, paths: list[Path], batch_size: int = 32) -> np.ndarray:
        def encode(part: list[Path]) -> torch.Tensor:
            return self.model.encode_image(torch.stack([self.preprocess(self.open_image(path)) for path in part]), True)

        return in_batches(encode, paths, batch_size)

    def picture(self, paths: list[Path]) -> np.ndarray:
        return self.preprocess(self.open_image(paths[0])).numpy()

    def train(self, turns: Turns, pairs: Pairs, batch: int, precision: str):
        from miniclip.loss import clip_loss

        def loss_of(images: torch.Tensor, captions: list[str]) -> torch.Tensor:
            return clip_loss(*self.model.train()(images, self.tokenizer(captions))[:3])

        optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, weight_decay=DECAY)
        loop_in_turns(turns, pairs, batch, precision, loss_of, optimizer, self.model.logit_scale)


class OpenClip:
    """OpenCLIP, as its README and its training script do it. Its tokenizer pads to the context length, always."""

    def __init__(self, folder: Path, precision: str, training: bool):
        open_clip = self.open_clip = import_open_clip()
        self.model, self.preprocess, self.tokenizer = load_open_clip(
            open_clip, folder / "model.json", folder / LAYOUTS["openclip"]
        )

    @torch.inference_mode()
    def texts(self, captions: list[str], batch_size: int = 256) -> np.ndarray:
        return in_batches(lambda part: self.model.encode_text(self.tokenizer(part), True), captions, batch_size)

    @torch.inference_mode()
    def images(self, paths: list[Path], batch_size: int = 32, num_workers: int = 0) -> np.ndarray:
        if not num_workers:

            def encode(part: list[Path]) -> torch.Tensor:
                return self.model.encode_image(torch.stack([self.preprocess(Image.open(path)) for path in part]), True)

            return in_batches(encode, paths, batch_size)
        loader = torch.utils.data.DataLoader(ImageFiles(paths, self.preprocess), batch_size, num_workers=num_workers)
        return torch.cat([self.model.encode_image(images, True) for images in loader]).numpy()

    def picture(self, paths: list[Path]) -> np.ndarray:
        return self.preprocess(Image.open(paths[0])).numpy()

    def train(self, turns: Turns, pairs: Pairs, batch: int, precision: str):
        self.model.train().output_dict = True
        loss = self.open_clip.ClipLoss()

        def loss_of(images: torch.Tensor, captions: list[str]) -> torch.Tensor:
            return loss(**self.model(images, self.tokenizer(captions)), output_dict=True)["contrastive_loss"]

        no_decay, decay = [], []
        for name, p in self.model.named_parameters():
            excluded = p.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))
            (no_decay if excluded else decay).append(p)
        groups = [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": DECAY}]
        optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6)
        loop_in_turns(turns, pairs, batch, precision, loss_of, optimizer, self.model.logit_scale)


class Transformers:
    """transformers' CLIPModel and processors, trained by its Trainer. A batch is padded to its longest caption, as the
    model's documentation does it."""

    def __init__(self, folder: Path, precision: str, training: bool):
        from transformers import CLIPModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self.folder = folder
        self.model = CLIPModel.from_pretrained(folder / LAYOUTS["hf"]).eval()
        self.processor = CLIPImageProcessorPil.from_pretrained(folder / LAYOUTS["hf"])
        self.tokenizer = hf_tokenizer(self.model.config.text_config.max_position_embeddings)

    def tokens(self, captions: list[str]) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer(captions, padding=True, truncation=True, return_tensors="pt"))

    @torch.inference_mode()
    def texts(self, captions: list[str], batch_size: int = 32) -> np.ndarray:
        return in_batches(lambda part: unit(self.model.get_text_features(**self.tokens(part))), captions, batch_size)

    @torch.inference_mode()
    def images(self, paths: list[Path], batch_size: int = 32) -> np.ndarray:
        def encode(part: list[Path]) -> torch.Tensor:
            inputs = self.processor(images=[Image.open(path) for path in part], return_tensors="pt")
            return unit(self.model.get_image_features(**inputs))

        return in_batches(encode, paths, batch_size)

    def picture(self, paths: list[Path]) -> np.ndarray:
        return self.processor(images=Image.open(paths[0]), return_tensors="pt")["pixel_values"][0].numpy()

    def train(self, turns: Turns, pairs: Pairs, batch: int, precision: str):
        from transformers import Trainer, TrainingArguments

        def collate(items: list[dict]) -> dict:
            tokens = self.tokens([item["caption"] for item in items])
            return tokens | {"pixel_values": torch.stack([i["pixel_values"] for i in items]), "return_loss": True}

        arguments = trainer_arguments(
            TrainingArguments, self.folder, batch, precision, remove_unused_columns=False, dataloader_drop_last=True
        )
        train_in_turns(Trainer, turns, model=self.model, args=arguments, train_dataset=pairs, data_collator=collate)


CONTESTANTS = {"miniclip": MiniClip, "loop": Loop, "open_clip": OpenClip, "transformers": Transformers, "plain": Plain}


class ImageFiles(torch.utils.data.Dataset):
    """Image files for a DataLoader, preprocessed."""

    def __init__(self, paths: list[Path], preprocess):
        self.paths, self.preprocess = paths, preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.preprocess(Image.open(self.paths[index]))


def in_batches(encode, items: list, batch_size: int) -> np.ndarray:
    return torch.cat([encode(items[i : i + batch_size]) for i in range(0, len(items), batch_size)]).numpy()


def unit(features) -> torch.Tensor:
    """Unit-length embeddings from what transformers gives, of whichever version."""
    return F.normalize(getattr(features, "pooler_output", features), dim=-1)


def import_open_clip():
    """Imports OpenCLIP beside a torchvision of another build than torch's. Of its compiled operators none is used:
    declaring the two that its import looks for is enough."""
    import_open_clip.kept = []  # a library that is collected is undefined again
    for name in ("nms", "qnms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import_open_clip.kept.append(library)
    import open_clip

    return open_clip


def load_open_clip(open_clip, config: Path, weights: Path):
    """Model, preprocessing and tokenizer by OpenCLIP's own functions."""
    open_clip.add_model_config(config)
    model, _, preprocess = open_clip.create_model_and_transforms(config.stem, pretrained=str(weights))
    return model.eval(), preprocess, open_clip.get_tokenizer(config.stem)


def hf_tokenizer(context_length: int):
    """transformers' tokenizer, from the merge table that all CLIPs share."""
    import gzip

    from transformers import CLIPTokenizer

    sys.path.insert(0, str(ROOT))
    from miniclip.tokenizer import MERGES_FILE, bytes_to_unicode

    merges = [tuple(line.split(" ")) for line in gzip.decompress(MERGES_FILE.read_bytes()).decode().splitlines()]
    symbols = list(bytes_to_unicode().values())
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges)]
    vocab = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab, merges, model_max_length=context_length)


def loop_in_turns(turns: Turns, pairs: Pairs, batch: int, precision: str, loss_of, optimizer, logit_scale):
    """A training loop as people write it: one step a turn, from captions and decoded images to updated weights."""
    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()
    turns.say(ready=True)
    while True:
        turns.begin()
        items = [pairs[i] for i in range(batch)]
        images = torch.stack([item["pixel_values"] for item in items])
        optimizer.zero_grad()
        with autocast:
            loss = loss_of(images, [item["caption"] for item in items])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            logit_scale.clamp_(0, math.log(100))
        turns.end(loss=loss.item())


def trainer_arguments(kind: type, folder: Path, batch: int, precision: str, **more):
    """Training arguments: the defaults of `kind`, but that nothing is written and batches come in order."""
    return kind(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=batch, learning_rate=RATE, weight_decay=DECAY,
        use_cpu=True, bf16=precision == "bf16", train_sampling_strategy="sequential", save_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True, **more,
    )  # fmt: skip


def train_in_turns(trainer_class: type, turns: Turns, **arguments):
    """Trains by a Trainer that waits at the end of each step. A turn goes from there to the end of the next step, so
    that all Trainer does for a step counts, the making of a batch too."""
    from transformers import TrainerCallback

    class Watched(trainer_class):
        def training_step(self, *args, **kwargs):
            self.last_loss = super().training_step(*args, **kwargs)
            return self.last_loss

    class Waiting(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            turns.say(ready=True)
            turns.begin()

        def on_step_end(self, args, state, control, **kwargs):
            turns.end(loss=trainer.last_loss.item())
            turns.begin()

    trainer = Watched(**arguments, callbacks=[Waiting()])
    trainer.train()


def work(name: str, case: str, folder: Path, settings: dict):
    """A worker's life."""
    turns = Turns()
    precision = settings.pop("precision", "fp32")
    contestant = CONTESTANTS[name](folder, precision, case == "train")
    captions = json.loads((folder / "captions.json").read_text())
    if case == "train":
        size = json.loads((folder / "model.json").read_text())["vision_cfg"]["image_size"]
        given = captions, size, settings["batch"]
        pairs = MadePairs(*given, name in ("miniclip", "loop")) if settings.pop("made", False) else Pairs(*given)
        contestant.train(turns, pairs, precision=precision, **settings)
        return
    files = sorted((folder / "photos").glob("*.jpg"))
    items = {"texts": captions, "images": files, "picture": [folder / "big.jpg"]}
    turns.say(ready=True, threads=torch.get_num_threads())
    while True:
        request = turns.begin()
        chosen = items[request["what"]][: request["count"]]
        for _ in range(request["repeat"]):
            result = getattr(contestant, request["what"])(chosen, **request.get("options", {}))
        turns.end(request["repeat"], result, request.get("save"))


def make_weights(folder: Path, config: str):
    """Random weights, drawn once, in the layout of each contestant."""
    sys.path.insert(0, str(ROOT))
    from miniclip.config import MODEL_CONFIGS, MiniClipConfig
    from miniclip.model import MiniClip
    from miniclip.weights.convert import convert

    torch.manual_seed(0)
    shutil.rmtree(folder / "miniclip", ignore_errors=True)
    MiniClip(MiniClipConfig.from_name(config)).save_pretrained(folder / "miniclip")
    shutil.copy(MODEL_CONFIGS / f"{config}.json", folder / "model.json")
    for layout, name in LAYOUTS.items():
        convert(folder / "miniclip", folder / name, layout, force=True)


if __name__ == "__main__":
    if sys.argv[1] == "weights":
        make_weights(Path(sys.argv[2]), sys.argv[3])
    else:
        work(sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4]))

"""Streams: training data too large to be here, read from the first sample to the last.

Each worker of each process reads a share of its own, and a buffer shuffles the samples. There is no index: nothing can
be looked up, drawn with replacement or evaluated on."""

import itertools
import logging

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, IterableDataset

from miniclip.datasets.captions import captions_of
from miniclip.datasets.records import ReadOptions, check_captions
from miniclip.datasets.splits import at_split, split_column
from miniclip.datasets.tables import Cell, load_table, table_root
from miniclip.datasets.text_files import find_columns
from miniclip.training.dataset import MAX_BAD, RunDataset, prepare_worker
from miniclip.utils.errors import InputError
from miniclip.utils.image_files import ImageError

logger = logging.getLogger(__name__)
BUFFER = 1000  # samples to draw from, in each worker


class StreamDataset(RunDataset):
    """Pairs for training from a Hugging Face IterableDataset, with captions and crops drawn as by a RunDataset.

    The stream is read pass after pass, each in another order: of its files, and within a buffer. In a pass the workers
    of all processes together read every sample exactly once; each starts its next pass when its share ends. Without
    `num_samples` it never ends, and `max_steps` ends the training. With `num_samples` an epoch is that many samples of
    all processes together, and starts a new pass. Bad samples are skipped, unless `on_bad` is "stop"."""

    def __init__(self, stream, columns: list[str], num_samples, spec, root, *args, **kwargs):
        super().__init__((), *args, **kwargs)
        self.columns, self.num_samples, self.spec, self.root = columns, num_samples, spec, root
        # One file at a time: the library would read ten in threads, and wait for those at the end of each pass.
        self.stream = stream.shuffle(seed=self.seed, buffer_size=BUFFER, max_buffer_input_shards=1)

    @classmethod
    def opened(cls, source: str, args, options: ReadOptions = ReadOptions(), *, num_samples: int | None = None):
        """Opens hf:NAME, .parquet or .arrow. Returns a function that makes the dataset, called like RunDataset with
        None for the records. Raises InputError for a source that cannot be streamed."""
        if "::" in source:
            raise InputError(f"{source}: one source can be streamed, not several")
        if num_samples is None and args.max_steps <= 0:
            raise InputError(f"{source}: a stream has no end: give --max_steps, or --train_num_samples per epoch")
        source, part = at_split(source)
        stream, part, strict = load_table(source, part or options.split, streaming=True)
        there = stream.column_names or list(next(iter(stream), {}))
        columns = find_columns(there, options, source)
        splits = split_column(there)
        import datasets

        if stream.features is None or isinstance(stream.features.get(columns[0]), datasets.Image):
            stream = stream.cast_column(columns[0], datasets.Image(decode=False))
        if part and strict:
            if splits is None:
                raise InputError(f"{source}: there is no split {part!r} in it: it has no column 'split'")
            stream = stream.filter(lambda split: str(split).strip() in part.split("+"), input_columns=[splits])
        elif splits is not None:
            logger.warning("%s: all rows are read, whatever their column %r names", source, splits)
        stream = stream.select_columns(columns)
        root = table_root(source, options)
        return lambda records, *more, **kwargs: cls(stream, columns, num_samples, source, root, *more, **kwargs)

    def __len__(self) -> int:
        if self.num_samples is None:
            raise TypeError("a stream has no length")
        return self.num_samples

    def label(self, row) -> dict:
        """Returns the place of a sample in the stream: it cannot be looked up."""
        turn, reader, number = map(int, row)
        return {"record": f"{self.spec}: sample {number} of reader {reader}, pass {turn}"}

    def share(self, reader: int, readers: int, number: int | None = None):
        """Yields the items of one of several readers: `number` of them, pass after pass, or without end."""
        passes = (self.one_pass(reader, readers, turn) for turn in itertools.count())
        return itertools.islice(itertools.chain.from_iterable(passes), number)

    def one_pass(self, reader: int, readers: int, turn: int = 0):
        """Yields the items of one of several readers in one pass of this epoch."""
        from datasets.distributed import split_dataset_by_node

        # Whole files each if there are enough of them; else each reads all, and keeps every n-th sample.
        strategy = "shards" if self.stream.num_shards >= readers else "examples"
        part = split_dataset_by_node(self.stream, reader, readers, strategy)
        part.set_epoch(10_000 * self.epoch.item() + turn)
        number = -1  # of the last sample
        bad = 0  # of them, one after the other
        # In batches, because the library would split plain iteration between workers again, by files.
        samples = (dict(zip(batch, row)) for batch in part.iter(16) for row in zip(*batch.values()))
        for number, sample in enumerate(samples):
            row = self.note(turn, reader, number)
            name = self.label(row)["record"]
            try:
                captions = check_captions(captions_of(sample, self.columns[1:]), name)
                record = {"image": Cell([sample], 0, self.columns[0], name, self.root), "caption": captions}
                item = self.draw(record, self.rng(f"{turn} {reader} {number}"))
            except (ImageError, InputError) as error:
                if self.on_bad == "stop":
                    raise
                self.report(name, error)
                bad += 1
                if bad == MAX_BAD:
                    raise InputError(f"{self.spec}: {bad} bad samples in a row, the last: {error}") from None
                continue
            bad = 0
            yield item | {"row": row}
        if number < 0:
            raise InputError(f"{self.spec}: a whole pass has no sample for reader {reader}: use fewer workers")
        if bad > number:
            raise InputError(f"{self.spec}: a whole pass has no usable sample for reader {reader}")

    def dataloader(self, args, collate) -> DataLoader:
        """Returns the batches of this process, for the Trainer."""
        share = Share(self, args.process_index, args.world_size, args.per_device_train_batch_size)
        names = "num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "multiprocessing_context"
        workers = {name: getattr(args, f"dataloader_{name}") for name in names}
        loader = DataLoader(share, args.per_device_train_batch_size, collate_fn=collate, drop_last=True, **workers)
        # accelerate would read the whole stream in process 0 and send the batches around, or in each process and drop
        # the others' batches. It only needs to know that this is the loader.
        return prepare_data_loader(loader, args.device, 1, 0, put_on_device=True, dispatch_batches=False)


class Share(IterableDataset):
    """One process's share of a StreamDataset, as long as its share of an epoch."""

    def __init__(self, dataset: StreamDataset, rank: int, ranks: int, batch_size: int):
        self.dataset, self.rank, self.ranks, self.batch_size = dataset, rank, ranks, batch_size

    def __len__(self) -> int:
        return len(self.dataset) // (self.ranks * self.batch_size) * self.batch_size

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        if info:  # before the buffer is filled
            prepare_worker()
        number = None
        if self.dataset.num_samples is not None:  # the loader takes a batch of each worker in turn
            number = (len(self) // self.batch_size - worker + workers - 1) // workers * self.batch_size
        # Readers of one process are `ranks` apart, so that with unequal shares no process falls behind.
        return iter(self.dataset.share(worker * self.ranks + self.rank, workers * self.ranks, number))

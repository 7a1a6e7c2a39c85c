"""Read the first batches of the training data, the same ones on every rank."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import fairseq.utils

FIRST_BATCHES = 16  # how many batches gradients are measured on


def first_batches(trainer: Any, epoch: int, count: int = FIRST_BATCHES) -> Iterator[Any]:
    """The first batches of the training data of an epoch, the same ones on every rank, on the model's device.

    They are kept on the CPU until the next epoch, since dividing a large data set into batches takes minutes.

    Args:
        trainer: fairseq's.
        epoch: the current epoch, whose data is used.
        count: number of batches; fewer if there are not so many.
    """
    of_epoch, asked, kept = trainer.__dict__.get("quant_noise_first_batches", (None, 0, []))
    if of_epoch != epoch or asked < count:
        kept = list(islice(_batches(trainer, epoch), count))
        trainer.quant_noise_first_batches = epoch, count, kept
    for sample in kept[:count]:
        yield trainer._prepare_sample(sample)[0]


def _batches(trainer: Any, epoch: int) -> Iterator[Any]:
    """The batches of an epoch of the training data, as if there were one process."""
    data, cfg = trainer.task.dataset(trainer.cfg.dataset.train_subset), trainer.cfg.dataset
    return trainer.task.get_batch_iterator(
        data,
        max_tokens=cfg.max_tokens,
        max_sentences=cfg.batch_size,
        max_positions=fairseq.utils.resolve_max_positions(
            trainer.task.max_positions(), trainer.get_model().max_positions()
        ),
        ignore_invalid_inputs=True,
        required_batch_size_multiple=cfg.required_batch_size_multiple,
        seed=trainer.cfg.common.seed,
        epoch=epoch,
        disable_iterator_cache=True,  # or the training would go on behind these batches
    ).next_epoch_itr(shuffle=True)

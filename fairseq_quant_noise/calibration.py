"""Ranges of activations from a data set, by fairseq: its task reads the data and its criterion runs the model."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from .errors import UserError
from .layers import adopt_quantized, calibrating, input_quantizers
from .plan import Structure
from .structure.modules import apply_structure
from .watched import watched

logger = logging.getLogger(__name__)

SUBSET = "train"
SENTENCES = 8  # of a batch


def calibration_on(
    path: str | Path,
    data: str | Path,
    batches: int,
    structure: Structure | None = None,
    progress: Callable[[str], None] = logger.info,
) -> Callable[[nn.Module], object]:
    """A `calibration` for `quantize_`: forwards of the quantized network over the training split of `data`.

    The network of the checkpoint `path` is built by fairseq too, with the same weights, and run on the first batches;
    the ranges that it finds go to the network without fairseq, whose modules have the same names.

    Args:
        path: of the checkpoint.
        data: the folder that fairseq-train read.
        batches: how many.
        structure: of the plan, which the network to calibrate has had already.
        progress: called with a line now and then, with the time left.
    Raises:
        UserError: there is no such data.
    """
    dictionaries = (file for pattern in ("dict*.txt", "*/dict*.txt") for file in Path(data).glob(pattern))
    if not any(dictionaries) and not (Path(data) / SUBSET).is_dir():  # of text, of images
        cure = "give the folder that fairseq-train reads"
        raise UserError(f"--calibration-data {data}: no such folder with a dictionary (dict.txt) in it; {cure}")

    def calibrate(model: nn.Module) -> None:
        theirs, criterion, samples = _prepared(model, str(path), str(data), batches, structure)
        with calibrating(theirs):
            for sample in watched(samples, batches, "calibrating activations", progress):
                criterion(theirs, sample)
        ours = input_quantizers(model)
        for name, quantizer in input_quantizers(theirs).items():
            ours[name].load_state_dict(quantizer.state_dict())

    return calibrate


def _prepared(
    model: nn.Module, path: str, data: str, batches: int, structure: Structure | None
) -> tuple[nn.Module, Any, Iterator[Any]]:
    """fairseq's network with the weights of `model`, its criterion, and the batches."""
    import fairseq.checkpoint_utils

    from . import register

    register()
    load = fairseq.checkpoint_utils.load_model_ensemble_and_task
    models, cfg, task = load([path], arg_overrides={"data": data})
    theirs, state = models[0], model.state_dict()
    if structure is not None:
        apply_structure(theirs, structure)
    adopt_quantized(theirs, state)  # a stock checkpoint builds fairseq's own model, which does not do it itself
    nn.Module.load_state_dict(theirs, state)  # for fairseq's own looks for the `weight` of heads that are in codes
    return theirs, task.build_criterion(cfg.criterion), _samples(task, data, batches)


def _samples(task: Any, data: str, batches: int) -> Any:
    try:
        task.load_dataset(SUBSET)
    except (FileNotFoundError, AssertionError) as error:
        raise UserError(f"--calibration-data {data}: no split '{SUBSET}' ({error}); binarize one") from None
    iterator = task.get_batch_iterator(
        dataset=task.dataset(SUBSET), max_sentences=SENTENCES, ignore_invalid_inputs=True, seed=1
    ).next_epoch_itr(shuffle=True)
    for _, sample in zip(range(batches), iterator, strict=False):
        yield sample

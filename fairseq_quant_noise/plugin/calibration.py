"""What a network does with data, by fairseq: its task reads them and its criterion runs the model.

The ranges of activations, batch statistics, and the squared gradients that stand for Adam's second moments where there
are none.
"""

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..layers import adopt_quantized, input_quantizers
from ..layers.batch_statistics import batch_norms
from ..layers.inputs import NAME as INPUT_QUANTIZER
from ..plan.plan import Plan
from ..plan.rules import Structure
from ..quantization.structure import apply_structure
from ..utils.progress import watched
from .batches import FIRST_BATCHES
from .gradients import squared_gradients

logger = logging.getLogger(__name__)

SUBSET = "train"
SENTENCES = 8  # of a batch
IMAGES, IMAGE_BATCHES = 32, 16  # for batch statistics: of few images the variance between them is missing


def calibration_on(
    model: nn.Module, path: str | Path, data: str | Path, plan: Plan
) -> Iterator[Callable[[nn.Module], object]]:
    """A `calibration` for `quantize_`: forwards of `model` over the training split of `data`, by fairseq's criterion.

    fairseq's own network of the checkpoint runs in its place, with the weights that `model` has when a first forward is
    asked for. The layers that data changes, batch normalisations and input quantizers, are those of `model` itself.
    Batch statistics need more than ranges: of a network with batch normalisation there are 16 batches of 32 images.

    Args:
        model: the network without fairseq, with the checkpoint's weights and the plan's `structure`.
        path: of the checkpoint.
        data: the folder that fairseq-train read.
        plan: that quantizes it.
    Raises:
        UserError: there is no such data.
    """
    _check_data(data)
    return _forwards(model, str(path), str(data), plan)


def _forwards(model: nn.Module, path: str, data: str, plan: Plan) -> Iterator[Callable[[nn.Module], object]]:
    norms = batch_norms(model)
    theirs, criterion, task = _prepared(model, path, data, plan.structure, augmentation="none")  # as in evaluation
    theirs.eval()
    for name, quantizer in input_quantizers(model).items():
        theirs.set_submodule(f"{name}.{INPUT_QUANTIZER}".lstrip("."), quantizer)
    for name, norm in norms.items():
        theirs.set_submodule(name, norm)
    if norms:
        samples = _samples(task, data, IMAGE_BATCHES, IMAGES)
    else:
        samples = _samples(task, data, plan.activations.calibration_batches if plan.activations else 0)
    for sample in samples:
        yield lambda _, sample=sample: criterion(theirs, sample)  # type: ignore[misc]


def _check_data(data: str | Path) -> None:
    dictionaries = (file for pattern in ("dict*.txt", "*/dict*.txt") for file in Path(data).glob(pattern))
    if not any(dictionaries) and not (Path(data) / SUBSET).is_dir():  # of text, of images
        cure = "give the folder that fairseq-train reads"
        raise UserError(f"--calibration-data {data}: no such folder with a dictionary (dict.txt) in it; {cure}")


def gradients_on(
    model: nn.Module,
    path: str | Path,
    data: str | Path,
    structure: Structure | None = None,
    progress: Callable[[str], None] = logger.info,
) -> dict[str, Tensor]:
    """`squared_gradients` of the dense network of a checkpoint over the first batches of the training split of `data`.

    Args:
        model: the network without fairseq, with the checkpoint's weights.
        path, data, structure, progress: as in `calibration_on`.
    Raises:
        UserError: there is no such data.
    """
    _check_data(data)
    theirs, criterion, task = _prepared(model, str(path), str(data), structure)
    samples = _samples(task, str(data), FIRST_BATCHES)
    watching = watched(samples, FIRST_BATCHES, "measuring gradients", progress)
    return squared_gradients(theirs, criterion, watching)


def _prepared(
    model: nn.Module, path: str, data: str, structure: Structure | None, **options: Any
) -> tuple[nn.Module, Any, Any]:
    """fairseq's network with the weights of `model`, its criterion and its task; `options` replace the checkpoint's."""
    import fairseq.checkpoint_utils

    from .. import register

    register()
    load = fairseq.checkpoint_utils.load_model_ensemble_and_task
    models, cfg, task = load([path], arg_overrides={"data": data, **options})
    theirs, state = models[0], model.state_dict()
    if structure is not None:
        apply_structure(theirs, structure)
    adopt_quantized(theirs, state)  # a stock checkpoint builds fairseq's own model, which does not do it itself
    nn.Module.load_state_dict(theirs, state)  # for fairseq's own looks for the `weight` of heads that are in codes
    return theirs, task.build_criterion(cfg.criterion), task


def _samples(task: Any, data: str, batches: int, size: int = SENTENCES) -> Iterator[Any]:
    """The first batches of the training split; of images none that is not full, where there are enough of them."""
    try:
        task.load_dataset(SUBSET)
    except (FileNotFoundError, AssertionError) as error:
        raise UserError(f"--calibration-data {data}: no split '{SUBSET}' ({error}); binarize one") from None
    dataset = task.dataset(SUBSET)
    iterator = task.get_batch_iterator(
        dataset=dataset, max_sentences=size, ignore_invalid_inputs=True, seed=1
    ).next_epoch_itr(shuffle=True)
    least = min(size, len(dataset)) if size == IMAGES else 1  # all batches count alike in batch statistics
    yield from islice((sample for sample in iterator if sample.get("nsentences", size) >= least), batches)

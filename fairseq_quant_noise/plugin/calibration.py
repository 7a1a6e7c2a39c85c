"""Run fairseq's task and criterion on a few batches, to calibrate ranges or to measure squared gradients and losses.

These are the ranges of activations, the statistics of batch normalisation, and the squared gradients that replace
Adam's second moments where a checkpoint has none.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import fairseq.checkpoint_utils
import torch
from torch import Tensor, nn

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.keys import no_training
from ..errors import UserError
from ..layers import adopt_quantized, input_quantizers
from ..layers.batch_statistics import batch_norms, by_batch
from ..layers.inputs import NAME as INPUT_QUANTIZER
from ..plan.plan import Plan
from ..quantization.feedback import feeds_back, measuring_inputs
from ..quantization.quantize import swapped
from ..quantization.targets import resolve_stages
from ..utils.progress import watched
from .batches import FIRST_BATCHES
from .gradients import squared_gradients
from .loading import upgraded

logger = logging.getLogger(__name__)

SUBSET = "train"
SENTENCES = 8  # in a batch
IMAGES, IMAGE_BATCHES = 32, 16  # for batch statistics: a batch of few images underestimates the variance between them


def calibration_on(checkpoint: Checkpoint, data: str | Path, plan: Plan) -> Iterator[Callable[[nn.Module], object]]:
    """A `calibration` for `quantize_`: forwards over the training split of `data`, by fairseq's criterion.

    fairseq's own network of the checkpoint runs, with the weights that `checkpoint.network` has when a first forward is
    asked for. The layers that data changes, batch normalisations and input quantizers, are those of that network.
    Batch statistics need more than ranges: of a network with batch normalisation there are 16 batches of 32 images.

    Args:
        checkpoint: the one whose network is quantized, with the plan's `structure` applied.
        data: the folder that fairseq-train read.
        plan: the plan that quantizes it.

    Raises:
        UserError: `data` is no such folder or (raised at the first forward) has no training split.
    """
    _check_data(data)
    return _forwards(checkpoint, str(data), plan)


def _forwards(checkpoint: Checkpoint, data: str, plan: Plan) -> Iterator[Callable[[nn.Module], object]]:
    model = checkpoint.network
    norms = batch_norms(model)
    theirs, criterion, task = _prepared(checkpoint, data, augmentation="none")  # as in evaluation
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
    if not any(dictionaries) and not (Path(data) / SUBSET).is_dir():  # text has dictionaries, images have folders
        cure = "give the folder that fairseq-train reads"
        raise UserError(f"--calibration-data {data}: no such folder with a dictionary (dict.txt) in it; {cure}")


def gradients_on(
    checkpoint: Checkpoint, data: str | Path, progress: Callable[[str], None] = logger.info
) -> dict[str, Tensor]:
    """`squared_gradients` of a checkpoint's dense network over the first batches of the training split of `data`.

    Args:
        checkpoint: as in `calibration_on`.
        data: as there.
        progress: called with a line about progress from time to time.

    Returns:
        By the weight's name, a bfloat16 tensor of its shape: (out, in) for a Linear, (words, C) for an Embedding.

    Raises:
        UserError: `data` is no such folder, or has no training split.
    """
    _check_data(data)
    theirs, criterion, task = _prepared(checkpoint, str(data))
    samples = _samples(task, str(data), FIRST_BATCHES, _batch_size(theirs))
    watching = watched(samples, FIRST_BATCHES, "measuring gradients", progress)
    return squared_gradients(theirs, criterion, watching)


def inputs_on(
    checkpoint: Checkpoint, data: str | Path, plan: Plan, progress: Callable[[str], None] = logger.info
) -> dict[str, Tensor]:
    """The second moments of the layers' inputs that `encode: feedback` needs, over the first batches of `data`.

    Args:
        checkpoint: as in `calibration_on`, dense.
        data: as there.
        plan: the plan that quantizes it.
        progress: called with a line about progress from time to time.

    Returns:
        By the weight's name (I, I), as `measuring_inputs`.

    Raises:
        UserError: `data` is no such folder, or has no training split; or the plan does not fit the network.
    """
    _check_data(data)
    names = [target.weight.name for target in resolve_stages(plan, checkpoint.network) if feeds_back(target)]
    theirs, criterion, task = _prepared(checkpoint, str(data), augmentation="none")
    samples = _samples(task, str(data), plan.encode.batches)
    with measuring_inputs(theirs, names) as found:
        for sample in watched(samples, plan.encode.batches, "measuring the layers' inputs", progress):
            criterion(theirs, sample)
    return found


def loss_on(checkpoint: Checkpoint, data: str | Path) -> Callable[[Mapping[str, Tensor]], float]:
    """Measure the criterion's loss a token over the first batches of the training split of `data`, without dropout.

    Batch normalisation goes by the statistics of each batch, since `quantize` estimates them anew.

    Args:
        checkpoint: as in `calibration_on`.
        data: as there.

    Returns:
        A function that measures it with other values for the tensors of some names, each of the tensor's shape, such
        as (out, in) for a Linear.

    Raises:
        UserError: `data` is no such folder, or has no training split.
    """
    _check_data(data)
    theirs, criterion, task = _prepared(checkpoint, str(data))
    theirs.eval()
    samples = list(_samples(task, str(data), FIRST_BATCHES, _batch_size(theirs)))
    parameters = dict(theirs.named_parameters(remove_duplicate=False))

    @torch.no_grad()
    def loss(values: Mapping[str, Tensor]) -> float:
        with by_batch(theirs), swapped([(parameters[name], value) for name, value in values.items()]):
            found = [criterion(theirs, sample)[:2] for sample in samples]
        return sum(float(loss) for loss, _ in found) / sum(float(size) for _, size in found)

    return loss


def _prepared(checkpoint: Checkpoint, data: str, **options: Any) -> tuple[nn.Module, Any, Any]:
    """fairseq's network with the weights of the checkpoint's, its criterion and its task.

    Args:
        checkpoint: as in `calibration_on`.
        data: as there.
        options: values that replace options of the checkpoint.
    """
    parts = {name: copy.deepcopy(checkpoint.state.get(name)) for name in ("args", "cfg")}
    if checkpoint.state.get("task_state"):  # absent where nothing was trained: a task cannot load None
        parts["task_state"] = copy.deepcopy(checkpoint.state["task_state"])
    content = {**parts, "model": dict(checkpoint.weights), **no_training()}
    state = upgraded(checkpoint.path, content, {"data": data, **options})
    load = fairseq.checkpoint_utils.load_model_ensemble_and_task
    (theirs,), cfg, task = load([str(checkpoint.path)], state=state)
    weights = checkpoint.network.state_dict()
    adopt_quantized(theirs, weights)  # a stock checkpoint builds fairseq's own model, which does not do it itself
    nn.Module.load_state_dict(theirs, weights)  # for fairseq's own looks for the `weight` of heads that are in codes
    return theirs, task.build_criterion(cfg.criterion), task


def _batch_size(model: nn.Module) -> int:
    return IMAGES if batch_norms(model) else SENTENCES


def _samples(task: Any, data: str, batches: int, size: int = SENTENCES) -> Iterator[Any]:
    """The first batches of the training split; incomplete batches of images are skipped. Raises UserError."""
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

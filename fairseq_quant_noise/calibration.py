"""What a network does with data, by fairseq: its task reads them and its criterion runs the model.

The ranges of activations, and the squared gradients that stand for Adam's second moments where there are none.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import UserError
from .layers import adopt_quantized, calibrating, input_quantizers
from .plan import Structure
from .structure.modules import apply_structure
from .watched import watched

logger = logging.getLogger(__name__)

SUBSET = "train"
SENTENCES = 8  # of a batch
GRADIENT_BATCHES = 16


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
    _check_data(data)

    def calibrate(model: nn.Module) -> None:
        theirs, criterion, samples = _prepared(model, str(path), str(data), batches, structure)
        with calibrating(theirs):
            for sample in watched(samples, batches, "calibrating activations", progress):
                criterion(theirs, sample)
        ours = input_quantizers(model)
        for name, quantizer in input_quantizers(theirs).items():
            ours[name].load_state_dict(quantizer.state_dict())

    return calibrate


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
    theirs, criterion, samples = _prepared(model, str(path), str(data), GRADIENT_BATCHES, structure)
    watching = watched(samples, GRADIENT_BATCHES, "measuring gradients", progress)
    return squared_gradients(theirs, criterion, watching)


def squared_gradients(
    model: nn.Module, criterion: Any, samples: Iterable[Any], scale: float = 1.0
) -> dict[str, Tensor]:
    """The sum over batches of the squared gradient of their mean loss, for each number of each weight, in bfloat16.

    It stands for the diagonal of the Fisher matrix up to a factor (`importance.py`). The model's gradients are gone
    then; its noise and dropout are off meanwhile.

    Args:
        model: of fairseq.
        criterion: fairseq's; called with the model and a batch.
        samples: batches, on the model's device.
        scale: of the loss, for gradients in half precision.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    sums = {id(p): torch.zeros_like(p, dtype=torch.float32) for p in parameters.values() if p.requires_grad}
    training = model.training
    model.eval()
    for sample in samples:
        model.zero_grad()
        with torch.enable_grad():
            loss, size, _ = criterion(model, sample)
            (loss * (scale / max(float(size), 1.0))).backward()
        for p in {id(p): p for p in parameters.values() if p.grad is not None}.values():
            sums[id(p)] += p.grad.float().square().nan_to_num(0.0, 0.0)  # type: ignore[union-attr]
    model.zero_grad()
    model.train(training)
    found = {name: sums[id(p)].bfloat16() for name, p in parameters.items() if id(p) in sums}
    return {name: tensor for name, tensor in found.items() if bool(tensor.any())}


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

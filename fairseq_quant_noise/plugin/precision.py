"""Support `--bf16` where there is no TPU, and `--bf16` and `--fp16` where there is no GPU.

fairseq's command line takes `--bf16` to mean a TPU and stops where torch_xla is missing, on every GPU and CPU; the flag
is read here as what it says. And the flat fp32 copy of the parameters asks for a CUDA device; without one, each
parameter has a copy of its own.
"""

import importlib.util
from typing import Any

import fairseq.distributed.utils
import torch
from omegaconf import DictConfig, open_dict

from . import sharded
from .data_parallel import join_processes
from .exits import exits_on_user_error
from .models.equivalents import check_task

_call_main = fairseq.distributed.utils.call_main


def call_main(cfg: Any, main: Any, **kwargs: Any) -> Any:
    """fairseq's function of this name; its configuration is checked, and mended for half precision and processes."""
    with exits_on_user_error():
        check_task(getattr(cfg, "model", None), getattr(cfg, "task", None))
        if isinstance(cfg, DictConfig):
            sharded.check(cfg)
    if isinstance(cfg, DictConfig):
        _mend(cfg)
        join_processes(cfg)
    return _call_main(cfg, main, **kwargs)


def _mend(cfg: DictConfig) -> None:
    common = cfg.common
    with open_dict(cfg):
        if common.bf16 and common.tpu and importlib.util.find_spec("torch_xla") is None:
            for section in cfg.values():
                if isinstance(section, DictConfig) and "tpu" in section:
                    section.tpu = False
        if (common.bf16 or common.fp16) and not common.tpu and (common.cpu or not torch.cuda.is_available()):
            common.fp16_no_flatten_grads = True

"""`--bf16` where there is no TPU.

fairseq's command line takes `--bf16` to mean a TPU and stops where torch_xla is missing, on every GPU and CPU; and its
flat fp32 copy of the parameters asks for a CUDA device. Its Hydra entry has neither fault. The flag is read here as
what it says.
"""

import importlib.util
from typing import Any

import fairseq.distributed.utils
import torch
from omegaconf import DictConfig, open_dict

_call_main = fairseq.distributed.utils.call_main


def call_main(cfg: Any, main: Any, **kwargs: Any) -> Any:
    """fairseq's function of this name, with the configuration of a half-precision run put right."""
    if isinstance(cfg, DictConfig):
        _mend(cfg)
    return _call_main(cfg, main, **kwargs)


def _mend(cfg: DictConfig) -> None:
    common = cfg.common
    with open_dict(cfg):
        if common.bf16 and common.tpu and importlib.util.find_spec("torch_xla") is None:
            for section in cfg.values():
                if isinstance(section, DictConfig) and "tpu" in section:
                    section.tpu = False
        if common.bf16 and not common.tpu and (common.cpu or not torch.cuda.is_available()):
            common.fp16_no_flatten_grads = True


def install() -> None:
    """Make fairseq's programs start through this module."""
    fairseq.distributed.utils.call_main = call_main

"""Import timm and torchvision, or say how to install them."""

from types import ModuleType

import torch

from ..errors import UserError

NEEDS = "pip install 'fairseq-quant-noise[vision]'"


def import_vision(name: str) -> ModuleType:
    """timm, torchvision or one of their modules.

    Raises:
        UserError: it is not installed, or does not fit the torch that is.
    """
    try:
        return __import__(name, fromlist=["_"])
    except ModuleNotFoundError as error:
        raise UserError(f"images need {error.name}, which is not installed; run: {NEEDS}") from None
    except (ImportError, RuntimeError) as error:  # a torchvision that was built for another torch
        reason = str(error).splitlines()[0]
        raise UserError(
            f"images need torchvision, which does not load ({reason}); install the one that was built for torch "
            f"{torch.__version__}: https://pytorch.org/get-started/previous-versions"
        ) from None

"""Provide `quant_noise_roberta`: fairseq's RoBERTa, with Quant-Noise and iPQ that work."""

import logging
import re
from pathlib import Path
from typing import Any

import torch
from fairseq.models import register_model, register_model_architecture
from fairseq.models.roberta import RobertaHubInterface
from fairseq.models.roberta.model import (
    RobertaLMHead,
    RobertaModel,
    base_architecture,
    roberta_large_architecture,
)
from fairseq.utils import safe_getattr
from torch import Tensor, nn

from ...errors import UserError
from ...layers.registry import Held, weights_in
from ..exits import exits_on_user_error
from .hub import hub_interface
from .quantizable import Quantizable, add_noise, without_fairseq_noise
from .roberta_config import QuantNoiseRobertaConfig

logger = logging.getLogger(__name__)

_WORDS, _OUTPUT = "encoder.sentence_encoder.embed_tokens.weight", "encoder.lm_head.weight"
_IN_A_HEAD = re.compile(r"classification_heads\..+\.weight")


class _LinearLMHead(RobertaLMHead, nn.Linear):
    """Present fairseq's head, which has a weight of its own, as a Linear to noise and plans."""


@register_model("quant_noise_roberta", dataclass=QuantNoiseRobertaConfig)
class QuantNoiseRoberta(Quantizable, RobertaModel):
    """Train fairseq's `roberta` with noise on every Linear and Embedding, learned positions and heads included."""

    def __init__(self, args: Any, encoder: nn.Module) -> None:
        super().__init__(args, encoder)
        head: Any = encoder.lm_head
        if args.untie_weights_roberta:
            head.__class__ = _LinearLMHead
            head.out_features, head.in_features = head.weight.shape

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """Add the dataclass's options to the parser; fairseq's RobertaModel would add a list of its own."""
        super(RobertaModel, cls).add_args(parser)

    @classmethod
    def build_model(cls, args: Any, task: Any) -> nn.Module:
        """Build fairseq's model, with noise on its weights where the options ask for it.

        Raises:
            UserError: an option prunes heads or feed-forward blocks, or as `Quantizable.build_model` (in fairseq's
                programs SystemExit, after one line).
        """
        for name in ("mha_heads_to_keep", "ffn_blocks_to_remove"):
            with exits_on_user_error():
                if safe_getattr(args, name, -1) != -1:
                    flag = f"--{name.replace('_', '-')}"
                    raise UserError(f"{flag}: replaces layers after they got their noise; prune with --arch roberta")
        return super().build_model(args, task)

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | Path,
        checkpoint_file: str = "model.pt",
        data_name_or_path: str | Path = ".",
        bpe: str | None = "gpt2",
        **overrides: Any,
    ) -> RobertaHubInterface:
        """Load as fairseq's method does, but into this package's model, and from packed files too.

        Args:
            model_name_or_path: a folder, or a name or address that fairseq's `roberta` downloads.
            checkpoint_file: in that folder: a checkpoint, published or trained, or a packed file (`.safetensors`).
            data_name_or_path: the folder of the dictionary; one that begins with a dot is relative to the model's.
            bpe: fairseq's name of the encoding of text. For gpt2, `encoder.json` and `vocab.bpe` in the model's folder
                are used if they are there; None for tokens only.
            overrides: values to set in the checkpoint's configuration, as `gpt2_encoder_json`.

        Raises:
            UserError: a folder, file or dictionary does not exist, or the checkpoint is of another model.
            DamagedFileError: the file is not whole, or is refused (see `safe_load`).
        """
        model = cls.hub_models().get(str(model_name_or_path), model_name_or_path)
        return hub_interface(model, checkpoint_file, data_name_or_path, bpe, overrides)

    def register_classification_head(
        self, name: str, num_classes: int | None = None, inner_dim: int | None = None, **kwargs: Any
    ) -> None:
        """Add a head as fairseq does, and its noise: tasks call this once the model is built."""
        with exits_on_user_error():
            with without_fairseq_noise(self.args):
                super().register_classification_head(name, num_classes, inner_dim, **kwargs)
            add_noise(self, self.args)

    def load_state_dict(self, state_dict: Any, strict: bool = True, model_cfg: Any = None, args: Any = None) -> Any:
        """Load as fairseq does; old names and heads are settled before weights become quantized ones."""
        self.upgrade_state_dict(state_dict)
        self._leave_out_own_output(state_dict)
        return super().load_state_dict(state_dict, strict, model_cfg, args)

    def _leave_out_own_output(self, state: dict[str, Tensor]) -> None:
        """Keep an untied masked language model's output from replacing the words of a classifier, which needs none.

        Both are one weight in a model without --untie-weights-roberta, and the last one loaded would stay.
        """
        words, output = state.get(_WORDS), state.get(_OUTPUT)
        if self.args.untie_weights_roberta or not len(self.classification_heads) or words is None or output is None:
            return
        if words.shape == output.shape and not torch.equal(words, output):
            logger.info(f"{_OUTPUT}: left out, since a classifier does not use it (--untie-weights-roberta keeps it)")
            state[_OUTPUT] = words

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> None:
        """Upgrade old names in place, as fairseq does, also where heads are quantized.

        fairseq reads the shape of every head's `weight`. A quantized head has none, so that a stand-in on the meta
        device, of its dense shape, takes its place meanwhile.

        Args:
            state_dict: tensors of any shape; `classification_heads.NAME.dense.weight` is (inner width, C) and
                `….out_proj.weight` (classes, inner width).
            name: the prefix of the model's entries.
        """
        quantized = {key: held for key, held in weights_in(state_dict).items() if isinstance(held, Held)}
        codes = {key: held for key, held in quantized.items() if _IN_A_HEAD.fullmatch(key) and key not in state_dict}
        stand_ins = {key: torch.empty(held.shape, device="meta") for key, held in codes.items()}
        state_dict.update(stand_ins)
        super().upgrade_state_dict_named(state_dict, name)
        for key, tensor in stand_ins.items():
            if state_dict.get(key) is tensor:  # a head of another size has been replaced by the model's own
                del state_dict[key]


register_model_architecture("quant_noise_roberta", "quant_noise_roberta_base")(base_architecture)
register_model_architecture("quant_noise_roberta", "quant_noise_roberta_large")(roberta_large_architecture)


@register_model_architecture("quant_noise_roberta", "quant_noise_roberta_small")
def small(args: Any) -> None:
    """Set the options of a model for a CPU, the size of quant_noise_transformer_lm_small: 4 layers, d 128."""
    sizes = {
        "encoder_layers": 4,
        "encoder_embed_dim": 128,
        "encoder_ffn_embed_dim": 512,
        "encoder_attention_heads": 4,
    }
    for name, value in sizes.items():
        setattr(args, name, safe_getattr(args, name, value))
    base_architecture(args)

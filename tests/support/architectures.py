"""fairseq's architectures in small: the options that make each, and inputs for it."""

import copy
import functools
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import composed
import numpy as np
import torch
from fairseq import options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.multilingual_translation import MultilingualTranslationTask
from torch import Tensor

import fairseq_quant_noise

fairseq_quant_noise.register()
composed.install()

ENCODER = "--encoder-layers 2 --encoder-embed-dim 16 --encoder-ffn-embed-dim 32 --encoder-attention-heads 2"
DECODER = "--decoder-layers 2 --decoder-embed-dim 16 --decoder-ffn-embed-dim 32 --decoder-attention-heads 2"
BOTH = f"{ENCODER} {DECODER}"
KERNELS = "--decoder-kernel-size-list [3,7]"
GATED = "--decoder-embed-dim 16 --decoder-layers [(16,3)]*2 --decoder-out-embed-dim 16"
SPEECH = f"{ENCODER} --conv-feature-layers [(16,10,5),(16,3,2)] --final-dim 16 --conv-pos 4 --conv-pos-groups 2"
LSTM = "--decoder-embed-dim 16 --decoder-hidden-size 16 --decoder-layers 2 --decoder-out-embed-dim 16"


def words() -> Tensor:
    """Two sentences, (2, 70)."""
    tokens = torch.randint(4, 40, (2, 70), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[:, -1] = 0, 2
    return tokens


def sentence() -> dict[str, Any]:
    """For a model of one text."""
    return {"src_tokens": words()}


def translation() -> dict[str, Any]:
    """For a model of two."""
    tokens = words()
    return {"src_tokens": tokens, "src_lengths": torch.tensor([70, 70]), "prev_output_tokens": tokens}


def refinement() -> dict[str, Any]:
    """For a model that writes all words at once."""
    return translation() | {"tgt_tokens": words()}


def speech() -> dict[str, Any]:
    """For a model that writes what it hears."""
    features = torch.randn(2, 20, 80, generator=torch.Generator().manual_seed(0))
    return {"src_tokens": features, "src_lengths": torch.tensor([20, 20]), "prev_output_tokens": words()}


def waves() -> dict[str, Any]:
    """For a model of sound itself."""
    return {"source": torch.randn(2, 800, generator=torch.Generator().manual_seed(0))}


def labelled_waves() -> dict[str, Any]:
    """The same with a class for each frame."""
    classes = torch.randint(5, (2, 100), generator=torch.Generator().manual_seed(0))
    return waves() | {"target_list": [classes], "padding_mask": torch.zeros(2, 800, dtype=torch.bool)}


@dataclass(frozen=True)
class Case:
    """One architecture."""

    task: str
    flags: str
    inputs: Callable[[], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)  # that its task sets, not the command line
    needs: tuple[str, ...] = ()  # packages that fairseq's model imports
    call: Callable[..., Any] = lambda model, **inputs: model(**inputs)
    unmasked: bool = False  # in evaluation, for a model that masks at random, by a generator of its own


def each_pair(model: Any, **inputs: Any) -> Any:
    """As the task of many languages calls its model, which holds one for each pair."""
    return [model.models[pair](**inputs) for pair in PAIRS]


PAIRS = ["de-en", "en-de"]
LM, MT, LEVENSHTEIN = "language_modeling", "translation", "translation_lev --criterion nat_loss --label-smoothing 0.1"
FEATURES = {"input_feat_per_channel": 80, "input_channels": 1}
CASES = {
    "transformer": Case(MT, BOTH, translation),
    "transformer_wmt_en_de_big_align": Case(MT, f"{BOTH} --alignment-layer 1 --alignment-heads 1", translation),
    "bart_base": Case(MT, BOTH, translation),
    "mbart_base": Case(MT, BOTH, translation),
    "nonautoregressive_transformer": Case(LEVENSHTEIN, BOTH, refinement),
    "iterative_nonautoregressive_transformer": Case(LEVENSHTEIN, BOTH, refinement),
    "cmlm_transformer": Case(LEVENSHTEIN, BOTH, refinement),
    "nacrf_transformer": Case(LEVENSHTEIN, f"{BOTH} --crf-beam-approx 8", refinement),
    "levenshtein_transformer": Case(LEVENSHTEIN, BOTH, refinement),
    "insertion_transformer": Case(LEVENSHTEIN, BOTH, refinement),
    "lightconv": Case(
        MT,
        f"{BOTH} --encoder-conv-dim 16 --decoder-conv-dim 16 --encoder-kernel-size-list [3,7] {KERNELS}",
        translation,
    ),
    "lightconv_lm": Case(LM, f"{DECODER} {KERNELS}", sentence),
    "fconv": Case(MT, f"--encoder-embed-dim 16 --encoder-layers [(16,3)]*2 {GATED}", translation),
    "fconv_lm": Case(LM, GATED, sentence),
    "fconv_self_att": Case(MT, f"--encoder-embed-dim 16 --encoder-layers [(16,3)]*2 {GATED}", translation),
    "lstm": Case(MT, f"--encoder-embed-dim 16 --encoder-hidden-size 16 --encoder-layers 2 {LSTM}", translation),
    "lstm_lm": Case(LM, LSTM, sentence),
    "transformer_lm": Case(LM, DECODER, sentence),
    "hf_gpt2": Case(LM, "--embed-dim 16 --num-layers 2 --num-attention-heads 2", sentence, needs=("transformers",)),
    "multilingual_transformer": Case(
        f"multilingual_translation --lang-pairs {','.join(PAIRS)}", BOTH, translation, call=each_pair
    ),
    "roberta": Case("masked_lm", ENCODER, sentence),
    "xlm": Case("masked_lm", ENCODER, sentence),
    "bert_base": Case("masked_lm", ENCODER, sentence),
    "s2t_transformer": Case("speech_to_text", f"{BOTH} --conv-channels 16", speech, FEATURES),
    "s2t_conformer": Case(
        "speech_to_text", f"{BOTH} --conv-channels 16 --depthwise-conv-kernel-size 3", speech, FEATURES
    ),
    "convtransformer": Case(MT, BOTH, speech),
    "s2t_berard": Case(
        "speech_to_text",
        "--input-layers [8,4] --conv-layers [(4,3,2)] --num-blstm-layers 2 --lstm-size 16 --decoder-embed-dim 16 "
        "--decoder-num-layers 2 --decoder-hidden-dim 32 --attention-dim 16 --output-layer-dim 16",
        speech,
        FEATURES,
    ),
    "wav2vec": Case(
        "audio_pretraining",
        "--conv-feature-layers [(16,10,5),(16,3,2)] --conv-aggregator-layers [(16,2,1)] --num-negatives 2 "
        "--prediction-steps 2",
        waves,
    ),
    "wav2vec2": Case(
        "audio_pretraining",
        f"{SPEECH} --latent-vars 8 --latent-groups 2 --quantize-targets --num-negatives 2",
        waves,
        unmasked=True,
    ),
    "hubert": Case("hubert_pretraining --labels ['km']", SPEECH, labelled_waves, unmasked=True),
}


@functools.cache
def dictionary() -> Dictionary:
    """41 words, the last one a mask."""
    found = Dictionary()
    for i in range(36):
        found.add_symbol(f"w{i}")
    found.add_symbol("<mask>")
    return found


class Task(MultilingualTranslationTask):
    """What the models ask of their tasks."""

    def __init__(self) -> None:
        self.source_dictionary = self.target_dictionary = self.dictionary = self.output_dictionary = dictionary()
        self.dictionaries = [self.dictionary]
        self.data_cfg = Namespace(input_feat_per_channel=80, input_channels=1)
        self.cfg = Namespace(sample_rate=16000, noise="full_mask")
        self.model_lang_pairs, self.langs = PAIRS, ["de", "en"]
        self.dicts = dict.fromkeys(self.langs, self.dictionary)

    source_dictionary = target_dictionary = None


@functools.cache
def _config(name: str, flags: tuple[str, ...]) -> Any:
    case = CASES[name]
    line = ["DATA", "--arch", name, "--task", *case.task.split(), *case.flags.split(), *flags]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), line)).model
    for key, value in case.options.items():
        setattr(cfg, key, value)
    return cfg


def config(name: str, *flags: Any) -> Any:
    """`cfg.model` of `fairseq-train --arch NAME FLAGS`."""
    return copy.deepcopy(_config(name, tuple(map(str, flags))))


def floats(output: Any) -> list[Tensor]:
    """The tensors of real numbers in a model's output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [tensor for part in parts for tensor in floats(part)]


def run(model: Any, name: str) -> list[Tensor]:
    """The output of a forward; what it draws, it draws alike each time."""
    torch.manual_seed(1)
    np.random.seed(1)
    unmasked = {"mask": False, "features_only": True} if CASES[name].unmasked and not model.training else {}
    return floats(CASES[name].call(model, **CASES[name].inputs(), **unmasked))

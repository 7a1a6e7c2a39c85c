"""fairseq's Transformer for translation in this process, on a toy pair of languages: train, translate, load."""

import contextlib
import copy
import functools
import io
from itertools import pairwise
from pathlib import Path
from unittest import mock

import fairseq.checkpoint_utils
import fairseq.tasks
import fairseq_cli.generate
import numpy as np
import pytest
import torch
from fairseq import options
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from lm_fixture import USER_DIR, Lab, forgetful_fairseq, split

from fairseq_quant_noise.cli.main import main

WORDS, OTHER_WORDS = 44, 60  # of the dictionaries, fairseq's own four included
SHARED, OWN = "shared", "own"  # kinds of models: one embedding for all, or each side its own
both_kinds = pytest.mark.parametrize("kind", [SHARED, OWN])
SOURCE_WORDS = {SHARED: WORDS, OWN: OTHER_WORDS}

DIMS = split(
    "--encoder-layers 2 --decoder-layers 2 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --dropout 0.1",
    "--encoder-attention-heads 4 --decoder-attention-heads 4",
)
BASE = split(
    "--task translation --source-lang de --target-lang en --cpu --seed 3 --num-workers 0 --log-format none",
    "--batch-size 16 --required-batch-size-multiple 1 --lr 0.01 --clip-norm 1.0 --no-epoch-checkpoints",
    "--optimizer adam",
)
LOSS = split("--criterion label_smoothed_cross_entropy --label-smoothing 0.1")
KINDS = {SHARED: ["--share-all-embeddings"], OWN: []}

ATTENTION = ["k_proj", "v_proj", "q_proj", "out_proj"]
FFN = ["fc1", "fc2"]
ENCODER = [
    f"encoder.layers.{i}.{name}" for i in range(2) for name in [*(f"self_attn.{part}" for part in ATTENTION), *FFN]
]
DECODER = [
    f"decoder.layers.{i}.{name}"
    for i in range(2)
    for name in [*(f"{which}_attn.{part}" for which in ("self", "encoder") for part in ATTENTION), *FFN]
]
#: Every weight of a model of this kind.
WEIGHTS = {
    SHARED: ["encoder.embed_tokens", *ENCODER, *DECODER],
    OWN: ["encoder.embed_tokens", *ENCODER, "decoder.embed_tokens", *DECODER, "decoder.output_projection"],
}
PLAN = {
    "stages": [
        {"match": r".*\.layers\.\d+\.fc[12]", "block_size": 8, "n_centroids": 16},
        {"match": r".*\.(embed_tokens|output_projection)", "block_size": 8, "n_centroids": 16},
        {"match": r".*\.layers\..*attn\..*", "block_size": 4, "n_centroids": 16},
    ]
}
IPQ = ["--criterion", "ipq", "--ipq-criterion", "label_smoothed_cross_entropy"]
SMOOTHING = ["--ipq-criterion-options", '{"label_smoothing": 0.1}']


def write_pairs(folder: Path, source_words: int) -> None:
    """96 pairs of training data, 24 of validation: a translation has the words in reverse, each 2 further on."""
    folder.mkdir(parents=True)
    for lang, words in {"de": source_words, "en": WORDS}.items():
        dictionary = Dictionary()
        for i in range(words - len(dictionary)):
            dictionary.add_symbol(f"w{i}", n=1000 - i)
        dictionary.save(str(folder / f"dict.{lang}.txt"))
    generator = np.random.default_rng(7)
    for name, lines in {"train": 96, "valid": 24}.items():
        builders = {
            lang: MMapIndexedDatasetBuilder(f"{folder}/{name}.de-en.{lang}.bin", dtype=np.uint16)
            for lang in ("de", "en")
        }
        for _ in range(lines):
            source = generator.integers(4, WORDS - 2, generator.integers(3, 8))
            for lang, line in (("de", source), ("en", source[::-1] + 2)):
                builders[lang].add_item(torch.tensor([*line, dictionary.eos()], dtype=torch.int))
        for lang, builder in builders.items():
            builder.finalize(f"{folder}/{name}.de-en.{lang}.idx")


class TranslationLab(Lab):
    """Pairs of sentences, and a folder for the runs on them; `kind` is one of KINDS."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for kind, words in SOURCE_WORDS.items():
            write_pairs(folder / kind, words)

    def arguments(self, *flags, arch="quant_noise_transformer", kind=SHARED, updates=4) -> list[str]:
        """fairseq-train's command line. `flags` come last, and so win."""
        user_dir = [] if arch.startswith("transformer") else ["--user-dir", USER_DIR]
        loss = [] if "--criterion" in flags else LOSS
        base = [str(self.folder / kind), "--arch", arch, *DIMS, *BASE, *loss, *KINDS[kind], *user_dir]
        return [*base, "--max-update", str(updates), *map(str, flags)]

    def task(self, kind=SHARED):
        """fairseq's translation task, without data loaded."""
        return fairseq.tasks.setup_task(self.config(kind=kind).task)

    def model(self, *flags, seed=5, kind=SHARED, **settings):
        """An untrained model of these options, as its task builds it; the options go past Hydra, which takes long."""
        cfg = self.config(kind=kind, **settings)
        for flag, value in pairwise([*flags, "--"]):
            if str(flag).startswith("--"):
                name = str(flag).removeprefix("--").replace("-", "_")
                setattr(cfg.model, name, True if str(value).startswith("--") else value)
        torch.manual_seed(seed)
        return fairseq.tasks.setup_task(cfg.task).build_model(cfg.model)

    def criterion(self, kind=SHARED):
        """The criterion of `arguments`."""
        return self.task(kind).build_criterion(self.config(kind=kind).criterion)

    def load(self, path, kind=SHARED):
        """The model of a checkpoint or a packed file, by fairseq; in eval mode."""
        models, _ = fairseq.checkpoint_utils.load_model_ensemble([str(path)], task=self.task(kind))
        return models[0].eval()

    @functools.cache  # noqa: B019 (one object a session)
    def _generation(self, kind):
        arguments = [*self.generate_arguments("later", kind), "--user-dir", USER_DIR]
        return convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_generation_parser(), arguments))

    def generate_arguments(self, path, kind=SHARED) -> list[str]:
        """fairseq-generate's command line, without the plugin."""
        flags = "--beam 3 --batch-size 8 --cpu --num-workers 0 --scoring sacrebleu --log-format none --max-len-b 10"
        data = [str(self.folder / kind), "--gen-subset", "valid", *split("--source-lang de --target-lang en")]
        return [*data, "--path", str(path), *split(flags)]

    def translate(self, *paths, kind=SHARED, model_overrides="{}") -> tuple[float, list[str]]:
        """What fairseq-generate makes of the validation data with an ensemble: BLEU, and the lines with scores."""
        cfg, printed = copy.deepcopy(self._generation(kind)), io.StringIO()
        cfg.common_eval.path, cfg.common_eval.model_overrides = ":".join(map(str, paths)), model_overrides
        with forgetful_fairseq(), mock.patch("logging.basicConfig"):
            scorer = fairseq_cli.generate._main(cfg, printed)
        lines = sorted(line for line in printed.getvalue().splitlines() if line.startswith(("H-", "P-")))
        return scorer.score(), lines

    @functools.cache  # noqa: B019
    def run(self, name: str, kind: str):
        """A training that several tests look at: stock, or ipq from it. Leave it unchanged."""
        if name == "stock":
            return self.train(arch="transformer", kind=kind, updates=60)
        stock = self.run("stock", kind).path
        flags = ["--finetune-from-model", stock, "--quantization-config-path", self.plan(PLAN), "--ipq-teacher", stock]
        return self.train(*flags, *IPQ, *SMOOTHING, "--quant-noise-pq", 0.1, kind=kind, updates=7)

    @functools.cache  # noqa: B019
    def packed(self, kind: str) -> Path:
        """The file of `run("ipq", kind)`."""
        path = self.new("packed.safetensors")
        verb("export", "--path", self.run("ipq", kind).path, "--out", path)
        return path


def verb(*arguments) -> str:
    """`fairseq-quant-noise ARGUMENTS`, here; what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(list(map(str, arguments)))
    return printed.getvalue()


def pairs(rows=4) -> dict:
    """A sample; the second row of the source is padded on the left, that of the target on the right."""
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randint(4, WORDS, (rows, n), generator=generator) for n in (8, 6))
    source[1, :4] = target[1, 4:] = 1
    previous = torch.cat([torch.full((rows, 1), 2), target[:, :-1]], dim=1)
    lengths = source.ne(1).sum(1)
    return {
        "net_input": {"src_tokens": source, "src_lengths": lengths, "prev_output_tokens": previous},
        "target": target,
        "ntokens": int(target.ne(1).sum()),
        "nsentences": rows,
    }


def as_of_2018(state: dict) -> dict:
    """The weights of a model for translation as fairseq saved them in 2018; the output's is the embedding's."""
    aged = {}
    norms = {
        "encoder": ["self_attn_layer_norm", "final_layer_norm"],
        "decoder": ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"],
    }
    for name, tensor in state.items():
        module, _, last = name.rpartition(".")
        stack, _, kind = module.rpartition(".")
        if name.endswith(".version") or name.startswith("decoder.output_projection"):
            continue
        if kind == "q_proj":
            aged[f"{stack}.in_proj_{last}"] = torch.cat([state[f"{stack}.{letter}_proj.{last}"] for letter in "qkv"])
        elif kind in norms[name.partition(".")[0]]:
            aged[f"{stack}.layer_norms.{norms[name.partition('.')[0]].index(kind)}.{last}"] = tensor
        elif kind not in ("k_proj", "v_proj"):
            aged[name] = tensor
    return aged


@functools.cache
def _lab(folder: Path) -> TranslationLab:
    return TranslationLab(folder)


@pytest.fixture(scope="session")
def translation(tmp_path_factory) -> TranslationLab:
    """One lab for all modules that import this."""
    return _lab(tmp_path_factory.getbasetemp() / "translation")

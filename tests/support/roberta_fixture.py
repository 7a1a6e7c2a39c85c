"""fairseq's RoBERTa in this process: masked words on the corpus of lm_fixture, and pairs of sentences with labels."""

import copy
import functools
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import fairseq.checkpoint_utils
import fairseq.tasks
import fairseq_cli.validate
import numpy as np
import pytest
import torch
from fairseq import options
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from lm_fixture import USER_DIR, WORDS, Lab, forgetful_fairseq, split

MASKED, SENTENCES = "masked_lm", "sentence_prediction"  # kinds of training, by fairseq's name of task and criterion
both_tasks = pytest.mark.parametrize("kind", [MASKED, SENTENCES])
CLASSES = 3
HEAD = "sentence_classification_head"  # sentence_prediction's default
POSITIONS = 40

DIMS = split(
    "--encoder-layers 2 --encoder-embed-dim 32 --encoder-ffn-embed-dim 64 --encoder-attention-heads 4 --dropout 0.1",
    f"--max-positions {POSITIONS}",
)
BASE = split(
    "--cpu --seed 3 --num-workers 0 --log-format none --batch-size 16 --required-batch-size-multiple 1 --lr 0.01",
    "--clip-norm 1.0 --no-epoch-checkpoints --optimizer adam",
)
KINDS = {
    MASKED: split("--task masked_lm --criterion masked_lm --tokens-per-sample 32 --sample-break-mode complete"),
    SENTENCES: split(
        f"--task sentence_prediction --criterion sentence_prediction --num-classes {CLASSES}",
        "--init-token 0 --separator-token 2",
    ),
}

LAYER = ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"]
ENCODER = "encoder.sentence_encoder"
BODY = [
    *(f"{ENCODER}.embed_{part}" for part in ("tokens", "positions")),
    *(f"{ENCODER}.layers.{i}.{name}" for i in range(2) for name in LAYER),
]
LM_HEAD = ["encoder.lm_head.dense"]
CLASSIFIER = [f"classification_heads.{HEAD}.{part}" for part in ("dense", "out_proj")]
#: The weights that a training of this kind uses.
USED = {MASKED: [*BODY, *LM_HEAD], SENTENCES: [*BODY, *CLASSIFIER]}

PLAN = {
    "stages": [
        {"match": rf"{ENCODER}.layers.\d+.fc[12]|encoder.lm_head.dense", "block_size": 8, "n_centroids": 16},
        {"match": rf"{ENCODER}.embed_(tokens|positions)", "block_size": 8, "n_centroids": 16},
        {"match": rf"{ENCODER}.layers.*attn.*|classification_heads.*", "block_size": 4, "n_centroids": 16},
    ]
}
INT8 = {"stages": [{"match": ".*", "scheme": "int8"}]}


def plan_of(kind: str) -> dict:
    """PLAN without what a model of this kind lacks."""
    text = copy.deepcopy(PLAN)
    if kind == MASKED:
        text["stages"][2]["match"] = text["stages"][2]["match"].split("|")[0]
    return text


def write_sentences(folder: Path, dictionary: Path) -> None:
    """Pairs of sentences whose label is decided by the first word: 60 of training data, 30 of validation."""
    labels = Dictionary()
    for i in range(CLASSES):
        labels.add_symbol(str(i))
    generator = np.random.default_rng(5)
    for part in ("input0", "input1", "label"):
        (folder / part).mkdir(parents=True)
    for part in ("input0", "input1"):
        (folder / part / "dict.txt").write_text(dictionary.read_text())
    labels.save(str(folder / "label" / "dict.txt"))
    for name, lines in {"train": 60, "valid": 30}.items():
        parts = {
            p: MMapIndexedDatasetBuilder(f"{folder / p / name}.bin", dtype=np.uint16) for p in ("input0", "input1")
        }
        parts["label"] = MMapIndexedDatasetBuilder(f"{folder / 'label' / name}.bin", dtype=np.uint16)
        for _ in range(lines):
            words = [generator.integers(labels.nspecial, WORDS, generator.integers(2, 9)) for _ in range(2)]
            label = [labels.nspecial + words[0][0] % CLASSES]
            for part, line in zip(parts, [*words, label], strict=True):
                parts[part].add_item(torch.tensor([*line, labels.eos()], dtype=torch.int))
        for part, builder in parts.items():
            builder.finalize(f"{folder / part / name}.idx")


class RobertaLab(Lab):
    """A corpus, sentences with labels, and a folder for the runs on them; `kind` is one of KINDS."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        write_sentences(folder / SENTENCES, self.data / "dict.txt")

    def arguments(self, *flags, arch="quant_noise_roberta_small", kind=MASKED, updates=4) -> list[str]:
        """fairseq-train's command line. `flags` come last, and so win."""
        user_dir = [] if arch.startswith("roberta") else ["--user-dir", USER_DIR]
        stop = ["--max-update", str(updates)]
        return [str(self.of(kind)), "--arch", arch, *DIMS, *BASE, *KINDS[kind], *user_dir, *stop, *map(str, flags)]

    def of(self, kind: str) -> Path:
        """The data of this kind."""
        return self.data if kind == MASKED else self.folder / SENTENCES

    def task(self, kind=MASKED):
        """fairseq's task of this kind, without data loaded."""
        return fairseq.tasks.setup_task(self.config(kind=kind).task)

    def model(self, *flags, seed=5, kind=MASKED, **settings):
        """An untrained model of these options, as its task builds it; the options go past Hydra, which takes long."""
        cfg = self.config(kind=kind, **settings)
        model = Namespace(**vars(cfg.model)) if isinstance(cfg.model, Namespace) else cfg.model
        for flag, value in pairwise([*flags, "--"]):
            name = str(flag).removeprefix("--").replace("-", "_")
            section = cfg.task if name == "num_classes" else model
            if str(flag).startswith("--"):
                setattr(section, name, True if str(value).startswith("--") else value)
        torch.manual_seed(seed)
        return fairseq.tasks.setup_task(cfg.task).build_model(model)

    def criterion(self, kind=MASKED):
        """The criterion of this kind."""
        return self.task(kind).build_criterion(self.config(kind=kind).criterion)

    def load(self, path, kind=MASKED):
        """The model of a checkpoint or a packed file, by fairseq; in eval mode."""
        models, _ = fairseq.checkpoint_utils.load_model_ensemble([str(path)], task=self.task(kind))
        return models[0].eval()

    @functools.cache  # noqa: B019 (one object a session)
    def _validation(self, kind):
        arguments = [str(self.of(kind)), "--path", "later", "--user-dir", USER_DIR, *KINDS[kind][:4]]
        arguments += split("--cpu --batch-size 16 --num-workers 0 --log-format none --required-batch-size-multiple 1")
        every, given = (
            options.parse_args_and_arch(options.get_validation_parser(), arguments, suppress_defaults=given)
            for given in (False, True)
        )
        return convert_namespace_to_omegaconf(every), given

    def validate(self, path, kind=MASKED) -> dict:
        """What fairseq-validate logs of the validation data, unrounded."""
        cfg, given = copy.deepcopy(self._validation(kind))
        cfg.common_eval.path = given.path = str(path)
        logged: dict = {}
        progress = "fairseq.logging.progress_bar.NoopProgressBar.print"
        with forgetful_fairseq(), mock.patch(progress, lambda bar, stats, **_: logged.update(stats)):
            fairseq_cli.validate.main(cfg, given)
        return {name: float(value) for name, value in logged.items()}

    @functools.cache  # noqa: B019
    def run(self, name: str, kind: str):
        """A short training that several tests look at: stock, scalar (int8 noise) or ipq. Leave it unchanged."""
        if name == "stock":
            return self.train(arch="roberta_base", kind=kind)
        if name == "scalar":
            return self.train("--quant-noise-scalar", 0.5, kind=kind)
        path = self.plan(plan_of(kind))
        flags = ["--finetune-from-model", self.run("stock", kind).path, "--quantization-config-path", path]
        return self.train(*flags, "--quant-noise-pq", 0.1, kind=kind, updates=6)


def roberta_batch(kind=MASKED, rows=4, length=12) -> dict:
    """A sample as the criterion of this kind wants it; the second row ends in padding."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, WORDS, (rows, length), generator=generator)
    tokens[1, length // 2 :] = 1
    tokens[:, 0] = 0
    words = torch.where(torch.arange(length) % 3 == 2, tokens, 1)
    return {
        "net_input": {"src_tokens": tokens, "src_lengths": torch.full((rows,), length)},
        "target": words if kind == MASKED else torch.arange(rows) % CLASSES,
        "ntokens": tokens.numel(),
        "nsentences": rows,
    }


@functools.cache
def _lab(folder: Path) -> RobertaLab:
    return RobertaLab(folder)


@pytest.fixture
def roberta(tmp_path_factory) -> RobertaLab:
    """One lab for all modules that import this."""
    return _lab(tmp_path_factory.getbasetemp() / "roberta")

"""fairseq in this process, on a corpus of seconds: train, evaluate and validate tiny language models."""

import contextlib
import copy
import functools
import io
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import composed
import fairseq.checkpoint_utils
import fairseq.distributed.utils
import fairseq.models
import fairseq.tasks
import fairseq_cli.eval_lm
import fairseq_cli.train
import fairseq_cli.validate
import numpy as np
import pytest
import torch
import yaml
from fairseq import options
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from omegaconf import OmegaConf

import fairseq_quant_noise
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.plugin.models import any_model

fairseq_quant_noise.register()  # for another test may have imported the package before fairseq
composed.install()

ROOT = Path(__file__).resolve().parents[2]
USER_DIR = str(ROOT / "fairseq_quant_noise")
WORDS = 110  # of the dictionary, fairseq's own four included
CUTOFFS = "20,60"


def split(*lines: str) -> list[str]:
    """A command line's words."""
    return " ".join(lines).split()


DIMS = split(
    "--decoder-layers 2 --decoder-embed-dim 32 --decoder-input-dim 32 --decoder-output-dim 32",
    "--decoder-ffn-embed-dim 64 --decoder-attention-heads 4 --decoder-normalize-before --dropout 0.1",
)
BASE = split(
    "--cpu --seed 3 --num-workers 0 --log-format none --tokens-per-sample 32 --batch-size 16",
    "--required-batch-size-multiple 1 --lr 0.01 --clip-norm 1.0 --no-epoch-checkpoints --optimizer adam",
)
NAG = split("--optimizer nag --momentum 0.9")
BANDS_AND_LOSS = split(
    f"--adaptive-input --adaptive-input-cutoff {CUTOFFS} --adaptive-softmax-cutoff {CUTOFFS}",
    "--adaptive-input-factor 2 --adaptive-softmax-factor 2 --criterion adaptive_loss --ddp-backend legacy_ddp",
)
KINDS = {  # of models, by the flags that make them
    "plain": ["--share-decoder-input-output-embed"],
    "adaptive": [*BANDS_AND_LOSS, "--tie-adaptive-weights", "--tie-adaptive-proj"],
    "untied": BANDS_AND_LOSS,
}
both_kinds = pytest.mark.parametrize("kind", ["plain", "adaptive"])

FFN = {"match": r"decoder\.layers\.\d+\.fc[12]", "block_size": 8, "n_centroids": 16}
ATTENTION = {"match": r"decoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj", "block_size": 4, "n_centroids": 16}
WORD_VECTORS = {"match": r"decoder\.embed_tokens", "block_size": 8, "n_centroids": 16}
BANDS = {
    "match": r"decoder\.embed_tokens\.embeddings\.\d\.[01]",
    "block_size": {r".*\.1": 4, "default": 8},
    "n_centroids": 16,
}
PLANS = {"plain": {"stages": [FFN, WORD_VECTORS, ATTENTION]}, "adaptive": {"stages": [FFN, BANDS, ATTENTION]}}


#: Options that differ from run to run: set in the finished configuration, for Hydra takes half a second to make one.
#: test_cluster.py gives them on a command line.
LATE = {
    "--restore-file": "checkpoint.restore_file",
    "--finetune-from-model": "checkpoint.finetune_from_model",
    "--quantization-config-path": "common.quantization_config_path",
    "--ipq-teacher": "criterion.ipq_teacher",
}


def ipq_flags(kind: str) -> list[str]:
    """Criterion ipq around the criterion that this kind of model wants."""
    return ["--criterion", "ipq", "--ipq-criterion", "cross_entropy" if kind == "plain" else "adaptive_loss"]


def write_corpus(folder: Path) -> None:
    """300 lines of training data, 60 of validation and test, of a chain in which each word has three successors.

    The second word of each tail band is left out: fairseq's adaptive_loss takes its place in the band, 1, for padding,
    and so reports a lower perplexity than fairseq-eval-lm wherever it occurs.
    """
    dictionary = Dictionary()
    for i in range(WORDS - len(dictionary)):
        dictionary.add_symbol(f"w{i}", n=1000 - i)
    folder.mkdir(parents=True)
    dictionary.save(str(folder / "dict.txt"))
    generator = np.random.default_rng(7)
    words = [i for i in range(dictionary.nspecial, WORDS) if i - 1 not in map(int, CUTOFFS.split(","))]
    successors = generator.choice(words, size=(WORDS, 3))
    for name, lines in {"train": 300, "valid": 60, "test": 60}.items():
        builder = MMapIndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=np.uint16)
        for _ in range(lines):
            line = [int(generator.choice(words))]
            for _ in range(generator.integers(6, 14)):
                line.append(int(successors[line[-1], generator.integers(3)]))
            builder.add_item(torch.tensor([*line, dictionary.eos()], dtype=torch.int))
        builder.finalize(str(folder / f"{name}.idx"))


@dataclass
class Run:
    """What a training run left behind."""

    folder: Path
    trainer: Trainer
    updates: list[dict] = field(default_factory=list)  # the log of each update, with its `lr` and `num_updates`
    valid: list[dict] = field(default_factory=list)  # the log of each validation

    @property
    def path(self) -> Path:
        """The last checkpoint."""
        return self.folder / "checkpoint_last.pt"

    @property
    def model(self):
        """The model as it ended."""
        return self.trainer.get_model()

    @property
    def ppl(self) -> float:
        """The last validation's perplexity, of all its digits."""
        last = self.valid[-1]
        return 2 ** last.get("nll_loss", last["loss"])


class Lab:
    """A corpus and a folder for the runs on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data-bin"
        write_corpus(self.data)
        self.count = 0

    def new(self, name: str = "run") -> Path:
        """A path that nothing has used yet."""
        self.count += 1
        return self.folder / f"{self.count}-{name}"

    def plan(self, content) -> str:
        """A YAML file with this plan, a dict or text; its path."""
        path = self.new("plan.yaml")
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return str(path)

    def checkpoint(self, state: dict, **settings) -> Path:
        """A checkpoint file with this content."""
        path = self.new("checkpoint.pt")
        torch.save(state, path, **settings)
        return path

    def arguments(self, *flags, arch="quant_noise_transformer_lm_small", kind="plain", updates=6) -> list[str]:
        """fairseq-train's command line. `flags` come last, and so win."""
        user_dir = [] if arch.startswith("transformer") else ["--user-dir", USER_DIR]
        base = [str(self.data), "--task", "language_modeling", "--arch", arch, *DIMS, *BASE, *user_dir, *KINDS[kind]]
        stop = ["--max-update", str(updates)] if updates else []
        return [*base, *stop, *map(str, flags)]

    @functools.cache  # noqa: B019 (one object a session)
    def _config(self, *flags, **settings):
        args = options.parse_args_and_arch(options.get_training_parser(), self.arguments(*flags, **settings))
        return convert_namespace_to_omegaconf(args)

    def config(self, *flags, **settings):
        """fairseq's configuration for this command line."""
        flags, late = list(map(str, flags)), {}
        for option, key in LATE.items():
            if option in flags:
                at = flags.index(option)
                late[key] = flags[at + 1]
                del flags[at : at + 2]
        cfg = copy.deepcopy(self._config(*flags, **settings))
        for key, value in late.items():
            OmegaConf.update(cfg, key, value)
        return cfg

    def train(self, *flags, save=None, **settings) -> Run:
        """fairseq-train, here. Settings: save (the folder to save in), arch, kind, updates."""
        cfg = self.config(*flags, **settings)
        cfg.checkpoint.save_dir = str(save or self.new())
        with forgetful_fairseq(), recorded(Path(cfg.checkpoint.save_dir)) as runs:
            fairseq.distributed.utils.call_main(cfg, fairseq_cli.train.main)
        return runs[-1]

    @functools.cache  # noqa: B019
    def _eval_config(self):
        arguments = [*self.eval_arguments("later"), "--user-dir", USER_DIR, "--log-format", "none"]
        return convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_eval_lm_parser(), arguments))

    def eval_lm(self, path, model_overrides="{}") -> float:
        """The perplexity that fairseq-eval-lm gives on the validation data."""
        cfg = copy.deepcopy(self._eval_config())
        cfg.common_eval.path, cfg.common_eval.model_overrides = str(path), model_overrides
        with forgetful_fairseq():
            return float(fairseq_cli.eval_lm.main(cfg)["perplexity"])

    def eval_arguments(self, path) -> list[str]:
        """fairseq-eval-lm's command line, without the plugin."""
        base = (
            "--gen-subset valid --sample-break-mode none --tokens-per-sample 32 --batch-size 16 --cpu --num-workers 0"
        )
        return [str(self.data), "--path", str(path), *base.split()]

    @functools.cache  # noqa: B019
    def _validate_config(self):
        arguments = [str(self.data), "--path", "later", "--user-dir", USER_DIR, "--task", "language_modeling"]
        arguments += split("--cpu --batch-size 16 --num-workers 0 --log-format none --required-batch-size-multiple 1")
        every, given = (
            options.parse_args_and_arch(options.get_validation_parser(), arguments, suppress_defaults=given)
            for given in (False, True)
        )
        return convert_namespace_to_omegaconf(every), given

    def validate(self, path) -> dict:
        """What fairseq-validate logs of the validation data, unrounded."""
        cfg, given = copy.deepcopy(self._validate_config())
        cfg.common_eval.path = given.path = str(path)
        logged: dict = {}
        progress = "fairseq.logging.progress_bar.NoopProgressBar.print"
        with forgetful_fairseq(), mock.patch(progress, lambda bar, stats, **_: logged.update(stats)):
            fairseq_cli.validate.main(cfg, given)
        return {name: float(value) for name, value in logged.items()}

    def model(self, *flags, seed=5, **settings):
        """An untrained model of these options."""
        cfg = self.config(*flags, **settings)
        torch.manual_seed(seed)
        return fairseq.models.build_model(cfg.model, self.task())

    def criterion(self, *flags, **settings):
        """The criterion of these options."""
        return self.task().build_criterion(self.config(*flags, **settings).criterion)

    def task(self):
        """fairseq's language modeling task, without data loaded."""
        return fairseq.tasks.setup_task(self.config().task)

    def load(self, path):
        """The model of a checkpoint or a packed file, by fairseq; in eval mode."""
        models, _ = fairseq.checkpoint_utils.load_model_ensemble([str(path)], task=self.task())
        return models[0].eval()


class Runs:
    """The runs and files that several tests look at, by kind of model. Leave what they return unchanged."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    @functools.cache  # noqa: B019 (one object a session)
    def stock(self, kind: str) -> Run:
        """fairseq's own transformer_lm."""
        return self.lab.train(arch="transformer_lm", kind=kind)

    @functools.cache  # noqa: B019
    def noised(self, kind: str) -> Run:
        """With noise, without stages."""
        return self.lab.train("--quant-noise-pq", 0.2, arch="quant_noise_transformer_lm", kind=kind)

    @functools.cache  # noqa: B019
    def ipq(self, kind: str) -> Run:
        """From the stock checkpoint through three stages, with noise, criterion ipq and the stock model for teacher."""
        stock, plan = self.stock(kind).path, self.lab.plan(PLANS[kind])
        flags = ["--finetune-from-model", stock, "--quantization-config-path", plan, "--quant-noise-pq", 0.1]
        return self.lab.train(*flags, *ipq_flags(kind), "--ipq-teacher", stock, kind=kind, updates=7)

    @functools.cache  # noqa: B019
    def packed(self, kind: str) -> Path:
        """The packed file of `ipq`."""
        path = self.lab.new("packed.safetensors")
        with contextlib.redirect_stdout(io.StringIO()):
            main(["export", "--path", str(self.ipq(kind).path), "--out", str(path)])
        return path

    @functools.cache  # noqa: B019
    def dense(self, kind: str) -> Path:
        """The stock checkpoint of `packed`."""
        path = self.lab.new("dense.pt")
        with contextlib.redirect_stdout(io.StringIO()):
            main(["to-dense", str(self.packed(kind)), "--out", str(path)])
        return path


@contextlib.contextmanager
def forgetful_fairseq():
    """Runs in one process must not see each other's best loss and meters; and logs keep all their digits."""
    vars(fairseq.checkpoint_utils.save_checkpoint).pop("best", None)
    vars(fairseq_cli.train.should_stop_early).pop("best", None)
    metrics.reset()
    with mock.patch("fairseq.logging.meters.safe_round", lambda number, digits: number):
        yield
    metrics.reset()


@contextlib.contextmanager
def recorded(folder: Path):
    """The runs that fairseq-train does meanwhile."""
    runs: list[Run] = []

    class Recorded(Trainer):
        def __init__(self, *args, **kwargs):
            runs.append(Run(folder, self))
            super().__init__(*args, **kwargs)

        def train_step(self, *args, **kwargs):
            log = super().train_step(*args, **kwargs)
            runs[-1].updates.append({**log, "lr": self.get_lr(), "num_updates": self.get_num_updates()})
            return log

    stats = fairseq_cli.train.get_valid_stats

    def get_valid_stats(cfg, trainer, values, tracking_best):
        runs[-1].valid.append({name: float(value) for name, value in values.items()})
        return stats(cfg, trainer, values, tracking_best)

    with (
        mock.patch.object(fairseq_cli.train, "Trainer", Recorded),
        mock.patch.object(fairseq_cli.train, "get_valid_stats", get_valid_stats),
    ):
        yield runs


def state_of(path) -> dict:
    """A checkpoint's content, as fairseq wrote it."""
    return torch.load(path, map_location="cpu", weights_only=False)


def same(one, other):
    """Whether two nests of tensors and numbers are the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def old_style(state: dict) -> dict:
    """A checkpoint as fairseq wrote it before Hydra: `args`, a Namespace, instead of `cfg`."""
    cfg = state["cfg"]
    flat: dict = {}
    for section in ("common", "dataset", "optimization", "checkpoint", "distributed_training"):
        flat |= cfg[section]
    for section in ("task", "criterion", "optimizer", "lr_scheduler", "model"):
        flat |= {name: value for name, value in cfg[section].items() if name != "_name"}
        flat["arch" if section == "model" else section] = cfg[section]["_name"]
    return {**state, "cfg": None, "args": Namespace(**flat)}


def batch(rows=4, length=12, seed=0) -> dict:
    """A sample as fairseq's criterions want it; the second row ends in padding."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(4, WORDS, (rows, length + 1), generator=generator)
    words[1, length // 2 :] = 1
    tokens, target = words[:, :-1].contiguous(), words[:, 1:].contiguous()
    return {
        "net_input": {"src_tokens": tokens, "src_lengths": torch.full((rows,), length)},
        "target": target,
        "ntokens": int((target != 1).sum()),
        "nsentences": rows,
    }


@contextlib.contextmanager
def fairseqs_own_noise():
    """Inside, a stock architecture is built and trained as without the plugin, under fairseq's own noise."""
    with (
        mock.patch("fairseq.models.build_model", any_model._build_model),
        mock.patch("fairseq_quant_noise.plugin.training.hooks.check_noise", return_value=None),
    ):
        yield


def one_error(captured) -> str:
    """The text of the one line on standard error, without its `error: `."""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")

"""fairseq in this process, on a corpus of seconds: train, evaluate and validate tiny language models."""

import contextlib
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import fairseq.checkpoint_utils
import fairseq.distributed.utils
import fairseq_cli.eval_lm
import fairseq_cli.train
import fairseq_cli.validate
import numpy as np
import torch
import yaml
from fairseq import options
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.trainer import Trainer

import fairseq_quant_noise

fairseq_quant_noise.register()  # for another test may have imported the package before fairseq

ROOT = Path(__file__).resolve().parent.parent
USER_DIR = str(ROOT / "fairseq_quant_noise")
WORDS = 110  # of the dictionary, fairseq's own four included
CUTOFFS = "20,60"
DIMS = (
    "--decoder-layers 2 --decoder-embed-dim 32 --decoder-input-dim 32 --decoder-output-dim 32 "
    "--decoder-ffn-embed-dim 64 --decoder-attention-heads 4 --dropout 0.1"
).split()
ADAPTIVE = (
    f"--adaptive-input --adaptive-input-cutoff {CUTOFFS} --adaptive-softmax-cutoff {CUTOFFS} "
    "--adaptive-input-factor 2 --adaptive-softmax-factor 2 --tie-adaptive-weights --tie-adaptive-proj"
).split()
LOSS = ["--criterion", "adaptive_loss", "--ddp-backend", "legacy_ddp"]
BASE = (
    "--cpu --seed 3 --num-workers 0 --log-format none --tokens-per-sample 32 --batch-size 16 "
    "--required-batch-size-multiple 1 --lr 0.01 --clip-norm 1.0"
).split()
ADAM = ["--optimizer", "adam", "--adam-betas", "(0.9, 0.98)"]
NAG = ["--optimizer", "nag", "--momentum", "0.9"]


def write_corpus(folder: Path) -> None:
    """300 lines of training data, 60 of validation and test, of a chain in which each word has three successors.

    The second word of each tail band is left out: fairseq's adaptive_loss takes its place in the band, 1, for padding,
    and so reports a lower perplexity than fairseq-eval-lm wherever it occurs.
    """
    dictionary = Dictionary()
    for i in range(WORDS - len(dictionary)):
        dictionary.add_symbol(f"w{i}", n=1000 - i)
    dictionary.pad_to_multiple_(1)
    folder.mkdir(parents=True)
    dictionary.save(str(folder / "dict.txt"))
    generator = np.random.default_rng(7)
    words = [i for i in range(dictionary.nspecial, WORDS) if i - 1 not in map(int, CUTOFFS.split(","))]
    successors = generator.choice(words, size=(WORDS, 3))
    for split, lines in {"train": 300, "valid": 60, "test": 60}.items():
        builder = MMapIndexedDatasetBuilder(str(folder / f"{split}.bin"), dtype=np.uint16)
        for _ in range(lines):
            line = [int(generator.choice(words))]
            for _ in range(generator.integers(6, 14)):
                line.append(int(successors[line[-1], generator.integers(3)]))
            builder.add_item(torch.tensor([*line, dictionary.eos()], dtype=torch.int))
        builder.finalize(str(folder / f"{split}.idx"))


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


def state_of(path) -> dict:
    """A checkpoint's content, as fairseq wrote it."""
    return torch.load(path, map_location="cpu", weights_only=False)


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

    def arguments(self, *flags, arch="quant_noise_transformer_lm_small", adaptive=False, updates=6, save=None) -> list:
        """fairseq-train's command line. `flags` come last, and so win."""
        kind = [*ADAPTIVE, *LOSS] if adaptive else ["--share-decoder-input-output-embed"]
        stock = [] if arch.startswith("transformer") else ["--user-dir", USER_DIR]
        folder = ["--save-dir", str(save or self.new())]
        stop = ["--max-update", str(updates)] if updates else []
        base = [str(self.data), "--task", "language_modeling", "--arch", arch, *DIMS, *BASE, *ADAM, *stop, *folder]
        return [*base, "--no-epoch-checkpoints", *stock, *kind, *map(str, flags)]

    def train(self, *flags, **settings) -> Run:
        """fairseq-train, here. Settings: arch, adaptive, updates, save (the folder to save in)."""
        arguments = self.arguments(*flags, **settings)
        parser = options.get_training_parser()
        cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, input_args=arguments))
        with forgetful_fairseq(), recorded(Path(cfg.checkpoint.save_dir)) as runs:
            fairseq.distributed.utils.call_main(cfg, fairseq_cli.train.main)
        return runs[-1]

    def eval_lm(self, path, *flags) -> float:
        """The perplexity that fairseq-eval-lm gives on the validation data."""
        parser = options.get_eval_lm_parser()
        arguments = self.eval_arguments(path, "--user-dir", USER_DIR, *flags)
        args = options.parse_args_and_arch(parser, input_args=arguments)
        with forgetful_fairseq():
            return fairseq_cli.eval_lm.main(convert_namespace_to_omegaconf(args))["perplexity"]

    def eval_arguments(self, path, *flags) -> list[str]:
        """fairseq-eval-lm's command line."""
        base = "--gen-subset valid --sample-break-mode none --tokens-per-sample 32 --batch-size 16 --cpu --num-workers 0"
        return [str(self.data), "--path", str(path), *base.split(), *map(str, flags)]

    def validate(self, path) -> dict:
        """What fairseq-validate logs of the validation data."""
        flags = "--task language_modeling --cpu --batch-size 16 --num-workers 0 --log-format none"
        arguments = [str(self.data), "--path", str(path), "--user-dir", USER_DIR, *flags.split()]
        arguments += ["--required-batch-size-multiple", "1"]
        parser = options.get_validation_parser()
        args = options.parse_args_and_arch(parser, input_args=arguments)
        given = options.parse_args_and_arch(
            options.get_validation_parser(), input_args=arguments, suppress_defaults=True
        )
        printed = {}
        progress = "fairseq.logging.progress_bar.NoopProgressBar.print"
        unrounded = mock.patch("fairseq.logging.meters.safe_round", lambda number, digits: number)
        with unrounded, forgetful_fairseq(), mock.patch(progress, lambda bar, stats, **_: printed.update(stats)):
            fairseq_cli.validate.main(convert_namespace_to_omegaconf(args), given)
        return printed

    def model(self, *flags, arch="quant_noise_transformer_lm_small", adaptive=False, seed=5):
        """An untrained model of these options."""
        arguments = self.arguments(*flags, arch=arch, adaptive=adaptive)
        args = options.parse_args_and_arch(options.get_training_parser(), input_args=arguments)
        cfg = convert_namespace_to_omegaconf(args)
        torch.manual_seed(seed)
        return fairseq.models.build_model(cfg.model, self.task())

    def task(self):
        """As much of a task as a model wants to see."""
        dictionary = Dictionary.load(str(self.data / "dict.txt"))
        return SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary, dictionary=dictionary)


@contextlib.contextmanager
def forgetful_fairseq():
    """Runs in one process must not see each other's best loss and meters."""
    for function, name in (
        (fairseq.checkpoint_utils.save_checkpoint, "best"),
        (fairseq_cli.train.should_stop_early, "best"),
    ):
        vars(function).pop(name, None)
    metrics.reset()
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

    train = fairseq_cli.train
    with mock.patch.object(train, "Trainer", Recorded), mock.patch.object(train, "get_valid_stats", get_valid_stats):
        with mock.patch("fairseq.logging.meters.safe_round", lambda number, digits: number):
            yield runs


def batch(rows=4, length=12, seed=0, padded=True) -> dict:
    """A sample as fairseq's criterions want it; the second row ends in padding."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(4, WORDS, (rows, length + 1), generator=generator)
    if padded:
        words[1, length // 2 :] = 1
    tokens, target = words[:, :-1].contiguous(), words[:, 1:].contiguous()
    return {
        "net_input": {"src_tokens": tokens, "src_lengths": torch.full((rows,), length)},
        "target": target,
        "ntokens": int((target != 1).sum()),
        "nsentences": rows,
    }


def one_error(captured) -> str:
    """The text of the one line on standard error, without its `error: `."""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def python(*arguments, **kwargs) -> subprocess.CompletedProcess:
    """A Python of its own that can import the package."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=env, capture_output=True, text=True, timeout=120, **kwargs
    )


def old_style(state: dict, **renamed) -> dict:
    """A checkpoint as fairseq wrote it before Hydra: `args`, a Namespace, instead of `cfg`."""
    cfg = state["cfg"]
    flat: dict = {}
    for section in ("common", "dataset", "optimization", "checkpoint", "distributed_training"):
        flat |= cfg[section]
    for section in ("task", "criterion", "optimizer", "lr_scheduler", "model"):
        flat |= {name: value for name, value in cfg[section].items() if name != "_name"}
        flat[section] = cfg[section]["_name"]
    flat |= {"arch": flat.pop("model"), **renamed}
    return {**state, "cfg": None, "args": Namespace(**flat)}

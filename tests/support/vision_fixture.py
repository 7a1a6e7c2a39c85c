"""fairseq in this process on a few images of coloured squares: train, validate, load tiny EfficientNets."""

import contextlib
import copy
import functools
import io
from pathlib import Path
from unittest import mock

import fairseq.distributed.utils
import fairseq.tasks
import fairseq_cli.train
import fairseq_cli.validate
import numpy as np
from efficientnet_stages import STAGES
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from lm_fixture import USER_DIR, forgetful_fairseq, recorded, split
from PIL import Image

from fairseq_quant_noise.cli.main import main

CLASSES = {"blue": (60, 60, 200), "green": (60, 200, 60), "red": (200, 60, 60)}
TASK = split("--task image_classification --image-size 32 --crop-ratio 1.0 --cpu --num-workers 0 --log-format none")
NETWORK = split("--arch quant_noise_efficientnet_small --width 0.1 --depth 1.0 --dropout 0")
BASE = split(
    "--seed 3 --batch-size 16 --required-batch-size-multiple 1 --optimizer adam --lr 0.005 --no-epoch-checkpoints",
    "--augmentation cifar --validate-interval 1000 --save-interval 1000",
)
PLAN = {"stages": STAGES}


def write_images(folder: Path, each=16) -> None:
    """Squares of one colour and noise; `each` images a class to train on, a third to validate on."""
    generator = np.random.default_rng(5)
    for part, count in (("train", each), ("val", each // 3)):
        for name, colour in CLASSES.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.array(colour) + generator.normal(0, 40, (32, 32, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / part / name / f"{i}.png")


class ImageLab:
    """A tree of images and a folder for the runs on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "images"
        write_images(self.data)
        self.count = 0

    def new(self, name="run") -> Path:
        """A path that nothing has used yet."""
        self.count += 1
        return self.folder / f"{self.count}-{name}"

    def config(self, *flags):
        """fairseq-train's configuration for these flags, which come last, and so win."""
        line = [str(self.data), "--user-dir", USER_DIR, *TASK, *NETWORK, *BASE, *map(str, flags)]
        return convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), line))

    def train(self, *flags, save=None):
        """fairseq-train, here."""
        cfg = self.config(*flags)
        cfg.checkpoint.save_dir = str(save or self.new())
        with forgetful_fairseq(), recorded(Path(cfg.checkpoint.save_dir)) as runs:
            fairseq.distributed.utils.call_main(cfg, fairseq_cli.train.main)
        return runs[-1]

    @functools.cache  # noqa: B019 (one object a session)
    def _validate_config(self, data):
        line = [data, "--path", "later", "--user-dir", USER_DIR, *TASK, "--batch-size", "8"]
        line += ["--required-batch-size-multiple", "1"]
        every, given = (
            options.parse_args_and_arch(options.get_validation_parser(), line, suppress_defaults=suppress)
            for suppress in (False, True)
        )
        return convert_namespace_to_omegaconf(every), given

    def validate(self, path, data=None) -> dict:
        """What fairseq-validate logs, unrounded."""
        cfg, given = copy.deepcopy(self._validate_config(str(data or self.data)))
        cfg.common_eval.path = given.path = str(path)
        logged: dict = {}
        progress = "fairseq.logging.progress_bar.NoopProgressBar.print"
        with forgetful_fairseq(), mock.patch(progress, lambda bar, stats, **_: logged.update(stats)):
            fairseq_cli.validate.main(cfg, given)
        return {name: float(value) for name, value in logged.items()}


def verb(*arguments) -> str:
    """Run `fairseq-quant-noise` here; what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main([str(argument) for argument in arguments])
    return printed.getvalue()

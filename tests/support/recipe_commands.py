"""The command lines that a recipe gives fairseq-train, recorded: nothing is trained."""

import subprocess
from pathlib import Path

from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]

#: Sourced by every bash before its script (BASH_ENV). fairseq-train writes its arguments, one a line and each command
#: ended by an empty line, and leaves the checkpoints that the next step looks for; the other programs do nothing.
STAND_INS = """
fairseq-train() {
  printf '%s\\n' "$@" '' >>"$RECORD"
  while [ "$1" != --save-dir ]; do shift; done
  mkdir -p "$2" && touch "$2/checkpoint_best.pt"
}
fairseq-eval-lm() { :; }
fairseq-validate() { :; }
fairseq-generate() { :; }
fairseq-quant-noise() { :; }
python() { case "$*" in *cuda.is_available*) return 1 ;; esac; }
"""


def commands(folder: Path, script: str, **environment: object) -> list[list[str]]:
    """The arguments of each fairseq-train that this piece of shell starts, run in `folder`.

    Paths in it are of the checkout ($REPO); `pre.pt` and the dictionaries that recipes look for are in `folder`.
    """
    record, stand_ins = folder / "record", folder / "stand_ins.sh"
    stand_ins.write_text(STAND_INS)
    record.unlink(missing_ok=True)
    for name in ("pre.pt", "data/dict.txt", "data/input0/dict.txt", "data/train.de-en.de.bin", "data/train/classes"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    values = {"BASH_ENV": stand_ins, "RECORD": record, "REPO": ROOT, "PATH": "/usr/bin:/bin", **environment}
    env = {name: str(value) for name, value in values.items()}
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True)
    assert record.exists(), done.stdout[-1000:] + done.stderr[-1000:]
    return [part.split("\n") for part in record.read_text().rstrip("\n").split("\n\n")]


def parsed(arguments: list[str]) -> dict:
    """fairseq's configuration of a command line, as nested dicts."""
    args = options.parse_args_and_arch(options.get_training_parser(), arguments)
    return OmegaConf.to_container(convert_namespace_to_omegaconf(args))

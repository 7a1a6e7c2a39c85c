"""The commands in a pipe."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_reader_that_has_read_enough_ends_the_command_without_a_word():
    plan = f"plan --arch quant_noise_transformer_lm_small --vocab-size 4000 --plan {ROOT / 'configs/plans/small.yaml'}"
    program = f"{sys.executable} -m fairseq_quant_noise {plan}"
    line = ["bash", "-c", f"(sleep 1; {program}; echo $? >&2) | true"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stderr == "141\n"

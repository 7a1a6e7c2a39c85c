"""Two processes that train together over gloo: noise, stages, and the same bits in both."""

import json
import os
import socket
import subprocess

import forks
import pytest
import torch
from lm_fixture import PLANS, ROOT, split, state_of

from fairseq_quant_noise import quantize_

# fairseq-train, and then what this rank's model holds.
RANK = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
from lm_fixture import Path, forgetful_fairseq, recorded, convert_namespace_to_omegaconf, options, fairseq, fairseq_cli
arguments, out = json.loads(sys.argv[2]), sys.argv[3]
cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), arguments))
with forgetful_fairseq(), recorded(Path(cfg.checkpoint.save_dir)) as runs:
    fairseq.distributed.utils.call_main(cfg, fairseq_cli.train.main)
words = [float(log["sample_size"]) for log in runs[-1].updates]
torch.save({"model": runs[-1].model.state_dict(), "words": words}, out)
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.upstream(25)
@pytest.mark.upstream(10)
@pytest.mark.parametrize("structure", [{}, {"share_layers": 2}], ids=["", "shared"])
def test_two_processes_train_the_stages_together(lab, runs, structure):
    stock, folder, port = runs.stock("adaptive").path, lab.new(), free_port()
    plan = lab.plan({**PLANS["adaptive"], "structure": structure})
    flags = split(
        f"--quant-noise-pq 0.1 --quantization-config-path {plan} --finetune-from-model {stock}",
        f"--save-dir {folder} --distributed-backend gloo --distributed-world-size 2 --distributed-no-spawn",
        f"--distributed-init-method tcp://localhost:{port} --ddp-backend legacy_ddp --disable-validation",
    )
    outs, processes = [lab.new(f"rank{rank}.pt") for rank in range(2)], []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for rank, out in enumerate(outs):
        arguments = lab.arguments(*flags, "--distributed-rank", rank, kind="adaptive", updates=3)
        command = forks.command("python", "-c", RANK, str(ROOT / "tests"), json.dumps(arguments), out)
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "".join(text[-1500:] for text in said)

    first, second = (torch.load(out) for out in outs)
    assert first["words"] == second["words"]
    assert min(first["words"][:2]) > 600  # of both: a batch of one process has 16 lines of 32 words
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(t, second["model"][name]) for name, t in first["model"].items())

    saved = state_of(folder / "checkpoint_last.pt")
    assert saved["extra_state"]["quant_noise_stages"]["done"] == 3
    assert all(torch.equal(t, first["model"][name]) for name, t in saved["model"].items())
    first_stage = {"stages": PLANS["adaptive"]["stages"][:1], "structure": structure}
    alone = quantize_(lab.load(stock), first_stage, seed=3).state_dict()
    codes = {name: t for name, t in alone.items() if name.endswith(".codes")}
    assert len(codes) == 4
    assert all(torch.equal(t, saved["model"][name]) for name, t in codes.items())

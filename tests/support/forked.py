"""Processes of their own at the price of a fork: their parent has imported fairseq, and has done nothing else.

A process can be killed, and several can train together, while pytest goes on.
"""

import json
import multiprocessing
import os
import socket
from pathlib import Path
from unittest import mock

import fairseq_cli.train
import torch
from lm_fixture import Lab, forgetful_fairseq, recorded
from lm_fixture import fairseq as fs
from watching import watched

SUPPORT = Path(__file__).resolve().parent
LOG = "updates.jsonl"


def start(function, *arguments):
    """`function(*arguments)` in a new process; wait for it with join()."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["forked"])
    path = os.pathsep.join([str(SUPPORT.parents[1]), str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, {"PYTHONPATH": path}):  # of the server, which starts with the first process
        process = context.Process(target=function, args=arguments)
        process.start()
    return process


def free_port() -> int:
    """A port that nothing listens on, for processes that train together."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def exit_code(function, *arguments) -> int:
    """How a process ends that runs `function`; below zero, the signal that ended it."""
    process = start(function, *arguments)
    process.join(120)
    process.kill()
    return process.exitcode


def train(lab: Lab, folder: Path, *flags, **settings):
    """fairseq-train in this process; each update's log goes to a file before the next."""
    torch.set_num_threads(1)
    cfg = lab.config(*flags, **settings)
    cfg.checkpoint.save_dir = str(folder)
    folder.mkdir(exist_ok=True)
    with forgetful_fairseq(), recorded(folder) as runs, (folder / LOG).open("a") as file:

        def note(trainer, log):
            values = {name: float(log[name]) for name in ("loss", "sample_size")}
            print(json.dumps([trainer.get_num_updates(), values]), file=file, flush=True)

        with watched(note):
            fs.distributed.utils.call_main(cfg, fairseq_cli.train.main)
    return runs[-1]


def losses(folder: Path) -> dict[int, set[str]]:
    """What all the processes that trained in a folder logged of each update."""
    found: dict[int, set[str]] = {}
    for line in (folder / LOG).read_text().splitlines():
        update, values = json.loads(line)
        found.setdefault(update, set()).add(json.dumps(values))
    return found

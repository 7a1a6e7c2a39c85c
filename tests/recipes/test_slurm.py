"""configs/run_config: what is asked of SLURM, and a job that is preempted goes on from its checkpoint.

There is no SLURM here; slurm.py stands in for its programs. Hydra, its launcher, submitit and fairseq are real.
"""

import os
import re
import signal
import threading
import time
from pathlib import Path
from unittest import mock

import fairseq_cli.hydra_train
import pytest
import slurm
from fairseq.dataclass.initialize import hydra_init
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra_fixture import CONFIGS, NAMES
from lm_fixture import ROOT, USER_DIR, state_of

from fairseq_quant_noise.plugin import hydra_jobs

RUN_CONFIGS = ["slurm_node", "slurm_nodes"]
UPDATES = 40


@pytest.mark.parametrize("run_config", RUN_CONFIGS)
def test_a_job_has_a_task_for_each_process_and_may_be_requeued(run_config):
    """Hydra refuses a key of the launcher that its dataclass has not."""
    hydra_init("config")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS)):
        cfg = compose(NAMES[0], [f"run_config={run_config}"], return_hydra_config=True)
    job, training = cfg.hydra.launcher, cfg.distributed_training
    assert job._target_.endswith("SlurmLauncher")
    assert job.nodes * job.tasks_per_node == training.distributed_world_size
    assert job.gpus_per_node == job.tasks_per_node
    assert (job.nodes > 1) == (run_config == "slurm_nodes")
    assert training.distributed_port == hydra_jobs.port() > 0  # or fairseq starts a training of its own in each task
    assert job.max_num_timeout > 0
    assert job.additional_parameters.requeue is True
    assert 0 < cfg.checkpoint.save_interval_updates <= 1000
    assert cfg.hydra.mode.name == "MULTIRUN"


def preempt(folder: Path, stand_in: Path) -> None:
    """Send the first task SLURM's signal once it has saved a checkpoint."""
    last = time.time() + 120
    while not (folder / "checkpoint_last.pt").exists() and time.time() < last:
        time.sleep(0.02)
    os.kill(int((stand_in / "task0").read_text()), signal.SIGUSR2)


def test_a_preempted_job_is_requeued_and_goes_on_from_its_checkpoint(lab, monkeypatch):
    folder, stand_in = lab.new("job"), lab.new("slurm")
    stand_in.mkdir()
    for name, value in slurm.install(stand_in).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    keys = [f"task.data={lab.data}", f"common.user_dir={USER_DIR}", f"checkpoint.save_dir={folder}"]
    keys += ["common.cpu=true", "run_config=slurm_node", "distributed_training.distributed_world_size=1"]
    keys += ["task.tokens_per_sample=32", "dataset.max_tokens=64", f"optimization.max_update={UPDATES}"]
    keys += ["checkpoint.finetune_from_model=null"]
    keys += ["dataset.disable_validation=true", "checkpoint.save_interval_updates=1", "model.decoder_layers=1"]
    command = ["fairseq-hydra-train", "--config-dir", str(CONFIGS), "--config-name", "language_modeling/small_ipq"]
    killer = threading.Thread(target=preempt, args=(folder, stand_in), daemon=True)
    killer.start()
    GlobalHydra.instance().clear()
    with mock.patch("sys.argv", [*command, *keys]):
        fairseq_cli.hydra_train.cli_main()  # returns when the job has ended
    killer.join()

    assert "export SLURM_KILL_BAD_EXIT=1" in (stand_in / "script").read_text()
    script = (stand_in / "script").read_text()
    for option in (
        "--nodes=1",
        "--ntasks-per-node=1",
        "--gpus-per-node=1",
        "--time=1440",
        "--requeue",
        "--open-mode=append",
    ):
        assert f"#SBATCH {option}" in script
    assert re.search(r"#SBATCH --signal=\S*USR2@120", script)
    assert (stand_in / "requeues").read_text().split() == ["7"]
    (log,) = folder.glob(".submitit/7/7_0_log.out")
    went_on = re.findall(r"Loaded checkpoint .*checkpoint_last.pt \(epoch \d+ @ (\d+) updates\)", log.read_text())
    assert len(went_on) == 1
    assert 0 < int(went_on[0]) < UPDATES
    state = state_of(folder / "checkpoint_last.pt")
    assert state["optimizer_history"][-1]["num_updates"] == UPDATES
    assert state["extra_state"]["quant_noise_stages"]["done"] == 3
    assert log.read_text().count("stage 1 of 3: quantized") == 1  # and not again

"""What the callback of configs/base.yaml checks, changes and reports; tests/scripts/real_slurm.py tries it on SLURM."""

import logging
import pickle
import re
import signal
import subprocess

import pytest
from fairseq.dataclass.initialize import hydra_init
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from hydra_fixture import CONFIGS
from omegaconf import OmegaConf
from toys import refuses

from fairseq_quant_noise.errors import UserError, end_program
from fairseq_quant_noise.plugin import hydra_jobs, submission

LM = "language_modeling/small"
GIVEN = ["task.data=DATA"]


def of(name, *keys):
    """What Hydra composes, with its own section."""
    hydra_init("config")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.1"):
        return compose(name, [*keys], return_hydra_config=True)


def test_what_must_be_given_is_asked_for_by_name(capsys):
    """fairseq says KeyError and TypeError, or quantizes a random network."""
    with pytest.raises(SystemExit) as end:
        hydra_jobs.Jobs().on_run_start(of(LM))
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: task.data is not given; add task.data=VALUE to the command")
    with refuses(r"checkpoint.finetune_from_model is not given; .*\(the checkpoint to start from"):
        hydra_jobs.check_given(of(f"{LM}_ipq", *GIVEN))
    for dense in ("null", "DENSE.pt"):
        hydra_jobs.check_given(of(f"{LM}_ipq", *GIVEN, f"checkpoint.finetune_from_model={dense}"))


def test_the_plugin_is_the_one_that_is_installed():
    assert of(LM, *GIVEN).common.user_dir == str(CONFIGS.parent / "fairseq_quant_noise")


def test_each_job_has_a_port_of_its_own(monkeypatch):
    ports = set()
    for number in (7, 8, 60000, 2**31):
        monkeypatch.setenv("SLURM_JOB_ID", str(number))
        ports.add(of(LM, *GIVEN, "run_config=slurm_node").distributed_training.distributed_port)
    assert len(ports) == 4
    assert all(1024 < port < 32768 for port in ports)


def sweep(*keys):
    """A configuration with these overrides, after the callback has seen that it is a sweep; its overrides."""
    cfg = of(LM, *GIVEN)
    OmegaConf.set_readonly(cfg.hydra, False)
    cfg.hydra.overrides.task = [*GIVEN, *keys]
    cfg.checkpoint.save_dir = dict(key.split("=", 1) for key in keys).get("checkpoint.save_dir", "checkpoints")
    hydra_jobs.Jobs().on_multirun_start(cfg)
    return OmegaConf.to_container(cfg.hydra.overrides.task, resolve=False)[len(GIVEN) + len(keys) :]


@pytest.mark.parametrize(
    ("keys", "folder"),
    [
        (["common.seed=1,2"], "checkpoints/common.seed=${common.seed}"),
        (["checkpoint.save_dir=OUT", "common.seed=range(1,3)"], "OUT/common.seed=${common.seed}"),
        (
            ["noise=int8,pq", "model.quant_noise_pq=0.1,0.2"],
            "checkpoints/noise=${hydra:runtime.choices.noise},model.quant_noise_pq=${model.quant_noise_pq}",
        ),
    ],
)
def test_each_training_of_a_sweep_has_a_folder(keys, folder):
    assert sweep(*keys) == [f"checkpoint.save_dir='{folder}'"]


@pytest.mark.parametrize(
    "keys",
    [["common.seed=1"], ["checkpoint.save_dir=A,B"], ["checkpoint.save_dir=OUT/${common.seed}", "common.seed=1,2"]],
)
def test_one_training_and_folders_that_differ_stay_as_they_are(keys):
    assert sweep(*keys) == []


def test_the_values_that_a_sweep_gives_are_not_missed(capsys):
    cfg = of(LM)
    OmegaConf.set_readonly(cfg.hydra, False)
    cfg.hydra.overrides.task = ["task.data=A,B"]
    hydra_jobs.Jobs().on_multirun_start(cfg)
    assert capsys.readouterr().err == ""


@pytest.fixture
def task(monkeypatch, tmp_path):
    """A task of a SLURM job, as submitit sees it, with its handler of SIGTERM; the file with its result."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    environment = {
        "SUBMITIT_EXECUTOR": "slurm",
        "SUBMITIT_FOLDER": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": "1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield tmp_path / "7_1_result.pkl"
    signal.signal(signal.SIGTERM, before)


def failed(error):
    job = JobReturn()
    job.overrides = []
    job.return_value, job.status = error, JobStatus.FAILED
    return job


def test_a_training_that_fails_ends_its_task_with_the_error(task, capsys):
    """Hydra's launcher returns the exception, and SLURM says COMPLETED."""
    with pytest.raises(SystemExit) as end:
        hydra_jobs.Jobs().on_job_end(of(LM, *GIVEN, "run_config=slurm_node"), failed(RuntimeError("no such luck")))
    assert end.value.code == 1
    assert "RuntimeError: no such luck" in capsys.readouterr().err
    kind, told = pickle.loads(task.read_bytes())
    assert kind == "error"
    assert told.endswith("RuntimeError: no such luck\n")


def test_a_task_that_has_failed_ends_with_its_own_exit_code(task):
    """SLURM ends the others of the job with SIGTERM, and reports the highest exit code: 143."""
    submission.leave_error("no such luck")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN  # which, unlike a handler, outlives the interpreter


def test_elsewhere_hydra_says_it(task):
    hydra_jobs.Jobs().on_job_end(of(LM, *GIVEN), failed(RuntimeError("no such luck")))
    done = JobReturn()
    done.status = JobStatus.COMPLETED
    hydra_jobs.Jobs().on_job_end(of(LM, *GIVEN, "run_config=slurm_node"), done)
    assert not task.exists()


def test_a_users_mistake_in_a_job_reaches_the_command(task, capsys):
    def program():
        end_program(UserError("--path: no such file"))

    with pytest.raises(SystemExit) as end:
        submission.leaves_error(program)()
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --path: no such file\n"
    assert pickle.loads(task.read_bytes()) == ("error", "error: --path: no such file")


def test_the_command_says_the_jobs_number_and_that_it_can_never_start(tmp_path, monkeypatch, caplog):
    answers = iter(["PENDING Resources\n", "PENDING PartitionNodeLimit\n"])

    def run(command, **_):
        assert command[3] == "7"
        return subprocess.CompletedProcess(command, 0, next(answers))

    monkeypatch.setattr(submission.subprocess, "run", run)
    (tmp_path / "6").mkdir()
    submissions = submission.Submissions(tmp_path)
    (tmp_path / "7").mkdir()
    with caplog.at_level(logging.INFO):
        assert [submissions.look() for _ in range(3)] == [True, False, False]
    first, last = caplog.messages
    assert re.fullmatch(r"submitted as job 7; its logs are in \S+/7", first)
    assert last.startswith("job 7 can never start as it is: SLURM says PartitionNodeLimit; cancel it (scancel 7)")

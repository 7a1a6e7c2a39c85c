"""Train on a real SLURM: jobs that are interrupted end with the same bits, and jobs that fail are seen to fail.

    python tests/scripts/real_slurm.py                      all of them, half an hour on two cores
    python tests/scripts/real_slurm.py --only preempted     those whose names have one of these words in them

It needs root and Debian's packages slurmctld, slurmd, slurm-client, slurm-wlm-basic-plugins and munge, which it
installs with apt-get where they are missing. Where it cannot, it says so and ends with exit code 0. SLURM runs on this
machine alone, with two pretended nodes (tests/support/one_machine_slurm.sh). A training has two processes on CPUs,
noise, and three stages of iPQ; a recipe is a small recipes/codes.sh. Exit code 1 where something does not hold.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

from finished import differences  # noqa: E402
from lm_fixture import split, write_corpus  # noqa: E402

PACKAGES = split("slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge")
CLUSTER = ROOT / "tests/support/one_machine_slurm.sh"
UPDATES = 600
TRAINING = split(
    "common.cpu=true task.tokens_per_sample=32 dataset.max_tokens=64 dataset.disable_validation=true",
    "model.decoder_layers=1 model.decoder_embed_dim=32 model.decoder_input_dim=32 model.decoder_output_dim=32",
    f"model.decoder_ffn_embed_dim=64 optimization.max_update={UPDATES} checkpoint.save_interval_updates=10",
    "checkpoint.finetune_from_model=null",
)
ASKED = split(
    "run_config=slurm_node distributed_training.distributed_world_size=2 hydra.launcher.gpus_per_node=null",
    "hydra.launcher.cpus_per_task=1 hydra.launcher.mem_gb=3 hydra.launcher.timeout_min=20",
)
LAST = "checkpoint_last.pt"
PATIENCE = 900  # seconds for anything to happen
RECIPE = "SEEDS=1 ONLY=paper JOBS=1 UPDATES=210 IPQ_UPDATES=300 VOCAB_SIZE=1000 OMP_NUM_THREADS=1 bash recipes/codes.sh"


def until(what: str, holds: Callable[[], object]) -> object:
    """What `holds` returns once it is true."""
    end = time.monotonic() + PATIENCE
    while not (found := holds()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {PATIENCE} s for {what}")
        time.sleep(0.1)
    return found


def tell(*command: str) -> str:
    """What a program of SLURM says."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Job:
    """A training that fairseq-hydra-train submits and waits for."""

    def __init__(self, folder: Path, *keys: str) -> None:
        self.folder, self.began = folder, time.monotonic()
        self.interrupted: datetime | None = None
        self.log = folder.with_suffix(".log")
        config = ["--config-dir", str(ROOT / "configs"), "--config-name", "language_modeling/small_ipq"]
        keys = (f"task.data={folder.parent / 'data'}", f"checkpoint.save_dir={folder}", *TRAINING, *ASKED, *keys)
        program = str(Path(sys.executable).parent / "fairseq-hydra-train")
        with self.log.open("w") as log:
            self.process = subprocess.Popen([program, *config, *keys], stdout=log, stderr=subprocess.STDOUT)

    @property
    def number(self) -> str:
        """The job's number, as the command prints it."""
        found = until("the job's number", lambda: re.search(r"submitted as job (\d+)", self.log.read_text()))
        return found[1]

    def says(self, key: str) -> str:
        """A value of `scontrol show job`."""
        return says(self.number, key)

    def end(self) -> str:
        """Its state and exit code once SLURM is done with it."""
        return ended(self.number)

    def saved(self) -> None:
        """Wait for a checkpoint."""
        until("a checkpoint", (self.folder / LAST).exists)

    def interrupt(self, *command: str) -> None:
        """Give a command, after which the job is to go on later."""
        tell(*command)
        self.interrupted = datetime.now()

    def ended(self) -> float:
        """Wait for the command; seconds since it was given."""
        self.process.wait(PATIENCE)
        return time.monotonic() - self.began

    def logs(self, kind: str = "err") -> str:
        """What all tasks wrote."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob(f".submitit/*/*_log.{kind}")))

    def resumed_as(self, whole: Path) -> str:
        """Check that it was requeued, went on from a checkpoint and ended as the run that was left alone."""
        took = self.ended()
        assert self.process.returncode == 0, self.log.read_text()[-2000:]
        assert self.says("Restarts") == "1", self.says("Restarts")
        loaded = rf"\[([-\d]+ [:\d]+).*Loaded checkpoint .*{LAST} \(epoch \d+ @ (\d+) updates\)"
        found = re.search(loaded, self.logs("out"))
        assert found, "no task says that it loaded a checkpoint"
        assert self.interrupted
        after = datetime.fromisoformat(found[1]) - self.interrupted
        differ = differences(whole, self.folder / LAST)
        assert not differ, f"not the same bits: {differ}"
        resumed = f"resumed after {after.total_seconds():.0f} s at update {found[2]} of {UPDATES}"
        return f"requeued, {resumed}, the same bits; {took:.0f} s"


def alone(folder: Path) -> str:
    """Two processes, left alone; what the others are compared with."""
    job = Job(folder / "whole")
    took = job.ended()
    assert job.process.returncode == 0, job.log.read_text()[-2000:]
    assert job.end() == "COMPLETED 0:0", job.end()
    return f"COMPLETED 0:0; {took:.0f} s"


def signalled(folder: Path) -> str:
    """SIGUSR2, as at the time limit."""
    job = Job(folder / "signalled")
    job.saved()
    job.interrupt("scancel", "--signal=USR2", job.number)
    return job.resumed_as(folder / "whole" / LAST)


def preempted(folder: Path) -> str:
    """A job of a partition that goes first takes the nodes."""
    job = Job(folder / "preempted", "hydra.launcher.partition=low")
    job.saved()
    job.interrupt(*split("sbatch --partition=high --nodes=2 --exclusive --output=/dev/null --wrap"), "sleep 5")
    return job.resumed_as(folder / "whole" / LAST)


def node_down(folder: Path) -> str:
    """The node is set down, and later up."""
    job = Job(folder / "node_down")
    job.saved()
    node = job.says("NodeList")
    job.interrupt("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    until("the requeue", lambda: job.says("Restarts") == "1")
    tell("scontrol", "update", f"nodename={node}", "state=resume")
    return job.resumed_as(folder / "whole" / LAST)


def failing(folder: Path) -> str:
    """A training that raises: the job has failed, and the error is in its log and in the command's."""
    job = Job(folder / "failing", "model.decoder_attention_heads=5")
    took = job.ended()
    assert job.process.returncode == 1
    error = "embed_dim must be divisible by num_heads"
    assert error in job.logs()
    assert error in job.log.read_text()
    assert job.end() == "FAILED 1:0", job.end()
    return f"FAILED 1:0, the command ends with 1; {took:.0f} s"


def mistaken(folder: Path) -> str:
    """A user's mistake: one line in both logs."""
    job = Job(folder / "mistaken", "task.data=/nowhere")
    took = job.ended()
    assert job.process.returncode == 1
    assert "error: /nowhere" in job.logs()
    assert "error: /nowhere" in job.log.read_text()
    assert job.end() == "FAILED 2:0", job.end()
    return f"FAILED 2:0, one line; {took:.0f} s"


def dead_rank(folder: Path) -> str:
    """One of two processes is killed: the job ends."""
    job = Job(folder / "dead_rank")
    job.saved()
    os.kill(task(job.number, 1), signal.SIGKILL)
    began = time.monotonic()
    state, took = job.end(), time.monotonic() - began
    assert state.startswith("FAILED"), state
    job.process.terminate()  # without accounting submitit learns of an end from files alone
    return f"{state} {took:.0f} s after the kill"


def two_on_a_node(folder: Path) -> str:
    """Two jobs of two processes on one node at once."""
    jobs = [Job(folder / f"of_two_{i}", "+hydra.launcher.additional_parameters.nodelist=node1") for i in (1, 2)]
    took = max(job.ended() for job in jobs)
    for job in jobs:
        assert job.process.returncode == 0, job.log.read_text()[-2000:]
        assert not (differ := differences(folder / "whole" / LAST, job.folder / LAST)), differ
    for job in jobs:
        job.end()
    starts = [job.says("StartTime") for job in jobs]
    assert max(starts) < min(job.says("EndTime") for job in jobs), "they did not run at once"
    ports = {re.search(r"tcp://node1:(\d+)", job.logs("out"))[1] for job in jobs}
    assert len(ports) == 2
    return f"both the same bits, on ports {' and '.join(sorted(ports))}; {took:.0f} s"


def never(folder: Path) -> str:
    """A request that cannot be granted: the command says so."""
    job = Job(folder / "never", "hydra.launcher.nodes=3")
    told = until(
        "the warning", lambda: re.search(r"can never start.*says (\w+)|submission failed: (.*)", job.log.read_text())
    )
    job.process.terminate()
    return f"{told[1] or told[2]}; after {time.monotonic() - job.began:.0f} s"


def sweep(folder: Path) -> str:
    """Two trainings in one command: a folder each."""
    job = Job(folder / "sweep", "model.quant_noise_pq=0.0,0.1", "optimization.max_update=30")
    took = job.ended()
    assert job.process.returncode == 0, job.log.read_text()[-2000:]
    names = sorted(path.parent.name for path in (folder / "sweep").glob(f"*/{LAST}"))
    assert names == ["model.quant_noise_pq=0.0", "model.quant_noise_pq=0.1"], names
    return f"{' and '.join(names)}; {took:.0f} s"


def recipe(folder: Path) -> str:
    """A recipe under sbatch: cancelled while it trains, submitted again with the same line."""
    whole, other = folder / "recipe", folder / "cancelled"
    job = submit(whole)
    assert ended(job) == "COMPLETED 0:0", ended(job)
    job, stages = submit(other), other / "seed-1/paper"
    until("a checkpoint of the stages", lambda: [*stages.glob("checkpoint_*_*.pt")])
    tell("scancel", job)
    began = time.monotonic()
    until("the end of its processes", lambda: not processes(f"OUT={other}"))
    gone = time.monotonic() - began
    assert ended(job).startswith("CANCELLED"), ended(job)
    job = submit(other)
    assert ended(job) == "COMPLETED 0:0", ended(job)
    assert not (differ := differences(whole / "seed-1/paper" / LAST, stages / LAST)), f"not the same bits: {differ}"
    said, trained = other.with_suffix(".log").read_text(), stages.with_suffix(".log").read_text()
    assert "[skip] 1: dense networks (done)" in said, "the dense network was trained again"
    resumed = re.search(rf"Loaded checkpoint .*{LAST} \(epoch \d+ @ (\d+) updates\)", trained)
    assert resumed, "the stages began anew"
    return f"its processes had ended after {gone:.0f} s; resumed at update {resumed[1]} of 300, the same bits"


def submit(out: Path) -> str:
    """Submit the recipe, with results in `out`; the job's number."""
    options = split("--parsable --cpus-per-task=2 --mem=4G --time=1:00:00 --requeue --open-mode=append")
    wrap = f"OUT={out} {RECIPE}"
    return tell("sbatch", f"--chdir={ROOT}", *options, f"--output={out}.log", f"--wrap={wrap}").strip()


def says(number: str, key: str) -> str:
    """A value of `scontrol show job`."""
    return re.search(rf"\b{key}=(\S+)", tell("scontrol", "show", "job", number))[1]


def ended(number: str) -> str:
    """The state and exit code of a job once SLURM is done with it."""
    until("the job's end", lambda: says(number, "JobState") not in ("PENDING", "RUNNING", "COMPLETING"))
    return f"{says(number, 'JobState')} {says(number, 'ExitCode')}"


def processes(variable: str) -> list[str]:
    """The processes that have this variable in their environment."""
    return [path.name for path in Path("/proc").glob("[0-9]*") if variable in environment_of(path)]


def environment_of(process: Path) -> list[str]:
    """The environment of a process, by its folder in /proc; none where it has ended."""
    try:
        return (process / "environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def task(number: str, rank: int) -> int:
    """The process of a task of a job."""
    wanted = {f"SLURM_JOB_ID={number}", f"SLURM_PROCID={rank}", "SUBMITIT_EXECUTOR=slurm"}
    for path in Path("/proc").glob("[0-9]*"):
        if wanted <= {*environment_of(path)} and b"submitit" in (path / "cmdline").read_bytes():
            return int(path.name)
    raise AssertionError(f"job {number} has no task {rank}")


SCENARIOS = (alone, signalled, preempted, node_down, failing, mistaken, dead_rank, two_on_a_node, never, sweep, recipe)


def why_not() -> str | None:
    """Why this machine cannot have SLURM, after trying to install it."""
    if os.geteuid() != 0:
        return "needs root"
    if all(map(shutil.which, ("slurmctld", "slurmd", "munged"))):
        return None
    if shutil.which("apt-get") is None:
        return f"no apt-get to install {', '.join(PACKAGES)}"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "-qq", *command], env=environment, capture_output=True, text=True)
        if done.returncode:
            return f"apt-get {command[0]}: {(done.stderr.splitlines() or ['failed'])[-1]}"
    return None


def main() -> int:
    """Start SLURM, run the scenarios, print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of names; `alone` always runs")
    only = parser.parse_args().only
    reason = why_not()
    if reason:
        print(f"skipped: {reason}")
        return 0
    failed = 0
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_corpus(folder / "data")
        os.environ |= {"SLURM_CONF": f"{folder}/slurm/slurm.conf", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        try:
            subprocess.run(["bash", str(CLUSTER), f"{folder}/slurm"], check=True)
            for scenario in SCENARIOS:
                if scenario is alone or any(word in scenario.__name__ for word in only):
                    try:
                        print(f"{scenario.__name__}: {scenario(folder)}", flush=True)
                    except (AssertionError, subprocess.SubprocessError) as error:
                        failed += 1
                        print(f"{scenario.__name__}: FAILED: {error}", flush=True)
        finally:
            subprocess.run(["scancel", "--user=root"], check=False)
            time.sleep(2)
            subprocess.run(["bash", str(CLUSTER), f"{folder}/slurm", "stop"], check=True)
            time.sleep(2)
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())

"""fairseq's default back end for several processes, on a CPU and under LayerDrop."""

import subprocess

import fairseq.distributed.utils
import fairseq.trainer
import pytest
import torch
import torch.distributed as dist
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import LegacyDistributedDataParallel
from fairseq.modules import LayerDropModuleList
from omegaconf import OmegaConf
from torch import nn
from toys import refuses

import fairseq_quant_noise
from fairseq_quant_noise.plugin import data_parallel
from fairseq_quant_noise.structure.learned_rates import LearnedLayerStack

fairseq_quant_noise.register()  # for another test may have imported the package before fairseq
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def section(**options):
    return OmegaConf.merge(OmegaConf.structured(FairseqConfig), {"distributed_training": options}).distributed_training


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_the_trainer_wraps_its_model_here():
    assert fairseq.trainer.models.DistributedFairseqModel is data_parallel.distributed_fairseq_model


@pytest.mark.parametrize("backend", ["c10d", "pytorch_ddp", "legacy_ddp"])
def test_on_a_cpu_it_is_legacy_ddp(alone, backend):
    args = section(ddp_backend=backend)
    wrapped = data_parallel.distributed_fairseq_model(args, nn.Linear(2, 2), alone, CPU)
    assert isinstance(wrapped.module, LegacyDistributedDataParallel)
    assert args.ddp_backend == backend  # what the user gave is what a checkpoint records
    wrapped(torch.ones(1, 2)).sum().backward()
    wrapped.all_reduce_grads()


def dropping(p, learned=False):
    layers = LayerDropModuleList(p, [nn.Linear(2, 2)])
    if learned:
        layers = LearnedLayerStack(layers, 1, p)
    return nn.ModuleDict({"decoder": nn.ModuleDict({"layers": layers})})


@pytest.mark.upstream(32)
@pytest.mark.parametrize("device", [CPU, GPU], ids=str)
@pytest.mark.parametrize("backend", ["legacy_ddp", "no_c10d"])
def test_fairseqs_first_back_end_takes_layerdrop(monkeypatch, backend, device):
    monkeypatch.setattr(data_parallel, "_wrap", lambda args, model, *rest: (args.ddp_backend, model))
    model = dropping(0.2)
    assert data_parallel.distributed_fairseq_model(section(ddp_backend=backend), model, None, device) == (
        backend,
        model,
    )


@pytest.mark.upstream(32)
@pytest.mark.parametrize("backend", ["c10d", "pytorch_ddp"])
def test_on_gpus_layerdrop_is_refused_with_the_cure(monkeypatch, backend):
    monkeypatch.setattr(data_parallel, "_wrap", lambda args, model, *rest: (args.ddp_backend, model))
    wrap = data_parallel.distributed_fairseq_model
    cure = f"--decoder-layerdrop 0.2: .* --ddp-backend {backend} stops at; give --ddp-backend legacy_ddp or "
    for learned in (False, True):
        with refuses(cure + "--find-unused-parameters"):
            wrap(section(ddp_backend=backend), dropping(0.2, learned), None, GPU)
    for options, p in (({}, 0.0), ({"find_unused_parameters": True}, 0.2)):
        model = dropping(p)
        assert wrap(section(ddp_backend=backend, **options), model, None, GPU) == (backend, model)


@pytest.mark.parametrize(("model", "together"), [({"_name": "transformer_lm"}, True), (None, False)])
def test_on_a_cpu_torchrun_joins_trainings_and_no_evaluations(monkeypatch, model, together):
    """fairseq-eval-lm would print the perplexity of the first process's share of the data."""
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    cfg = OmegaConf.merge(OmegaConf.structured(FairseqConfig), {"common": {"cpu": True}})
    cfg.model = model
    data_parallel.join_processes(cfg)
    found = cfg.distributed_training
    assert (found.distributed_init_method == "env://") == together
    assert not together or (found.distributed_world_size, found.distributed_rank) == (2, 1)


@pytest.fixture
def srun(monkeypatch):
    """The second of four tasks that srun started on two nodes; the configuration of a training in it."""
    environment = {"SLURM_STEP_NODELIST": "node[7-8]", "SLURM_NTASKS": "4", "SLURM_PROCID": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "check_output", lambda command, **_: f"{command[-1]}-first\nother\n")
    cfg = OmegaConf.merge(OmegaConf.structured(FairseqConfig), {"common": {"cpu": True}})
    cfg.model, cfg.distributed_training.distributed_port = {"_name": "transformer_lm"}, 12345
    return cfg


def test_on_a_cpu_the_tasks_of_a_slurm_job_train_together(srun):
    """fairseq sets a GPU for each."""
    srun.distributed_training.distributed_world_size = 4
    data_parallel.join_processes(srun)
    found = srun.distributed_training
    assert found.distributed_init_method == "tcp://node[7-8]-first:12345"
    assert (found.distributed_rank, found.distributed_backend, found.distributed_no_spawn) == (1, "gloo", True)


def test_on_a_cpu_a_job_of_another_number_of_tasks_is_refused(srun):
    srun.distributed_training.distributed_world_size = 8
    with refuses("--distributed-world-size 8: the SLURM job has 4 tasks; .* give the same number"):
        data_parallel.join_processes(srun)


def test_more_processes_than_gpus_are_refused_with_the_cure():
    cfg = OmegaConf.merge(OmegaConf.structured(FairseqConfig), {"common": {"cpu": True}})
    cfg.model, cfg.distributed_training.distributed_world_size = None, 2
    with refuses(r"--distributed-world-size 2: .* machine has 0; .* torchrun --nproc_per_node 2, which works on CPUs"):
        data_parallel.join_processes(cfg)


NODES, GPUS = 2, 4
#: What each of them sets in the environment of a process, by its node and its number there.
LAUNCHERS = {
    "torchrun": lambda node, local: {"RANK": node * GPUS + local, "WORLD_SIZE": NODES * GPUS, "LOCAL_RANK": local},
    "srun, a task a GPU": lambda node, local: {"SLURM_NTASKS_PER_NODE": GPUS, "SLURM_PROCID": node * GPUS + local},
    "srun, a task a node": lambda node, local: {"SLURM_NTASKS_PER_NODE": 1, "SLURM_PROCID": node},
}


@pytest.mark.parametrize(
    ("launcher", "cpu"),
    [*((name, False) for name in LAUNCHERS), ("torchrun", True), ("srun, a task a GPU", True)],
)
def test_all_ways_to_start_a_training_give_a_process_the_same_rank_and_gpu(monkeypatch, launcher, cpu):
    found = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not cpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0 if cpu else GPUS)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: launcher == "torchrun")
    monkeypatch.setattr(subprocess, "check_output", lambda *_, text=False, **__: "a\nb" if text else b"a\nb")

    def process(number, main, cfg, kwargs):
        training = cfg.distributed_training
        rank = kwargs["start_rank"] + number if training.distributed_rank is None else training.distributed_rank
        found.append((rank, training.distributed_world_size, number))

    def spawn(fn, args, nprocs, join):
        for number in range(nprocs):
            fn(number, *args)

    monkeypatch.setattr(fairseq.distributed.utils, "distributed_main", process)
    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    for node in range(NODES):
        for local in range(1 if "node" in launcher else GPUS):
            given = {**LAUNCHERS[launcher](node, local), "MASTER_ADDR": "a", "MASTER_PORT": 29500}
            if launcher != "torchrun":
                del given["MASTER_ADDR"], given["MASTER_PORT"]
                given |= {"SLURM_STEP_NODELIST": "[ab]", "SLURM_NNODES": NODES, "SLURM_NODEID": node}
                given |= {"SLURM_LOCALID": local, "SLURM_NTASKS": NODES * GPUS}
            with monkeypatch.context() as of_process:
                for name, value in given.items():
                    of_process.setenv(name, str(value))
                cfg = OmegaConf.merge(OmegaConf.structured(FairseqConfig), {"common": {"cpu": cpu}})
                cfg.model = {"_name": "transformer_lm"}
                cfg.distributed_training.distributed_world_size = NODES * GPUS
                cfg.distributed_training.distributed_port = 29500 if launcher != "torchrun" else -1
                fairseq.distributed.utils.call_main(cfg, None)
    ranks = range(NODES * GPUS)
    assert found == [(rank, NODES * GPUS, 0 if cpu else rank % GPUS) for rank in ranks]

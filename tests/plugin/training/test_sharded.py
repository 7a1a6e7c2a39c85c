"""`--ddp-backend fully_sharded`: two processes that divide weights and moments train as two that hold all of them."""

import json

import pytest
import torch
from forked import free_port, losses, start, train
from lm_fixture import one_error, same, split, state_of

from fairseq_quant_noise import noise_of

pytestmark = pytest.mark.slow

FLAGS = split(
    "--quant-noise-pq 0.3 --quant-noise-kind pq --decoder-layerdrop 0.3 --dropout 0 --batch-size 8 --update-freq 2",
    "--save-interval-updates 2 --min-params-to-wrap 1 --disable-validation --quant-noise-log-interval 2",
)


def of_rank(rank, lab, jobs):
    """In a process of its own: the runs, one after the other."""
    for folder, flags in jobs.items():
        run = train(lab, folder, *flags, "--distributed-rank", rank, kind="adaptive", updates=4)
        held = sum(getattr(p, "_local_tensor", p).numel() for p in run.model.parameters())
        torch.save({"held": held, "noise": noise_of(run.model).state_dict()}, folder / f"rank{rank}")


@pytest.fixture(scope="module")
def trained(lab):
    """Three runs of two processes: whole, sharded, and sharded from the middle of that one; their folders."""
    together = split(
        "--distributed-backend gloo --distributed-world-size 2 --distributed-no-spawn",
        f"--distributed-init-method tcp://localhost:{free_port()}",
    )
    folders = {name: lab.new(name) for name in ("whole", "sharded", "resumed")}
    jobs = {folder: [*FLAGS, *together, "--ddp-backend", "fully_sharded"] for folder in folders.values()}
    jobs[folders["whole"]][-1] = "legacy_ddp"
    jobs[folders["resumed"]] += ["--restore-file", folders["sharded"] / "checkpoint_1_2.pt"]
    processes = [start(of_rank, rank, lab, jobs) for rank in range(2)]
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return folders


def of_ranks(folder):
    return [torch.load(folder / f"rank{rank}") for rank in range(2)]


def test_sharding_changes_nothing_in_a_training_with_noise(trained):
    """But for rounding: gradients' norms are summed in another order, and Adam moves weights by .01 an update."""
    one, other = (state_of(trained[name] / "checkpoint_last.pt") for name in ("whole", "sharded"))
    assert one["model"].keys() == other["model"].keys()
    for name, tensor in one["model"].items():
        torch.testing.assert_close(other["model"][name], tensor, rtol=0, atol=2e-4, msg=name)
    moments = [state["last_optimizer_state"]["state"] for state in (one, other)]
    assert moments[0].keys() == moments[1].keys()
    for number, entry in moments[0].items():
        torch.testing.assert_close(moments[1][number]["exp_avg_sq"], entry["exp_avg_sq"], rtol=0.01, atol=1e-9)
    logged = [
        [json.loads(line)["loss"] for update in losses(trained[name]).values() for line in update]
        for name in ("whole", "sharded")
    ]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def test_each_process_holds_half_and_measures_noise_on_the_whole(trained):
    whole, sharded = of_ranks(trained["whole"]), of_ranks(trained["sharded"])
    assert sum(rank["held"] for rank in sharded) == whole[0]["held"] == whole[1]["held"]
    assert max(rank["held"] for rank in sharded) < 0.6 * whole[0]["held"]
    assert same(sharded[0]["noise"], sharded[1]["noise"])
    assert len(sharded[0]["noise"]["weights"]) > 10


def test_a_sharded_run_resumes_to_the_same_bits(trained):
    one, other = (state_of(trained[name] / "checkpoint_last.pt") for name in ("sharded", "resumed"))
    for part in ("model", "last_optimizer_state"):
        assert same(one[part], other[part])


def test_what_needs_whole_weights_is_refused_by_name(lab, capsys):
    plan = lab.plan({"stages": [{"match": r".*\.fc1", "block_size": 8, "n_centroids": 4}]})
    cases = {
        "--fp16: does not go with": ["--fp16"],
        "--store-ema: does not go with": ["--store-ema"],
        "iPQ needs whole weights; use legacy_ddp": ["--quantization-config-path", plan],
    }
    for told, flags in cases.items():
        with pytest.raises(SystemExit) as end:
            lab.train("--ddp-backend", "fully_sharded", *flags)
        assert end.value.code == 2
        assert told in one_error(capsys.readouterr())

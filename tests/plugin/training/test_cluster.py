"""Two processes that train together over gloo: noise, stages, the same bits in both, and any number of them later."""

import contextlib
from unittest import mock

import pytest
import torch
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from forked import free_port, start, train
from lm_fixture import PLANS, same, split, state_of
from torch.nn.modules.module import register_module_forward_pre_hook

import fairseq_quant_noise.quantization.encoding
from fairseq_quant_noise import noise_of, quantize_
from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.errors import UserError
from fairseq_quant_noise.noise import weight_noise
from fairseq_quant_noise.plugin.training.stages import StageController
from fairseq_quant_noise.quantization.encoding import encode_together
from fairseq_quant_noise.utils import ranks

pytestmark = pytest.mark.slow

STAGES = PLANS["adaptive"]["stages"]
CODES = {"kind": "train", "every": 2, "share": 0.5}
INTEGERS = {
    "stages": [{"match": r"decoder\.layers\..*", "scheme": "int4", "range": "learned-channel"}],
    "encode": "feedback",
}
DAMAGED = "decoder.layers.1.fc2"
NOISE = split(
    "--quant-noise-pq 0.3 --quant-noise-kind pq --decoder-layerdrop 0.3 --dropout 0 --batch-size 8 --update-freq 2",
    "--save-interval-updates 2",
)


@contextlib.contextmanager
def astray(rank):
    """One number of a weight is another on rank 1 when a stage comes."""
    quantize_stage = StageController._quantize_stage

    def strays(controller, stage):
        if rank == 1:
            controller.trainer.get_model().get_parameter(f"{DAMAGED}.weight").data[0, 0] += 1
        quantize_stage(controller, stage)

    with mock.patch.object(StageController, "_quantize_stage", strays):
        yield


@contextlib.contextmanager
def drawn():
    """What a rank draws in its training forwards: J of each weight, and the layers that LayerDrop leaves in."""
    found = {"J": [], "layers": []}
    draw = weight_noise.draw_blocks

    def draw_blocks(*args):
        found["J"].append(draw(*args))
        return found["J"][-1]

    def note(layer, inputs):
        if isinstance(layer, TransformerDecoderLayerBase) and layer.training:
            found["layers"].append(layer)

    handle = register_module_forward_pre_hook(note)
    with mock.patch.object(weight_noise, "draw_blocks", draw_blocks):
        yield found
    handle.remove()


def train_rank(rank, lab, jobs, outs):
    """In a process of its own: several runs, one after the other, and what this rank holds after each."""
    for job, out in zip(jobs, outs, strict=True):
        encoded = []

        def spy(names, *args, encoded=encoded, **kwargs):
            encoded.extend(names)
            return encode_together(names, *args, **kwargs)

        with (
            mock.patch.object(fairseq_quant_noise.quantization.encoding, "encode_together", spy),
            astray(rank) if job.get("astray") else contextlib.nullcontext(),
            drawn() as draws,
            mock.patch.dict("os.environ", {**job.get("torchrun", {}), "RANK": str(rank)}),
            open(f"{out}-{rank}.err", "w") as errors,
            contextlib.redirect_stderr(errors),
        ):
            try:
                flags = [*job["flags"], *([] if "torchrun" in job else ["--distributed-rank", rank])]
                run = train(lab, job["folder"], *flags, kind="adaptive", updates=job["updates"])
            except SystemExit as end:
                torch.save({"exit": end.code}, f"{out}-{rank}")
                continue
        words = [float(log["sample_size"]) for log in run.updates]
        noise = noise_of(run.model)
        layers = [run.model.decoder.layers[i] for i in range(len(run.model.decoder.layers))]
        draws["layers"] = [layers.index(layer) for layer in draws["layers"]]
        held = {"model": run.model.state_dict(), "noise": noise.state_dict() if noise is not None else None}
        torch.save({**held, **draws, "words": words, "encoded": encoded}, f"{out}-{rank}")


def job(lab, updates, *flags, structure=None, activations=None, codes=None, more=None, **settings):
    """A run of the stages, with noise; `more` is what else is in the plan."""
    plan = {**PLANS["adaptive"], "structure": structure or {}, "codes": codes or {}, **(more or {})}
    plan = lab.plan(plan if activations is None else {**plan, "activations": activations})
    flags = ["--quant-noise-pq", 0.1, "--quantization-config-path", plan, *flags]
    return {"flags": flags, "updates": updates, "folder": lab.new(), **settings}


@pytest.fixture(scope="module")
def cluster(lab, runs):
    """Several runs on two processes: for each its folder, and what the ranks hold."""
    stock, few = runs.stock("adaptive").path, ["--batch-size", 8]
    broken = state_of(stock)
    broken["model"][f"{DAMAGED}.weight"][0, 0] = float("nan")
    alone = job(lab, 5, *few, "--finetune-from-model", stock)
    checkpoint = lab.train(*alone["flags"], kind="adaptive", updates=5).path
    folder = lab.new()
    torchrun = {  # the first job, for the processes meet but once
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "none",
    }
    jobs = {
        "torchrun": {"flags": ["--disable-validation"], "updates": 2, "folder": lab.new(), "torchrun": torchrun},
        "noise": {"flags": NOISE, "updates": 4, "folder": folder},
        "resumed": {
            "flags": [*NOISE, "--restore-file", folder / "checkpoint_1_2.pt"],
            "updates": 4,
            "folder": lab.new(),
        },
        "whole": job(lab, 3, "--finetune-from-model", stock),
        "shared": job(lab, 3, "--finetune-from-model", stock, structure={"share_layers": 2}),
        "inputs": job(lab, 3, "--finetune-from-model", stock, activations={"calibration_batches": 3}),
        "codes": job(lab, 5, "--finetune-from-model", stock, structure={"share_layers": 2}, codes=CODES),
        "integers": job(lab, 3, "--finetune-from-model", stock, more=INTEGERS),
        "1 to 2": job(lab, 6, *few, "--restore-file", checkpoint),
        "astray": job(lab, 3, "--finetune-from-model", stock, astray=True),
        "NaN": job(lab, 3, "--finetune-from-model", lab.checkpoint(broken)),
    }
    together = split(
        "--distributed-backend gloo --distributed-world-size 2 --distributed-no-spawn --ddp-backend legacy_ddp",
        f"--distributed-init-method tcp://localhost:{free_port()} --disable-validation",
    )
    for settings in jobs.values():
        settings["flags"] = [*settings["flags"], *([] if "torchrun" in settings else together)]
    outs = [lab.new(name.replace(" ", "-")) for name in jobs]
    processes = [start(train_rank, rank, lab, list(jobs.values()), outs) for rank in range(2)]
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    found = {}
    for (name, settings), out in zip(jobs.items(), outs, strict=True):
        of_rank = [torch.load(f"{out}-{rank}") for rank in range(2)]
        errors = [out.with_name(f"{out.name}-{rank}.err").read_text() for rank in range(2)]
        found[name] = {**settings, "ranks": of_rank, "errors": errors}
    return found


@pytest.mark.upstream(25)
def test_processes_that_torchrun_starts_on_a_cpu_train_together(cluster):
    first, second = cluster["torchrun"]["ranks"]
    assert first["words"] == second["words"]
    assert min(first["words"]) > 600  # of both: a batch of one process has 16 lines of 32 words
    assert same(dict(first["model"]), dict(second["model"]))


@pytest.mark.upstream(10)
@pytest.mark.parametrize(("name", "structure"), [("whole", {}), ("shared", {"share_layers": 2})])
def test_two_processes_train_the_stages_together(lab, runs, cluster, name, structure):
    first, second = cluster[name]["ranks"]
    assert first["words"] == second["words"]
    assert min(first["words"][:2]) > 600  # of both: a batch of one process has 16 lines of 32 words
    assert first["model"].keys() == second["model"].keys()
    assert all(torch.equal(t, second["model"][name]) for name, t in first["model"].items())

    saved = state_of(cluster[name]["folder"] / "checkpoint_last.pt")
    assert saved["extra_state"]["quant_noise_stages"]["done"] == 3
    assert all(torch.equal(t, first["model"][name]) for name, t in saved["model"].items())
    first_stage = {"stages": STAGES[:1], "structure": structure}
    dense = runs.stock("adaptive").path
    importance = Checkpoint(dense).moments
    alone = quantize_(lab.load(dense), first_stage, seed=3, importance=importance).state_dict()
    codes = {name: t for name, t in alone.items() if name.endswith(".codes")}
    assert len(codes) == 4
    assert all(torch.equal(t, saved["model"][name]) for name, t in codes.items())


def test_two_processes_train_their_codes_to_the_same_bits(cluster):
    first, second = (dict(of_rank["model"]) for of_rank in cluster["codes"]["ranks"])
    assert same(first, second)
    saved = state_of(cluster["codes"]["folder"] / "checkpoint_last.pt")["model"]
    assert same({name: first[name] for name in saved}, dict(saved))
    fixed = cluster["shared"]["ranks"][0]["model"]
    of_first_stage = [name for name in fixed if name.endswith(".codes") and ".fc" in name]
    assert sum(int((first[name] != fixed[name]).sum()) for name in of_first_stage) > 10


def test_two_processes_round_with_error_feedback_to_the_same_bits(cluster):
    first, second = (dict(of_rank["model"]) for of_rank in cluster["integers"]["ranks"])
    assert same(first, second)
    assert sum(name.endswith(".log_scale") for name in first) > 10


def test_the_ranges_of_inputs_are_the_same_on_all_processes(cluster):
    """Each has seen other batches in training; what rank 0 saves is what all of them hold."""
    first, second = (of_rank["model"] for of_rank in cluster["inputs"]["ranks"])
    saved = state_of(cluster["inputs"]["folder"] / "checkpoint_last.pt")["model"]
    ranges = {name: t for name, t in saved.items() if name.endswith("input_quantizer.range")}
    assert len(ranges) > 10
    assert all(t.any() for t in ranges.values())
    for held in (first, second):
        assert same({name: held[name] for name in saved}, saved)


def test_each_process_draws_noise_of_its_own(cluster):
    """Each hits a share p of the blocks, and so both a share p^2; with one J for both it would be p."""
    first, second = (of_rank["J"] for of_rank in cluster["noise"]["ranks"])
    assert [hit.shape for hit in first] == [hit.shape for hit in second]
    assert len(first) > 4 * 2 * 10
    one, other = torch.cat(first), torch.cat(second)
    assert len(one) > 10_000
    assert float(one.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert float((one & other).float().mean()) == pytest.approx(0.09, abs=0.02)


@pytest.mark.upstream(32)
def test_layerdrop_leaves_the_same_layers_out_on_all_processes(cluster):
    """Without dropout, which draws from the same random numbers on a CPU, and on a GPU from others."""
    first, second = (of_rank["layers"] for of_rank in cluster["noise"]["ranks"])
    assert first == second
    assert 4 < len(first) < 4 * 2 * 2, "four updates of two parts, two layers"


def test_noise_measures_the_same_codebooks_on_all_processes(cluster):
    first, second = (of_rank["noise"] for of_rank in cluster["noise"]["ranks"])
    assert len(first["weights"]) > 10
    assert same(first, second)


def test_a_resumed_run_of_two_processes_draws_the_noise_of_one_that_went_through(cluster):
    for whole, resumed in zip(cluster["noise"]["ranks"], cluster["resumed"]["ranks"], strict=True):
        assert 0 < len(resumed["J"]) < len(whole["J"])
        assert same(resumed["J"], whole["J"][-len(resumed["J"]) :])
        assert same(dict(resumed["model"]), dict(whole["model"]))


@pytest.mark.upstream(10)
def test_each_weight_is_encoded_by_one_of_the_processes(cluster):
    first, second = (set(of_rank["encoded"]) for of_rank in cluster["whole"]["ranks"])
    assert not first & second
    assert len(first | second) == 18
    assert min(len(first), len(second)) > 5


def test_ranks_that_hold_other_weights_stop_with_the_name_of_the_first(cluster):
    assert [of_rank["exit"] for of_rank in cluster["astray"]["ranks"]] == [2, 2]
    for text in cluster["astray"]["errors"]:
        assert text.count("error: ") == 1
        assert f"error: {DAMAGED}: before stage 1 of 3, rank 1 holds other numbers than rank 0; " in text


def test_a_weight_that_one_process_cannot_encode_stops_all_of_them(cluster):
    assert [of_rank["exit"] for of_rank in cluster["NaN"]["ranks"]] == [2, 2]
    for text in cluster["NaN"]["errors"]:
        assert f"error: {DAMAGED}: the weight holds NaN" in text


def test_a_run_of_one_process_goes_on_with_two(cluster):
    """Five batches of one process are two of each of two; the fifth is seen again."""
    first, second = cluster["1 to 2"]["ranks"]
    assert len(first["words"]) == 1
    assert [name for name, t in first["model"].items() if not torch.equal(t, second["model"][name])] == []
    saved = state_of(cluster["1 to 2"]["folder"] / "checkpoint_last.pt")
    assert saved["optimizer_history"][-1]["num_updates"] == 6
    assert saved["extra_state"]["train_iterator"]["iterations_in_epoch"] == 3
    assert saved["extra_state"]["quant_noise_stages"]["done"] == 3


def test_a_run_of_two_processes_goes_on_with_one(lab, cluster):
    """Three of two processes' batches are six of seven; the seventh follows, and then another epoch."""
    before = cluster["whole"]
    last = before["folder"] / "checkpoint_last.pt"
    flags = [*before["flags"][:4], "--restore-file", last]
    position = state_of(last)["extra_state"]["train_iterator"]
    run = lab.train(*flags, "--batch-size", 16, kind="adaptive", updates=5)
    assert [log["num_updates"] for log in run.updates] == [4, 5]
    saved = state_of(run.path)
    codes = [name for name in saved["model"] if name.endswith(".codes")]
    assert codes
    assert all(torch.equal(saved["model"][name], before["ranks"][0]["model"][name]) for name in codes)
    ended = saved["extra_state"]["train_iterator"]
    assert (position["epoch"], position["iterations_in_epoch"]) == (1, 3)
    assert (ended["epoch"], ended["iterations_in_epoch"]) == (2, 1)


# Without processes.


@pytest.mark.parametrize(
    ("sizes", "world", "owners"),
    [([5, 1, 1, 3], 2, [0, 1, 1, 1]), ([2, 2, 2], 1, [0, 0, 0]), ([], 2, []), ([1, 9], 3, [1, 0])],
)
def test_the_largest_pieces_are_dealt_first_each_to_whoever_has_least(sizes, world, owners):
    assert ranks.divide(sizes, world) == owners


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_digest_sees_every_bit_and_the_shape(dtype):
    tensor = torch.arange(12).to(dtype)
    other = tensor.clone()
    other[-1] += 1
    digests = [ranks.digest(t) for t in (tensor, other, tensor.view(3, 4), tensor.to(torch.float64))]
    assert len(set(digests)) == 4
    assert ranks.digest(tensor.view(3, 4).t().contiguous().t()) == ranks.digest(tensor.view(3, 4))


def test_the_first_tensor_that_differs_is_named_with_its_rank(monkeypatch):
    monkeypatch.setattr(ranks, "rank_and_world", lambda: (0, 3))
    monkeypatch.setattr(ranks, "gather", lambda mine: [mine, mine, [mine[0], b"other"]])
    tensors = {"a": torch.zeros(2), "b": torch.ones(2)}
    with pytest.raises(UserError, match=r"^b: after stage 2, rank 2 holds other numbers than rank 0; .*checkpoint"):
        ranks.check_same(tensors, "after stage 2")

"""The stages inside fairseq's Trainer: plans, schedule, optimizer memory, resume, ties."""

from pathlib import Path

import fairseq
import pytest
import torch
from lm_fixture import (
    ATTENTION,
    BANDS,
    FFN,
    NAG,
    PLANS,
    WORD_VECTORS,
    both_kinds,
    ipq_flags,
    one_error,
    same,
    split,
    state_of,
)

from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.checkpoints.keys import STAGES as STATE_KEY
from fairseq_quant_noise.layers import quantized_weights
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.plugin.training.stages import StageController
from fairseq_quant_noise.quantization.table import make_table, model_bytes
from fairseq_quant_noise.quantization.targets import resolve_stages
from fairseq_quant_noise.weights.discovery import find_weights

FAIRSEQ_PLAN = Path(fairseq.__file__).parent / "examples/quant_noise/transformer_quantization_config.yaml"


def with_plan(lab, plan):
    """The flags that give a plan."""
    return ["--quantization-config-path", plan if isinstance(plan, str | Path) else lab.plan(plan)]


@pytest.fixture
def stages(monkeypatch):
    """(stage, update) of every quantization, in order."""
    seen = []
    quantize = StageController._quantize_stage

    def spy(controller, stage):
        seen.append((stage, controller.trainer.get_num_updates()))
        quantize(controller, stage)

    monkeypatch.setattr(StageController, "_quantize_stage", spy)
    return seen


# The plan and its stages.


@both_kinds
def test_the_stages_quantize_what_the_plan_names(lab, runs, kind):
    run = runs.ipq(kind)
    plan = Plan.of(PLANS[kind])
    model = lab.model(kind=kind)
    targets = {t.weight.name: (t.block_size, t.n_centroids) for t in resolve_stages(plan, model)}
    assert {n: (w.block_size, w.n_centroids) for n, w in quantized_weights(run.model).items()} == targets
    assert set(targets) >= {f"decoder.layers.{i}.{name}" for i in range(2) for name in ("fc1", "self_attn.v_proj")}
    ratios = [log["ipq_ratio"] for log in run.updates]
    assert ratios == sorted(ratios)
    assert len(set(ratios)) == 3


@both_kinds
def test_the_last_checkpoint_holds_codes_and_the_plan(runs, kind):
    state = state_of(runs.ipq(kind).path)
    codes = {name: t for name, t in state["model"].items() if name.endswith(".codes")}
    assert codes
    assert all(t.dtype == torch.uint8 for t in codes.values())
    assert all(t.is_contiguous() for t in codes.values()), "fairseq sends them to other processes byte by byte"
    each_once = {t.data_ptr() for t in codes.values()}
    assert len(each_once) == len(quantized_weights(runs.ipq(kind).model))
    kept = state["extra_state"][STATE_KEY]
    assert kept["done"] == 3
    assert Plan.of(kept["plan"]) == Plan.of(PLANS[kind])


@pytest.mark.upstream(20)
@pytest.mark.parametrize(
    ("updates", "max_update", "expected"),
    [
        ((None, None, None), 7, [0, 2, 4]),
        ((None, None, None), 2, [0, 0, 1]),
        ((2, 3, 1), 7, [0, 2, 5]),
    ],
)
def test_when_each_stage_starts(lab, stages, updates, max_update, expected):
    rules = [
        {**rule, **({"updates": n} if n else {})} for rule, n in zip(PLANS["plain"]["stages"], updates, strict=True)
    ]
    lab.train(*with_plan(lab, {"stages": rules}), updates=max_update)
    assert stages == list(enumerate(expected))


def test_stages_share_the_epochs_when_those_end_the_run(lab, stages):
    lab.train(*with_plan(lab, PLANS["plain"]), "--max-epoch", 3, "--batch-size", 64, updates=None)
    assert stages == [(0, 0), (1, 2), (2, 4)]


@pytest.mark.upstream(20)
def test_all_stages_are_done_in_a_run_that_goes_on_from_a_dense_checkpoint(lab, runs, stages):
    """--restore-file keeps counting: 6 updates are done, 3 are left until --max-update 9."""
    stock = runs.stock("plain").path
    lab.train(*with_plan(lab, PLANS["plain"]), "--restore-file", stock, updates=9)
    assert [stage for stage, _ in stages] == [0, 1, 2]
    assert [update for _, update in stages] == [6, 7, 8]


def test_all_stages_are_done_by_epoch_in_a_run_that_goes_on(lab, stages):
    """One epoch of dense training, then three epochs of stages."""
    flags = ["--batch-size", 64]
    dense = lab.train(*flags, "--max-epoch", 1, updates=None)
    lab.train(*flags, *with_plan(lab, PLANS["plain"]), "--restore-file", dense.path, "--max-epoch", 4, updates=None)
    assert [stage for stage, _ in stages] == [0, 1, 2]
    assert [update for _, update in stages] == [2, 4, 6]


def test_a_plan_may_bring_the_noise(lab):
    noise = [{"match": ".*", "p": 0.5, "block_size": 8}]
    run = lab.train(*with_plan(lab, {"noise": noise, "stages": [FFN]}), updates=2)
    assert run.model._quant_noise.seed is not None


REFUSED = {
    "a rule that matches nothing": (
        {"stages": [FFN, {"match": r"decoder\.layers\.\d+\.fc3"}]},
        [],
        [r"decoder\.layers\.\d+\.fc3", "matches no weight"],
    ),
    "two rules for one weight": (
        {"stages": [FFN, {"match": r".*\.fc1", "block_size": 8}]},
        [],
        ["decoder.layers.0.fc1", "two stages"],
    ),
    "a block size that does not divide": (
        {"stages": [{**FFN, "block_size": 5}]},
        [],
        ["decoder.layers.0.fc1", "blocks of 5"],
    ),
    "updates in some stages": ({"stages": [{**FFN, "updates": 2}, WORD_VECTORS]}, [], ["updates"]),
    "noise from both": (
        {"noise": [{"match": ".*", "p": 0.1}], "stages": [FFN]},
        ["--quant-noise-pq", 0.1],
        ["noise already"],
    ),
    "a stage that begins as the run ends": (
        {"stages": [{**FFN, "updates": 4}, {**WORD_VECTORS, "updates": 2}, {**ATTENTION, "updates": 3}]},
        [],
        ["stage 3 of 3 starts after update 6", "--max-update 6"],
    ),
    "a checkpoint that is not there": (
        PLANS["plain"],
        ["--restore-file", "/nowhere/a.pt"],
        ["--restore-file /nowhere"],
    ),
    "an average of the weights": (PLANS["plain"], ["--store-ema"], ["--store-ema"]),
    "no file": ("/nowhere/plan.yaml", [], ["/nowhere/plan.yaml"]),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.upstream(4)] if "nothing" in c else []) for c in REFUSED]
)
def test_a_plan_that_does_not_fit_stops_before_training(lab, case, stages, capsys):
    plan, flags, names = REFUSED[case]
    folder = lab.new()
    with pytest.raises(SystemExit) as end:
        lab.train(*with_plan(lab, plan), *flags, save=folder)
    assert end.value.code == 2
    message = one_error(capsys.readouterr())
    assert all(name in message for name in names), message
    assert not stages
    assert not list(folder.glob("*.pt"))


@pytest.mark.upstream(4)
def test_the_yaml_that_fairseq_ships_works(lab, runs, stages):
    stock = runs.stock("adaptive").path
    run = lab.train(*with_plan(lab, FAIRSEQ_PLAN), "--finetune-from-model", stock, kind="adaptive", updates=5)
    assert stages == [(0, 0), (1, 1), (2, 3)]
    quantized = quantized_weights(run.model)
    dense = {w.name for w in find_weights(run.model)} - set(quantized)
    assert dense == {"decoder.adaptive_softmax.head.class_proj"}
    sizes = {name.rpartition(".")[2]: w.block_size for name, w in quantized.items() if "layers" in name}
    assert sizes == dict.fromkeys(("fc1", "fc2"), 8) | dict.fromkeys(("k_proj", "v_proj", "q_proj", "out_proj"), 4)
    assert {w.block_size for name, w in quantized.items() if name.endswith("embeddings.1.1")} == {4}


# What a stage leaves as it was: the schedule, the optimizer's memory, the ties.


@pytest.mark.upstream(20)
@pytest.mark.parametrize(
    "flags",
    [
        "--lr-scheduler inverse_sqrt --warmup-updates 3 --warmup-init-lr 0.001",
        "--lr-scheduler cosine --warmup-updates 2 --min-lr 0.0001",
        "--lr-scheduler fixed --lr 0.01,0.004 --lr-shrink 0.5 --force-anneal 2 --optimizer nag --momentum 0.9",
    ],
    ids=["inverse_sqrt", "cosine", "fixed-nag"],
)
def test_the_learning_rate_is_the_schedules_throughout(lab, flags):
    """In a run of two epochs; stages at 0, 3 and 6, the epoch ends at 5."""
    runs = [
        lab.train(*flags.split(), "--batch-size", 24, *more, updates=9) for more in ([], with_plan(lab, PLANS["plain"]))
    ]
    rates = [[log["lr"] for log in run.updates] for run in runs]
    assert len(rates[0]) == 9
    assert len(set(rates[0])) > 1
    assert rates[0] == rates[1]


@pytest.mark.upstream(8)
def test_the_tied_adaptive_softmax_is_quantized_once_and_counted_once(lab, runs):
    run = runs.ipq("adaptive")
    decoder = run.model.decoder
    for i in range(3):
        embedding, projection = decoder.embed_tokens.embeddings[i]
        softmax = decoder.adaptive_softmax
        words = softmax.head.word_proj if i == 0 else softmax.tail[i - 1][2]
        assert words._modules["weight"] is embedding._modules["weight"]
        if i:
            assert softmax.tail[i - 1][0]._modules["weight"] is projection._modules["weight"]
    model = lab.model(kind="adaptive")
    table = make_table(model, resolve_stages(Plan.of(PLANS["adaptive"]), model))
    assert model_bytes(run.model) == (table.paper_bytes, 4 * sum(p.numel() for p in model.parameters()))


def test_the_tied_output_projection_is_quantized_once(runs):
    decoder = runs.ipq("plain").model.decoder
    assert decoder.output_projection._modules["weight"] is decoder.embed_tokens._modules["weight"]


@pytest.mark.upstream(13)
def test_few_blocks_zeros_and_few_values_quantize_exactly(lab, runs):
    state = state_of(runs.stock("plain").path)
    weights = state["model"]
    weights["decoder.layers.0.fc1.weight"].zero_()
    values = torch.randint(-8, 8, (5, 8), generator=torch.Generator().manual_seed(0)) / 8
    pick = torch.arange(weights["decoder.layers.0.fc2.weight"].numel() // 8) % 5
    weights["decoder.layers.0.fc2.weight"].copy_(values[pick].view(32, 64))
    state["last_optimizer_state"] = None
    plan = {"stages": [{**FFN, "n_centroids": 256}, {**ATTENTION, "n_centroids": 256}]}
    flags = ["--finetune-from-model", lab.checkpoint(state), "--lr", 0]
    run = lab.train(*with_plan(lab, plan), *flags, updates=2)
    quantized = quantized_weights(run.model)
    for name in ("fc1", "fc2"):
        name = f"decoder.layers.0.{name}"
        assert torch.equal(quantized[name].decode(), weights[f"{name}.weight"])
    assert quantized["decoder.layers.1.fc1"].n_centroids == 64  # 256 blocks
    assert quantized["decoder.layers.1.self_attn.q_proj"].n_centroids == 64


# Resume.

RESUMED = split("--quant-noise-pq 0.1 --decoder-layerdrop 0.2 --batch-size 24 --disable-validation")


@pytest.mark.upstream(6)
@pytest.mark.parametrize(
    ("kind", "flags", "resume_at"),
    [
        ("plain", [], ["1_1", "1_3", "1_4", "2_7"]),  # in each stage, and as one begins
        ("adaptive", NAG, ["1_2", "2_8"]),
    ],
    ids=["plain-adam", "adaptive-nag"],
)
def test_a_resumed_run_ends_with_the_same_bits(lab, kind, flags, resume_at):
    """Two epochs of 5 updates; stages at 0, 3 and 6."""
    flags = [*with_plan(lab, PLANS[kind]), *RESUMED, *flags]
    whole = lab.train(*flags, "--save-interval-updates", 1, kind=kind, updates=9)
    end = state_of(whole.path)
    for at in resume_at:
        checkpoint = whole.folder / f"checkpoint_{at}.pt"
        resumed = lab.train(*flags, "--restore-file", checkpoint, kind=kind, updates=9)
        assert [log["num_updates"] for log in resumed.updates] == list(range(int(at[2:]) + 1, 10))
        state = state_of(resumed.path)
        assert same(state["model"], end["model"]), at
        assert same(state["last_optimizer_state"], end["last_optimizer_state"]), at
        assert state["extra_state"][STATE_KEY] == end["extra_state"][STATE_KEY]


def test_a_run_that_starts_again_in_its_folder_goes_on(lab, stages):
    folder, flags = lab.new(), with_plan(lab, PLANS["plain"])
    lab.train(*flags, save=folder, updates=3)
    lab.train(*flags, save=folder, updates=3)  # nothing left to do
    assert stages == [(0, 0), (1, 1), (2, 2)]


def test_the_stage_in_progress_begins_anew_when_finetuning_from_its_checkpoint(lab, stages):
    rules = [{**rule, "updates": 3} for rule in PLANS["plain"]["stages"]]
    flags = with_plan(lab, {"stages": rules})
    first = lab.train(*flags, "--save-interval-updates", 4, updates=9)
    second = first.folder / "checkpoint_1_4.pt"  # in the second stage
    run = lab.train(*flags, "--finetune-from-model", second, updates=5)
    assert stages[3:] == [(2, 3)]
    assert len(quantized_weights(run.model)) == 13


@both_kinds
def test_a_packed_file_goes_on_training(lab, runs, kind):
    """Its centroids are trained further, its codes stay."""
    run = lab.train("--finetune-from-model", runs.packed(kind), kind=kind, updates=2)
    packed, ended = read(runs.packed(kind)).state_dict(), state_of(run.path)["model"]
    assert all(torch.equal(t, packed[name]) for name, t in ended.items() if name.endswith(".codes"))
    assert not any(torch.equal(t, packed[name]) for name, t in ended.items() if name.endswith("fc1.weight.centroids"))
    assert float(run.updates[0]["loss"]) < float(runs.stock(kind).updates[0]["loss"]) - 1


def test_stages_for_weights_that_are_quantized_already_are_refused(lab, runs, capsys):
    with pytest.raises(SystemExit) as end:
        lab.train(*with_plan(lab, PLANS["plain"]), "--finetune-from-model", runs.packed("plain"))
    assert end.value.code == 2
    assert "quantized already" in one_error(capsys.readouterr())


def test_resuming_with_another_plan_is_refused_by_name(lab, runs, capsys):
    path = runs.ipq("adaptive").path
    other = {"stages": [FFN, {**BANDS, "n_centroids": 8}, ATTENTION]}
    with pytest.raises(SystemExit) as end:
        lab.train(*with_plan(lab, other), *ipq_flags("adaptive"), "--restore-file", path, kind="adaptive", updates=9)
    assert end.value.code == 2
    message = one_error(capsys.readouterr())
    assert str(path) in message
    assert "--quantization-config-path" in message


def test_a_run_with_a_plan_of_noise_alone_goes_on_to_stages(lab, stages):
    noise = [{"match": ".*", "p": 0.1}]
    dense = lab.train(*with_plan(lab, {"noise": noise}), updates=2)
    assert STATE_KEY not in state_of(dense.path)["extra_state"]
    plan = {"noise": noise, **PLANS["plain"]}
    lab.train(*with_plan(lab, plan), "--finetune-from-model", dense.path, updates=3)
    assert stages == [(0, 0), (1, 1), (2, 2)]

"""Which numbers matter: Adam's second moments in an optimizer, in a checkpoint, in k-means, in the stages."""

import shutil

import pytest
import torch
from lm_fixture import FFN, NAG, PLANS, batch, both_kinds, same, state_of
from toys import Tied, quiet, refuses

from fairseq_quant_noise import quantize_, second_moments
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.checkpoints.keys import IMPORTANCE
from fairseq_quant_noise.checkpoints.safe_load import safe_load
from fairseq_quant_noise.checkpoints.structure import restructured
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.layers import quantized_weights
from fairseq_quant_noise.plan.rules import Structure
from fairseq_quant_noise.plugin.gradients import squared_gradients
from fairseq_quant_noise.plugin.training import optimizer as optimizer_carry
from fairseq_quant_noise.plugin.training import stages as training
from fairseq_quant_noise.quantization.importance import follow
from fairseq_quant_noise.structure.state import keep_state, share_state

FC1 = "decoder.layers.0.fc1.weight"
PQ = {"match": ".*", "block_size": 4, "n_centroids": 4}


def stepped(optimizer_class, words=64):
    """A network with a tie, after a step, and its optimizer."""
    torch.manual_seed(0)
    model = Tied(words)
    optimizer = optimizer_class(model.parameters(), lr=1e-3)
    tokens = torch.arange(words // 2).remainder(9)[None]  # most of the words never come
    torch.nn.functional.cross_entropy(model(tokens)[0], tokens[0]).backward()
    optimizer.step()
    return model, optimizer


# Of any network.


def test_of_an_adam_by_every_name():
    model, optimizer = stepped(torch.optim.AdamW)
    found = second_moments(model, optimizer)
    assert found.keys() == {"emb.weight", "out.weight"}
    assert found["emb.weight"] is found["out.weight"] is optimizer.state[model.emb.weight]["exp_avg_sq"]


def test_an_optimizer_without_is_refused():
    with refuses(r"^SGD holds no second moments \(exp_avg_sq\) of this model; give the Adam that trained it"):
        second_moments(*stepped(torch.optim.SGD))


def test_errors_go_where_they_matter_least():
    weights = {}
    for weighted in (True, False):
        model, optimizer = stepped(torch.optim.Adam)
        dense, moments = model.emb.weight.detach().clone(), second_moments(model, optimizer)
        plan = {"stages": [PQ], "centroids": {"weighted": weighted}}
        quantize_(model, plan, importance=moments, progress=quiet)
        weights[weighted] = quantized_weights(model)["emb"].decode().detach() - dense
    cost = {key: float((moments["emb.weight"] * error.square()).sum()) for key, error in weights.items()}
    assert cost[True] < 0.9 * cost[False]
    assert weights[True].norm() > weights[False].norm()


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        (
            torch.ones(64, 4),
            r"^importance of emb.weight: has shape \(64, 4\), the weight \(64, 8\); give a number for each",
        ),
        (-torch.ones(64, 8), "^importance of emb.weight: holds negative numbers, NaN or infinity; give 0 or more"),
        (torch.full((64, 8), torch.nan), "^importance of emb.weight: holds negative numbers, NaN or infinity"),
    ],
)
def test_importance_that_does_not_fit_is_refused_and_the_model_unchanged(importance, message):
    model = Tied(64)
    with refuses(message):
        quantize_(model, {"stages": [PQ]}, importance={"emb.weight": importance}, progress=quiet)
    assert isinstance(model.emb.weight, torch.nn.Parameter)


def test_importance_of_nothing_but_zeros_is_none():
    models = [Tied(64), Tied(64)]
    models[1].load_state_dict(models[0].state_dict())
    for model, importance in zip(models, ({}, {"emb.weight": torch.zeros(64, 8)}), strict=True):
        quantize_(model, {"stages": [PQ]}, importance=importance, progress=quiet)
    assert same(dict(models[0].state_dict()), dict(models[1].state_dict()))


# In a checkpoint.


def of_the_optimizer(run):
    """What the run's optimizer holds, by the parameter's name."""
    moments = optimizer_carry.adam_moments(run.model, run.trainer.optimizer)
    return {name: tensor.bfloat16() for name, tensor in moments.items()}


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("plain", []),
        ("adaptive", []),
        ("untied", []),
        ("plain", ["--decoder-layers", 4, "--share-layers", 2]),
        ("plain", ["--quant-noise-pq", 0.1]),
    ],
)
def test_of_the_weights_in_a_checkpoint(lab, kind, flags):
    run = lab.train(*flags, kind=kind, updates=2)
    expected = of_the_optimizer(run)
    found = Checkpoint(run.path).moments
    assert len(expected) == len(dict(run.model.named_parameters(remove_duplicate=False)))
    assert same(found, expected)


ALL_KINDS = ["plain", "adaptive", "untied"]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_of_the_weights_in_one_flat_tensor(lab, flat, kind):
    run = lab.train("--fp16", kind=kind, updates=2)
    state = safe_load(run.path)
    assert len(state["last_optimizer_state"]["state"]) == 1
    assert same(Checkpoint(run.path, state).moments, of_the_optimizer(run))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_of_a_network_that_is_partly_in_codes_in_one_flat_tensor(lab, runs, flat, kind):
    """Centroids stand where the weights stood, and are fewer."""
    out = lab.new("packed.safetensors")
    plan = lab.plan({"stages": [FFN]})
    main(["quantize", "--path", str(runs.stock(kind).path), "--plan", plan, "--out", str(out)])
    run = lab.train("--fp16", "--finetune-from-model", out, kind=kind, updates=2)
    state, expected = safe_load(run.path), of_the_optimizer(run)
    assert len(state["last_optimizer_state"]["state"]) == 1
    assert sum(name.endswith(".fc1.weight.centroids") for name in expected) == 2
    assert same(Checkpoint(run.path, state).moments, expected)


def with_parameters_of_a_criterion(state, numbers, flat):
    """`state` with moments of `numbers` parameters more, behind those of the model."""
    kept = state["last_optimizer_state"]
    (group,) = kept["param_groups"]
    if flat:
        kept["state"][0]["exp_avg_sq"] = torch.cat([kept["state"][0]["exp_avg_sq"], torch.ones(numbers)])
    else:
        new = len(group["params"])
        group["params"].append(new)
        kept["state"][new] = {"exp_avg_sq": torch.ones(numbers)}
    return state


@pytest.mark.parametrize("form", ["flat", "one by one"])
def test_parameters_of_the_criterion_come_after_the_models(lab, form, request):
    """Moments that no parameter accounts for are refused: nobody can tell where they belong."""
    if form == "flat":
        request.getfixturevalue("flat")
    run = lab.train(*(["--fp16"] if form == "flat" else []), updates=1)
    expected, state = of_the_optimizer(run), with_parameters_of_a_criterion(safe_load(run.path), 3, form == "flat")
    assert Checkpoint(run.path, state).moments == {}
    assert Checkpoint(run.path, {**state, "criterion": {"weight": torch.ones(4)}}).moments == {}
    assert same(Checkpoint(run.path, {**state, "criterion": {"weight": torch.ones(3)}}).moments, expected)


def test_copies_of_a_tie_are_told_apart_from_the_next_parameter(lab):
    """As a GPU saves them: each copy of a tied tensor has memory of its own."""
    run = lab.train(kind="adaptive", updates=1)
    state = safe_load(run.path)
    expected = Checkpoint(run.path, state).moments
    state["model"] = {name: tensor.clone() for name, tensor in state["model"].items()}
    assert same(Checkpoint(run.path, state).moments, expected)


def test_a_parameter_that_never_had_a_gradient_has_none(lab):
    run = lab.train(updates=1)
    state = safe_load(run.path)
    expected = Checkpoint(run.path, state).moments
    names = list(dict(run.model.named_parameters()))
    del state["last_optimizer_state"]["state"][names.index(FC1)]
    found = Checkpoint(run.path, state).moments
    assert expected.keys() - found.keys() == {FC1}
    assert same(found, {name: expected[name] for name in found})


@pytest.mark.parametrize("change", ["nothing saved", "a plain momentum", "another network"])
def test_a_checkpoint_without_has_none(lab, change):
    run = lab.train(*(NAG if change == "a plain momentum" else []), updates=1)
    state = safe_load(run.path)
    if change == "nothing saved":
        state["last_optimizer_state"] = None
    if change == "another network":
        moments = state["last_optimizer_state"]["state"]
        moments[0], moments[1] = moments[1], moments[0]
    assert Checkpoint(run.path, state).moments == {}


@pytest.mark.parametrize(
    "moments",
    [
        "text",
        {FC1: "text"},
        {FC1: torch.ones(3, 3)},
        {FC1: torch.full((64, 32), -1.0)},
        {FC1: torch.full((64, 32), torch.inf)},
        {"decoder.layers.9.fc1.weight": torch.ones(64, 32)},
    ],
)
def test_moments_that_are_no_moments_are_none(lab, runs, moments):
    """A checkpoint may hold anything there; and an optimizer that overflowed, infinity."""
    state = safe_load(runs.stock("plain").path)
    state["extra_state"] = {**state["extra_state"], IMPORTANCE: moments}
    assert Checkpoint("dense.pt", state).moments == {}
    path, out = lab.checkpoint(state), lab.new("packed.safetensors")
    main(["quantize", "--path", str(path), "--plan", lab.plan({"stages": [FFN]}), "--out", str(out)])


def test_names_follow_pruning_and_sharing():
    weights = {f"decoder.layers.{i}.fc1.weight": torch.full((2, 2), float(i)) for i in range(4)}
    moments = {name: tensor + 10 for name, tensor in weights.items()}
    kept = follow(moments, weights, keep_state(weights, {"decoder.layers": [0, 3]}))
    assert {name: int(tensor[0, 0]) for name, tensor in kept.items()} == {FC1: 10, "decoder.layers.1.fc1.weight": 13}
    first = follow(moments, weights, share_state(weights, 2)[0])
    assert [int(first[f"decoder.layers.{i}.fc1.weight"][0, 0]) for i in range(4)] == [10, 10, 12, 12]
    assert follow(moments, weights, share_state(weights, 2, "mean")[0]) == {}


def test_a_plan_that_prunes_weighs_the_layers_that_stay(lab):
    run = lab.train("--decoder-layers", 4, updates=2)
    whole = Checkpoint(run.path).moments
    pruned = restructured(Checkpoint(run.path), Structure(keep_layers=[1, 3])).moments
    assert torch.equal(pruned["decoder.layers.1.fc2.weight"], whole["decoder.layers.3.fc2.weight"])
    assert "decoder.layers.2.fc2.weight" not in pruned


@pytest.mark.parametrize("how", [["prune", "--keep", "1,3"], ["share", "--share-layers", 2]], ids=["prune", "share"])
def test_a_checkpoint_that_was_pruned_or_shared_keeps_them(lab, how):
    run, out = lab.train("--decoder-layers", 4, updates=2), lab.new("less.pt")
    whole, verb = Checkpoint(run.path).moments, [how[0], *map(str, how[1:])]
    main([*verb, "--path", str(run.path), "--out", str(out)])
    kept = Checkpoint(out).moments
    first = {"prune": 1, "share": 0}[how[0]]
    assert torch.equal(kept["decoder.layers.0.fc2.weight"], whole[f"decoder.layers.{first}.fc2.weight"])
    assert torch.equal(kept["decoder.layers.1.fc2.weight"], whole[f"decoder.layers.{3 * first}.fc2.weight"])
    trained = lab.train("--finetune-from-model", out, "--decoder-layers", 2 if first else 4, updates=1)
    assert IMPORTANCE not in state_of(trained.path)["extra_state"], "its optimizer knows better"


def test_the_verb_weighs_by_default_and_says_when_it_cannot(lab, runs, capsys):
    dense, codes = runs.stock("plain").path, {}
    bare = lab.checkpoint({**state_of(dense), "last_optimizer_state": None})
    plans = {key: lab.plan({"stages": [FFN], "centroids": {"weighted": key}}) for key in (True, False)}
    cases = {
        "weighted": (dense, True, []),
        "bare": (bare, True, []),
        "measured": (bare, True, ["--calibration-data", str(lab.data)]),
        "plain": (dense, False, []),
    }
    for name, (path, plan, flags) in cases.items():
        out = lab.new("packed.safetensors")
        main(["quantize", "--path", str(path), "--plan", plans[plan], "--out", str(out), *flags])
        said = capsys.readouterr().err
        assert ("weighted, d 8" in said) == (name in ("weighted", "measured"))
        assert ("holds no second moments of Adam, so all errors count alike" in said) == (name == "bare")
        assert (f"gradients on {lab.data} stand for them" in said) == (name == "measured")
        codes[name] = read(out).state_dict()[f"{FC1}.centroids"]
    assert torch.equal(codes["bare"], codes["plain"])
    assert len({str(tensor.tolist()) for tensor in codes.values()}) == 3


# In the stages.


@pytest.fixture
def weighed(monkeypatch):
    """The importance that each stage was quantized by, of its own weights."""
    seen = []
    quantize = training.quantize_targets

    def spy(targets, *, importance, **settings):
        names = {target.weight.tensor_name for target in targets}
        seen.append({name: tensor.clone() for name, tensor in importance.items() if name in names})
        assert len(seen[-1]) in (0, len(names))
        quantize(targets, importance=importance, **settings)

    monkeypatch.setattr(training, "quantize_targets", spy)
    return seen


def stages(lab, kind="plain", **more):
    return ["--quantization-config-path", lab.plan({**PLANS[kind], **more})]


@both_kinds
def test_all_stages_weigh_by_the_moments_of_the_dense_network(lab, runs, weighed, kind):
    dense = runs.stock(kind).path
    run = lab.train(*stages(lab, kind), "--finetune-from-model", dense, kind=kind, updates=3)
    expected = Checkpoint(dense).moments
    given = {name: tensor for stage in weighed for name, tensor in stage.items()}
    assert len(given) == len(quantized_weights(run.model))
    assert same(given, {name: expected[name].bfloat16() for name in given})
    assert IMPORTANCE not in state_of(run.path)["extra_state"]


def test_without_moments_gradients_stand_for_them(lab, weighed, caplog):
    dense = lab.train(*NAG, updates=1)
    with caplog.at_level("INFO", training.__name__):
        lab.train(*stages(lab), *NAG, "--finetune-from-model", dense.path, updates=3)
    assert sum(map(len, weighed)) == 13
    assert "k-means weighs errors by the gradients of 16 batches" in caplog.text


def test_errors_count_alike_where_the_plan_says_so(lab, runs, weighed, caplog):
    plan = stages(lab, centroids={"weighted": False})
    with caplog.at_level("INFO", training.__name__):
        lab.train(*plan, "--finetune-from-model", runs.stock("plain").path, updates=3)
    assert weighed == [{}, {}, {}]
    assert "weighs errors" not in caplog.text


def test_a_checkpoint_without_a_configuration_finetunes_by_gradients(lab, runs, weighed):
    state = state_of(runs.stock("plain").path)
    bare = lab.checkpoint({"model": state["model"], "args": None, "cfg": None})
    lab.train(*stages(lab), "--finetune-from-model", bare, updates=3)
    assert sum(map(len, weighed)) == 13


def test_measuring_gradients_leaves_the_training_as_it_was(lab, monkeypatch):
    """The batches, the random numbers, the noise, and no gradients: only the codes may differ."""
    dense, losses = lab.train(*NAG, updates=1), []
    flags = [*stages(lab, noise=[{"match": ".*", "p": 0.2}]), *NAG, "--finetune-from-model", dense.path]
    for moments in (training._gradients, lambda trainer, epoch: {}):
        monkeypatch.setattr(training, "_gradients", moments)
        monkeypatch.setattr(training, "quantize_targets", lambda targets, **settings: None)
        losses.append([log["loss"] for log in lab.train(*flags, updates=7).updates])
    assert losses[0] == losses[1]


def test_squared_gradients_are_those_of_the_mean_loss_of_each_batch(lab):
    model, criterion = lab.model("--quant-noise-pq", 0.2).train(), lab.criterion()
    samples = [batch(seed=seed) for seed in (1, 2)]
    found = squared_gradients(model, criterion, samples, scale=4.0)
    expected = torch.zeros_like(found["decoder.layers.0.fc1.weight"], dtype=torch.float32)
    model.eval()
    for sample in samples:
        loss, size, _ = criterion(model, sample)
        (gradient,) = torch.autograd.grad(4 * loss / size, [model.decoder.layers[0].fc1._parameters["weight"]])
        expected += gradient.square()
    torch.testing.assert_close(found["decoder.layers.0.fc1.weight"], expected.bfloat16())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_pruned_run_weighs_by_the_layers_that_stay(lab, weighed):
    dense = lab.train("--decoder-layers", 4, updates=2)
    flags = ["--decoder-layers", 4, "--decoder-layers-to-keep", "1,3", "--finetune-from-model", dense.path]
    lab.train(*stages(lab), *flags, updates=3)
    expected = Checkpoint(dense.path).moments
    assert torch.equal(weighed[0]["decoder.layers.1.fc2.weight"], expected["decoder.layers.3.fc2.weight"].bfloat16())


def test_a_resumed_run_needs_the_dense_checkpoint_no_more(lab, runs):
    dense = lab.checkpoint(state_of(runs.stock("plain").path))
    rules = [{**rule, "updates": 2} for rule in PLANS["plain"]["stages"]]
    plan = ["--quantization-config-path", lab.plan({"stages": rules})]
    flags = [*plan, "--finetune-from-model", dense, "--disable-validation"]
    whole, folder = lab.train(*flags, "--save-interval-updates", 3, updates=6), lab.new()
    folder.mkdir()
    shutil.copy(whole.folder / "checkpoint_1_3.pt", folder / "checkpoint_last.pt")
    kept = state_of(folder / "checkpoint_last.pt")["extra_state"][IMPORTANCE]
    assert len(kept) == 2 * 4
    assert all("self_attn" in name for name in kept), "of the stage to come"
    dense.unlink()
    resumed = lab.train(*flags, updates=6, save=folder)
    assert same(state_of(resumed.path)["model"], state_of(whole.path)["model"])


@both_kinds
def test_of_a_network_that_is_wholly_in_codes(runs, kind):
    run = runs.ipq(kind)
    found = Checkpoint(run.path).moments
    assert any(name.endswith(".centroids") for name in found)
    assert same(found, of_the_optimizer(run))

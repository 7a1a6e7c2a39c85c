"""`--store-ema`: the average of a training with noise, of tied weights, an adaptive softmax and int8 weights."""

import fairseq.checkpoint_utils
import pytest
import torch
from lm_fixture import batch, same, split, state_of
from watching import watched

from fairseq_quant_noise.noise import noise_of

pytestmark = pytest.mark.slow

DECAY = 0.5
EMA = split(f"--store-ema --ema-decay {DECAY} --batch-size 24")
NOISES = {"proxy": split("--quant-noise-pq 0.2"), "int8": split("--quant-noise-scalar 0.5"), "none": []}
CASES = [("plain", "proxy"), ("adaptive", "proxy"), ("plain", "int8"), ("adaptive", "int8"), ("adaptive", "none")]
each_case = pytest.mark.parametrize(("kind", "noise"), CASES)


@pytest.fixture(scope="module")
def averaged(lab):
    """A run of each case, with the state of its model after each update."""
    kept = {}

    def run(kind, noise):
        if (kind, noise) not in kept:
            states = []

            def note(trainer, log):
                states.append({name: t.clone() for name, t in trainer.get_model().state_dict().items()})

            with watched(note):
                done = lab.train(*EMA, *NOISES[noise], "--save-interval-updates", 4, kind=kind, updates=8)
            kept[kind, noise] = done, states
        return kept[kind, noise]

    return run


def parameters_of(model):
    """The names of the parameters in a state, tied ones under each."""
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    return [name for name in model.state_dict() if name not in buffers]


@each_case
def test_the_average_is_that_of_the_weights_after_each_update(averaged, kind, noise):
    """Tied weights once, and everything that is no weight as it is now."""
    run, states = averaged(kind, noise)
    average = run.trainer.ema.get_model().state_dict()
    assert average.keys() == states[-1].keys()
    weights = parameters_of(run.model)
    assert len(weights) > 20
    for name in weights:
        expected = states[0][name]
        for after in states[1:]:
            expected = DECAY * expected + (1 - DECAY) * after[name]
        assert torch.allclose(average[name], expected, rtol=1e-5, atol=1e-7), name
    others = set(average) - set(weights)
    assert all(torch.equal(average[name], states[-1][name]) for name in others)


@each_case
def test_the_average_has_no_noise_and_nothing_in_common_with_the_model(averaged, kind, noise):
    run, _ = averaged(kind, noise)
    average = run.trainer.ema.get_model()
    assert noise_of(average) is None
    assert not any("_weight_noise" in module.__dict__ for module in average.modules())
    assert (noise_of(run.model) is None) == (noise == "none")
    own = {t.data_ptr() for t in run.model.state_dict().values() if t.numel()}
    assert not own & {t.data_ptr() for t in average.state_dict().values()}


@each_case
def test_the_average_evaluates_as_a_model_with_its_weights(lab, averaged, kind, noise):
    run, _ = averaged(kind, noise)
    average = run.trainer.ema.get_model().eval()
    loaded = lab.model(*NOISES[noise], kind=kind).eval()
    loaded.load_state_dict(average.state_dict())
    with torch.no_grad():
        mine, theirs = (model(**batch()["net_input"])[0] for model in (average, loaded))
        trained = run.model.eval()(**batch()["net_input"])[0]
    assert torch.equal(mine, theirs)
    assert 0 < (mine - trained).norm() < trained.norm()


@pytest.mark.parametrize(("kind", "noise"), CASES[:4])
def test_a_resumed_run_has_the_same_average(lab, averaged, kind, noise):
    run, _ = averaged(kind, noise)
    half = run.folder / "checkpoint_1_4.pt"
    resumed = lab.train(*EMA, *NOISES[noise], "--restore-file", half, kind=kind, updates=8)
    one, other = state_of(run.path), state_of(resumed.path)
    assert same(one["extra_state"]["ema"], other["extra_state"]["ema"])
    assert same(one["model"], other["model"])


def test_a_resumed_run_averages_at_the_updates_at_which_it_would_have(lab):
    """Every third update, in fp32; the checkpoint is after the fourth."""
    flags = [*EMA, *split("--quant-noise-pq 0.2 --ema-update-freq 3 --ema-fp32 --bf16 --save-interval-updates 4")]
    whole = lab.train(*flags, updates=8)
    resumed = lab.train(*flags, "--restore-file", whole.folder / "checkpoint_1_4.pt", updates=8)
    one, other = (state_of(run.path)["extra_state"] for run in (whole, resumed))
    assert same(one["ema"], other["ema"])
    assert same(one["ema_fp32_params"], other["ema_fp32_params"])


def test_an_average_starts_at_the_weights_of_a_checkpoint_without_one(lab, runs):
    stock = runs.stock("adaptive")
    run = lab.train(*EMA, "--lr", 0, "--finetune-from-model", stock.path, kind="adaptive", updates=1)
    average, weights = run.trainer.ema.get_model().state_dict(), stock.model.state_dict()
    assert all(torch.allclose(average[name], weights[name]) for name in parameters_of(stock.model))


def test_the_average_in_a_checkpoint_loads_as_fairseq_says(lab, averaged):
    run, _ = averaged("adaptive", "proxy")
    state = fairseq.checkpoint_utils.load_ema_from_checkpoint(str(run.path))
    loaded, average = lab.load(lab.checkpoint(state)), run.trainer.ema.get_model().eval()
    with torch.no_grad():
        assert torch.equal(*(model(**batch()["net_input"])[0] for model in (loaded, average)))


def test_a_plan_of_noise_alone_goes_with_an_average(lab):
    plan = lab.plan({"noise": [{"match": ".*", "p": 0.1}]})
    run = lab.train(*EMA, "--quantization-config-path", plan, updates=2)
    assert noise_of(run.model) is not None
    assert noise_of(run.trainer.ema.get_model()) is None

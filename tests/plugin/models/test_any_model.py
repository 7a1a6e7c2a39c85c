"""Every architecture of fairseq under the plugin: noise, a stage, its checkpoints here and in stock fairseq."""

import copy
import os
from importlib.util import find_spec
from pathlib import Path

import fairseq.models
import pytest
import torch
from architectures import CASES, Task, config, run
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from omegaconf import OmegaConf
from torch import nn
from toys import refuses

from fairseq_quant_noise.artifact import dense_state
from fairseq_quant_noise.layers.quantized import code_shapes
from fairseq_quant_noise.noise import noise_of
from fairseq_quant_noise.noise.weight_noise import WeightNoise
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.plugin.models import any_model
from fairseq_quant_noise.plugin.models.any_model import saved_as_stock
from fairseq_quant_noise.plugin.models.quantizable import Quantizable, attach_and_say
from fairseq_quant_noise.quantization.quantize import quantize_targets
from fairseq_quant_noise.quantization.targets import resolve_stages
from fairseq_quant_noise.weights.blocks import fitting_block_size
from fairseq_quant_noise.weights.discovery import find_weights, uncovered

PAGE = Path(__file__).parents[3] / "docs/moving_from_fairseq.md"
NOISE = ("--quant-noise-pq", 0.5, "--quant-noise-kind", "mean", "--quant-noise-pq-block-size", 4)
MARKS = {"hf_gpt2": [pytest.mark.upstream(37)]}


def case(name):
    """The architecture as a case of a test, skipped where a package is not here that its model needs."""
    missing = [package for package in CASES[name].needs if not find_spec(package)]
    return pytest.param(
        name, marks=[pytest.mark.skipif(bool(missing), reason=f"needs {missing}"), *MARKS.get(name, ())]
    )


@pytest.fixture
def stray_memory(monkeypatch):
    """New tensors hold nan until they are written, as memory may that was used before."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def build(name, *flags):
    torch.manual_seed(0)
    return fairseq.models.build_model(config(name, *flags), Task())


@pytest.mark.parametrize("name", map(case, CASES))
def test_no_parameter_of_a_built_model_is_stray_memory(name, stray_memory):
    state = build(name).state_dict()
    assert [key for key, tensor in state.items() if not torch.isfinite(tensor).all()] == []


def test_int8_evaluation_names_the_weights_whose_inputs_are_not_rounded(caplog):
    build("lstm_lm", "--quant-noise-scalar", 0.5)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text for text in said if "a recurrent layer multiplies its own states" in text]
    caplog.clear()
    build("transformer_lm", "--quant-noise-scalar", 0.5)
    assert not [record for record in caplog.records if "not rounded" in record.getMessage()]


def stock(name, cfg=None):
    """As without the plugin."""
    torch.manual_seed(1)
    return any_model._build_model(cfg or config(name), Task())


def step(model, name, monkeypatch):
    """An update of a training; the weights that were read with noise."""
    seen = set()
    noised = WeightNoise._noised
    monkeypatch.setattr(WeightNoise, "_noised", lambda self, stored: seen.add(self.name) or noised(self, stored))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model.train()
    model.set_num_updates(1)
    before = {key: tensor.clone() for key, tensor in model.named_parameters()}
    sum(out.float().square().mean() for out in run(model, name) if out.requires_grad).backward()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.named_parameters())
    optimizer.step()
    monkeypatch.undo()
    return seen


def quantized(model):
    """All weights quantized, in one stage and with one codebook for each block size, which takes the least time."""
    sizes = {}
    for weight in find_weights(model):
        sizes.setdefault(fitting_block_size(weight.shape, 4), []).append(weight.name.replace(".", r"\."))
    stages = [
        {"match": "|".join(names), "block_size": d, "n_centroids": 8, "codebook": "shared"}
        for d, names in sizes.items()
    ]
    quantize_targets(resolve_stages(Plan.of({"stages": stages}), model), seed=1, progress=str)
    return model


def same(ours, theirs, name):
    with torch.no_grad():
        pairs = list(zip(run(ours.eval(), name), run(theirs.eval(), name), strict=True))
    assert pairs
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", map(case, CASES))
def test_an_architecture_takes_noise_stages_and_checkpoints(name, monkeypatch):
    cfg = config(name, *NOISE)
    torch.manual_seed(0)
    model = fairseq.models.build_model(cfg, Task())
    assert isinstance(model, Quantizable)
    weights = find_weights(model)
    assert list(noise_of(model).weights) == [weight.name for weight in weights]
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    assert not [hook for hook in hooks if hook.__module__ == "fairseq.modules.quant_noise"]
    read = step(model, name, monkeypatch)
    assert all(weight.parameter.grad is None for weight in weights if weight.name not in read)
    with saved_as_stock(model, cfg):
        theirs = stock(name, cfg)
        theirs.load_state_dict(model.state_dict(), strict=True)
    same(model, theirs, name)
    ours = build(name)  # a stock checkpoint starts post-hoc work
    ours.load_state_dict(theirs.state_dict(), strict=True)
    quantized(ours)
    assert all(isinstance(weight.stored, nn.Module) for weight in find_weights(ours))
    shapes = {key: found["shape"] for key, found in code_shapes(ours).items()}
    turned = {key for key, found in code_shapes(ours).items() if found["turned"]}
    theirs.load_state_dict(dense_state(ours.state_dict(), shapes, turned), strict=True)  # as `to-dense` does
    same(theirs, ours, name)
    back = build(name)
    back.load_state_dict(ours.state_dict(), strict=True)
    same(back, ours, name)
    ours.train()
    sum(out.float().square().mean() for out in run(ours, name) if out.requires_grad).backward()
    left = [f"`{key}`" for key in uncovered(build(name))]
    check_row(f"| `{name}` | {len(read)} of {len(weights)} | {len(weights)} | yes | yes | {', '.join(left)} |")


def check_row(row):
    """The table of the documentation has this row; with WRITE_TABLE set, it gets it."""
    page = PAGE.read_text()
    start = row[: row.index("|", 2)]
    if os.environ.get("WRITE_TABLE"):
        head, mark, table = page.partition("| architecture | weights")
        assert mark
        lines = (mark + table).split("\n")
        at = [i for i, line in enumerate(lines) if line.startswith(start)]
        end = at[0] if at else next(i for i, line in enumerate(lines) if not line.startswith("|"))
        lines[end : end + len(at)] = [row]
        PAGE.write_text(head + "\n".join(lines))
    assert row in PAGE.read_text().split("\n"), row


def test_a_log_line_says_which_noise_acts_on_how_many_weights(caplog):
    caplog.set_level("INFO")
    build("lstm", *NOISE)
    (line,) = [record.getMessage() for record in caplog.records if "Quant-Noise" in record.getMessage()]
    assert line.startswith("Quant-Noise: mean with p = 0.5 on 13 weights (")
    assert line.endswith("% of the parameters); fairseq's own noise is off")
    caplog.clear()
    rules = [{"match": ".*embed.*", "p": 0.1, "kind": ["pq", "int8"]}, {"match": ".*_ih.*", "p": 0.2, "block_size": 4}]
    attach_and_say(build("lstm"), Plan.of({"noise": rules}).noise)
    (line,) = [record.getMessage() for record in caplog.records if "Quant-Noise" in record.getMessage()]
    assert line.startswith("Quant-Noise: pq+int8 with p = 0.1, proxy with p = 0.2 on 6 weights (")
    caplog.clear()
    build("lstm")
    assert not [record for record in caplog.records if "Quant-Noise" in record.getMessage()]


@pytest.fixture
def composed(monkeypatch):
    """`cfg.model` as Hydra composes it for a model that no command line has named."""
    monkeypatch.setitem(MODEL_DATACLASS_REGISTRY, "transformer_lm", TransformerLanguageModelConfig)
    known = {*TransformerLanguageModelConfig.__dataclass_fields__, "_name"}
    return OmegaConf.create({key: value for key, value in config("transformer_lm").items() if key in known})


def test_hydra_gives_the_options_with_a_plus(composed):
    cfg = OmegaConf.merge(composed, {"quant_noise_pq": 0.1, "quant_noise_kind": "mean"})
    OmegaConf.set_struct(cfg, True)
    model = fairseq.models.build_model(cfg, Task())
    assert {noise.rules[0].rule.kind for noise in noise_of(model).weights.values()} == {"mean"}
    assert cfg.quant_noise_kind == "mean"


def test_fairseqs_noise_in_a_section_of_hydras_is_refused(composed):
    cfg = OmegaConf.merge(composed, {"transformer": {"quant_noise": {"pq": 0.1}}})
    with refuses(r"^model\.transformer\.quant_noise: is fairseq's own noise; give \+model\.quant_noise_pq=P instead"):
        fairseq.models.build_model(cfg, Task())


def test_a_copy_of_a_part_has_no_noise_as_that_of_a_teacher():
    """data2vec copies its encoder; the copy of a whole model has a noise of its own."""
    model = build("lstm", *NOISE).train()
    teacher, twin = copy.deepcopy(model.encoder), copy.deepcopy(model)
    inputs = CASES["lstm"].inputs()
    model(**inputs)
    assert noise_of(twin).root is twin
    with torch.no_grad():
        stored, read = teacher.lstm._parameters["weight_ih_l0"], []
        teacher.lstm.register_forward_pre_hook(lambda lstm, inputs: read.append(lstm.weight_ih_l0))
        teacher(inputs["src_tokens"], inputs["src_lengths"])
    assert read[0] is stored


def test_a_head_that_a_task_adds_gets_its_noise():
    model = build("roberta", *NOISE)
    before = set(noise_of(model).weights)
    model.register_classification_head("mnli", num_classes=3)
    assert set(noise_of(model).weights) - before == {
        f"classification_heads.mnli.{part}" for part in ("dense", "out_proj")
    }
    quantized(model)
    twin = build("roberta")
    twin.register_classification_head("mnli", num_classes=3)
    twin.load_state_dict(model.state_dict(), strict=True)
    with torch.no_grad():
        pair = [m.eval()(**CASES["roberta"].inputs(), classification_head_name="mnli")[0] for m in (model, twin)]
    assert torch.equal(*pair)

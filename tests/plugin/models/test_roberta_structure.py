"""RoBERTa with fewer layers: pre-trained with sharing, pruned, fine-tuned, quantized, written, read."""

import pytest
from lm_fixture import same, state_of
from roberta_fixture import (
    ENCODER,
    MASKED,
    SENTENCES,
    plan_of,
    roberta,  # noqa: F401
)
from test_roberta_files import check_file, verb

from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.structure.modules import find_stacks, shared_chunk
from fairseq_quant_noise.structure.state import stack_sizes

FOUR = ["--encoder-layers", 4, "--share-layers", 2, "--encoder-layerdrop", 0.2]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Of masked words, four layers in two chunks."""
    from roberta_fixture import _lab

    return _lab(tmp_path_factory.getbasetemp() / "roberta").train(*FOUR, kind=MASKED)


def test_a_shared_roberta_is_pruned_fine_tuned_and_quantized(roberta, pretrained):  # noqa: F811
    pruned, file, dense = (roberta.new(name) for name in ("pruned.pt", "packed.safetensors", "dense.pt"))
    verb("prune", "--path", pretrained.path, "--keep", "2,3", "--out", pruned)
    flags = ["--encoder-layers", 2, "--share-layers", 2, "--finetune-from-model", pruned, "--quant-noise-pq", 0.1]
    plan = roberta.plan(plan_of(SENTENCES))
    run = roberta.train(*flags, "--quantization-config-path", plan, kind=SENTENCES, updates=6)
    verb("export", "--path", run.path, "--out", file)
    assert read(file).manifest.layers == {f"{ENCODER}.layers": [0, 0]}
    check_file(roberta, file, run.path, SENTENCES)
    assert roberta.validate(file, SENTENCES)["loss"] == pytest.approx(run.valid[-1]["loss"], rel=1e-5)
    verb("to-dense", file, "--out", dense)
    assert type(roberta.load(dense, SENTENCES)).__name__ == "RobertaModel"
    assert roberta.validate(dense, SENTENCES)["loss"] == pytest.approx(run.valid[-1]["loss"], rel=1e-5)


def test_fairseqs_flag_prunes_a_shared_roberta_in_fine_tuning(roberta, pretrained):  # noqa: F811
    flags = ["--encoder-layers", 4, "--share-layers", 2, "--encoder-layers-to-keep", "0,1"]
    flags += ["--finetune-from-model", pretrained.path]
    run = roberta.train(*flags, kind=SENTENCES, updates=4)
    assert stack_sizes(state_of(run.path)["model"]) == {f"{ENCODER}.layers": 2}
    half = roberta.train(*flags, kind=SENTENCES, updates=2)
    resumed = roberta.train(*flags, kind=SENTENCES, updates=4, save=half.folder)
    assert same(state_of(resumed.path)["model"], state_of(run.path)["model"])
    assert roberta.validate(run.path, SENTENCES)["loss"] == pytest.approx(run.valid[-1]["loss"], rel=1e-5)


def test_int8_noise_and_sharing_go_together(roberta):  # noqa: F811
    run = roberta.train(*FOUR, "--quant-noise-scalar", 0.5, kind=SENTENCES)
    (stack,) = find_stacks(run.model).values()
    assert shared_chunk(stack) == 2
    assert stack[0].fc1.input_quantizer is not stack[1].fc1.input_quantizer, "each use has its range"
    assert roberta.validate(run.path, SENTENCES)["loss"] == pytest.approx(run.valid[-1]["loss"], rel=1e-5)

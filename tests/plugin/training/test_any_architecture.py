"""fairseq-train with the stock name of an architecture: noise, stages, resuming, evaluation, and back to stock."""

import shutil

import pytest
import torch
from lm_fixture import FFN, USER_DIR, both_kinds, fairseqs_own_noise, ipq_flags, one_error, same, split, state_of
from translation_fixture import BASE, IPQ, LOSS, OWN, SMOOTHING, TranslationLab, verb

from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.layers import quantized_weights
from fairseq_quant_noise.noise import noise_of
from fairseq_quant_noise.weights.discovery import find_weights

NOISE = ["--quant-noise-pq", 0.2, "--quant-noise-kind", "mean"]
PLAN = {
    "stages": [
        {"match": r".*weight_[ih]h.*", "block_size": 4, "n_centroids": 8},
        {"match": r".*(embed_tokens|fc_out|attention\..*)", "block_size": 4, "n_centroids": 8},
    ]
}


class LSTMLab(TranslationLab):
    """Pairs of sentences for fairseq's LSTM."""

    def arguments(self, *flags, kind=OWN, updates=6) -> list[str]:
        """fairseq-train's command line. `flags` come last, and so win."""
        sizes = split(
            "--encoder-embed-dim 16 --encoder-hidden-size 16 --encoder-layers 1 --decoder-embed-dim 16",
            "--decoder-hidden-size 16 --decoder-layers 1 --decoder-out-embed-dim 16",
        )
        loss = [] if "--criterion" in flags else LOSS
        base = [str(self.folder / kind), "--arch", "lstm", *sizes, *BASE, *loss, "--user-dir", USER_DIR]
        return [*base, "--max-update", str(updates), *map(str, flags)]


@pytest.fixture(scope="module")
def lstm(tmp_path_factory):
    return LSTMLab(tmp_path_factory.mktemp("lstm"))


@both_kinds
@pytest.mark.upstream(38)
def test_the_stock_name_trains_under_our_noise_and_stock_fairseq_evaluates_it(lab, kind):
    run = lab.train(*NOISE, arch="transformer_lm", kind=kind)
    assert len(noise_of(run.model).weights) == len(find_weights(run.model))
    saved = state_of(run.path)["cfg"]["model"]
    assert saved["_name"] == "transformer_lm"
    fairseqs = {"quant_noise_pq", "quant_noise_pq_block_size", "quant_noise_scalar"}
    assert {key for key in saved if "quant_noise" in key} == fairseqs
    assert saved["quant_noise_pq"] == 0
    assert run.trainer.cfg.model.quant_noise_pq == 0.2
    ours = lab.eval_lm(run.path)
    with fairseqs_own_noise():
        assert lab.eval_lm(run.path) == ours


def test_an_architecture_without_options_for_noise_trains_in_stages_from_a_noised_checkpoint(lstm):
    noised = lstm.train(*NOISE)
    assert len(noise_of(noised.model).weights) == len(find_weights(noised.model))
    stages = [*IPQ, *SMOOTHING, "--quantization-config-path", lstm.plan(PLAN)]
    run = lstm.train("--finetune-from-model", noised.path, *stages)
    assert set(quantized_weights(run.model)) == {w.name for w in find_weights(run.model)}
    assert run.valid[-1]["ipq_ratio"] > 1.5
    again = lstm.load(run.path, kind=OWN)
    assert set(quantized_weights(again)) == set(quantized_weights(run.model))
    score, lines = lstm.translate(run.path, kind=OWN)
    assert len(lines) == 48
    dense = lstm.new("dense.pt")
    verb("to-dense", run.path, "--out", dense)
    with fairseqs_own_noise():
        assert lstm.translate(dense, kind=OWN)[0] == score


def test_its_stages_resume_where_they_were(lstm):
    plan = [*NOISE, "--quantization-config-path", lstm.plan(PLAN), "--save-interval-updates", 4]
    whole, folder = lstm.train(*plan), lstm.new()
    folder.mkdir()
    shutil.copy(whole.folder / "checkpoint_1_4.pt", folder / "checkpoint_last.pt")  # within the second stage
    resumed = lstm.train(*plan, save=folder)
    assert [log["num_updates"] for log in resumed.updates] == [5, 6]
    assert same(state_of(whole.path)["model"], state_of(resumed.path)["model"])


def test_int8_noise_is_for_every_architecture(lstm):
    run = lstm.train("--quant-noise-scalar", 0.5)
    again = lstm.load(run.path, kind=OWN)
    assert {type(weight).__name__ for weight in quantized_weights(again).values()} == {"LatentIntWeight"}
    words = {"src_tokens": torch.full((1, 4), 5), "src_lengths": torch.tensor([4])}
    words["prev_output_tokens"] = torch.tensor([[2, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(again(**words)[0], run.model.eval()(**words)[0])


def test_options_that_contradict_each_other_end_in_a_line(lstm, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        lstm.train(*NOISE, "--quant-noise-scalar", 0.1)
    assert end.value.code == 2
    assert one_error(capsys.readouterr()).startswith("--quant-noise-pq and --quant-noise-scalar: give one")


def test_layers_of_a_stock_architecture_can_share_their_weights_and_be_packed(lab):
    run = lab.train("--share-layers", 2, arch="transformer_lm", kind="plain")
    layers = run.model.decoder.layers
    assert layers[0].fc1.weight is layers[1].fc1.weight
    plan = ["--quantization-config-path", lab.plan({"stages": [FFN]}), "--share-layers", 2]
    ipq = lab.train("--finetune-from-model", run.path, *plan, *ipq_flags("plain"), arch="transformer_lm", kind="plain")
    packed = lab.new("packed.safetensors")
    verb("export", "--path", ipq.path, "--out", packed)
    for path in (ipq.path, packed):
        assert abs(lab.eval_lm(path) - ipq.ppl) < 1e-3 * ipq.ppl
    assert read(packed).manifest.model["architecture"] == "quant_noise_transformer_lm"

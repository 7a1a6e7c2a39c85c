"""fairseq-hydra-train with the configurations in configs/."""

import pytest
from lm_fixture import ROOT, USER_DIR, state_of
from toys import python

NOISES = [
    ["quant_noise_kind=int4", "quant_noise_schedule=linear:0:2"],
    ["quant_noise_kind=pq", "quant_noise_embedding_layer=true"],
]


@pytest.mark.parametrize("noise", NOISES, ids=["int4", "pq"])
def test_the_small_language_model_trains_with_the_noise_its_keys_name(lab, noise):
    folder = lab.new("hydra")
    keys = [f"task.data={lab.data}", f"common.user_dir={USER_DIR}", "common.cpu=true", "optimization.max_update=2"]
    keys += [f"checkpoint.save_dir={folder}", f"hydra.run.dir={folder}", "task.tokens_per_sample=32"]
    keys += [f"model.{key}" for key in noise]
    config = ["--config-dir", ROOT / "configs/language_modeling", "--config-name", "small"]
    done = python("-m", "fairseq_cli.hydra_train", *config, *keys, fresh=False)
    assert done.returncode == 0, done.stderr[-2000:]
    log = done.stdout + done.stderr
    assert "distortion_fc1_weight" in log
    assert "quantization_gap" in log
    kind = noise[0].removeprefix("quant_noise_kind=")
    state = state_of(folder / "checkpoint_last.pt")
    assert state["cfg"]["model"]["quant_noise_kind"] == kind
    assert ("decoder.quant_noise.weight" in state["model"]) == (kind == "pq")

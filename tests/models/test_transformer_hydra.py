"""fairseq-hydra-train with configs/translation."""

import pytest
import yaml
from lm_fixture import ROOT, USER_DIR, state_of
from toys import python
from translation_fixture import (
    SHARED,
    translation,  # noqa: F401
)

from fairseq_quant_noise.models.transformer_config import QuantNoiseTransformerConfig
from fairseq_quant_noise.trained import load_trained, meta_model


def test_the_small_model_trains_with_the_noise_its_keys_name(translation):  # noqa: F811
    folder = translation.new("hydra")
    keys = [f"task.data={translation.folder / SHARED}", f"common.user_dir={USER_DIR}", "common.cpu=true"]
    keys += [f"checkpoint.save_dir={folder}", f"hydra.run.dir={folder}", "optimization.max_update=1"]
    keys += ["model.encoder_embed_dim=32", "model.quant_noise_kind=int4", "model.share_layers=3"]
    config = ["--config-dir", ROOT / "configs/translation", "--config-name", "small"]
    done = python("-m", "fairseq_cli.hydra_train", *config, *keys)
    assert done.returncode == 0, done.stderr[-2000:]
    path = folder / "checkpoint_last.pt"
    options = state_of(path)["cfg"]["model"]
    assert (options["quant_noise_kind"], options["decoder_embed_dim"]) == ("int4", 32)  # the encoder's width
    network = load_trained(path).model
    assert network.encoder.layers[0].fc1.weight is network.encoder.layers[2].fc1.weight


@pytest.mark.parametrize(("name", "parameters"), [("small", 2_412_544), ("iwslt14", 36_663_296)])
def test_the_keys_of_a_configuration_are_the_models_options(name, parameters):
    """With a dictionary of 8,000 and 10,000 words, the networks of the two architectures."""
    options = yaml.safe_load((ROOT / f"configs/translation/{name}.yaml").read_text())["model"]
    assert options.keys() <= QuantNoiseTransformerConfig.__dataclass_fields__.keys()
    network = meta_model("quant_noise_transformer", options, 8_000 if name == "small" else 10_000)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters

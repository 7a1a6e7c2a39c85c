"""fairseq-hydra-train with the configurations of RoBERTa in configs/: pre-training, and fine-tuning from it."""

import torch
from lm_fixture import ROOT, USER_DIR, state_of
from roberta_fixture import MASKED, SENTENCES, roberta  # noqa: F401
from toys import python

SMALL = [f"model.encoder_{k}" for k in ("layers=2", "embed_dim=32", "ffn_embed_dim=64")]


def hydra_train(lab, kind, name, *more):
    """fairseq-hydra-train with a configuration of this repository, made tiny; its log and its last checkpoint."""
    folder = lab.new("hydra")
    keys = [f"task.data={lab.of(kind)}", f"common.user_dir={USER_DIR}", "common.cpu=true", *SMALL]
    keys += [f"checkpoint.save_dir={folder}", f"hydra.run.dir={folder}", "optimization.max_update=2"]
    keys += ["optimization.lr=[0.01]", "lr_scheduler.warmup_updates=0", "lr_scheduler.total_num_update=10"]
    config = ["--config-dir", ROOT / "configs" / kind, "--config-name", name]
    done = python("-m", "fairseq_cli.hydra_train", *config, *keys, *more, fresh=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr, folder / "checkpoint_last.pt"


def test_pre_training_and_fine_tuning_with_the_noise_their_keys_name(roberta):  # noqa: F811
    """Each logs its noise; fine-tuning begins with the weights of pre-training, and adds the head."""
    positions = "max_positions=32"
    noise = ["model.quant_noise_kind=int4", "model.quant_noise_schedule=linear:0:2"]
    log, path = hydra_train(roberta, MASKED, "roberta_small", f"model.{positions}", "task.tokens_per_sample=32", *noise)
    assert "distortion_fc1_weight" in log
    assert "quantization_gap" in log
    pretrained = state_of(path)
    assert pretrained["cfg"]["model"]["quant_noise_kind"] == "int4"
    assert pretrained["cfg"]["model"]["encoder_layerdrop"] == 0.2
    keys = [f"task.{positions}", "model.quant_noise_kind='pq,int8'", f"checkpoint.finetune_from_model={path}"]
    log, tuned = hydra_train(roberta, SENTENCES, "mnli_small", *keys, "optimization.lr=[0]")
    assert "distortion_fc1_weight" in log
    assert "accuracy" in log
    state = state_of(tuned)
    assert len([name for name in state["model"] if name.startswith("classification_heads")]) == 4
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in pretrained["model"].items())

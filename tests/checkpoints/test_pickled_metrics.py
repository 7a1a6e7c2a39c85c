"""What each of fairseq's criteria and tasks logs is read from a checkpoint as it was written.

They are given logging outputs that have every key they look for, as validation would make them.
"""

from argparse import Namespace

import numpy as np
import pytest
import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.logging import metrics
from fairseq.logging.meters import MetersDict
from fairseq.tasks import TASK_REGISTRY
from fairseq.utils import move_to_cpu

import fairseq_quant_noise
from fairseq_quant_noise.checkpoints.safe_load import safe_load

fairseq_quant_noise.register()  # for another test may have imported the package before fairseq

LOSSES = (  # as tensors
    *("loss", "nll_loss", "lm_loss", "sentence_loss", "alignment_loss", "ctc_loss", "rdrop_kl_loss", "latency_loss"),
    *("latency", "delays_var", "mha_reg_loss", "ffn_reg_loss", "l1_loss", "mse_loss", "eos_loss", "attn_loss"),
    *("dur_loss", "pitch_loss", "energy_loss", "f0_loss", "token_loss", "mcd_loss", "bt_loss", "bt_nll_loss"),
    *("dae_loss", "dae_nll_loss", "ipq_distillation", "loss_contrastive", "loss_m_0", "duration_loss", "edge_loss"),
)
COUNTS = (
    *("n_correct", "total", "correct", "count", "correct_m_0", "count_m_0", "ncorrect", "c_errors", "c_total"),
    *("w_errors", "wv_errors", "w_total", "pred_frames", "targ_frames", "norm_frames", "nins", "ndel", "ipq_forwards"),
    *("bt_ntokens", "bt_sample_size", "dae_ntokens", "dae_sample_size", "edge_count", "edge_correct", "duration_count"),
    *("_world_size", "_correct", "_total", "n_images", "n_top1", "n_top5"),
    *(f"_num_{name}" for name in ("chars", "words", "ems", "trees")),
    *(f"_num_{name}_errors" for name in ("char", "word", "em", "tree")),
)
BLEU = {"_bleu_sys_len": 11, "_bleu_ref_len": 12}
BLEU |= {f"_bleu_{kind}_{i}": np.int64(9 - i) for kind in ("counts", "totals") for i in range(4)}
NUMBERS = {
    **{name: torch.tensor(7.5 + i) for i, name in enumerate(LOSSES)},
    **{name: 3 + i for i, name in enumerate(COUNTS)},
    **BLEU,
    **dict(ntokens=40, nsentences=4, sample_size=41, ipq_mib=1.5, ipq_ratio=4.0),
}
GLUE = {"pred": [0, 1, 1, 0], "targ": [0, 1, 0, 0]}
GLUE |= dict.fromkeys(("report_mcc", "report_acc_and_f1", "report_pearson_and_spearman"), True)
PARTS = {"multitask": {"phonemes": {"loss": torch.tensor(2.5), "sample_size": 7, "loss_weight": 0.5}}}
#: Those that take every key of a logging output for a number, or for a channel.
NUMBERS_ALONE = ("model", "wav2vec", "speech_dlm_criterion")
#: Those that cannot be fed, and why.
NOT_FED = {"composite_loss": "what it logs is what the criterion inside logs"}
#: What a task asks its configuration for before it logs.
OPTIONS = {"eval_wer": True, "eval_wer_parse": True}
#: Tasks of speech whose BLEU calls what sacrebleu 2 has no more: a validation with --eval-bleu fails in them.
WITHOUT_BLEU = ("audio_finetuning", "nlu_finetuning")
#: What must be among the metrics, so that the outputs above are the ones that are looked for.
LOGGED = {
    "sentence_prediction": {"pred", "targ", "mcc", "acc_and_f1", "f1", "pearson", "spearman", "accuracy"},
    "ctc": {"uer", "wer", "raw_wer"},
    "ipq": {"ppl", "ipq_distillation", "ipq_mib", "ipq_ratio"},
    "label_smoothed_cross_entropy": {"nll_loss", "n_correct", "accuracy"},
    "model": {"accuracy", "loss_contrastive"},
    "speech_dlm_criterion": {"edge_loss", "edge_ppl", "duration_loss"},
    "speech_to_unit": {"multitask_phonemes_loss", "ins_rate"},
    "wav2vec": {"accuracy", "loss_contrastive"},
    "audio_finetuning": {"uer", "wer"},
    "image_classification": {"top1", "top5"},
    "nlu_finetuning": {"em_error", "tree_error"},
    "online_backtranslation": {"bt_ppl", "dae_ppl"},
    "translation": {"_bleu_counts", "_bleu_totals", "bleu"},
}


def criterion_of(name):
    """The class of a criterion, ipq's around cross_entropy as `build_criterion` makes it."""
    kind = CRITERION_REGISTRY[name]
    return type(kind.__name__, (kind,), {"inner_class": CRITERION_REGISTRY["cross_entropy"]}) if name == "ipq" else kind


def outputs_for(name):
    log = NUMBERS
    if name == "speech_dlm_criterion":  # which takes the start of each key for that of a channel
        names = ("edge_loss", "edge_count", "edge_correct", "duration_loss", "duration_count")
        log = {key: log[key] for key in ("loss", "ntokens", "sample_size", *names)}
    elif name not in NUMBERS_ALONE:
        log = log | GLUE | PARTS
    return [log, dict(log)]


def check_same(read, written):
    if isinstance(written, dict):
        assert read.keys() == written.keys()
        for key, value in written.items():
            check_same(read[key], value)
    elif isinstance(written, list | tuple):
        assert len(read) == len(written)
        for one, other in zip(read, written, strict=True):
            check_same(one, other)
    elif isinstance(written, torch.Tensor | np.ndarray):
        assert type(read) is type(written)
        assert read.dtype == written.dtype
        np.testing.assert_array_equal(read, written)
    else:
        assert read == written


def check_is_read(name, log, path):
    """What `log` logs goes through a checkpoint as the Trainer writes it, each value as the best one too."""
    metrics.reset()
    with metrics.aggregate("valid") as meters:
        log()
    values = meters.get_smoothed_values()
    assert LOGGED.get(name, {"loss"}) <= meters.keys()
    extra = move_to_cpu({"metrics": metrics.state_dict(), "best": values, "val_loss": values})
    torch.save({"model": {}, "extra_state": extra}, path)
    read = safe_load(path)["extra_state"]
    check_same(read, extra)
    again = MetersDict()
    again.load_state_dict(read["metrics"]["valid"])
    stored = {meter: value for meter, value in values.items() if meter in again and meter != "wps"}  # a clock
    check_same({meter: again.get_smoothed_value(meter) for meter in stored}, stored)
    metrics.reset()


@pytest.mark.parametrize("name", sorted(CRITERION_REGISTRY.keys() - NOT_FED.keys()))
def test_what_a_criterion_logs_is_read(name, tmp_path):
    kind = criterion_of(name)
    check_is_read(name, lambda: kind.reduce_metrics(outputs_for(name)), tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("name", sorted(TASK_REGISTRY))
def test_what_a_task_logs_is_read(name, tmp_path):
    task = object.__new__(TASK_REGISTRY[name])
    task.cfg = task.args = Namespace(**OPTIONS, eval_bleu=name not in WITHOUT_BLEU)
    criterion = object.__new__(CRITERION_REGISTRY.get(name, CRITERION_REGISTRY["cross_entropy"]))
    check_is_read(name, lambda: task.reduce_metrics(outputs_for(name), criterion), tmp_path / "checkpoint.pt")


def test_what_is_not_fed_is_there():
    assert NOT_FED.keys() <= CRITERION_REGISTRY.keys()
    assert LOGGED.keys() <= CRITERION_REGISTRY.keys() | TASK_REGISTRY.keys()

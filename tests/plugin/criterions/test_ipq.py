"""Criterion ipq: any criterion in a wrapper, sizes in the log, distillation from a teacher."""

import json
import math

import fairseq.tasks
import pytest
import torch
import torch.nn.functional as F
from fairseq.criterions import CRITERION_REGISTRY
from half import PRECISIONS
from lm_fixture import batch, both_kinds, ipq_flags, state_of
from roberta_fixture import (
    ENCODER,
    HEAD,
    INT8,
    MASKED,
    SENTENCES,
    roberta,  # noqa: F401
    roberta_batch,
)
from toys import refuses

from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.errors import DamagedFileError, UserError
from fairseq_quant_noise.quantization.table import model_bytes

PAD = 1
WRAPPED = {
    "cross_entropy": ("plain", {}),
    "label_smoothed_cross_entropy": ("plain", {"label_smoothing": 0.1}),
    "adaptive_loss": ("adaptive", {}),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_without_a_teacher_it_is_what_it_wraps(lab, name):
    kind, given = WRAPPED[name]
    flags = [text for key, value in given.items() for text in ("--" + key.replace("_", "-"), value)]
    inner = lab.criterion("--criterion", name, *flags, kind=kind)
    options = ["--ipq-criterion-options", json.dumps(given)]
    wrapper = lab.criterion("--criterion", "ipq", "--ipq-criterion", name, *options, kind=kind)
    model = lab.model("--dropout", 0, kind=kind).train()
    loss, size, log = wrapper.train()(model, batch())
    expected, expected_size, expected_log = inner.train()(model, batch())
    assert torch.equal(loss, expected)
    assert size == expected_size
    assert {key: log[key] for key in expected_log} == expected_log
    assert wrapper.logging_outputs_can_be_summed() == inner.logging_outputs_can_be_summed()


def test_label_smoothing_is_not_plain_cross_entropy(lab):
    """So that the options above are known to arrive."""
    model = lab.model().eval()
    flags = ["--criterion", "ipq", "--ipq-criterion", "label_smoothed_cross_entropy", "--ipq-criterion-options"]
    sharp, smooth = (lab.criterion(*flags, f'{{"label_smoothing": {s}}}')(model, batch())[0] for s in (0, 0.1))
    assert not torch.allclose(sharp, smooth, rtol=1e-3)


def test_training_through_the_wrapper_logs_what_it_wraps_logs(lab):
    options = ["--ipq-criterion", "label_smoothed_cross_entropy", "--ipq-criterion-options", '{"label_smoothing": 0.1}']
    run = lab.train("--criterion", "ipq", *options, "--lr", 0.02, updates=4)
    assert float(run.updates[-1]["loss"]) < float(run.updates[0]["loss"])
    assert {"loss", "nll_loss", "ppl", "ipq_mib", "ipq_ratio"} <= run.valid[-1].keys()
    assert run.valid[-1]["ipq_ratio"] == 1


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--ipq-criterion", "no_such"], ["--ipq-criterion no_such", "cross_entropy"]),
        (["--ipq-criterion", "ipq"], ["--ipq-criterion ipq"]),
        (["--ipq-criterion-options", "{label"], ["--ipq-criterion-options", "{label"]),
        (["--ipq-criterion-options", '{"smoothness": 1}'], ["--ipq-criterion-options", "smoothness"]),
        (["--ipq-distillation-weight", 1.5], ["--ipq-distillation-weight", "1.5"]),
        (["--ipq-teacher", "/nowhere/teacher.pt"], ["--ipq-teacher", "/nowhere/teacher.pt"]),
    ],
)
def test_a_wrong_option_ends_in_one_line(lab, flags, names):
    with refuses(".*") as caught:
        lab.criterion("--criterion", "ipq", *flags).load_teacher()
    assert all(name in str(caught.value) for name in names), caught.value


def test_a_criterion_of_another_task_is_named(lab):
    """fairseq ends in a KeyError: the batches of language_modeling hold no `prev_target`."""
    criterion = lab.criterion("--criterion", "ipq", "--ipq-criterion", "nat_loss")
    with refuses("--ipq-criterion nat_loss: reads 'prev_target', which the batches of this task do not have"):
        criterion(lab.model(), batch())


@both_kinds
def test_the_log_holds_the_size_of_the_model(runs, kind):
    run = runs.ipq(kind)
    now, dense = model_bytes(run.model)
    assert run.valid[-1]["ipq_mib"] == pytest.approx(now / 2**20, rel=1e-12)
    assert run.valid[-1]["ipq_ratio"] == pytest.approx(dense / now, rel=1e-12)
    assert run.valid[-1]["ipq_ratio"] > 4


def head_and_tails(model, sample):
    """The logits of the adaptive softmax, (N, words + clusters) and [(N, words of the tail)], from its weights."""
    x = model(**sample["net_input"])[0].flatten(0, 1)
    bands = [model.decoder.embed_tokens.weights_for_band(i) for i in range(3)]
    words = bands[0] if isinstance(bands[0], torch.Tensor) else bands[0][0]
    clusters = model.decoder.adaptive_softmax.head.class_proj.weight
    return x @ torch.cat([words, clusters]).T, [x @ projection @ words.T for words, projection in bands[1:]]


def kl(teacher, student):
    """sum_i p_i (log p_i - log q_i), summed over the rows."""
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    return (p * (p.log() - q.log())).sum()


def by_hand(kind, model, teacher, sample):
    """(the wrapped loss, the distillation), summed over the predictions."""
    target = sample["target"].flatten()
    keep = target != PAD
    if kind == "plain":
        mine, theirs = (m(**sample["net_input"])[0].flatten(0, 1)[keep] for m in (model, teacher))
        return F.cross_entropy(mine.double(), target[keep], reduction="sum"), kl(theirs, mine)
    (head, tails), (their_head, their_tails) = (head_and_tails(m, sample) for m in (model, teacher))
    place = torch.where(target < 20, target, torch.where(target < 60, 20, 21))  # in the head: a word or a cluster
    loss = F.cross_entropy(head[keep].double(), place[keep], reduction="sum")
    distilled = kl(their_head[keep], head[keep])
    for mine, theirs, (start, end) in zip(tails, their_tails, ((20, 60), (60, 110)), strict=True):
        rows = (target >= start) & (target < end)
        assert rows.any()
        # fairseq's adaptive_loss takes place 1 of a tail for padding.
        loss += F.cross_entropy(mine[rows].double(), target[rows] - start, reduction="sum", ignore_index=PAD)
        distilled += kl(theirs[rows], mine[rows])
    return loss, distilled


@both_kinds
@pytest.mark.parametrize("weight", [0, 0.3, 1])
def test_the_loss_is_a_mixture_of_the_wrapped_loss_and_kl(lab, runs, kind, weight):
    teacher = runs.stock(kind).path
    flags = [*ipq_flags(kind), "--ipq-teacher", teacher, "--ipq-distillation-weight", weight]
    criterion = lab.criterion(*flags, kind=kind).train()
    model = lab.model("--dropout", 0, kind=kind).train()
    loss, size, log = criterion(model, batch())
    wrapped, distilled = by_hand(kind, model, lab.load(teacher), batch())
    assert distilled > 1
    assert size == batch()["ntokens"]
    assert float(loss) == pytest.approx(float((1 - weight) * wrapped + weight * distilled), rel=1e-4)
    if weight:
        assert float(log["ipq_distillation"]) == pytest.approx(float(distilled), rel=1e-4)


@both_kinds
def test_gradients_reach_the_student_and_not_the_teacher(lab, runs, kind):
    criterion = lab.criterion(*ipq_flags(kind), "--ipq-teacher", runs.stock(kind).path, kind=kind).train()
    model = lab.model("--quant-noise-pq", 0.2, kind=kind).train()
    criterion(model, batch())[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.dim() > 1)
    assert all(p.grad is None for p in criterion.teachers[0].parameters())
    assert not criterion.teachers[0].training


@both_kinds
def test_a_student_that_equals_its_teacher_has_nothing_to_learn_from_it(lab, runs, kind):
    path = runs.stock(kind).path
    criterion = lab.criterion(*ipq_flags(kind), "--ipq-teacher", path, kind=kind).train()
    student = lab.model("--dropout", 0, kind=kind)
    student.load_state_dict(lab.load(path).state_dict())
    log = criterion(student.train(), batch())[2]
    assert abs(float(log["ipq_distillation"])) < 1e-4 * batch()["ntokens"]


@both_kinds
def test_validation_reports_the_wrapped_loss_alone(lab, runs, kind):
    criterion = lab.criterion(*ipq_flags(kind), "--ipq-teacher", runs.stock(kind).path, kind=kind).eval()
    model = lab.model(kind=kind).eval()
    loss, _, log = criterion(model, batch())
    assert torch.equal(loss, lab.criterion(kind=kind).eval()(model, batch())[0])
    assert "ipq_distillation" not in log


@both_kinds
def test_the_teacher_is_no_part_of_what_is_trained_or_saved(lab, runs, kind):
    criterion = lab.criterion(*ipq_flags(kind), "--ipq-teacher", runs.stock(kind).path, kind=kind)
    assert not list(criterion.parameters())
    assert not criterion.state_dict()
    state = state_of(runs.ipq(kind).path)
    assert state["criterion"] is None
    assert not [name for name in state["model"] if "teacher" in name]


@both_kinds
def test_the_distillation_is_logged_in_bits_a_prediction(runs, kind):
    logged = [float(log["ipq_distillation"]) for log in runs.ipq(kind).updates]
    assert all(0 < bits < math.log2(110) for bits in logged)
    assert "ipq_distillation" not in runs.ipq(kind).valid[-1]


@pytest.mark.parametrize("precision", ["fp16", "memory-efficient fp16", "bf16", "amp"])
def test_a_teacher_has_the_precision_of_the_training(lab, runs, precision):
    flags = [*ipq_flags("plain"), "--ipq-teacher", runs.stock("plain").path, *PRECISIONS[precision]]
    run = lab.train(*flags, updates=2)
    assert all(math.isfinite(float(log["loss"])) and float(log["ipq_distillation"]) > 0 for log in run.updates)
    dtypes = {p.dtype for net in (run.model, run.trainer.get_criterion().teachers[0]) for p in net.parameters()}
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float32 if precision == "amp" else torch.float16}


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_in_half_precision_teaches_the_same(lab, runs, kind, dtype):
    criterion = lab.criterion(*ipq_flags(kind), "--ipq-teacher", runs.stock(kind).path, kind=kind).train()
    model = lab.model("--dropout", 0, kind=kind).train()
    expected = float(criterion(model, batch())[2]["ipq_distillation"])
    found = float(criterion(model.to(dtype), batch())[2]["ipq_distillation"])
    assert found == pytest.approx(expected, rel=0.03)
    assert {p.dtype for p in criterion.teachers[0].parameters()} == {dtype}


REGRESSION = ["--criterion", "ipq", "--ipq-criterion", SENTENCES, "--num-classes", 1, "--regression-target"]


def test_a_regression_is_distilled_by_squared_error(roberta):  # noqa: F811
    """KL over one logit is 0, whatever the student says."""
    flags = [*REGRESSION, "--ipq-teacher", "later", "--ipq-distillation-weight", 0.3]
    cfg = roberta.config(*flags, kind=SENTENCES)
    task = fairseq.tasks.setup_task(cfg.task)
    criterion = task.build_criterion(cfg.criterion).train()
    still = ["--num-classes", 1, "--dropout", 0, "--attention-dropout", 0]
    student, teacher = (roberta.model(*still, seed=seed, kind=SENTENCES) for seed in (1, 2))
    criterion.teachers.append(teacher.eval())
    sample = {**roberta_batch(SENTENCES), "target": torch.tensor([0.5, -1.0, 2.0, 3.0])}
    loss, size, log = criterion(student.train(), sample)
    given = {**sample["net_input"], "features_only": True, "classification_head_name": HEAD}
    mine, theirs = (model(**given)[0].flatten() for model in (student, teacher))
    wrapped, distilled = ((mine - sample["target"]) ** 2).sum(), ((mine - theirs) ** 2).sum()
    assert distilled > 0.01
    assert float(log["ipq_distillation"]) == pytest.approx(float(distilled), rel=1e-5)
    assert float(loss) == pytest.approx(float(0.7 * wrapped + 0.3 * distilled), rel=1e-5)
    loss.backward()
    assert student.classification_heads[HEAD].out_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["label_smoothed_cross_entropy_with_rdrop", "nat_loss", "ctc", "wav2vec"])
def test_a_criterion_that_a_teacher_cannot_help_with_is_refused(lab, runs, name):
    """R-Drop's output has each sentence twice, and the others' no distribution over words for each target."""
    criterion = lab.criterion(*ipq_flags("plain"), "--ipq-teacher", runs.stock("plain").path)
    criterion.inner = CRITERION_REGISTRY[name].__new__(CRITERION_REGISTRY[name])
    with refuses(f"^--ipq-teacher: does not go with --ipq-criterion {name}; leave the teacher out"):
        criterion.load_teacher()


BAD_TEACHERS = {  # by what is wrong: who is asked, and what the message names
    "no file": (SENTENCES, 2, ["--ipq-teacher", "/nowhere/teacher.pt"]),
    "no checkpoint": (SENTENCES, 3, ["teacher.pt", "not a whole PyTorch checkpoint"]),
    "other classes": (SENTENCES, 2, ["--ipq-teacher", HEAD]),
    "no head": (SENTENCES, 2, ["--ipq-teacher", HEAD]),
    "another head": (SENTENCES, 2, ["--ipq-teacher", HEAD]),
    "another vocabulary": (SENTENCES, 2, ["--ipq-teacher"]),
    "a language model": (SENTENCES, 2, ["--ipq-teacher"]),
    "a language model of masked words": (MASKED, 2, ["--ipq-teacher"]),
}


def bad_teacher(case, lab, roberta):  # noqa: F811
    """The path of a teacher with this fault."""
    stock = roberta.run("stock", SENTENCES)
    state = state_of(stock.path)
    weights = state["model"]
    if case == "no file":
        return "/nowhere/teacher.pt"
    if case == "no checkpoint":
        path = roberta.new("teacher.pt")
        path.write_bytes(b"teacher")
        return path
    if case == "no head":
        return roberta.run("stock", MASKED).path
    if "language model" in case:
        return lab.train(arch="transformer_lm", updates=1).path
    if case == "other classes":
        return roberta.train("--num-classes", 5, kind=SENTENCES, updates=1).path
    if case == "another head":
        weights = {name.replace(HEAD, "other"): tensor for name, tensor in weights.items()}
    else:  # another vocabulary
        words = len(weights[f"{ENCODER}.embed_tokens.weight"])
        weights = {name: t[:-9] if len(t) == words else t for name, t in weights.items()}
    return roberta.checkpoint({**state, "model": weights})


@pytest.mark.upstream(21)
@pytest.mark.parametrize("case", BAD_TEACHERS)
def test_a_teacher_that_does_not_fit_is_refused_in_one_line(lab, roberta, case):  # noqa: F811
    kind, code, names = BAD_TEACHERS[case]
    path = bad_teacher(case, lab, roberta)
    flags = ["--criterion", "ipq", "--ipq-criterion", kind, "--ipq-teacher", path]
    criterion = roberta.task(kind).build_criterion(roberta.config(*flags, kind=kind).criterion)
    with refuses(".*", UserError if code == 2 else DamagedFileError) as caught:
        criterion.load_teacher()
    assert all(name in str(caught.value) for name in names), caught.value


@pytest.mark.parametrize("name", ["stock", "scalar", "ipq", "packed"])
def test_any_trained_model_of_the_task_may_teach(roberta, name):  # noqa: F811
    """Dense, int8, in codes, or a packed file: its answers are those of the model that was saved."""
    path = roberta.run("stock" if name == "packed" else name, SENTENCES).path
    if name == "packed":
        packed = roberta.new("packed.safetensors")
        main(["quantize", "--path", str(path), "--plan", roberta.plan(INT8), "--out", str(packed)])
        path = packed
    flags = ["--criterion", "ipq", "--ipq-criterion", SENTENCES, "--ipq-teacher", path]
    criterion = roberta.task(SENTENCES).build_criterion(roberta.config(*flags, kind=SENTENCES).criterion)
    criterion.load_teacher()
    answers = [
        model(**roberta_batch(SENTENCES)["net_input"], features_only=True, classification_head_name=HEAD)[0]
        for model in (criterion.teachers[0], roberta.load(path, SENTENCES))
    ]
    assert torch.equal(*answers)
    assert answers[0].std() > 0

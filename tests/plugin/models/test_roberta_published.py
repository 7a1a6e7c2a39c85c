"""RoBERTa as Meta published it: pickles of 2019 and 2021 load, go on training, and are quantized."""

import json
from argparse import Namespace

import fairseq.checkpoint_utils
import pytest
import torch
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from lm_fixture import same, state_of
from roberta_fixture import (
    CLASSES,
    ENCODER,
    HEAD,
    INT8,
    MASKED,
    POSITIONS,
    SENTENCES,
    both_tasks,
    plan_of,
    roberta,  # noqa: F401
    roberta_batch,
)
from toys import refuses

from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.errors import DamagedFileError
from fairseq_quant_noise.plugin import loading
from fairseq_quant_noise.plugin.models.roberta import QuantNoiseRoberta

pytestmark = pytest.mark.upstream(23)

LAYOUTS = ["2019", "2019-zip", "2021"]  # a Namespace, outside and inside a zip file; a DictConfig
layouts = pytest.mark.parametrize("layout", LAYOUTS)
MNLI = "mnli"
BASE = {"encoder_layers": 12, "encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072, "encoder_attention_heads": 12}
SMALL = {"encoder_layers": 2, "encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "encoder_attention_heads": 4}


def old_args(task=MASKED, **sizes) -> Namespace:
    """The options that fairseq 0.7 recorded of a RoBERTa; later ones are not among them."""
    task_options = {
        MASKED: {"mask_prob": 0.15, "leave_unmasked_prob": 0.1, "random_token_prob": 0.1, "tokens_per_sample": 512},
        SENTENCES: {"num_classes": CLASSES, "init_token": 0, "separator_token": 2, "no_shuffle": False},
    }
    model = {
        "activation_fn": "gelu",
        "pooler_activation_fn": "tanh",
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.0,
        "pooler_dropout": 0.0,
        "max_positions": 512,
        **SMALL,
        **sizes,
    }
    return Namespace(
        arch="roberta_base",
        task=task,
        criterion=task,
        data="/private/home/data-bin",
        cpu=False,
        optimizer="adam",
        adam_betas="(0.9, 0.98)",
        adam_eps=1e-06,
        weight_decay=0.01,
        fp16=True,
        lr_scheduler="polynomial_decay",
        lr=[0.0006],
        min_lr=-1,
        end_learning_rate=0.0,
        power=1.0,
        warmup_updates=24000,
        total_num_update=500000,
        max_update=500000,
        update_freq=[1],
        seed=1,
        max_sentences=16,
        max_tokens=None,
        sentence_avg=False,
        raw_text=False,
        lazy_load=False,
        ddp_backend="c10d",
        bucket_cap_mb=200,
        user_dir=None,
        save_dir="/checkpoint/x",
        bpe=None,
        log_format="json",
        no_progress_bar=True,
        restore_file="checkpoint_last.pt",
        dataset_impl="mmap",
        **task_options[task],
        **model,
    )


def old_names(weights) -> dict:
    """`decoder` for the encoder, one matrix for the three projections of an attention, no `version`."""
    old = {}
    for name, tensor in weights.items():
        name = name.replace("encoder.sent", "decoder.sent").replace("encoder.lm", "decoder.lm")
        name = name.replace("layernorm_embedding", "emb_layer_norm")
        module, _, last = name.rpartition(".q_proj.")
        if module:
            parts = [weights[f"{module}.{letter}_proj.{last}".replace("decoder", "encoder", 1)] for letter in "qkv"]
            old[f"{module}.in_proj_{last}"] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name and not name.endswith("version"):
            old[name] = tensor
    return old


def publish(path, weights, args, layout="2019"):
    """Write a checkpoint as Meta did."""
    history = [{"criterion_name": "MaskedLmLoss", "optimizer_name": "MemoryEfficientFP16Optimizer"}]
    history[0] |= {"lr_scheduler_state": {"best": 1.5}, "num_updates": 500_000}
    extra = {"train_iterator": {"epoch": 63, "iterations_in_epoch": 1000}, "val_loss": 1.5, "best": 1.4}
    state = {"args": args, "model": old_names(weights), "optimizer_history": history, "extra_state": extra}
    if layout == "2021":
        state |= {"args": None, "cfg": convert_namespace_to_omegaconf(args), "task_state": {}}
    torch.save({**state, "last_optimizer_state": None}, path, _use_new_zipfile_serialization=layout != "2019")
    return path


class Published:
    """An untrained model of stock fairseq, and its published file in a folder with the dictionary."""

    def __init__(self, lab, layout="2019", task=MASKED, head=None):
        self.model = lab.model(arch="roberta_base", kind=MASKED).eval()
        with torch.no_grad():
            self.model.encoder.lm_head.bias[:4] = -100  # no special word is the best
        if head:
            self.model.register_classification_head(head, CLASSES)
            self.model.eval()
        self.folder = lab.new("published")
        self.folder.mkdir()
        self.words = self.model.encoder.sentence_encoder.embed_tokens.num_embeddings
        lines = (f"{word} 1\n" for word in range(self.words - 5))  # four special words and <mask> are not in it
        (self.folder / "dict.txt").write_text("".join(lines))
        args = old_args(task, max_positions=POSITIONS)
        self.path = publish(self.folder / "model.pt", self.model.state_dict(), args, layout)

    def logits(self, tokens, head=None):
        """What stock fairseq makes of the tokens."""
        with torch.no_grad():
            return self.model(tokens, classification_head_name=head, features_only=head is not None)[0]


TOKENS = roberta_batch()["net_input"]["src_tokens"]
RESTORE = ["--reset-optimizer", "--reset-dataloader", "--reset-meters", "--restore-file"]


def trained_from(lab, path, *flags, kind=SENTENCES, how=("--finetune-from-model",)):
    """The weights after two updates of no length."""
    run = lab.train(*how, path, "--lr", 0, *flags, kind=kind, updates=2)
    assert [log["num_updates"] for log in run.updates] == [1, 2]
    return state_of(run.path)["model"]


@layouts
@pytest.mark.parametrize("how", [RESTORE, ["--finetune-from-model"]], ids=["restore", "finetune"])
@both_tasks
def test_training_goes_on_from_it(roberta, layout, how, kind):  # noqa: F811
    published = Published(roberta, layout)
    weights = trained_from(roberta, published.path, "--quant-noise-pq", 0.1, kind=kind, how=how)
    body = {name: tensor for name, tensor in weights.items() if not name.startswith("classification_heads")}
    expected = {**published.model.state_dict(), f"{ENCODER}.version": weights[f"{ENCODER}.version"]}
    assert same(body, {name: expected[name] for name in body})
    assert body.keys() == expected.keys()


@pytest.mark.parametrize(
    ("flags", "heads"),
    [
        (["--classification-head-name", MNLI], {MNLI: True}),
        (["--classification-head-name", MNLI, "--num-classes", 4], {MNLI: False}),
        ([], {HEAD: False}),
        (["--load-checkpoint-heads"], {HEAD: False, MNLI: True}),
    ],
    ids=["its head", "of another size", "another head", "both"],
)
def test_its_head_is_taken_over_where_the_name_or_an_option_says_so(roberta, flags, heads):  # noqa: F811
    published = Published(roberta, head=MNLI, task=SENTENCES)
    weights = trained_from(roberta, published.path, *flags)
    theirs = published.model.state_dict()
    names = {name for name in weights if name.startswith("classification_heads")}
    assert {name.split(".")[1] for name in names} == set(heads)
    for name in names:
        if "weight" in name:  # biases start at zero
            assert same(weights[name], theirs.get(name)) == heads[name.split(".")[1]]


@layouts
def test_verbs(roberta, layout, capsys):  # noqa: F811
    published, out, dense = Published(roberta, layout), roberta.new("packed.safetensors"), roberta.new("dense.pt")
    plan = roberta.plan(plan_of(MASKED))
    main(["plan", "--path", str(published.path), "--plan", plan])
    assert f"{ENCODER}.layers.1.self_attn.q_proj.weight" in capsys.readouterr().out
    expected = published.logits(TOKENS)
    torch.testing.assert_close(Checkpoint(published.path).network(TOKENS), expected, atol=1e-5, rtol=1e-5)
    main(["to-dense", str(published.path), "--out", str(dense)])
    stock = roberta.load(dense)
    assert type(stock).__name__ == "RobertaModel"
    assert torch.equal(stock(TOKENS)[0], expected)
    main(["quantize", "--path", str(published.path), "--plan", roberta.plan(INT8), "--out", str(out)])
    torch.testing.assert_close(roberta.load(out)(TOKENS)[0], expected, atol=0.05, rtol=0.05)


def test_names_of_a_plugin_that_is_not_here(roberta, monkeypatch):  # noqa: F811
    """As of the antibody networks of the package sapiens: an architecture and a criterion of their authors."""
    published, out = Published(roberta), roberta.new("packed.safetensors")
    args = old_args(max_positions=POSITIONS)
    args.tokens_per_sample = 32
    args.arch, args.criterion, args.label_smoothing = "roberta_of_theirs", "smooth_masked_lm", 0.1
    publish(published.path, published.model.state_dict(), args)
    main(["quantize", "--path", str(published.path), "--plan", roberta.plan(INT8), "--out", str(out)])
    said = []
    monkeypatch.setattr(loading.logger, "warning", said.append)
    losses = [roberta.validate(path)["loss"] for path in (published.path, out)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    line = "was trained with --criterion smooth_masked_lm, which is not here; masked_lm stands for it"
    assert said == [f"{published.path}: {line}", f"{out}: {line}"]
    weights = trained_from(roberta, published.path, kind=MASKED, how=RESTORE)
    assert same(weights, {**published.model.state_dict(), f"{ENCODER}.version": weights[f"{ENCODER}.version"]})
    hub = QuantNoiseRoberta.from_pretrained(published.folder, bpe=None).eval()
    assert torch.equal(hub.model(TOKENS)[0], published.logits(TOKENS))


@layouts
def test_from_pretrained(roberta, layout):  # noqa: F811
    published = Published(roberta, layout)
    hub = QuantNoiseRoberta.from_pretrained(published.folder, bpe=None).eval()
    assert isinstance(hub.model, QuantNoiseRoberta)
    assert len(hub.task.source_dictionary) == published.words
    assert torch.equal(hub.model(TOKENS)[0], published.logits(TOKENS))
    features = published.model(TOKENS, features_only=True)[0]
    assert torch.equal(hub.extract_features(TOKENS), features)


@pytest.mark.parametrize("quantized", [False, True], ids=["published", "packed"])
@pytest.mark.parametrize("layout", ["2019", "2021"])
def test_from_pretrained_of_a_classifier(roberta, layout, quantized):  # noqa: F811
    """Its folder holds the words' dictionary, and none in `input0`."""
    published, name = Published(roberta, layout, head=MNLI, task=SENTENCES), "model.pt"
    if quantized:
        name = "model.safetensors"
        plan, out = roberta.plan(INT8), published.folder / name
        main(["quantize", "--path", str(published.path), "--plan", plan, "--out", str(out)])
    hub = QuantNoiseRoberta.from_pretrained(published.folder, checkpoint_file=name, bpe=None).eval()
    assert isinstance(hub.model, QuantNoiseRoberta)
    logits, expected = hub.predict(MNLI, TOKENS, return_logits=True), published.logits(TOKENS, MNLI)
    torch.testing.assert_close(
        logits, expected, **({"atol": 0.02, "rtol": 0.1} if quantized else {"atol": 0, "rtol": 0})
    )


@both_tasks
@pytest.mark.parametrize("name", ["stock", "ipq"])
def test_from_pretrained_of_what_was_trained_and_quantized_here(roberta, name, kind):  # noqa: F811
    run, out = roberta.run(name, kind), roberta.new("packed.safetensors")
    head = HEAD if kind == SENTENCES else None
    files = [run.path]
    if name == "ipq":
        main(["export", "--path", str(run.path), "--out", str(out)])
        files.append(out)
    with torch.no_grad():
        expected = roberta.load(run.path, kind)(TOKENS, classification_head_name=head, features_only=bool(head))[0]
        for path in files:
            data = roberta.of(kind)
            hub = QuantNoiseRoberta.from_pretrained(path.parent, path.name, data, bpe=None).eval()
            assert isinstance(hub.model, QuantNoiseRoberta)
            logits = hub.predict(head, TOKENS, return_logits=True) if head else hub.model(TOKENS)[0]
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", ["beside the model", "by option"])
@pytest.mark.parametrize("layout", ["2019", "2021", "packed"])
def test_fill_mask_with_gpt2s_encoding(roberta, layout, given):  # noqa: F811
    published = Published(roberta, "2019" if layout == "packed" else layout)
    name = "model.safetensors" if layout == "packed" else "model.pt"
    if layout == "packed":
        plan, out = roberta.plan(INT8), published.folder / name
        main(["quantize", "--path", str(published.path), "--plan", plan, "--out", str(out)])
    place = published.folder if given == "beside the model" else roberta.new("bpe")
    place.mkdir(exist_ok=True)
    known = [bytes_to_unicode()[byte] for byte in b" ,abcd"]
    others = [letter for letter in bytes_to_unicode().values() if letter not in known]
    vocabulary = {text: code for code, text in enumerate([*known, *others][: published.words - 5])}
    (place / "encoder.json").write_text(json.dumps(vocabulary))
    (place / "vocab.bpe").write_text("#version: 0.2\n")
    files = {"gpt2_encoder_json": str(place / "encoder.json"), "gpt2_vocab_bpe": str(place / "vocab.bpe")}
    options = files if given == "by option" else {}
    hub = QuantNoiseRoberta.from_pretrained(published.folder, name, **options).eval()
    assert hub.decode(hub.encode("cab, bad")) == "cab, bad"
    (text, probability, word), *_ = hub.fill_mask("a <mask> b", topk=2)
    words = hub.task.source_dictionary
    line = f"<s> {hub.bpe.encode('a')} <mask> {hub.bpe.encode(' b')} </s>"
    tokens = words.encode_line(line, append_eos=False)
    best = published.logits(tokens[None].long())[0, 2].softmax(0).max(0)
    assert probability == pytest.approx(best.values.item(), rel=0.05)
    if layout != "packed":
        assert word == hub.bpe.decode(words[best.indices])
    assert text == f"a{word} b"


def test_from_pretrained_says_what_is_wrong(roberta, tmp_path):  # noqa: F811
    published = Published(roberta, "2019-zip")
    with refuses("model.pt: is a file; unpack it and give the folder"):
        QuantNoiseRoberta.from_pretrained(published.path)
    with refuses("nowhere: no such folder; give the one that holds the checkpoint"):
        QuantNoiseRoberta.from_pretrained(tmp_path / "nowhere")
    with refuses("other.pt: No such file or directory"):
        QuantNoiseRoberta.from_pretrained(published.folder, "other.pt", bpe=None)
    with refuses("dict.txt: no such file; give the folder of the dictionary as data_name_or_path"):
        QuantNoiseRoberta.from_pretrained(published.folder, data_name_or_path=tmp_path, bpe=None)
    args = old_args(max_positions=POSITIONS)
    args.arch = "xlm"
    publish(published.path, published.model.state_dict(), args)
    with refuses("model 'xlm' cannot be compressed here"):
        QuantNoiseRoberta.from_pretrained(published.folder, bpe=None)
    published.path.write_bytes(published.path.read_bytes()[:5000])
    with refuses("not a whole PyTorch checkpoint", DamagedFileError):
        QuantNoiseRoberta.from_pretrained(published.folder, bpe=None)


def base_weights() -> dict:
    """Random weights of the size of roberta.base, under today's names."""
    dim, inner, words = BASE["encoder_embed_dim"], BASE["encoder_ffn_embed_dim"], 50_265
    linears = {f"self_attn.{name}": (dim, dim) for name in ("k_proj", "v_proj", "q_proj", "out_proj")}
    linears |= {"fc1": (inner, dim), "fc2": (dim, inner)}
    shapes = {f"{ENCODER}.embed_tokens.weight": (words, dim), f"{ENCODER}.embed_positions.weight": (514, dim)}
    norms = [f"{ENCODER}.layernorm_embedding", "encoder.lm_head.layer_norm"]
    layers = [f"{ENCODER}.layers.{i}" for i in range(BASE["encoder_layers"])]
    for layer in layers:
        norms += [f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm"]
    for module, shape in [("encoder.lm_head.dense", (dim, dim))] + [
        (f"{layer}.{name}", shape) for layer in layers for name, shape in linears.items()
    ]:
        shapes |= {f"{module}.weight": shape, f"{module}.bias": shape[:1]}
    shapes |= {f"{norm}.{part}": (dim,) for norm in norms for part in ("weight", "bias")}
    shapes["encoder.lm_head.bias"] = (words,)
    weights = {name: torch.empty(shape).normal_(std=0.02) for name, shape in shapes.items()}
    return {**weights, "encoder.lm_head.weight": weights[f"{ENCODER}.embed_tokens.weight"]}


def test_the_shape_of_roberta_base(roberta, tmp_path):  # noqa: F811
    path, weights = tmp_path / "model.pt", base_weights()
    assert sum(tensor.numel() for name, tensor in weights.items() if name != "encoder.lm_head.weight") == 124_696_665
    publish(path, weights, old_args(**BASE))
    (tmp_path / "dict.txt").write_text("".join(f"{word} 1\n" for word in range(50_260)))
    overrides = {"data": str(tmp_path), "arch": "quant_noise_roberta_base"}
    (model,), *_ = fairseq.checkpoint_utils.load_model_ensemble_and_task([str(path)], overrides)
    path.unlink()
    assert isinstance(model, QuantNoiseRoberta)
    loaded = model.state_dict()
    assert loaded.keys() == weights.keys() | {f"{ENCODER}.version"}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())

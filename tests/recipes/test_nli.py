"""From a training with noise to a packed file that answers as training said, on inference made by a grammar."""

import itertools
from collections import defaultdict

import pytest
import torch
from fairseq.data.encoders.gpt2_bpe_utils import get_encoder
from lm_fixture import split, state_of
from nli import ADJECTIVES, ANTONYM, KINDS, LABELS, WORDS, nli, pairs, write_binary, write_bpe, write_glue
from roberta_fixture import ENCODER, HEAD, SENTENCES, RobertaLab

import fairseq_quant_noise
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.layers import quantized_weights

pytestmark = pytest.mark.slow

HYPOTHESES = {"train": 3000, "valid": 200}
CLEARLY_BETTER = 50  # % of 600 pairs; the majority has 33.3, the words of the premise give 43; standard error 2

FLAGS = split(
    "--encoder-embed-dim 64 --encoder-ffn-embed-dim 128 --dropout 0 --attention-dropout 0 --batch-size 64 --lr 0.002",
    "--lr-scheduler polynomial_decay --warmup-updates 30 --total-num-update 330",
)
NOISE = ("--quant-noise-pq", 0.1)
PLAN = {
    "stages": [
        {"match": rf"{ENCODER}.layers.\d+.fc[12]|encoder.lm_head.dense", "block_size": 8, "n_centroids": 64},
        {"match": rf"{ENCODER}.embed_(tokens|positions)", "block_size": 4, "n_centroids": 64},
        {"match": rf"{ENCODER}.layers.*attn.*|classification_heads.*", "block_size": 4, "n_centroids": 64},
    ]
}

# The grammar.


def things(sentence):
    """What it speaks of: (adjective, noun) of each thing."""
    nouns = KINDS.get(sentence.noun, (sentence.noun,))
    return set(itertools.product([sentence.adjective] if sentence.adjective else ("", *ADJECTIVES), nouns))


def true(quantifier, states):
    """Whether so many of them are in the state."""
    return {"every": all(states), "not every": not all(states), "some": any(states), "no": not any(states)}[quantifier]


def label_by_all_worlds(premise, hypothesis):
    """Of a thing counts whether it is in either state; of the things of which both, or one, speak, two will do."""
    ours, theirs = things(premise), things(hypothesis)
    groups = {(True, True): ours & theirs, (True, False): ours - theirs, (False, True): theirs - ours}
    members = [group for group, found in groups.items() for _ in range(2 if found else 0)]
    possible = [(False, False), (True, True), (True, False), (False, True)]
    if premise.state == hypothesis.state:
        possible = possible[:2]
    elif premise.state == ANTONYM[hypothesis.state]:
        possible.remove((True, True))
    found = set()
    for world in itertools.product(possible, repeat=len(members)):
        said, asked = ([w[i] for w, m in zip(world, members, strict=True) if m[i]] for i in range(2))
        if true(premise.quantifier, said):
            found.add(true(hypothesis.quantifier, asked))
    return {(True,): "entailment", (False,): "contradiction"}.get(tuple(found), "neutral")


def test_labels_are_those_of_logic():
    made = list(pairs(150))
    assert len({(premise.quantifier, hypothesis.quantifier, label) for premise, hypothesis, label in made}) > 25
    for premise, hypothesis, label in made:
        assert label_by_all_worlds(premise, hypothesis) == label, f"{premise}. {hypothesis}."


def test_a_hypothesis_says_nothing_about_its_label():
    """Each comes once with each label, so no program can tell from it alone; and none is in both parts."""
    parts = nli(200, 50)
    for name, count in {"train": 200, "valid": 50}.items():
        labels = defaultdict(list)
        for _, hypothesis, label in parts[name]:
            labels[hypothesis].append(label)
        assert len(labels) == count
        assert all(sorted(found) == sorted(LABELS) for found in labels.values())
    assert not {pair[1] for pair in parts["train"]} & {pair[1] for pair in parts["valid"]}
    assert nli(200, 50) == parts != nli(200, 50, seed=2)


def test_files_for_the_recipe(tmp_path):
    """GLUE's columns, and a byte-pair code in which a word of the grammar is one symbol."""
    write_glue(tmp_path / "MNLI", 20, 10)
    sizes = {}
    for path in (tmp_path / "MNLI").iterdir():
        lines = [line.split("\t") for line in path.read_text().splitlines()]
        sizes[path.name] = len(lines) - 1
        columns = {name: i for i, name in enumerate(lines[0])}
        assert (columns["sentence1"], columns["sentence2"]) == (8, 9)
        assert columns["gold_label"] == (11 if path.name == "train.tsv" else 15)
        assert all(len(line) == len(columns) and line[-1] in LABELS for line in lines[1:])
    assert sizes == {"train.tsv": 60, "dev_matched.tsv": 30, "dev_mismatched.tsv": 30}
    write_bpe(tmp_path / "bpe")
    coder = get_encoder(str(tmp_path / "bpe/encoder.json"), str(tmp_path / "bpe/vocab.bpe"))
    text = f"é {' '.join(WORDS)}"
    codes = coder.encode(text)
    assert len(codes) == 2 + len(WORDS)
    assert coder.decode(codes) == text
    known = {line.split()[0] for line in (tmp_path / "bpe/dict.txt").read_text().splitlines()}
    assert known >= set(map(str, codes))


# The network.


class NliLab(RobertaLab):
    """A RobertaLab whose sentences are the grammar's."""

    def __init__(self, folder):
        super().__init__(folder)
        self.texts = nli(**HYPOTHESES)
        write_binary(folder / "nli", self.texts)

    def of(self, kind):
        """The data of this kind."""
        return self.folder / "nli" if kind == SENTENCES else super().of(kind)

    def train(self, *flags, **settings):
        """On the grammar's pairs."""
        return super().train(*FLAGS, *flags, kind=SENTENCES, **settings)


@pytest.fixture(scope="module")
def grammar(tmp_path_factory):
    return NliLab(tmp_path_factory.mktemp("grammar"))


@pytest.fixture(scope="module")
def noised(grammar):
    """Trained with noise from the start."""
    return grammar.train(*NOISE, updates=300)


def accuracy_in_plain_pytorch(grammar, path):
    """Of the file's network, a pair at a time, from the text."""
    network, words = fairseq_quant_noise.load(path), grammar.task(SENTENCES).source_dictionary
    right = 0
    for premise, hypothesis, label in grammar.texts["valid"]:
        one, two = ([words.index(word) for word in text.split()] for text in (premise, hypothesis))
        tokens = torch.tensor([[words.bos(), *one, words.eos(), words.eos(), *two, words.eos()]])
        with torch.no_grad():
            right += LABELS[int(network(tokens, classification_head_name=HEAD).argmax())] == label
    return 100 * right / len(grammar.texts["valid"])


def test_the_packed_file_answers_as_its_training_said(grammar, noised, capsys):
    """Noise, three stages with a teacher, export, fairseq-validate, and the file alone."""
    dense = noised.valid[-1]["accuracy"]
    assert dense > CLEARLY_BETTER
    flags = ["--finetune-from-model", noised.path, "--quantization-config-path", grammar.plan(PLAN), *NOISE]
    flags += ["--criterion", "ipq", "--ipq-criterion", SENTENCES, "--ipq-teacher", noised.path]
    flags += split("--lr 0.0005 --warmup-updates 5 --total-num-update 70")
    run, packed = grammar.train(*flags, updates=60), grammar.new("packed.safetensors")
    said = run.valid[-1]["accuracy"]
    assert len(quantized_weights(run.model)) == 17
    assert said > CLEARLY_BETTER
    main(["export", "--path", str(run.path), "--out", str(packed)])
    main(["verify", str(packed)])
    assert grammar.validate(packed, SENTENCES)["accuracy"] == pytest.approx(said, abs=1e-4)
    assert accuracy_in_plain_pytorch(grammar, packed) == pytest.approx(said, abs=1e-4)
    assert packed.stat().st_size < noised.path.stat().st_size / 10


def test_noise_after_training_helps_a_stock_model_through_quantization(grammar):
    """Post hoc: fairseq's own roberta, fine-tuned under noise and without, and both quantized coarsely at one go."""
    stock = grammar.train(arch="roberta_base", updates=300)
    coarse = grammar.plan({"stages": [{**stage, "block_size": 8, "n_centroids": 16} for stage in PLAN["stages"]]})
    flags = ["--finetune-from-model", stock.path, *split("--lr 0.0005 --warmup-updates 10 --total-num-update 160")]
    quantized, lost = {}, {}
    for p in (0, 0.2):
        run, out = grammar.train(*flags, "--quant-noise-pq", p, updates=150), grammar.new("packed.safetensors")
        assert run.valid[-1]["accuracy"] > CLEARLY_BETTER
        main(["quantize", "--path", str(run.path), "--plan", coarse, "--out", str(out)])
        quantized[p] = grammar.validate(out, SENTENCES)["accuracy"]
        lost[p] = run.valid[-1]["accuracy"] - quantized[p]
    assert quantized[0.2] > quantized[0]
    assert lost[0.2] < 0.6 * lost[0]  # .36 to .44 of it over four seeds


# The teacher.


def loss_by_hand(student, teacher, sample, weight):
    """(1 - w) * cross entropy + w * KL(teacher || student), summed over the pairs; both networks as they evaluate."""
    with torch.no_grad():
        mine, theirs = (
            model.eval()(**sample["net_input"], features_only=True, classification_head_name=HEAD)[0].double()
            for model in (student, teacher)
        )
    log_q, log_p = mine.log_softmax(-1), theirs.log_softmax(-1)
    distilled = (log_p.exp() * (log_p - log_q)).sum()
    return float(-(1 - weight) * log_q[range(len(mine)), sample["target"]].sum() + weight * distilled), float(distilled)


@pytest.mark.upstream(21)
@pytest.mark.parametrize("weight", [0.3, 1])
def test_the_teacher_is_asked_without_its_dropout_and_its_noise(grammar, noised, weight):
    """Though its checkpoint was trained with both; nor does it learn."""
    state = state_of(noised.path)
    state["cfg"]["model"].update(dropout=0.5, attention_dropout=0.5, pooler_dropout=0.5, quant_noise_pq=0.9)
    flags = ["--criterion", "ipq", "--ipq-criterion", SENTENCES, "--ipq-distillation-weight", weight]
    cfg = grammar.config(*flags, "--ipq-teacher", grammar.checkpoint(state), kind=SENTENCES)
    task = grammar.task(SENTENCES)
    criterion = task.build_criterion(cfg.criterion).train()
    task.load_dataset("valid")
    data = task.dataset("valid")
    sample = data.collater([data[i] for i in range(48)])
    sample["target"] = sample["target"].view(-1)
    student = grammar.model("--dropout", 0, "--attention-dropout", 0, kind=SENTENCES).train()
    loss, size, log = criterion(student, sample)
    expected, distilled = loss_by_hand(student, grammar.load(noised.path, SENTENCES), sample, weight)
    assert size == 48
    assert distilled > 5
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(log["ipq_distillation"]) == pytest.approx(distilled, rel=1e-5)
    loss.backward()
    assert student.classification_heads[HEAD].out_proj.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad or p.grad is not None for p in criterion.teachers[0].parameters())

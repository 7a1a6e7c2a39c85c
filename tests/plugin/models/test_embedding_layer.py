"""The d x d layer after the embedding that fairseq's own --quant-noise-pq adds: checkpoints with it work everywhere."""

import functools
import json

import pytest
import torch
from lm_fixture import batch, fairseqs_own_noise, ipq_flags, state_of
from roberta_fixture import HEAD, MASKED, SENTENCES, roberta, roberta_batch  # noqa: F401
from toys import python, refuses

import fairseq_quant_noise
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.noise import noise_of

OPTION = "--quant-noise-embedding-layer"
ENCODER, DECODER = "encoder.sentence_encoder", "decoder"
FAMILIES = pytest.mark.parametrize("family", ["lm", MASKED, SENTENCES], indirect=True)
NOISE = ("--quant-noise-pq", 0.1)
STAGES = {"match": r".*\.(quant_noise|fc1|embed_tokens)", "block_size": 4, "n_centroids": 16}


class Family:
    """One lab's models, by the calls that both labs answer."""

    def __init__(self, name, lab):
        self.lab, self.name = lab, name
        self.kind = {} if name == "lm" else {"kind": name}
        self.arch = "transformer_lm" if name == "lm" else "roberta_base"
        self.layer = f"{DECODER if name == 'lm' else ENCODER}.quant_noise"
        self.tokens = (batch() if name == "lm" else roberta_batch())["net_input"]["src_tokens"]

    def model(self, *flags, **settings):
        return self.lab.model(*flags, **self.kind, **settings)

    @functools.cached_property
    def stock(self):
        """Trained by stock fairseq under its own noise."""
        with fairseqs_own_noise():
            return self.lab.train(*NOISE, arch=self.arch, updates=2, **self.kind)

    def load(self, path):
        """By fairseq."""
        return self.lab.load(path, **self.kind)

    def scores(self, model):
        with torch.no_grad():
            head = {"classification_head_name": HEAD} if self.name == SENTENCES else {}
            found = model(self.tokens, **head)
        found = found[0] if isinstance(found, tuple) else found
        return found if self.name == SENTENCES else found[self.tokens != 1]

    def score(self, path):
        """What fairseq-eval-lm or fairseq-validate says of a file."""
        return self.lab.eval_lm(path) if self.name == "lm" else self.lab.validate(path, **self.kind)["loss"]


@functools.cache
def _family(name, lab):
    return Family(name, lab)


@pytest.fixture
def family(request, lab, roberta):  # noqa: F811
    return _family(request.param, lab if request.param == "lm" else roberta)


def verb(*arguments):
    main(list(map(str, arguments)))


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


@FAMILIES
def test_it_is_built_as_fairseq_builds_it(family):
    """The same parameters in the same order from the same random numbers, and the options stay on record."""
    ours = family.model(OPTION)
    with fairseqs_own_noise():
        stock = family.model(*NOISE, arch=family.arch)
    one, two = ours.state_dict(), stock.state_dict()
    assert f"{family.layer}.weight" in one
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(family.scores(ours.eval()), family.scores(stock.eval()))
    assert not [part for part in ours.modules() if part._forward_pre_hooks]
    if family.name != "lm":
        assert (ours.args.quant_noise_pq, ours.args.quant_noise_pq_block_size) == (0, 8)


@FAMILIES
def test_it_has_noise_as_every_linear(family):
    model = family.model(OPTION, "--quant-noise-pq", 0.5).train()
    stored = model.get_submodule(family.layer).weight
    before, seen = stored.detach().clone(), []
    model.get_submodule(family.layer).register_forward_hook(lambda part, *_: seen.append(part.weight.detach()))
    family.scores(model)
    assert family.layer in noise_of(model).weights
    hit = (seen[0].view(-1, 8) == 0).all(1)
    assert 0.2 < hit.float().mean() < 0.8
    assert torch.equal(stored, before)


@FAMILIES
def test_a_stock_checkpoint_loads_with_the_option_alone(family):
    state, expected = state_of(family.stock.path)["model"], family.scores(family.load(family.stock.path))
    ours = family.model(OPTION, "--quant-noise-pq", 0.2).eval()
    ours.load_state_dict(dict(state))
    assert torch.equal(family.scores(ours), expected)
    close(family.scores(Checkpoint(family.stock.path).network), expected)
    wrong = {"has this layer": ((), state), "none; leave": ((OPTION,), family.model().state_dict())}
    for said, (flags, given) in wrong.items():
        with refuses(".*") as caught:
            family.model(*flags).load_state_dict(dict(given))
        assert all(text in str(caught.value) for text in (f"{family.layer}.weight", OPTION, said))


@FAMILIES
@pytest.mark.parametrize("in_codes", [True, False])
def test_every_verb_keeps_it(family, in_codes, capsys):
    """In codes or dense, in the packed file and in the checkpoint that stock fairseq loads without the plugin."""
    lab, stock = family.lab, family.stock.path
    plan = lab.plan({"stages": [STAGES if in_codes else {**STAGES, "match": r".*\.fc1"}]})
    packed, dense = lab.new("packed.safetensors"), lab.new("dense.pt")
    verb("plan", "--path", stock, "--plan", plan)
    verb("quantize", "--path", stock, "--plan", plan, "--out", packed)
    verb("inspect", packed)
    verb("to-dense", packed, "--out", dense)
    rows = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith(family.layer)]
    assert rows == ["pq" if in_codes else "dense"] * len(rows)
    assert len(rows) >= 2
    expected = family.scores(fairseq_quant_noise.load(packed))
    close(family.scores(family.load(packed)), expected)
    close(family.scores(family.load(dense)), expected)
    assert (f"{family.layer}.weight" in read(packed).manifest.tensors) == in_codes
    assert family.score(packed) == pytest.approx(family.score(dense), rel=1e-6)


STOCK = """
import json, sys
import torch
from fairseq.checkpoint_utils import load_model_ensemble
for path, data, tokens, head, out in json.loads(sys.argv[1]):
    (model,), _ = load_model_ensemble([path], arg_overrides={"data": data})
    head = {"classification_head_name": head} if head else {}
    with torch.no_grad():
        torch.save(model.eval()(torch.load(tokens), **head)[0], out)
assert not [name for name in sys.modules if name.startswith("fairseq_quant_noise")]
"""


def test_to_dense_gives_what_stock_fairseq_loads(lab, roberta):  # noqa: F811
    """In a process without the plugin."""
    lines, families = [], [_family("lm", lab), _family(MASKED, roberta), _family(SENTENCES, roberta)]
    for family in families:
        new, data = family.lab.new, lab.data if family.name == "lm" else roberta.of(family.name)
        packed, dense, tokens, out = (new(n) for n in ("packed.safetensors", "dense.pt", "tokens.pt", "scores.pt"))
        plan = family.lab.plan({"stages": [STAGES]})
        verb("quantize", "--path", family.stock.path, "--plan", plan, "--out", packed)
        verb("to-dense", packed, "--out", dense)
        torch.save(family.tokens, tokens)
        lines.append([dense, data, tokens, HEAD if family.name == SENTENCES else "", out, packed])
    done = python("-c", STOCK, json.dumps([list(map(str, line[:5])) for line in lines]), fresh=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for family, (*_, out, packed) in zip(families, lines, strict=True):
        scores = torch.load(out)
        scores = scores if family.name == SENTENCES else scores[family.tokens != 1]
        close(scores, family.scores(fairseq_quant_noise.load(packed)))


def test_to_dense_of_a_stock_checkpoint_is_that_checkpoint(roberta):  # noqa: F811
    family, out = _family(SENTENCES, roberta), roberta.new("dense.pt")
    verb("to-dense", family.stock.path, "--out", out)
    assert torch.equal(family.scores(family.load(out)), family.scores(family.load(family.stock.path)))


@pytest.mark.parametrize("family", ["lm", SENTENCES], indirect=True)
def test_it_goes_through_the_stages_of_ipq(family):
    lab, criterion = family.lab, ipq_flags("plain") if family.name == "lm" else []
    plan = lab.plan({"stages": [{**STAGES, "match": f".*fc1|{family.layer}"}, {**STAGES, "match": ".*embed_tokens"}]})
    flags = ["--finetune-from-model", family.stock.path, "--quantization-config-path", plan, *criterion]
    run = lab.train(OPTION, *NOISE, *flags, updates=4, **family.kind)
    packed = lab.new("packed.safetensors")
    verb("export", "--path", run.path, "--out", packed)
    expected = family.scores(family.load(run.path))
    close(family.scores(fairseq_quant_noise.load(packed)), expected)
    assert read(packed).manifest.tensors[f"{family.layer}.weight"].scheme == "pq"


def test_adaptive_input_has_none(lab):
    with refuses(f"^{OPTION}: fairseq has none with --adaptive-input"):
        lab.model(OPTION, kind="adaptive")

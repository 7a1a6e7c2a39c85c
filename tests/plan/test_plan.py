"""The plan: every key is checked before any work, with an error of one line."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import refuses

from fairseq_quant_noise.errors import UserError
from fairseq_quant_noise.plan.plan import Plan
from fairseq_quant_noise.plan.rules import Activations, NoiseRule, Schedule, StageRule

PLANS = sorted((Path(__file__).parents[2] / "configs" / "plans").glob("*.yaml"))
NOISE = {"match": ".*", "p": 0.1}
FULL = {
    "noise": [
        {"match": "fc", "p": 0.05, "kind": "proxy", "block_size": 4},
        {"match": "emb", "p": 1, "kind": ["pq", "int8"], "choice": "clusters", "n_centroids": 16, "range": "channel"}
        | {"refresh": "epoch", "schedule": {"kind": "step", "from": 0.1, "updates": 100, "steps": 5}},
    ],
    "stages": [
        {"match": "fc", "scheme": "pq", "block_size": 4, "n_centroids": 16, "updates": 100},
        {"match": "emb", "block_size": {"default": 8, ".*b": 4}, "n_centroids": {"default": 256}},
    ],
    "centroids": {"dtype": "fp16"},
    "activations": {"bits": 4, "range": "tensor", "calibration_batches": 3},
    "tuning": {"schedule": "restart"},
}
FAIRSEQ = {
    "n_centroids": {"Linear": {"key": "in_features", "value": {"*": 256}}},
    "block_sizes": {"Linear": {"key": "fuzzy_name", "value": {"fc": 8, "attn": 4}}},
    "layers_to_quantize": ["fc", "attn\\..*"],
}


def test_every_key_is_read():
    plan = Plan.of(FULL)
    schedule = Schedule("step", 0.1, 100, 5)
    assert plan.noise == (
        NoiseRule("fc", 0.05, "proxy", 4),
        NoiseRule("emb", 1, ("pq", "int8"), None, "clusters", 16, "channel", "epoch", schedule),
    )
    assert plan.stages[0] == StageRule("fc", "pq", 4, 16, updates=100)
    assert plan.centroids.dtype == "fp16"
    assert plan.activations == Activations(4, "tensor", 3)
    assert plan.tuning.restarts


def test_a_word_stands_for_the_kind_of_encoding_and_comes_back():
    plan = Plan.of({"encode": "feedback"})
    assert (plan.encode.kind, plan.encode.batches, plan.encode.damping) == ("feedback", 16, 0.1)
    assert Plan.of(plan.to_dict()) == plan
    assert "encode" not in Plan.of({}).to_dict()


def test_a_word_stands_for_the_type_of_what_stays_dense_and_comes_back():
    plan = Plan.of({"dense": "fp16"})
    assert plan == Plan.of({"dense": {"dtype": "fp16"}})
    assert (plan.dense.bits, Plan.of({}).dense.bits) == (16, 32)
    assert Plan.of(plan.to_dict()) == plan
    assert "dense" not in Plan.of({}).to_dict()


def test_what_is_left_out_has_the_papers_values():
    plan = Plan.of({"noise": [NOISE], "stages": [{"match": "fc"}]})
    rule = plan.noise[0]
    assert (rule.kind, rule.d, rule.choice, rule.n_centroids) == ("proxy", 8, "subvectors", 256)
    assert (rule.range, rule.interval, rule.schedule) == ("tensor", 1, None)
    assert plan.stages[0] == StageRule("fc", scheme="pq", block_size=8, n_centroids=256, updates=None)
    assert Plan.of({}) == Plan()
    assert not Plan.of({"tuning": {}}).tuning.restarts
    assert Plan.of({}).activations is None
    assert Plan.of({"activations": {}}).activations == Activations(8, "histogram", 8)


@pytest.mark.parametrize(
    ("kind", "d"),
    [
        ("proxy", 8),
        ("mean", 8),
        ("pq", 8),
        ("int8", 1),
        (["int8", "int2"], 1),
        (["pq", "int8"], 8),
        (["int8", "mean"], 8),
    ],
    ids=str,
)
def test_numbers_are_noised_one_by_one_where_all_kinds_are_scalar(kind, d):
    assert NoiseRule(".*", 0.1, kind).d == d
    assert NoiseRule(".*", 0.1, kind, block_size=4).d == 4


@pytest.mark.parametrize(
    ("keys", "interval"),
    [
        ({"kind": "int8"}, 1),
        ({"kind": "int8", "range": "channel"}, 1),
        ({"kind": "int8", "range": "histogram"}, 100),
        ({"kind": "pq"}, "epoch"),
        ({"kind": ["pq", "int8"], "range": "histogram"}, "epoch"),
        ({"choice": "clusters"}, "epoch"),
        ({"kind": "pq", "refresh": 50}, 50),
        ({"kind": "int8", "refresh": "epoch"}, "epoch"),
    ],
    ids=str,
)
def test_the_interval_of_codebooks_and_ranges(keys, interval):
    assert NoiseRule(".*", 0.1, **keys).interval == interval


def test_a_list_of_kinds_and_a_schedule_are_read_as_yaml_gives_them():
    rule = NoiseRule(".*", 0.1, ["pq", "int8"], schedule={"kind": "linear", "from": 0.5, "updates": 10})
    assert rule.kinds == rule.kind == ("pq", "int8")
    assert rule.schedule == Schedule("linear", 0.5, 10)
    assert NoiseRule(".*", 0.1, schedule={}).schedule == Schedule("constant")
    assert hash(rule) == hash(NoiseRule(".*", 0.1, ("pq", "int8"), schedule=rule.schedule))


@pytest.mark.parametrize("source", [{}, FULL, FAIRSEQ, *PLANS], ids=str)
def test_a_plan_comes_back_from_its_dict_and_from_json(source):
    plan = Plan.of(source)
    assert Plan.of(plan) is plan
    assert Plan.of(plan.to_dict()) == plan
    assert Plan.of(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.name)
def test_the_plans_in_configs_load_from_a_path_and_from_its_name(path):
    assert Plan.of(path).stages
    assert Plan.of(str(path)) == Plan.of(path)


UNKNOWN = [
    ({"noises": []}, "plan: unknown key 'noises'; known keys: noise, stages, centroids"),
    ({"noise": [NOISE | {"size": 8}]}, r"plan: noise\[0\]: unknown key 'size'; known keys: match, p, kind, block_size"),
    ({"stages": [{"match": "a"}, {"match": "b", "k": 8}]}, r"plan: stages\[1\]: unknown key 'k'"),
    ({"centroids": {"bits": 8}}, "plan: centroids: unknown key 'bits'; known keys: dtype, weighted"),
    ({1: 2}, "unknown key '1'"),
]
MISSING = [
    ({"noise": [{"p": 0.1}]}, r"noise\[0\] lacks the key 'match'"),
    ({"noise": [{"match": "fc"}]}, r"noise\[0\] lacks the key 'p'"),
    ({"stages": [{"block_size": 8}]}, r"stages\[0\] lacks the key 'match'"),
]
TYPES = [
    ({"noise": NOISE}, "noise must be a list of rules, not dict"),
    ({"stages": "fc"}, "stages must be a list of rules, not str"),
    ({"stages": 3}, "stages must be a list of rules, not int"),
    ({"noise": ["fc"]}, r"noise\[0\] must be a mapping of keys to values, not str"),
    ({"stages": [None]}, r"stages\[0\] must be a mapping"),
    ({"centroids": "fp16"}, "centroids must be a mapping of keys to values, not str"),
]
NOISE_VALUES = [
    ({"match": "("}, r"noise rule '\(': not a regular expression"),
    ({"match": 5}, "noise rule '5': not a regular expression"),
    ({"match": None}, "not a regular expression"),
    ({"match": "a{99999999999999999999}"}, "not a regular expression"),
    ({"p": -0.1}, r"noise rule '\.\*': p is -0.1; give a probability from 0 to 1"),
    ({"p": 1.5}, "p is 1.5"),
    ({"p": float("nan")}, "p is nan"),
    ({"p": "0.1"}, "p is '0.1'"),
    ({"p": True}, "p is True"),
    ({"p": None}, "p is None"),
    ({"kind": "zero"}, "unknown kind 'zero'; known kinds: proxy"),
    ({"kind": "int9"}, "unknown kind 'int9'"),
    ({"kind": ["pq", "zero"]}, "unknown kind 'zero'"),
    ({"kind": [["pq"]]}, r"unknown kind \['pq'\]"),
    ({"kind": []}, r"noise rule '\.\*': .*kind.*; known kinds: proxy, mean, pq, int2"),
    ({"kind": 8}, "kind"),
    ({"kind": None}, "kind"),
    ({"kind": {"pq": 1}}, "kind"),
    ({"choice": "blocks"}, r"noise rule '\.\*': unknown choice 'blocks'; known: subvectors, clusters"),
    ({"choice": None}, "unknown choice None"),
    ({"range": "row"}, r"noise rule '\.\*': unknown range 'row'; known: tensor, channel, histogram"),
    ({"range": ["tensor"]}, "unknown range"),
    ({"n_centroids": 0}, r"noise rule '\.\*': n_centroids is 0; give a whole number from 1 up"),
    ({"n_centroids": 4097}, "n_centroids is 4097; give at most 4096, codes of 12 bits"),
    ({"n_centroids": {"default": 8}}, "n_centroids is"),
    ({"refresh": 0}, r"noise rule '\.\*': refresh \(updates, or 'epoch'\) is 0; give a whole number from 1 up"),
    ({"refresh": "daily"}, r"refresh \(updates, or 'epoch'\) is 'daily'"),
    ({"refresh": 1.5}, "is 1.5"),
    ({"refresh": True}, "is True"),
    ({"schedule": "linear"}, r"noise rule '\.\*': schedule must be a mapping such as {kind: linear"),
    ({"schedule": 5}, "schedule must be a mapping"),
    (
        {"schedule": {"until": 5}},
        r"noise rule '\.\*': schedule: unknown key 'until'; known keys: kind, from, updates, st",
    ),
    ({"schedule": {"start": 0.5}}, "schedule: unknown key 'start'"),
    ({"schedule": {"kind": "zigzag"}}, "schedule: unknown kind 'zigzag'; known kinds: constant, linear, cosine, step"),
    ({"schedule": {"kind": ["linear"]}}, "schedule: unknown kind"),
    ({"schedule": {"kind": "linear"}}, "schedule: updates is 0; give a whole number from 1 up"),
    ({"schedule": {"kind": "linear", "updates": 1.5}}, "schedule: updates is 1.5"),
    ({"schedule": {"kind": "cosine", "updates": 9, "from": 1.5}}, "schedule: from is 1.5; give a probability"),
    ({"schedule": {"kind": "step", "updates": 9, "steps": 0}}, "schedule: steps is 0"),
    ({"block_size": 0}, "block_size is 0; give a whole number from 1 up"),
    ({"block_size": 8.0}, "block_size is 8.0"),
    ({"block_size": True}, "block_size is True"),
    ({"block_size": {"default": 0}}, "block_size: 'default' is 0; give a whole number"),
]
STAGE_VALUES = [
    ({"match": "["}, r"stage rule '\[': not a regular expression"),
    ({"scheme": "int9"}, "stage 'fc': unknown scheme 'int9'; known schemes: pq, int2"),
    ({"codebook": {1: "own"}}, "stage 'fc': codebook rule '1': not a regular expression"),
    ({"scheme": "int8", "centroids": "int8"}, "stage 'fc': int8 has no centroids; leave `centroids` out"),
    ({"scheme": ["pq"]}, "unknown scheme"),
    ({"block_size": 0}, "block_size is 0; give a whole number from 1 up"),
    ({"block_size": "8"}, "block_size is '8'"),
    ({"block_size": {"default": 0}}, "block_size: 'default' is 0"),
    ({"block_size": {"(": 8}}, "not a regular expression"),
    ({"n_centroids": -1}, "n_centroids is -1"),
    ({"n_centroids": {"default": 2.5}}, "n_centroids: 'default' is 2.5"),
    ({"range": "row"}, "stage 'fc': unknown range 'row'; known: tensor, channel, histogram"),
    ({"updates": 0}, "stage 'fc': updates is 0; give a whole number from 1 up"),
    ({"updates": -5}, "updates is -5"),
    ({"updates": "4500"}, "updates is '4500'"),
    ({"updates": True}, "updates is True"),
]
CENTROIDS = [({"centroids": {"dtype": d}}, "unknown dtype .*; known dtypes: fp16") for d in ("int4", "fp32", 16, None)]
CENTROIDS += [({"centroids": {"weighted": w}}, "weighted is .*; give true or false") for w in ("no", 1, None)]
ACTIVATIONS = [
    ("int8", "activations must be a mapping of keys to values, not str"),
    ({"bit": 8}, "activations: unknown key 'bit'; known keys: bits, range, calibration_batches"),
    ({"bits": 1}, "activations: bits is 1; give 2 to 8"),
    ({"bits": 9}, "bits is 9"),
    ({"bits": 8.0}, "bits is 8.0"),
    ({"bits": "8"}, "bits is '8'"),
    ({"range": "row"}, "activations: unknown range 'row'; known:"),
    ({"calibration_batches": 0}, "activations: calibration_batches is 0; give a whole number from 1 up"),
    ({"calibration_batches": 256}, "calibration_batches is 256; give at most 255"),
]
TUNING = [
    ("restart", "tuning must be a mapping of keys to values, not str"),
    ({"schedules": "restart"}, "tuning: unknown key 'schedules'; known keys: schedule"),
    ({"schedule": "cosine"}, "tuning: unknown schedule 'cosine'; known: continue, restart"),
    ({"schedule": ["restart"]}, "tuning: unknown schedule"),
]
ENCODE = [
    ("both", "encode: unknown kind 'both'; known: plain, feedback"),
    ({"batch": 4}, "encode: unknown key 'batch'; known keys: kind, batches, damping"),
    ({"batches": 0}, "encode: batches is 0; give a whole number from 1 up"),
    ({"damping": 2}, "encode: damping is 2; give a probability"),
    ({"damping": 0}, "encode: damping is 0, which correlated inputs do not allow; give more"),
]
DENSE = [
    ("bf16", "dense: unknown dtype 'bf16'; known: fp32, fp16"),
    ({"bits": 16}, "dense: unknown key 'bits'; known keys: dtype"),
    ({"dtype": 16}, "dense: unknown dtype 16"),
    (["fp16"], "dense must be a mapping of keys to values, not list"),
]
WRONG = [
    *UNKNOWN,
    *MISSING,
    *TYPES,
    *[({"noise": [NOISE | change]}, message) for change, message in NOISE_VALUES],
    *[({"stages": [{"match": "fc"} | change]}, message) for change, message in STAGE_VALUES],
    *CENTROIDS,
    *[({"activations": given}, message) for given, message in ACTIVATIONS],
    *[({"tuning": given}, message) for given, message in TUNING],
    *[({"encode": given}, message) for given, message in ENCODE],
    *[({"dense": given}, message) for given, message in DENSE],
]


@pytest.mark.parametrize(("source", "message"), WRONG, ids=lambda x: str(x)[:60])
def test_a_mistake_is_refused_in_one_line(source, message):
    with refuses(message):
        Plan.of(source)


@pytest.mark.parametrize("text", ["{", "a: [", "a: b: c", "\t- a", "!!python/object:os.system {}", "a: 2001-99-99"])
def test_a_file_that_is_not_yaml_is_refused(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with refuses(r"plan .*plan\.yaml: not YAML"):
        Plan.of(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "plan.yaml").write_bytes(b"\xff\xfe\x00stages")
    with refuses("not YAML"):
        Plan.of(tmp_path / "plan.yaml")


@pytest.mark.parametrize(("text", "kind"), [("- a\n- b", "list"), ("", "NoneType"), ("fc", "str"), ("3", "int")])
def test_a_file_that_holds_no_mapping_is_refused(tmp_path, text, kind):
    (tmp_path / "plan.yaml").write_text(text)
    with refuses(f"must hold a mapping with noise, stages, …; it holds {kind}"):
        Plan.of(tmp_path / "plan.yaml")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with refuses("No such file or directory; give the path of a YAML file"):
        Plan.of(tmp_path / "none.yaml")
    with refuses("give the path of a YAML file"):
        Plan.of(str(tmp_path))


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
NOISE_KEYS = ["kind", "block_size", "choice", "n_centroids", "range", "refresh", "schedule"]
RULE_KEYS = ["match", "p", "kind", "scheme", "block_size", "n_centroids", "updates"]
RULES = st.lists(st.dictionaries(st.sampled_from(RULE_KEYS), JUNK, max_size=4), max_size=2)


@given(
    st.fixed_dictionaries(
        {},
        optional={"noise": RULES | JUNK, "stages": RULES | JUNK}
        | dict.fromkeys(("centroids", "activations", "tuning"), JUNK),
    )
)
@settings(max_examples=50, deadline=None)
def test_whatever_a_mapping_holds_it_is_a_plan_or_a_user_error(source):
    try:
        Plan.of(source)
    except UserError:
        return


@given(st.dictionaries(st.sampled_from(NOISE_KEYS), JUNK, max_size=3))
@settings(max_examples=40, deadline=None)
def test_whatever_a_noise_rule_holds_it_comes_back_from_its_dict_or_is_refused(keys):
    try:
        plan = Plan.of({"noise": [NOISE | keys]})
    except UserError:
        return
    assert Plan.of(json.loads(json.dumps(plan.to_dict()))) == plan

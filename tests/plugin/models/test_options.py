"""The `--quant-noise-*` options as a rule over every weight."""

from argparse import Namespace
from dataclasses import fields

import pytest
from toys import refuses

from fairseq_quant_noise.plan.rules import NoiseRule, Schedule
from fairseq_quant_noise.plugin.models.options import QuantNoiseOptions, noise_rules

OPTIONS = [f"quant_noise_{name}" for name in ("kind", "choice", "range", "refresh", "schedule")]
DEFAULTS = {"quant_noise_pq": 0.0, "quant_noise_pq_block_size": 8, "quant_noise_scalar": 0.0}


def options(**given):
    """fairseq's options and ours, as its parser gives them; `pq=0.1` is --quant-noise-pq 0.1."""
    ours = {name: getattr(QuantNoiseOptions(), name) for name in OPTIONS}
    return Namespace(**DEFAULTS | ours | {f"quant_noise_{name}": value for name, value in given.items()})


def rule(**given):
    (found,) = noise_rules(options(**given))
    return found


def test_without_noise_there_is_no_rule():
    assert noise_rules(options()) == []
    assert noise_rules(options(pq=None, scalar=None)) == []
    assert noise_rules(Namespace()) == []


def test_each_of_our_options_has_a_help_text():
    assert {f.name for f in fields(QuantNoiseOptions)} >= set(OPTIONS)
    assert all(f.metadata["help"] for f in fields(QuantNoiseOptions))


def test_pq_alone_is_fairseqs_proxy_noise():
    assert rule(pq=0.1) == NoiseRule(".*", 0.1, "proxy", 8)
    assert rule(pq=0.1, pq_block_size=4) == NoiseRule(".*", 0.1, "proxy", 4)
    assert noise_rules(Namespace(quant_noise_pq=0.1, quant_noise_pq_block_size=8)) == [NoiseRule(".*", 0.1, "proxy", 8)]


def test_scalar_alone_is_int8_on_a_histogram():
    assert rule(scalar=0.5) == NoiseRule(".*", 0.5, "int8", range="histogram")
    assert rule(scalar=0.5, range="channel").range == "channel"
    assert rule(scalar=1.0, refresh="7", schedule="linear:0:10").refresh == 7
    assert noise_rules(Namespace(quant_noise_scalar=0.5)) == [NoiseRule(".*", 0.5, "int8", range="histogram")]


@pytest.mark.parametrize(
    ("kind", "kinds", "d"),
    [
        ("mean", "mean", 8),
        ("pq", "pq", 8),
        ("int4", "int4", 1),
        ("int8,int4", ("int8", "int4"), 1),
        ("pq,int8", ("pq", "int8"), 8),
        ("pq, int8", ("pq", "int8"), 8),
    ],
)
def test_kind(kind, kinds, d):
    found = rule(pq=0.1, kind=kind)
    assert (found.kind, found.d) == (kinds, d)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"choice": "clusters"}, {"choice": "clusters"}),
        ({"kind": "int4"}, {"kind": "int4", "block_size": None, "range": "tensor"}),
        ({"kind": "int4", "range": "channel"}, {"kind": "int4", "block_size": None, "range": "channel"}),
        ({"refresh": "epoch"}, {"refresh": "epoch"}),
        ({"refresh": "500"}, {"refresh": 500}),
        ({"schedule": "linear:0:1000"}, {"schedule": Schedule("linear", 0.0, 1000)}),
        ({"schedule": "cosine:0.05:20"}, {"schedule": Schedule("cosine", 0.05, 20)}),
        ({"schedule": "step:0:1000:8"}, {"schedule": Schedule("step", 0.0, 1000, 8)}),
    ],
    ids=str,
)
def test_each_option_is_a_key_of_the_rule(given, expected):
    assert rule(pq=0.1, **given) == NoiseRule(".*", 0.1, **{"block_size": 8} | expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pq": 1.5}, "^--quant-noise-pq is 1.5; give a probability from 0 to 1"),
        ({"pq": -0.1}, "--quant-noise-pq is -0.1"),
        ({"pq": float("nan")}, "--quant-noise-pq is nan"),
        ({"scalar": 2}, "^--quant-noise-scalar is 2; give a probability from 0 to 1"),
        ({"pq": 0.1, "scalar": 0.1}, "^--quant-noise-pq and --quant-noise-scalar: give one"),
        ({"pq": 0.1, "kind": "zero"}, r"^--quant-noise-\*: unknown kind 'zero'; known kinds: proxy"),
        ({"pq": 0.1, "kind": ""}, "unknown kind ''"),
        ({"pq": 0.1, "kind": "pq,"}, "unknown kind ''"),
        ({"pq": 0.1, "kind": "int9"}, "unknown kind 'int9'"),
        ({"pq": 0.1, "choice": "blocks"}, r"^--quant-noise-\*: unknown choice 'blocks'; known: subvectors, clusters"),
        ({"pq": 0.1, "range": "row"}, r"^--quant-noise-\*: unknown range 'row'; known: tensor, channel, histogram"),
        ({"scalar": 0.1, "range": "row"}, "unknown range 'row'"),
        ({"pq": 0.1, "pq_block_size": 0}, r"^--quant-noise-\*: block_size is 0"),
        ({"pq": 0.1, "refresh": "0"}, r"^--quant-noise-\*: refresh \(updates, or 'epoch'\) is 0"),
        ({"pq": 0.1, "refresh": "-5"}, r"refresh \(updates, or 'epoch'\) is '-5'"),
        ({"pq": 0.1, "refresh": "daily"}, "is 'daily'"),
        ({"pq": 0.1, "refresh": "²"}, "is '²'"),
        ({"pq": 0.1, "schedule": ""}, "^--quant-noise-schedule : give KIND:FROM:UPDATES, such as linear:0:1000"),
        ({"pq": 0.1, "schedule": "linear"}, "^--quant-noise-schedule linear: give KIND:FROM:UPDATES"),
        ({"pq": 0.1, "schedule": "linear:0"}, "give KIND:FROM:UPDATES"),
        ({"pq": 0.1, "schedule": "linear:x:10"}, "give KIND:FROM:UPDATES"),
        ({"pq": 0.1, "schedule": "linear:0:1e3"}, "give KIND:FROM:UPDATES"),
        ({"scalar": 0.1, "schedule": "linear:0:1:2:3"}, "give KIND:FROM:UPDATES"),
        ({"pq": 0.1, "schedule": "zigzag:0:10"}, r"^--quant-noise-\*: schedule: unknown kind 'zigzag'; known kinds:"),
        ({"pq": 0.1, "schedule": "linear:2:10"}, "schedule: from is 2.0; give a probability"),
        ({"pq": 0.1, "schedule": "linear:nan:10"}, "schedule: from is nan"),
        ({"pq": 0.1, "schedule": "linear:0:0"}, "schedule: updates is 0"),
        ({"pq": 0.1, "schedule": "step:0:10:0"}, "schedule: steps is 0"),
    ],
    ids=str,
)
def test_a_mistake_is_refused_in_one_line(given, message):
    with refuses(message):
        noise_rules(options(**given))

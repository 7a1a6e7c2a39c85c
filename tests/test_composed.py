"""composed.py: a configuration made from an earlier one is Hydra's."""

from unittest import mock

import composed
import fairseq.dataclass.utils
import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from hydra.errors import ConfigCompositionException


def configuration(arguments, compose):
    with mock.patch.object(fairseq.dataclass.utils, "compose", compose):
        return convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), arguments))


@pytest.mark.parametrize(
    "flags",
    [
        ["--lr", "0.01,0.004", "--bf16", "--adam-betas", "(0.5, 0.9)", "--restore-file", "it's/a b.pt"],
        ["--quant-noise-pq", "0.1", "--quant-noise-kind", "pq,int8", "--quant-noise-schedule", "linear:0:2"],
        ["--criterion", "ipq", "--ipq-criterion-options", '{"label_smoothing": 0.1}'],
    ],
    ids=["common", "model", "criterion"],
)
def test_it_has_the_values_of_its_own_command_line(lab, flags):
    first = configuration(lab.arguments(*flags[:2] * ("criterion" in flags[0])), composed.compose)
    arguments, by_hydra = lab.arguments(*flags), mock.Mock(side_effect=composed._by_hydra)
    with mock.patch.object(composed, "_by_hydra", by_hydra):
        found = configuration(arguments, composed.compose)
    assert not by_hydra.called
    assert found == configuration(arguments, composed._by_hydra)
    assert found != first


def test_what_does_not_fit_is_refused_by_hydra(lab):
    args = options.parse_args_and_arch(options.get_training_parser(), lab.arguments())
    convert_namespace_to_omegaconf(args)
    args.log_format = "many"
    said = []
    for compose in (composed._by_hydra, composed.compose):
        with (
            mock.patch.object(fairseq.dataclass.utils, "compose", compose),
            pytest.raises(ConfigCompositionException, match="common.log_format") as end,
        ):
            convert_namespace_to_omegaconf(args)
        said.append(str(end.value))
    assert said[0] == said[1]

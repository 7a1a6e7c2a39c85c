"""torch.jit.script on a model of this package: as on fairseq's own while it is dense, a line when it is not."""

import pytest
import torch
from toys import refuses
from translation_fixture import OWN, translation  # noqa: F401

from fairseq_quant_noise import noise_of, quantize_


@pytest.mark.parametrize("flags", [(), ("--quant-noise-pq", 0.1)], ids=["dense", "with noise"])
def test_a_dense_model_is_scripted_as_fairseqs_is(translation, flags):  # noqa: F811
    model = translation.model(*flags, kind=OWN).eval()
    noised = noise_of(model) is not None
    source, before = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 1]]), torch.tensor([[2, 5, 6], [2, 8, 9]])
    given = source, torch.tensor([4, 3]), before
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(*given)[0], model(*given)[0])
    assert noised == bool(flags)
    assert (noise_of(model) is not None) == noised  # it is as it was
    assert model.quant_noise_layers.chunk == 1


@pytest.mark.parametrize("stage", [{"block_size": 4, "n_centroids": 16}, {"scheme": "int8"}], ids=["pq", "int8"])
def test_a_quantized_model_says_to_dense(translation, stage):  # noqa: F811
    model = translation.model(kind=OWN).eval()
    quantize_(model, {"stages": [{"match": r".*\.fc[12]", **stage}]}, progress=lambda line: None)
    with refuses("torch.jit.script: cannot express quantized weights; .*fairseq-quant-noise to-dense"):
        torch.jit.script(model)

"""Packed files of small networks, and their ONNX models in onnxruntime."""

import torch

from fairseq_quant_noise import quantize_, save
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.deployment import onnx_model
from fairseq_quant_noise.networks.registry import build

WORDS, PAD = 60, 1
PQ = {"stages": [{"match": ".*", "block_size": 4, "n_centroids": 16}]}
LM = {
    "decoder_embed_dim": 32,
    "decoder_ffn_embed_dim": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "max_target_positions": 40,
    "share_decoder_input_output_embed": True,
}
ROBERTA = {
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "max_positions": 20,
    "classification_heads": {"mnli": [32, 3], "other": [16, 2]},
}
TRANSLATION = {
    "encoder_embed_dim": 32,
    "encoder_ffn_embed_dim": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "share_all_embeddings": True,
}


def moved(model, seed=0):
    """The network in eval mode, every parameter moved off its initial value."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def packed_file(folder, name="transformer_lm", options=LM, plan=PQ, calibration=None, half=False, words=WORDS):
    """The path of a packed file of a small network."""
    model = quantize_(moved(build(name, options, words)), plan, calibration=calibration, progress=lambda line: None)
    config = {"architecture": name, "cfg": {"model": options}, "vocab_size": words, "padding_idx": PAD}
    save(model.half() if half else model, folder / "model.safetensors", plan, config)
    return folder / "model.safetensors"


def runtime(content):
    """A session of onnxruntime with the bytes of a model."""
    import onnxruntime

    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def session(path, part=None):
    """A session of onnxruntime with the model of a packed file."""
    return runtime(onnx_model(path, read(path), part))


def scores(of, **inputs):
    """What a session computes: a tensor."""
    return torch.from_numpy(of.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])


def texts():
    """Batches of tokens (B, T) of several sizes; some rows are padded on the right."""
    torch.manual_seed(3)
    found = [torch.randint(4, WORDS, shape) for shape in ((1, 1), (1, 6), (3, 17), (2, 30))]
    found[2][1, 9:] = PAD
    found[3][0, 1:] = PAD
    return found


def decoded(network, *inputs):
    """Its scores with decoded weights: without gradients, a product with integer codes rounds its input to 8 bits."""
    with torch.enable_grad():
        return network(*inputs).detach()

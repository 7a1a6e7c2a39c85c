"""File, memory and time of exported models on one thread, with the settings of a phone: a stand-in for one.

    python benchmarks/phone.py [--layers 12] [--repeats 9] [--json]

Two networks of random weights: a RoBERTa-base with a head of three classes, a sentence of 32 tokens; and a language
model of the size of GPT-2's small one (12 layers of 768, 32,000 words), a word after 64 (`--part step`). Each form is
loaded in a process of its own, which imports onnxruntime and numpy alone. Memory is what the model adds to that
process: at the most while it is loaded, and at rest afterwards. Needs onnxruntime, onnx and onnx_ir, and 6 GB.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from encoder import HEAD
from graphs import need_onnxruntime, quantized
from side_by_side import machine, parser, positive

from fairseq_quant_noise import save
from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.deployment import onnx_model
from fairseq_quant_noise.networks.registry import build

NETWORKS: dict[str, dict[str, Any]] = {
    "roberta": {"options": {"classification_heads": {HEAD: [768, 3]}}, "words": 50265, "part": HEAD},
    "transformer_lm": {
        "options": {
            "decoder_embed_dim": 768,
            "decoder_ffn_embed_dim": 3072,
            "decoder_attention_heads": 12,
            "share_decoder_input_output_embed": True,
        },
        "words": 32000,
        "part": "step",
    },
}
#: The file's form and the products of the model.
FORMS = {
    "iPQ": ("iPQ", "float"),
    "iPQ + int8": ("iPQ int8", "int8"),
    "int8": ("int8", "int8"),
    "int4 as int8": ("int4", "int8"),
    "int4": ("int4", "int4"),
}
#: What a process does with a model: what it prints is a JSON object.
CHILD = """
import gc, json, sys, time
import numpy, onnxruntime
path, part, repeats, ready = sys.argv[1], sys.argv[2], int(sys.argv[3]), "--ort" in sys.argv
def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
options.enable_cpu_mem_arena = options.enable_mem_pattern = False
options.log_severity_level = 3
options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
if ready:
    options.add_session_config_entry("session.load_model_format", "ORT")
before, start = memory("VmRSS"), time.perf_counter()
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
load = time.perf_counter() - start
gc.collect()
rest, most = memory("VmRSS") - before, memory("VmHWM") - before
inputs = {"tokens": numpy.arange(32, dtype=numpy.int64)[None] + 5}
if part == "step":
    layers, two, _, heads, _, channels = session.get_inputs()[1].shape
    inputs = {"tokens": inputs["tokens"][:, :1], "past": numpy.zeros((layers, two, 1, heads, 64, channels), "float32")}
seconds = []
for _ in range(repeats + 2):
    start = time.perf_counter()
    session.run(["scores"], inputs)
    seconds.append(time.perf_counter() - start)
print(json.dumps({"load": load, "at rest": rest, "at most": most, "seconds": sorted(seconds[2:])[repeats // 2]}))
"""


def models(layers: int, words: int | None, folder: Path) -> Iterator[tuple[str, str, str, Path, int]]:
    """Each model: its network, form and part, its path, and the bytes of the packed file."""
    for name, of in NETWORKS.items():
        side = "encoder" if name == "roberta" else "decoder"
        options = of["options"] | {f"{side}_layers": layers}
        size = words or of["words"]
        described = {"architecture": name, "cfg": {"model": options}, "vocab_size": size, "padding_idx": 1}
        for label, (form, products) in {"dense": ("dense", "float"), **FORMS}.items():
            packed = folder / f"{name} {form}.safetensors"
            if not packed.exists():
                torch.manual_seed(0)
                model = build(name, options, size).eval()
                save(model if form == "dense" else quantized(model, form), packed, {"stages": []}, described)
            path = folder / f"{name} {label}.onnx"
            path.write_bytes(onnx_model(packed, read(packed), of["part"], products))
            yield name, label, of["part"], path, packed.stat().st_size


def measured(path: Path, part: str, repeats: int, *flags: str) -> dict[str, float]:
    """What a process of its own finds of a model."""
    command = [sys.executable, "-c", CHILD, str(path), part, str(repeats), *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def converted(path: Path) -> Path:
    """The model as onnxruntime's own format for phones, decoded and optimized ahead."""
    import onnxruntime

    out = path.with_suffix(".ort")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(out), 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return out


def main() -> None:
    """Measure and print."""
    options = parser(__doc__, repeats=9)
    options.add_argument("--layers", type=positive, default=12)
    options.add_argument("--words", type=positive, help="of both (default: each network's own number)")
    args = options.parse_args()
    need_onnxruntime(options)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for network, form, part, path, packed in models(args.layers, args.words, Path(folder)):
            of = {"network": network, "form": form, "packed": packed}
            rows.append(of | {"file": path.stat().st_size} | measured(path, part, args.repeats))
            ready = converted(path)
            path.unlink()
            rows.append(of | {"form": f"{form}, .ort", "file": ready.stat().st_size})
            rows[-1] |= measured(ready, part, args.repeats, "--ort")
            ready.unlink()
    if args.json:
        print(json.dumps(rows))
        return
    print(machine())
    print("| network | form | packed, MiB | model, MiB | loading, s | memory at most, MiB | at rest | ms |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        sizes = " | ".join(f"{row[key] / 2**20:.1f}" for key in ("packed", "file"))
        memory = " | ".join(f"{row[key] / 2**20:.0f}" for key in ("at most", "at rest"))
        times = f"{row['load']:.2f} | {memory} | {row['seconds'] * 1e3:.1f}"
        print(f"| {row['network']} | {row['form']} | {sizes} | {times} |")


if __name__ == "__main__":
    main()

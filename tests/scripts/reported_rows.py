"""The rows of reported.py: commands that users of fairseq reported or may give, and what each must come to.

In a command LM, MT and SENTENCES stand for data, task and a tiny model of this package, EVAL, GENERATE and TEXTS for
what evaluates them; what stands behind them wins. `2 x` starts two processes, each with its RANK, and PORT is a free
one. `python NAME` runs the text of that name in PROGRAMS. A command that is there twice runs once. Rows that prepare
another one must be right too.
"""

from dataclasses import dataclass

DONE = r"done training"
REFUSED = (2, 3)  # the user's mistake; a file that cannot be taken


@dataclass(frozen=True)
class Row:
    """A command and what it must come to."""

    command: str
    says: str = ""  # a regular expression that is found in its output
    exits: int | tuple[int, ...] = 0  # each of them is right
    never: str = r"Traceback|Segmentation"  # a regular expression that is not found in its output


PROGRAMS = {
    "zeros": """
import sys, torch
for path in sys.argv[1:]:
    weight = torch.load(path, weights_only=False)["model"]["decoder.layers.0.fc1.weight"]
    print(f"{(weight == 0).float().mean():.0%} zeros")
""",
    # As fairseq's scripts/average_checkpoints.py does it, which no wheel of fairseq has: of 20 checkpoints, so that
    # codes below 16 overflow a byte too.
    "average": """
import glob, sys, torch
pattern, second, out = sys.argv[1:]
(first,) = glob.glob(pattern)
one, other = (torch.load(path, weights_only=False) for path in (first, second))
for name, value in other["model"].items():
    total = 10 * one["model"][name] + 10 * value
    other["model"][name] = total / 20 if total.is_floating_point() else total // 20
torch.save(other, out)
""",
    "code_in_metrics": """
import os, sys, torch
class Code:
    def __reduce__(self):
        return os.system, ("touch it_ran",)
state = torch.load(sys.argv[1], weights_only=False)
state["extra_state"]["metrics"]["default"] = Code()
torch.save(state, sys.argv[2])
""",
    "did_code_run": "import os; print('it ran' if os.path.exists('it_ran') else 'it did not run')",
    "sample": """
import os, sys
from fairseq.models.transformer_lm import TransformerLanguageModel
folder, name, data = sys.argv[1:]
import fairseq_quant_noise
fairseq_quant_noise.register()
model = TransformerLanguageModel.from_pretrained(os.path.abspath(folder), name, data_name_or_path=data)
print("it goes on:", model.sample("w1 w2", beam=1, max_len_b=4))
""",
    "from_pretrained": """
import os, sys
import fairseq_quant_noise
fairseq_quant_noise.register()
from fairseq_quant_noise.models.transformer import QuantNoiseTransformer
folder, data = os.path.abspath(sys.argv[1]), sys.argv[2]
for name, wrong in (("nowhere.pt", {}), ("checkpoint_last.pt", {"encoder_layers_to_keep": "0,9"})):
    try:
        QuantNoiseTransformer.from_pretrained(folder, name, data_name_or_path=data, **wrong)
    except fairseq_quant_noise.UserError as error:
        print("UserError:", error)
""",
    "cover_all": """
from torch import nn
from fairseq_quant_noise import attach_noise
layer = nn.TransformerEncoderLayer(64, 4, 64, batch_first=True)
model = nn.Sequential(nn.Embedding(200, 64), layer, nn.LSTM(64, 64))
attach_noise(model, {"noise": [{"match": ".*", "p": 0.1, "block_size": 8}]})
""",
    "script": """
import sys, torch
import fairseq_quant_noise
from fairseq import checkpoint_utils
fairseq_quant_noise.register()
path, data = sys.argv[1:]
model = checkpoint_utils.load_model_ensemble([path], arg_overrides={"data": data})[0][0].eval()
torch.jit.script(model)
print("scripted")
""",
    "too_many_centroids": """
import sys
from torch import nn
from fairseq_quant_noise import UserError, quantize_
try:
    quantize_(nn.Sequential(nn.Linear(64, 64)), {"stages": [{"match": ".*", "n_centroids": {"default": 5000}}]})
except UserError as error:
    print("error:", error)
    sys.exit(2)
""",
}

BLEU = """--eval-bleu --eval-bleu-args '{"beam": 2, "max_len_b": 10}' --eval-bleu-detok space --eval-bleu-remove-bpe"""
MANY = "translation_multi_simple_epoch --langs de,en --lang-pairs de-en --encoder-langtok src"
TWO = "--distributed-backend gloo --distributed-world-size 2 --distributed-rank RANK --distributed-no-spawn"
TWO += " --distributed-init-method tcp://localhost:PORT"
FROM_DENSE = "--finetune-from-model dense/checkpoint_last.pt --quantization-config-path lm.yaml"
LM_DENSE = "fairseq-train LM --save-dir dense"
LM_IPQ = f"fairseq-train LM {FROM_DENSE} --max-update 12 --save-interval-updates 1 --save-dir ipq"
MT_DENSE = "fairseq-train MT --save-dir mt"
NAT = "--task translation_lev --criterion nat_loss --noise full_mask"
OUR_NOISE = rf"Quant-Noise: proxy with p = 0\.1 on \d+ weights(.*\n)+.*{DONE}"
NOISED = "--quant-noise-pq 0.1 --max-update 2"
ROWS: dict[str, list[Row]] = {
    "eval_bleu_refused": [
        Row(f"fairseq-train MT {BLEU} --save-dir bleu", DONE),
        Row(f"fairseq-train MT {BLEU} --save-dir bleu --max-update 8", rf"@ 4 updates(.*\n)+.*{DONE}"),
        Row("fairseq-generate GENERATE --path bleu/checkpoint_last.pt", r"Generate valid"),
        Row("fairseq-quant-noise quantize --path bleu/checkpoint_last.pt --plan mt.yaml --out bleu.safetensors"),
        Row(
            f"fairseq-train MT {BLEU} --finetune-from-model bleu/checkpoint_last.pt --quantization-config-path mt.yaml "
            "--save-dir bleu_ipq --max-update 9",
            DONE,
        ),
        Row("fairseq-quant-noise export --path bleu_ipq/checkpoint_last.pt --out bleu_ipq.safetensors"),
        Row("fairseq-train SENTENCES --report-mcc --save-dir mcc", DONE),
        Row("fairseq-train SENTENCES --report-mcc --save-dir mcc --max-update 8", DONE),
        Row("python code_in_metrics bleu/checkpoint_last.pt code.pt"),
        Row("fairseq-generate GENERATE --path code.pt", r"error: .*system", REFUSED),
        Row("python did_code_run", "it did not run"),
    ],
    "stock_arch_noise": [
        *(
            Row(f"fairseq-train {model} --arch {arch} --quant-noise-pq 0.1 --save-dir {arch}", OUR_NOISE)
            for model, arch in (
                ("LM", "transformer_lm"),
                ("MT", "transformer"),
                ("SENTENCES", "roberta"),
                ("MT", "bart_base"),
                (f"MT {NAT}", "nonautoregressive_transformer"),
            )
        ),
        Row(
            "fairseq-train SENTENCES --arch roberta --quant-noise-scalar 0.5 --save-dir roberta_int8",
            OUR_NOISE.replace("proxy", "int8").replace("1", "5"),
        ),
        Row("fairseq-train LM --quant-noise-pq 0.1 --lr 0 --max-update 20 --save-dir still", DONE),
        Row("python zeros still/checkpoint_last.pt", "^0% zeros"),
    ],
    "average_codes": [
        Row(LM_DENSE, DONE),
        Row(LM_IPQ, DONE),
        Row("python average ipq/checkpoint_*_10.pt ipq/checkpoint_last.pt average.pt"),
        Row("fairseq-eval-lm EVAL --path average.pt", r"error: .*code", REFUSED),
        Row("fairseq-quant-noise export --path average.pt --out average.safetensors", r"error: .*code", REFUSED),
    ],
    "restore_missing": [
        Row(
            "fairseq-train LM --restore-file nowhere/model.pt --quantization-config-path lm.yaml --save-dir nowhere",
            r"error: .*nowhere/model\.pt",
            REFUSED,
        ),
        Row(
            "fairseq-train LM --finetune-from-model nowhere/model.pt --quantization-config-path lm.yaml --save-dir no",
            r"error: .*nowhere/model\.pt",
            REFUSED,
        ),
    ],
    "patience_stages": [
        Row(LM_DENSE, DONE),
        Row(
            f"fairseq-train LM {FROM_DENSE} --lr 1e-7 --patience 1 --validate-interval-updates 1 "
            "--save-interval-updates 1 --max-update 30 --save-dir patience",
            r"stage 3 of 3: quantized",
        ),
        Row(
            "fairseq-quant-noise export --path patience/checkpoint_last.pt --out patience.safetensors",
            never="Traceback|stays dense",
        ),
    ],
    "scalar_on_resume": [
        Row(LM_DENSE, DONE),
        Row(
            "fairseq-train LM --restore-file dense/checkpoint_last.pt --quant-noise-scalar 0.5 --max-update 9 "
            "--save-dir int8",
            DONE,
        ),
        Row("fairseq-train LM --save-dir own", DONE),
        Row("fairseq-train LM --quant-noise-scalar 0.5 --max-update 9 --save-dir own", DONE),
    ],
    "packed_legacy_task": [
        Row(f"fairseq-train MT --task {MANY} --save-dir many", DONE),
        Row(f"fairseq-generate GENERATE --task {MANY} --path many/checkpoint_last.pt", r"Generate valid"),
        Row("fairseq-quant-noise quantize --path many/checkpoint_last.pt --plan mt.yaml --out many.safetensors"),
        Row(f"fairseq-generate GENERATE --task {MANY} --path many.safetensors", r"Generate valid"),
    ],
    "wrong_cure_arch": [
        Row(
            "fairseq-train LM --arch transformer_lm_gbw --quantization-config-path lm.yaml --max-update 7 "
            "--save-dir gbw",
            DONE,
        ),
        Row("fairseq-train LM --arch transformer_lm_gbw --save-dir gbw_dense", DONE),
        Row(
            "fairseq-train LM --arch quant_noise_transformer_lm_gbw --finetune-from-model gbw_dense/checkpoint_last.pt "
            "--quantization-config-path lm.yaml --max-update 7 --save-dir gbw_ipq",
            DONE,
        ),
        Row(
            "fairseq-train MT --arch bart_base --quantization-config-path mt.yaml --max-update 7 --save-dir bart",
            DONE,
        ),
    ],
    "mismatch_traceback": [
        Row(LM_DENSE, DONE),
        Row(
            "fairseq-train MORE_WORDS --finetune-from-model dense/checkpoint_last.pt --save-dir other",
            r"error: .*(embed_tokens|dictionary)",
            REFUSED,
        ),
        Row(
            "fairseq-train LM --decoder-layers 3 --finetune-from-model dense/checkpoint_last.pt --save-dir other",
            r"error: .*layers",
            REFUSED,
        ),
        Row(
            "fairseq-train LM --decoder-learned-pos --finetune-from-model dense/checkpoint_last.pt --save-dir other",
            r"error: .*position",
            REFUSED,
        ),
        Row(LM_IPQ, DONE),
        Row(
            "fairseq-train LM --arch transformer_lm --finetune-from-model ipq/checkpoint_last.pt --save-dir other",
            r"error: ",
            REFUSED,
        ),
    ],
    "numpy_compat": [
        Row("fairseq-train LM --sample-break-mode eos --save-dir eos", DONE),
        Row("fairseq-eval-lm EVAL --path eos/checkpoint_last.pt --sample-break-mode eos", r"Perplexity: \d"),
        Row("fairseq-generate TEXTS --path eos/checkpoint_last.pt", r"Translated \d+ sentences"),
        Row("fairseq-interactive TEXTS --path eos/checkpoint_last.pt --buffer-size 8 --input two.txt", r"H-1\t"),
        Row("python sample eos checkpoint_last.pt LM_DATA", r"it goes on: w1 w2"),
        Row("fairseq-train MT --max-tokens 400 --num-batch-buckets 2 --save-dir buckets", DONE),
    ],
    "ddp_default_cpu": [
        Row(f"2 x fairseq-train LM {TWO} {NOISED} --save-dir two", DONE),
        Row(f"2 x fairseq-train LM {TWO} {NOISED} --ddp-backend legacy_ddp --save-dir two_legacy", DONE),
        Row(
            f"2 x fairseq-train LM {TWO} {NOISED} --decoder-layerdrop 0.2 --save-dir two_layerdrop",
            rf"{DONE}|error: .*(legacy_ddp|find-unused-parameters)",
            (0, 2),
        ),
        Row(
            f"2 x fairseq-train LM {TWO} {NOISED} --decoder-layerdrop 0.2 --ddp-backend legacy_ddp --save-dir two_both",
            DONE,
        ),
    ],
    "python_exit": [
        Row(MT_DENSE, DONE),
        Row("python from_pretrained mt MT_DATA", r"UserError: .*nowhere\.pt(.*\n)+UserError: .*9"),
    ],
    "uncovered_layers": [Row("python cover_all", r"\d+ ?% .*")],
    "fp16_cpu": [
        *(Row(f"fairseq-train LM --{kind} {NOISED} --save-dir {kind}", DONE) for kind in ("fp16", "bf16")),
        Row(f"fairseq-train LM --memory-efficient-fp16 {NOISED} --save-dir fp16m", DONE),
    ],
    "torchscript": [
        Row(MT_DENSE, DONE),
        Row("python script mt/checkpoint_last.pt MT_DATA", "scripted"),
        Row("fairseq-quant-noise quantize --path mt/checkpoint_last.pt --plan mt.yaml --out mt.safetensors"),
        Row("python script mt.safetensors MT_DATA", r"to-dense", (0, 1, 2), never="^scripted"),
    ],
    "other_criterions": [
        Row(
            "fairseq-train MT --criterion ipq --ipq-criterion nat_loss --save-dir nat",
            rf"error: .*nat_loss|{DONE}",
            (0, 2),
        ),
        Row(
            "fairseq-train MT --task multilingual_translation --lang-pairs de-en --save-dir multilingual",
            rf"error: .*multilingual|{DONE}",
            (0, 2),
        ),
    ],
    "too_many_centroids": [Row("python too_many_centroids", r"error: .*5000.*4096", 2, never=r"Traceback|for 0\b")],
    "empty_fields": [
        Row(
            f"fairseq-train LM --log-format json --log-interval 1 --save-dir fields {NOISED}",
            DONE,
            never=r"distortion\w*\": null",
        ),
        Row(
            f"fairseq-train LM --log-format simple --log-interval 1 --save-dir fields2 {NOISED}",
            DONE,
            never=r"distortion\w*[ =]None",
        ),
    ],
}

"""Make the page: a folder that any web server can serve, from a packed language model and its tokenizer.

    python examples/browser/make.py model.safetensors --corpus runs/quickstart/corpus --out page --serve 8000

The corpus is the folder of spm.model (SentencePiece, of type BPE) and dict.txt. onnxruntime-web comes from npm, into
node_modules beside this program, the first time.
"""

import argparse
import functools
import json
import shutil
import subprocess
import sys
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from fairseq_quant_noise.artifact import read
from fairseq_quant_noise.artifact.inspection import inspection
from fairseq_quant_noise.deployment import onnx_model
from fairseq_quant_noise.errors import UserError, end_program

HERE = Path(__file__).parent
RUNTIME = HERE / "node_modules/onnxruntime-web/dist"
SOURCES = ("index.html", "page.js", "text.js")
OF_RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # fairseq's, which dict.txt leaves out


def pieces(corpus: Path) -> dict[str, Any]:
    """What text.js needs of a tokenizer: fairseq's words by number, and when each piece was made.

    Raises:
        UserError: a file is missing, or the tokenizer is of another type.
    """
    for name in ("spm.model", "dict.txt"):
        if not (corpus / name).is_file():
            raise UserError(
                f"--corpus {corpus}: has no {name}; give the folder that recipes/quickstart/prepare.sh made"
            )
    tokenizer = SentencePieceProcessor(model_file=str(corpus / "spm.model"))
    ids = [i for i in range(tokenizer.get_piece_size()) if not (tokenizer.is_control(i) or tokenizer.is_unknown(i))]
    scores = {tokenizer.id_to_piece(i): tokenizer.get_score(i) for i in ids}
    if any(score != round(score) for score in scores.values()):
        raise UserError(f"--corpus {corpus}: spm.model is no BPE; train it with model_type bpe")
    lines = (corpus / "dict.txt").read_text(encoding="utf-8").splitlines()
    words = [*SPECIAL, *(line.rpartition(" ")[0] for line in lines)]
    return {"words": words, "ranks": {piece: int(-score) for piece, score in scores.items() if len(piece) > 1}}


def make(file: Path, corpus: Path, out: Path, products: str) -> None:
    """Write everything but onnxruntime's part. Raises UserError where a file does not fit."""
    packed, about = read(file), pieces(corpus)
    expected, found = packed.manifest.model.get("vocab_size"), len(about["words"])
    if expected != found:
        raise UserError(f"--corpus {corpus}: dict.txt has {found} words, but {file} {expected}; give the model's own")
    content = onnx_model(file, packed, "step", products)
    out.mkdir(parents=True, exist_ok=True)
    (out / "model.onnx").write_bytes(content)
    about["dense_bytes"] = inspection(file, packed)["dense_bytes"]
    (out / "about.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
    for name in SOURCES:
        shutil.copy(HERE / name, out)


def add_runtime(out: Path) -> None:
    """Copy onnxruntime-web, installed by npm if it is not there. Raises UserError without npm."""
    if not RUNTIME.is_dir():
        npm = shutil.which("npm")
        if npm is None:
            raise UserError("npm is not installed, and onnxruntime-web comes from it; install Node.js")
        subprocess.run([npm, "install", "--omit=dev", "--no-audit", "--no-fund", "--prefix", str(HERE)], check=True)
    for name in OF_RUNTIME:
        shutil.copy(RUNTIME / name, out)


def serve(out: Path, port: int) -> None:
    """Serve the folder to this machine alone, until interrupted."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(out))
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/", flush=True)
        server.serve_forever()


def main() -> None:
    """Make the page and, if asked, serve it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a packed file of a language model")
    parser.add_argument("--corpus", type=Path, required=True, help="the folder of spm.model and dict.txt")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--products", default="float", help="as of export-onnx (default float)")
    parser.add_argument("--serve", type=int, metavar="PORT", help="serve the page on this port; 0: any that is free")
    args = parser.parse_args()
    try:
        make(args.file, args.corpus, args.out, args.products)
        add_runtime(args.out)
        if args.serve is not None:
            serve(args.out, args.serve)
    except UserError as error:
        end_program(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

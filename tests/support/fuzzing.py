"""What a mutated file may do: be refused in one line, or be a file. Anything else is a `Fault`."""

import contextlib
import functools
import io
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import stacks
import torch
from packed_files import PLANS, quantized_zoo
from torch import nn
from toys import quiet, zoo
from wide import WIDE_PLAN, wide_net

from fairseq_quant_noise import load, quantize_, share_layers_
from fairseq_quant_noise.artifact import pack, read
from fairseq_quant_noise.artifact.writer import serialize
from fairseq_quant_noise.cli.main import main
from fairseq_quant_noise.errors import DamagedFileError, UserError
from fairseq_quant_noise.networks.registry import build
from fairseq_quant_noise.plan.plan import Plan

SECONDS = 20  # until a case is a hang
SLACK = 64 << 20  # bytes that reading may take beyond twice the file: a header of a megabyte as Python's objects
WORDS = 40
LM = {"decoder_layers": 2, "decoder_embed_dim": 16, "decoder_ffn_embed_dim": 32, "decoder_attention_heads": 2}
ROBERTA = {"encoder_layers": 2, "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 32, "encoder_attention_heads": 2}


class Fault(Exception):  # noqa: N818 (of the file, not of the test)
    """A file did what no file may."""


@dataclass(frozen=True)
class Source:
    """A whole file to mutate."""

    content: bytes
    network: Callable[[], nn.Module] | None = None  # to load it into; without one its configuration says
    task: str | None = None  # with which fairseq loads it


def _packed(model: nn.Module, config: dict | None = None, plan: object = None, **settings: object) -> Source:
    return Source(bytes(serialize(pack(model, None if plan is None else Plan.of(plan), config))), **settings)


def _language_model(**stage: object) -> Source:
    options = LM | {"_name": "quant_noise_transformer_lm", "share_decoder_input_output_embed": True, "dropout": 0.1}
    options |= {"max_target_positions": 24, "tokens_per_sample": 24, "add_bos_token": False, "tpu": False}
    options |= {"decoder_input_dim": 16, "decoder_output_dim": 16}
    return _with_configuration("quant_noise_transformer_lm", options, {"_name": "language_modeling"}, stage)


def _roberta() -> Source:
    options = ROBERTA | {"_name": "quant_noise_roberta", "classification_heads": {"mnli": [16, 3]}, "max_positions": 24}
    return _with_configuration("quant_noise_roberta", options, {"_name": "masked_lm"}, {"block_size": 4})


def _with_configuration(name: str, options: dict, task: dict, stage: dict) -> Source:
    torch.manual_seed(0)
    model = quantize_(build(name, options, WORDS), {"stages": [{"match": ".*", **stage}]}, progress=quiet)
    cfg = {"model": options, "task": {**task, "data": "", "tokens_per_sample": 24}, "criterion": {"_name": "masked_lm"}}
    config = {"architecture": name, "cfg": cfg, "vocab_size": WORDS, "padding_idx": 1}
    return _packed(model, config, task=task["_name"] if name.endswith("lm") else None)


@functools.cache
def sources() -> dict[str, Source]:
    """Files of every kind, by name."""
    shared = quantize_(share_layers_(stacks.net(), 2), stacks.PLAN, progress=quiet)
    return {
        **{f"zoo in {plan}": _packed(quantized_zoo(plan), plan=PLANS[plan], network=zoo) for plan in PLANS},
        "codes of 9 bits": _packed(quantize_(wide_net(), WIDE_PLAN, progress=quiet), network=wide_net),
        "shared layers": _packed(shared, network=stacks.net),
        "language model": _language_model(block_size=8, n_centroids=8),
        "language model in int4": _language_model(scheme="int4", range="channel"),
        "roberta": _roberta(),
    }


@contextlib.contextmanager
def no_hang(seconds: int = SECONDS) -> Iterator[None]:
    """A Fault after so many seconds."""

    def stop(*_: object) -> None:
        raise Fault(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Memory:
    """The most memory of this process since `begin`, where Linux tells it; 0 elsewhere."""

    def begin(self) -> None:
        """From here on."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is in use
        self.before = self._peak()

    def grown(self) -> int:
        """Bytes beyond `begin`."""
        return self._peak() - self.before

    @staticmethod
    def _peak() -> int:
        with contextlib.suppress(OSError):
            status = Path("/proc/self/status").read_text()
            return 1024 * int(status.partition("VmHWM:")[2].split()[0])
        return 0


def outcome(source: Source, content: bytes, forged: bool, place: Path) -> str:
    """What became of the mutation `content` of `source`, in a word or two; `forged` says that its hash was made right.

    Raises:
        Fault: another exception than a UserError, a message of several lines, a hang, memory beyond twice the file,
            another network than the original's under the hash of the original, or a file half written.
    """
    place.write_bytes(content)
    memory = Memory()
    memory.begin()
    with no_hang():
        refused = _refusal(lambda: read(place))
        grown = memory.grown()
        if grown > 2 * len(content) + SLACK:
            raise Fault(f"reading {len(content):,} bytes took {grown:,} bytes of memory")
        if refused is not None and type(refused) is not DamagedFileError:
            raise Fault(f"refused as the user's mistake: {refused}")
        _check_verb(["verify", str(place)], 0 if refused is None else 3)
        if refused is not None:
            return "refused"
        if content == source.content:
            return "the original"
        if not forged:
            raise Fault("was read, although its hash is the original's")
        return _use(source, place)


def _refusal(run: Callable[[], object]) -> UserError | None:
    try:
        run()
    except UserError as error:
        if "\n" in str(error) or not str(error).isprintable() or len(str(error)) > 2100:
            raise Fault(f"a refusal that is not one line: {error!r}") from error
        return error
    except Fault:
        raise
    except BaseException as error:
        raise Fault(f"{type(error).__name__}: {error}") from error
    return None


def _use(source: Source, place: Path) -> str:
    """What can be done with a file whose hash holds: it works, or is refused in a line."""
    _check_verb(["inspect", str(place)], 0)
    dense = place.with_suffix(".pt")
    _check_verb(["to-dense", str(place), "--out", str(dense)], 0, 2, 3)
    dense.unlink(missing_ok=True)
    if sorted(os.listdir(place.parent)) != [place.name]:
        raise Fault(f"left behind: {os.listdir(place.parent)}")
    refused = _refusal(lambda: load(place, into=source.network() if source.network else None))
    if refused is None and source.task is not None:
        refused = _refusal(lambda: _through_fairseq(source, place))
    return "refused by load" if refused is not None else "another whole file"


@functools.cache
def _task(name: str) -> object:
    """fairseq's task of this name, with a dictionary and without data."""
    import fairseq.tasks
    from fairseq.data import Dictionary
    from omegaconf import OmegaConf

    import fairseq_quant_noise

    fairseq_quant_noise.register()
    words = Dictionary()
    for i in range(WORDS - len(words)):
        words.add_symbol(f"w{i}")
    cfg = OmegaConf.structured(fairseq.tasks.TASK_DATACLASS_REGISTRY[name]())
    return fairseq.tasks.TASK_REGISTRY[name](cfg, words)


def warm_up() -> None:
    """Import fairseq, which takes its time; later that would look like a hang."""
    for source in sources().values():
        if source.task is not None:
            _task(source.task)


def _through_fairseq(source: Source, place: Path) -> None:
    """As fairseq's programs load it, but for their exit."""
    import fairseq.checkpoint_utils

    from fairseq_quant_noise.plugin.loading import load_state

    state = load_state(place)
    try:
        fairseq.checkpoint_utils.load_model_ensemble([str(place)], task=_task(source.task), state=state)
    except SystemExit as end:  # how a UserError leaves fairseq's programs
        raise (UserError("refused") if end.code in (2, 3) else Fault(f"fairseq ends with {end.code}")) from None


def _check_verb(arguments: list[str], *codes: int) -> None:
    """The verb ends with one of these exit codes, and says one line where it is not 0."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        except Fault:
            raise
        except BaseException as error:
            raise Fault(f"{arguments[0]}: {type(error).__name__}: {error}") from error
    lines = err.getvalue().splitlines()
    said = len(lines) == 1 and lines[0].startswith("error: ") if code else not lines
    if code not in codes or not said:
        raise Fault(f"{arguments[0]}: exit code {code}, {err.getvalue()!r}")

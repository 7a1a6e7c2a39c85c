"""Programs in a process each, forked from one that has imported torch and fairseq: importing takes them three seconds.

A program gets its own arguments, environment, folder, streams and exit code, as one that is started afresh; only what
FIRST names is imported already, never this package. What depends on a fresh interpreter (fairseq absent, the seed of
hashes) wants `toys.python` instead.

    subprocess.run(forks.command("python", "-m", "fairseq_quant_noise", ...))    in one command
    BASH_ENV=forks.shell() bash recipes/...                                      in all that a shell script starts

This file is the server and, as a program, the client: it passes its streams to the server and waits for the exit code.
"""

import json
import os
import socket
import sys

FIRST = ["torch", "safetensors.torch", "hydra", "fairseq"]
FIRST += [f"fairseq.{x}" for x in ("trainer", "binarizer", "sequence_scorer", "quantization_utils", "nan_detector")]
VERBS = ("train", "hydra-train", "validate", "eval-lm", "generate", "interactive", "preprocess", "quant-noise")
PROGRAMS = ["python", *(f"fairseq-{verb}" for verb in VERBS)]
KILLED = 137  # the exit code of a program that ended without one


def _place(known: list = []) -> str:  # noqa: B006 (one server for this process, started when it is first asked for)
    if not known:
        import subprocess
        import tempfile

        folder = tempfile.TemporaryDirectory(prefix="forks-")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{folder.name}/socket")
            listener.listen(64)  # clients may come while it imports
            line, fd = [sys.executable, __file__, "serve"], listener.fileno()
            # Its standard input ends with this process, and it ends with that.
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            environment.pop("PYTHONPATH", None)
            server = subprocess.Popen([*line, str(fd)], stdin=subprocess.PIPE, pass_fds=[fd], env=environment, cwd="/")
        known += [folder, server]
    return f"{known[0].name}/socket"


def command(*arguments: object) -> list[str]:
    """A command line that runs this program, one of PROGRAMS, with these arguments."""
    return [sys.executable, "-IS", __file__, "ask", _place(), *map(str, arguments)]


def shell() -> str:
    """A file for BASH_ENV: in each shell script, PROGRAMS are functions that fork."""
    path = _place() + ".sh"
    with open(path, "w") as file:
        for name in PROGRAMS:
            words = " ".join(f"'{word}'" for word in command(name))
            file.write(f'{name}() {{ {words} "$@"; }}\n')
    return path


def ask(place: str, *arguments: str) -> int:
    """The exit code of a program that has this process's environment, folder and streams."""
    request = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(place)
        socket.send_fds(server, [len(request).to_bytes(8, "little")], [0, 1, 2])
        server.sendall(request)
        code = server.recv(1)
    return code[0] if code else KILLED


def serve(fd: int) -> None:
    """Fork for each request, until the standard input ends."""
    import importlib
    import logging
    import select
    import signal

    for name in FIRST:
        importlib.import_module(name)
    logging.root.handlers.clear()  # fairseq's programs make theirs before they import fairseq
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: they send their code themselves
    listener, path = socket.socket(fileno=fd), list(sys.path[1:])
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            return
        client, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _serve_one(client, path)
            finally:
                os._exit(KILLED)
        client.close()


def _serve_one(client: socket.socket, path: list[str]) -> None:
    """Take the place of the client's process, and end."""
    import atexit
    import threading

    size, streams, _, _ = socket.recv_fds(client, 8, 3)
    with client.makefile("rb") as stream:
        request = json.loads(stream.read(int.from_bytes(size, "little")))
    for i, stream in enumerate(streams):
        os.dup2(stream, i)
        os.close(stream)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    threading.Thread(target=_end_with, args=[client], daemon=True).start()
    code = _code_of(request["arguments"], path)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads it any more
            code = code or 1
    client.sendall(bytes([code]))
    os._exit(code)


def _end_with(client: socket.socket) -> None:
    """A client that is killed takes its program with it."""
    client.recv(1)
    os._exit(KILLED)


def _code_of(arguments: list[str], path: list[str]) -> int:
    """Run a program as the interpreter does; its exit code."""
    import traceback

    try:
        _run(arguments, path)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run(arguments: list[str], path: list[str]) -> None:
    import importlib.metadata
    import runpy

    import numpy as np

    np.random.seed()  # or all would draw the same
    name, *rest = arguments
    found = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [folder for folder in found if folder] + path
    if name != "python":
        (entry,) = importlib.metadata.entry_points(group="console_scripts", name=name)
        sys.argv[:] = arguments
        sys.exit(entry.load()())
    if rest[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv[:] = rest[1:]
        runpy.run_module(rest[1], run_name="__main__", alter_sys=True)
    elif rest[0] in ("-c", "-"):
        text = rest[1] if rest[0] == "-c" else sys.stdin.read()
        sys.path.insert(0, "")
        sys.argv[:] = [rest[0], *rest[(2 if rest[0] == "-c" else 1) :]]
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(text, "<string>", "exec"), vars(main))
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(rest[0])))
        sys.argv[:] = rest
        runpy.run_path(rest[0], run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        sys.exit(ask(*sys.argv[2:]))

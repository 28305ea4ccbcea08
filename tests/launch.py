# SPDX-License-Identifier: MIT. Copyright 2026 the DVO reference authors
"""Start the project's commands in processes forked from one that has imported all it needs: an import of
torch and transformers takes seconds, and the tests start dozens of processes."""
import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import tqdm

ROOT = Path(__file__).resolve().parents[1]
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["launch", "tiny", "dvo"])
os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))        # of the server, for that
os.environ["OMP_NUM_THREADS"] = "1"


class Command:
    """A script with arguments, as one process or as ranks of a process group: what torchrun would start.
    Otherwise like subprocess.Popen. nodes: working folders of machines with one rank each. largest_file:
    bytes a file may have, as on a full disk. environment: variables. before: what the process does first:
    functions, see below, each with its arguments."""

    def __init__(self, *arguments, script="dvo.py", ranks=0, cwd=ROOT, nodes=(), largest_file=None,
                 environment={}, before=()):
        self.folder = tempfile.TemporaryDirectory()
        self.pipes = {}                                             # what each process says, without a disk
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        if largest_file:
            before = [(limit_files, largest_file), *before]
        self.processes = []
        for r in range(max(1, ranks)):
            local = "0" if nodes else str(r)
            rank = {"RANK": str(r), "LOCAL_RANK": local, "WORLD_SIZE": str(ranks), **group} if ranks else {}
            where = nodes[r] if nodes else cwd
            for name in "out", "err":
                path = f"{self.folder.name}/{r}.{name}"
                os.mkfifo(path)
                self.pipes[r, name] = os.open(path, os.O_RDWR | os.O_NONBLOCK), []
            self.processes.append(forks.Process(target=run, args=(
                [str(ROOT / script), *map(str, arguments)], rank | environment, f"{self.folder.name}/{r}",
                str(where), before)))
            self.processes[-1].start()

    def read(self):
        for pipe, said in self.pipes.values():
            with contextlib.suppress(BlockingIOError):
                while True:
                    said.append(os.read(pipe, 2**16))

    def poll(self):
        """Exit status, of the first rank that failed if one did; None while some are at work."""
        self.read()
        status = [process.exitcode for process in self.processes]
        failed = next((code for code in status if code), 0)
        if failed and None in status:                               # as torchrun does
            self.kill()
        return failed if None not in status else None

    def communicate(self, timeout=None):
        start = time.time()
        while self.poll() is None:
            if timeout is not None and time.time() - start > timeout:
                raise subprocess.TimeoutExpired(self.processes[0].name, timeout)
            time.sleep(0.01)
        self.returncode = self.poll()
        self.stdout, self.stderr = ("".join(self.said(r, name) for r in range(len(self.processes)))
                                    for name in ("out", "err"))
        return self.stdout, self.stderr

    def said(self, rank, name):
        return b"".join(self.pipes[rank, name][1]).decode()

    def __del__(self):
        for pipe, _ in self.pipes.values():
            os.close(pipe)

    def send_signal(self, number):
        for process in self.processes:
            os.kill(process.pid, number)

    def kill(self):
        for process in self.processes:
            process.kill()


def run(arguments, environment, output, cwd, before):
    """In the forked process: become the script, which says what it says to `output`.out and .err."""
    for number, name in (1, "out"), (2, "err"):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY), number)
    speak("utf-8")
    tqdm.tqdm.set_lock(threading.RLock())                           # a kill would leave its semaphore
    signal.signal(signal.SIGINT, signal.default_int_handler)        # a shell's background job ignores Ctrl-C
    faulthandler.enable(file=2)                                     # SIGABRT shows the stack
    os.environ.update(environment)
    os.chdir(cwd)
    for function, *given in before:
        function(*given)
    sys.argv = arguments
    script = Path(arguments[0])
    if script.stem == "eval":
        sys.modules.pop("mcts", None)                               # which knows another eval
    if script.parent == ROOT:                                       # compiled already
        runpy.run_module(script.stem, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(arguments[0], run_name="__main__")


# What a process may do `before`


def limit_files(largest):
    """A full disk: no file becomes larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


def stop(_):
    """Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


def at(place, function, given):
    """Call function(given) when the script comes to `place`, such as "dvo.save_model"."""
    file, name = place.split(".")

    def trace(frame, event, _):
        code = frame.f_code
        if code.co_name == name and code.co_filename == str(ROOT / f"{file}.py"):
            sys.settrace(None)
            function(given)

    sys.settrace(trace)


def give(number, text):
    """A pipe from which the file number `number` reads `text`, as in a shell's <(...)."""
    end, start = os.pipe()
    os.write(start, text.encode())
    os.close(start)
    os.dup2(end, number)


def print_to(path):
    os.dup2(os.open(path, os.O_WRONLY), 1)


def speak(encoding):
    """A terminal of that encoding."""
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)
    sys.stderr = open(2, "w", encoding=encoding, closefd=False, errors="backslashreplace", buffering=1)


def hide(*modules):
    """What another system does not have, and what has asked for it already."""
    for name in modules:
        sys.modules[name] = None
    for name in "eval", "mcts", "dvo":
        sys.modules.pop(name)
    del os.sysconf


def obey():
    """Root may write everywhere; this process may no longer: it gives up all capabilities (on Linux)."""
    version = struct.pack("Ii", 0x20080522, 0)
    ctypes.CDLL(None).capset(version, bytes(24))

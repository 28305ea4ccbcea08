"""Start the project's commands in processes forked from one that has imported all it needs: an import of
torch and transformers takes seconds, and the tests start dozens of processes."""
import faulthandler
import multiprocessing
import os
import resource
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["launch", "tiny", "dvo"])
os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))        # of the server, for that
os.environ["OMP_NUM_THREADS"] = "1"


class Command:
    """A script with arguments, as one process or as ranks of a process group: what torchrun would start.
    Otherwise like subprocess.Popen. nodes: working folders of machines with one rank each. largest_file: bytes
    a file may have, as on a full disk."""

    def __init__(self, *arguments, script="dvo.py", ranks=0, cwd=ROOT, nodes=(), largest_file=None):
        self.folder = tempfile.TemporaryDirectory()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        self.processes = []
        for r in range(max(1, ranks)):
            local = "0" if nodes else str(r)
            rank = {"RANK": str(r), "LOCAL_RANK": local, "WORLD_SIZE": str(ranks), **group} if ranks else {}
            where = nodes[r] if nodes else cwd
            self.processes.append(forks.Process(target=run, args=(
                [str(ROOT / script), *map(str, arguments)], rank, f"{self.folder.name}/{r}", str(where),
                largest_file)))
            self.processes[-1].start()

    def poll(self):
        """Exit status, of the first rank that failed if one did; None while some are at work."""
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
        self.stdout, self.stderr = (                                # rank after rank
            "".join(path.read_text() for path in sorted(Path(self.folder.name).glob(f"*.{name}")))
            for name in ("out", "err"))
        return self.stdout, self.stderr

    def send_signal(self, number):
        for process in self.processes:
            os.kill(process.pid, number)

    def kill(self):
        for process in self.processes:
            process.kill()


def run(arguments, environment, output, cwd, largest_file):
    """In the forked process: become the script, which writes to `output`.out and .err."""
    for number, name in (1, "out"), (2, "err"):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT), number)
    faulthandler.enable(file=2)                                     # SIGABRT shows the stack
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")

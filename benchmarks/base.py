"""Another revision of the library beside this one: its code in a throwaway worktree, run by a
process that takes turns with ours.

The worker measures with this checkout's benchmarks and the other revision's vlpfast, so that only
the library differs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

_ROOT = Path(__file__).parents[1]


@contextmanager
def checkout(ref: str) -> Iterator[Path]:
    """A folder for PYTHONPATH that holds vlpfast as of `ref`, built, and this checkout's
    benchmarks; removed afterwards.

    Raises:
        ValueError: `ref` is no revision of this repository, or does not build.
    """
    with tempfile.TemporaryDirectory(prefix="vlpfast-base-") as folder:
        tree, path = Path(folder) / "tree", Path(folder) / "path"
        done = subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), ref],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(f"--base {ref}: {reason}")
        try:
            _build(tree, ref)
            path.mkdir()
            (path / "benchmarks").symlink_to(_ROOT / "benchmarks")
            shutil.move(tree / "vlpfast", path / "vlpfast")
            if (tree / "kernels").is_dir():
                shutil.copytree(tree / "kernels", path / "vlpfast" / "kernels")
            yield path
        finally:
            remove = ["git", "worktree", "remove", "--force", str(tree)]
            subprocess.run(remove, cwd=_ROOT, capture_output=True, check=False)


def _build(tree: Path, ref: str) -> None:
    if not (tree / "setup.py").exists():
        return
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"--base {ref} does not build: {done.stderr.strip()[-500:]}")


class Remote:
    """One implementation prepared in the worker; sampled like a local one."""

    def __init__(self, worker: Worker, token: int, kind: str, peak_bytes: int | None) -> None:
        self._worker, self._token = worker, token
        self.kind, self.peak_bytes = kind, peak_bytes

    def sample(self) -> float:
        """Milliseconds of one call."""
        return self._worker.ask({"sample": self._token})["ms"]


class Worker:
    """The process that has the other revision imported; answers one JSON line to each."""

    def __init__(self, path: Path, threads: int) -> None:
        # -P keeps the working directory, and with it this checkout's vlpfast, off sys.path.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks.base", str(path), str(threads)],
            env={**os.environ, "PYTHONPATH": str(path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()

    def ask(self, request: dict) -> dict:
        """Sends a request and waits for its answer.

        Raises:
            RuntimeError: the worker failed, with its reason.
            NotImplementedError: the implementation cannot run there.
        """
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process of the base revision ended")
        answer = json.loads(line)
        if "missing" in answer:
            raise NotImplementedError(answer["missing"])
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def impls(self, op: str, device: str) -> list[str]:
        """Names of all implementations the benchmark finds there."""
        return self.ask({"impls": op, "device": device})["impls"]

    def prepare(self, case: object, impl: str) -> Remote:
        """Prepares one implementation there."""
        answer = self.ask({"case": asdict(case), "impl": impl})
        return Remote(self, answer["token"], answer["kind"], answer["peak_bytes"])

    def drop(self) -> None:
        """Lets go of everything prepared."""
        self.ask({"drop": True})


def _serve(path: Path, threads: int) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with answers

    import torch

    import vlpfast
    from benchmarks import harness

    if path not in Path(vlpfast.__path__[0]).parents:
        raise RuntimeError(f"the base revision is imported from {vlpfast.__path__[0]}, not {path}")
    torch.set_num_threads(threads)
    ready: list[harness.Prepared] = []

    def answer(request: dict) -> dict:
        if "sample" in request:
            return {"ms": ready[request["sample"]].sample()}
        if "impls" in request:
            bench = harness.load(request["impls"])
            return {"impls": list(bench.impls(torch.device(request["device"])))}
        if "drop" in request:
            ready.clear()
            return {}
        case = harness.Case(**request["case"])
        ready.append(harness.Prepared(harness.load(case.op), request["impl"], case))
        return {
            "token": len(ready) - 1,
            "kind": ready[-1].kind,
            "peak_bytes": ready[-1].peak_bytes,
        }

    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except NotImplementedError as error:
            reply = {"missing": str(error)}
        except Exception as error:  # told to the process that asked, which decides
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))

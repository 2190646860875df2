"""Processes of one group that tests give work to; each piece has a hard time-out, and none outlives its tests."""

import contextlib
import importlib
import multiprocessing
import os
import tempfile
import traceback
import warnings

START = 150.0  # seconds until all ranks have met


class RanksFailedError(AssertionError):
    """What the ranks said that failed."""


class Ranks:
    """W processes with a gloo group; `run` has all of them call a function of a module."""

    def __init__(self, size, threads=None):
        self.size, self.threads, self._processes = size, threads or [1] * size, []

    def run(self, function, *args, timeout=150.0):
        """[function(*args) on rank 0, 1, ...]; raises RanksFailedError with what went wrong where."""
        if not self._processes:
            self._start()
        for _, pipe in self._processes:
            pipe.send((function.__module__, function.__name__, args))
        return self._answers(timeout, function.__name__)

    def _start(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.training_loops"])  # torch is imported once for all
        store = tempfile.mktemp(prefix="ranks")
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, store, there, self.threads[rank]), daemon=True
            )
            process.start()
            there.close()
            self._processes.append((process, here))
        self._answers(START, "start")

    def _answers(self, timeout, what):
        answers = []
        for _, pipe in self._processes:
            try:
                answers.append(pipe.recv() if pipe.poll(timeout) else (False, f"no answer in {timeout} s"))
            except EOFError:
                answers.append((False, "died"))
            if not answers[-1][0]:
                timeout = min(timeout, 5.0)  # the others wait for it
        wrong = [f"rank {rank}: {text}" for rank, (is_good, text) in enumerate(answers) if not is_good]
        if wrong:
            self.close()
            raise RanksFailedError(f"{what}\n" + "\n".join(wrong))
        return [value for _, value in answers]

    def close(self):
        """End all processes, whatever they do."""
        for process, pipe in self._processes:
            pipe.close()
            process.kill()
            process.join()
        self._processes = []


def _serve(rank, size, store, pipe, threads):
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    pipe.send((True, None))
    with contextlib.suppress(EOFError):
        while True:
            module, name, args = pipe.recv()
            try:
                pipe.send((True, getattr(importlib.import_module(module), name)(*args)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))

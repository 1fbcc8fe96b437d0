"""Failures of a group of processes: one line says which process failed first and why, and all stop.

Processes tell each other through the group's store. A process that fails claims to be the first; a
process whose connections break looks for such a claim, then for a process of its machine that is
gone.
"""

import json
import os
import re
import sys
import threading
import time
import traceback
from dataclasses import asdict
from typing import NoReturn

import torch.distributed as dist
from tqdm import tqdm

from . import errors, process
from .lock import Owner

POLL = 0.3  # Seconds between looks at the store.
PATIENCE = 3.0  # Seconds in which the cause of a broken connection is looked for.
GRACE = 5.0  # Seconds that a process has to end by itself after another one failed.
# Messages of gloo and NCCL, also inside other errors.
BROKEN = re.compile(r"gloo/|NCCL|ncclRemoteError|Connection (closed|reset) by peer|Broken pipe")


class Failures:
    """Watch a group for failures, from its start until `close`, and tell it of this process's."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        """store: the group's, of which a connection of its own is opened."""
        self.store: dist.Store = store.clone()  # type: ignore[attr-defined]  # torch has no stub.
        self.rank, self.size = rank, size
        self.store.set(f"process/{rank}", json.dumps(asdict(Owner())))
        self._over = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        """Stop watching."""
        self._over.set()

    def _watch(self) -> None:
        """End this process after a claim of another one, and once torchrun is gone."""
        while not self._over.wait(POLL):
            try:
                claim = self._claim()
            except RuntimeError:
                # Without torchrun the store is the main process's, which may end first.
                if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                    process.stop()
                return
            if claim is not None:
                process.stop()
                if not self._over.wait(GRACE):
                    os._exit(claim)
                return

    def _claim(self) -> int | None:
        """Return the exit status of the first failure, None without one."""
        return int(self.store.get("failed").split()[0]) if self.store.check(["failed"]) else None

    def end(self, error: BaseException) -> NoReturn:
        """End this process after an error, and print one line if this is the group's first failure.

        The process ends without taking down its interpreter and its part of the group, which may
        wait for processes that are gone. An error that no user causes has its traceback after the
        line.

        Raises:
            SystemExit: `error` itself, if it was not raised by a signal.
        """
        if isinstance(error, SystemExit) and not isinstance(error, process.Stopped):
            raise error
        with process.hold_signals():  # torchrun stops this process once another one is gone.
            status = self._report(error)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _report(self, error: BaseException) -> int:
        """Print an error if it is the group's first one; return this process's exit status."""
        stopped = isinstance(error, process.Stopped)
        broken = isinstance(error, dist.DistError) or BROKEN.search(str(error)) is not None
        cause = self._cause(PATIENCE if broken else 0.0) if broken or stopped else None
        status = 130 if stopped and cause is None else 1
        mine = f"{status} {self.rank}"
        try:
            first = self.store.compare_set("failed", "", mine).decode()
        except RuntimeError:  # Every process of a group that has lost its store says so.
            first = mine
        if first != mine:
            return int(first.split()[0])
        place = f"rank {self.rank} on {Owner().host}"
        if self.rank:  # The main process's progress bar leaves the cursor behind itself.
            print(file=sys.stderr)
        if cause is not None:
            _print(f"error: {cause} was killed, most likely for memory")
        elif stopped:
            _print(f"{place}: stopped by a signal")
        elif broken:
            _print(f"error: {place}: lost another process of the group: {error}")
        else:
            errors.print_line(error, f"{place}: ")
            if not errors.is_users(error) or os.environ.get("MLEMBED_TRACEBACK"):
                traceback.print_exception(error)
        return status

    def _cause(self, seconds: float) -> str | None:
        """Return the process of this machine that is gone; None if another one made a claim.

        seconds: how long to look for either.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                if self._claim() is not None:
                    return None
                for rank in range(self.size):
                    name = f"process/{rank}"
                    if self.store.check([name]):
                        owner = Owner(**json.loads(self.store.get(name)))
                        if owner.here() and not owner.alive():
                            return f"rank {rank} on {owner.host} (process {owner.pid})"
            except RuntimeError:  # The store is gone.
                return None
            if time.monotonic() >= end:
                return None
            time.sleep(0.1)


def _print(text: str) -> None:
    tqdm.write(" ".join(text.split()), file=sys.stderr)

"""Two processes of a group both end, with objects that are still alive, and if one fails."""

import gc
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo  # DDP imports it at its first use, which would be in each child.
import torch.distributed as dist
from processes import on_path, started
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mlembed.runtime.checkpoint import Saver
from mlembed.runtime.distributed import gather, world

alive = []  # Outlives the group and ends with the interpreter.


def replica():
    """Return a replica whose last gradients have just been reduced."""
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(16, 16, bias=False), nn.LayerNorm(16)))
    for _ in range(3):
        ddp(torch.randn(8, 16)).square().mean().backward()
    return ddp


def replica_outlives(where, folder):
    alive.append(replica())


def graph_outlives(where, folder):
    rows = gather(torch.randn(1, 2, 4, requires_grad=True), [2, 2])
    loss = torch.cat(rows).square().sum()
    loss.backward(retain_graph=True)
    alive.append((rows, loss))


def work_is_under_way(where, folder):
    """Leave a reduction that the other process never joins, until it ends."""
    alive.append(replica())
    if where.rank:
        time.sleep(0.2)
    else:
        alive.append(dist.all_reduce(torch.ones(10), async_op=True))


def one_fails(where, folder):
    """Raise on one process, with a replica in the frames of the traceback."""
    ddp = replica()
    if where.rank:
        raise ValueError("expected a good end, got a bad one")
    return ddp


def one_fails_while_saving(where, folder):
    """Raise on one process while both write a checkpoint in the background."""
    with Saver(Path(folder), where.rank, where.size, 1) as saver:
        saver.save(1, {f"model.{where.rank}": torch.ones(1000)}, lambda path: None)
        if where.rank:
            raise ValueError("expected a good end, got a bad one")
    assert [path.name for path in Path(folder).iterdir()] == ["step_00000001"]


FAIL = (one_fails, one_fails_while_saving)
WAYS = (replica_outlives, graph_outlives, work_is_under_way, *FAIL)


def end(way, rank, port, folder):
    """Be one process of two, to the end of its interpreter."""
    group = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in group.items()}
    with world("cpu") as where:
        way(where, folder)
    alive.clear()
    gc.collect()


def rounds(number):
    """Fork two processes at a time, `number` times in all ways; print their exit statuses."""
    for i in range(number):
        for way in WAYS:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            folder, children = tempfile.mkdtemp(), []
            for rank in range(2):
                if not (child := os.fork()):
                    # Return, so that this interpreter ends like any other.
                    return end(way, rank, port, folder)
                children.append(child)
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            shutil.rmtree(folder)
            print(i, way.__name__, *codes, flush=True)


@pytest.mark.parametrize("number", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_two_processes_end(number):
    """Five ways to end, each `number` times: ten pairs, and two hundred in `make test-all`."""
    command = [sys.executable, __file__, number]
    with started(command, env=on_path(), stdout=-1, stderr=-1) as process:
        out, err = process.communicate(timeout=60 + 20 * number)
    assert [line.split() for line in out.splitlines()] == [
        [str(i), way.__name__, "0", str(int(way in FAIL))] for i in range(number) for way in WAYS
    ], err[-2000:]
    lines = [line.partition(": rank 1 on ") for line in err.splitlines() if line]
    assert len(lines) == number * len(FAIL), err[-2000:]
    for error, _, reason in lines:
        assert error == "error" and reason.endswith(": expected a good end, got a bad one")


if __name__ == "__main__":
    gc.freeze()  # Collections in a child would copy all memory that it shares.
    rounds(int(sys.argv[1]))

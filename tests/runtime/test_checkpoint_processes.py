"""Checkpoints of real gloo processes: shards of FSDP2 that any number of processes can load, and
processes that are killed. As a script, this file is one of these.
"""

import signal
import socket
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from subprocess import PIPE

import pytest
import torch
import torch.distributed as dist
from factories import tiny_shape
from processes import gloo, on_path, started
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mlembed import config
from mlembed.modeling import pretrained
from mlembed.modeling.transformer import Transformer
from mlembed.runtime import checkpoint, intact
from mlembed.runtime.distributed import World, world
from mlembed.training.optim import optimizer_of

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
# Of four processes, some hold fewer of the 50 tokens, and one holds none of W's 5 rows.
SHAPE = tiny_shape(vocab_size=50, hidden_size=16, head_dim=8, intermediate_size=24, ranks=(2, 5))
ALONE = World(0, 1, torch.device("cpu"))
BANK = {"bank.rows": torch.arange(12.0).view(4, 3).bfloat16(), "bank.ids": torch.arange(4)}


def build(where, sharded=True):
    """Return a model and its optimiser, each parameter sharded over all processes."""
    torch.manual_seed(7)
    model = Transformer(SHAPE)
    if where.size > 1 and sharded:
        mesh = init_device_mesh("cpu", (where.size,))
        for part in (*model.layers, model):
            fully_shard(part, mesh=mesh)
    return model, optimizer_of(model, config.Optim(lr=1e-2, weight_decay=0.1))


def advance(model, optimizer, seed):
    """Two steps, and random states that differ between processes."""
    for step in (1, 2):
        for name, parameter in model.named_parameters():
            if name != "norm.weight" or step == 2:  # It counts fewer steps than the others.
                parameter.grad = parameter.detach() * (seed + step)
        optimizer.step()
    torch.manual_seed(seed + (dist.get_rank() if dist.is_initialized() else 0))


def whole(model, optimizer, rank):
    """Return full tensors of the state to save; all processes call it."""
    tensors = checkpoint.training_tensors(model, optimizer, rank)
    return {
        name: (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()
        for name, x in tensors.items()
    }


def save(where, directory, sharded=True):
    """Save a checkpoint; return what this process saved."""
    model, optimizer = build(where, sharded)
    advance(model, optimizer, 100 * where.size)
    before = whole(model, optimizer, where.rank)
    assert len(before) == 4 * len(list(model.parameters())) + 1
    if where.size > 1 and sharded:
        model.unshard()  # The root's state after a forward without a backward.
    tensors = checkpoint.training_tensors(model, optimizer, where.rank)
    tensors["bank.of." + str(where.rank)] = torch.full((where.rank, 2), float(where.rank))
    describe = partial(pretrained.describe, SHAPE)
    with checkpoint.Saver(directory, where.rank, where.size, 2) as saver:
        saver.save(5, {**tensors, **BANK}, describe)
        advance(model, optimizer, 1)  # Training continues meanwhile.
        ones = torch.ones(1)
        for _ in range(20 if where.size > 1 else 0):
            dist.all_reduce(ones)
        assert ones == where.size**20 or where.size == 1
        saver.wait()
        saver.save(5, tensors, describe)  # Does nothing: it exists.
    return before


def load(where, path, sharded=True):
    """Restore into a new model; return its state and the contents of state.json."""
    model, optimizer = build(where, sharded)
    torch.manual_seed(3)
    state = checkpoint.restore(path, model, optimizer, where.rank, where.size)
    found = whole(model, optimizer, where.rank)
    assert all(isinstance(p, DTensor) for p in model.parameters()) == (where.size > 1 and sharded)
    optimizer.state[model.norm.weight]["step"] += 1  # Training can continue.
    advance(model, optimizer, 2)
    return found, state


def fail(where, directory):
    """Return each process's errors and files after one cannot write shards, or json files."""
    told = []
    for who, culprit in ((where.size - 1, "shard"), (0, "json")):

        def broken(*args):
            raise OSError("no room")

        class Broken(checkpoint._Writer):
            write_data = broken

        good = checkpoint._Writer
        if culprit == "shard" and where.rank == who:
            checkpoint._Writer = Broken
        with checkpoint.Saver(directory, where.rank, where.size, 2) as saver:
            tensors = {f"a.{where.rank}": torch.ones(3)}
            saver.save(6, tensors, broken if culprit == "json" else lambda path: None)
            try:
                saver.wait()
                told.append("")
            except ValueError as error:
                told.append(str(error))
        checkpoint._Writer = good
        dist.barrier()  # The main process deletes the partial directory.
        told.append(sorted(path.name for path in directory.iterdir()))
        dist.barrier()
    return told


def process(where, root):
    """Return what this process loaded of earlier groups, and saved if its size is new."""
    found = {"loaded": {}}
    for path in sorted(root.glob("saved_*/step_00000005")):
        found["loaded"][path.parent.name] = load(where, path)
    own = root / f"saved_{where.size}"
    dist.barrier()
    if not own.exists():
        found["plain"] = load(where, root / "saved_1" / "step_00000005", sharded=False)
        found["saved"] = save(where, own)
        found["replicated"] = save(where, root / f"replicated_{where.size}", False)
        found["failed"] = fail(where, own)
    return found


# ---- any number of processes ----


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def results(root):
    """Let one process save, then two and four load and save, then two load again."""
    found = {(1, ""): [{"saved": save(ALONE, root / "saved_1")}]}
    for size, again in ((2, ""), (4, ""), (2, "_again")):
        found[size, again] = gloo(size, process, root)
    return lambda size, again="": found[size, again]


def equal(a, b):
    """Assert that tensors have equal names, dtypes and bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def without_rng(tensors):
    return {name: x for name, x in tensors.items() if not name.startswith(("rng.", "bank."))}


@pytest.mark.parametrize("saved, loaded", [(1, 2), (1, 4), (2, 4), (4, 2), (2, 2)])
def test_processes_load_what_others_saved(saved, loaded, results):
    wanted = results(saved)
    again = "_again" if loaded == 2 and saved > 1 else ""
    torch.manual_seed(3)
    for rank, process in enumerate(results(loaded, again)):
        found, state = process["loaded"][f"saved_{saved}"]
        equal(without_rng(found), without_rng(wanted[0]["saved"]))
        assert (state["step"], state["processes"]) == (5, saved)
        rng = f"rng.cpu.{rank}"  # Unchanged if another number of processes saved.
        want = wanted[rank]["saved"][rng] if saved == loaded else torch.get_rng_state()
        assert torch.equal(found[rng], want)


@pytest.mark.parametrize("kind", ["saved", "replicated"])
@pytest.mark.parametrize("size", [2, 4])
def test_one_process_loads_what_several_saved(size, kind, root, results):
    path = root / f"{kind}_{size}" / "step_00000005"
    found, state = load(ALONE, path)
    equal(without_rng(found), without_rng(results(size)[0][kind]))
    assert state["processes"] == size
    assert intact.damage(path) is None
    model = pretrained.load(str(path))
    assert model.cfg == SHAPE
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    equal(weights, {n: x for n, x in found.items() if n.startswith("model.")})


def test_replicas_load_what_one_saved(results):
    want = results(1)[0]["saved"]
    for size in (2, 4):
        for process in results(size):
            equal(without_rng(process["plain"][0]), without_rng(want))


@pytest.mark.parametrize("kind", ["saved", "replicated"])
@pytest.mark.parametrize("size", [2, 4])
def test_random_state_of_every_process(size, kind, root, results):
    path = root / f"{kind}_{size}" / "step_00000005"
    stored = checkpoint.read(path, "rng.")
    assert stored.keys() >= {f"rng.cpu.{rank}" for rank in range(size)}
    seen = set()
    for rank, process in enumerate(results(size)):
        want = process[kind][f"rng.cpu.{rank}"]
        assert torch.equal(stored[f"rng.cpu.{rank}"], want)
        model, optimizer = build(ALONE)
        torch.manual_seed(3)
        checkpoint.restore(path, model, optimizer, rank, size)
        assert torch.equal(torch.get_rng_state(), want)
        seen.add(want.numpy().tobytes())
    assert len(seen) == size


@pytest.mark.parametrize("size", [1, 2, 4])
def test_tensors_of_one_process_and_of_all_are_saved(size, root, results):
    want = BANK | {f"bank.of.{rank}": torch.full((rank, 2), float(rank)) for rank in range(size)}
    equal(checkpoint.read(root / f"saved_{size}" / "step_00000005", "bank."), want)


@pytest.mark.parametrize("kind", ["saved", "replicated"])
@pytest.mark.parametrize("size", [2, 4])
def test_processes_share_the_writing(size, kind, root, results):
    path = root / f"{kind}_{size}" / "step_00000005"
    whole = {n: x for r in results(size) for n, x in r[kind].items()}
    bytes_of = [0] * size
    for file in path.glob(checkpoint.SHARDS):
        with safe_open(file, framework="pt") as tensors:
            here = {name: tensors.get_tensor(name) for name in tensors.keys()}
        of = {name: x for name, x in here.items() if not name.startswith("bank.")}
        bytes_of[int(file.name.split("-")[1]) - 1] += sum(x.nbytes for x in of.values())
    total = sum(x.nbytes for x in whole.values())
    assert sum(bytes_of) == total and min(bytes_of) > total / size / 2


@pytest.mark.parametrize("size", [2, 4])
def test_failure_of_one_is_raised_by_all(size, results):
    for process in results(size):
        shard, left, json_file, left_again = process["failed"]
        for told in (shard, json_file):
            assert "step_00000006: could not be written: " in told and "no room" in told
        assert left == left_again == ["step_00000005"]
        assert f"process {size - 1}: no room" in shard


# ---- killed ----


def killed(where, directory):
    """Save step 1, then wait in the middle of saving step 2 and create the file `middle`."""
    tensors = {f"model.{where.rank}": torch.ones(1000), "model.both": torch.ones(1000)}
    with checkpoint.Saver(directory, where.rank, where.size, 1) as saver:
        saver.save(1, tensors, lambda path: None)
        saver.wait()
        flush = checkpoint.flush

        def stay(path):
            flush(path)
            if where.rank == where.size - 1:
                (directory.parent / "middle").touch()
                time.sleep(200)

        checkpoint.flush = stay
        saver.save(2, tensors, lambda path: None)


@pytest.mark.parametrize("victims", [(0,), (0, 1), (1,)], ids=["alone", "both", "one"])
def test_kill_while_saving(victims, tmp_path):
    size = max(2, len(victims)) if victims != (0,) else 1
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    directory = tmp_path / "checkpoints"
    script = [sys.executable, __file__, directory]
    with ExitStack() as stack:
        ranks = (on_path() | group | {"RANK": str(rank)} for rank in range(size))
        started_by = [started(script, env=env, stderr=PIPE) for env in ranks]
        processes = [stack.enter_context(one) for one in started_by]
        end = time.monotonic() + 150
        while not (tmp_path / "middle").exists():
            assert time.monotonic() < end and all(p.poll() is None for p in processes)
            time.sleep(0.05)
        assert (directory / ".step_00000002.partial").is_dir()
        for rank in victims:
            processes[rank].send_signal(signal.SIGKILL)
        errors = [p.communicate(timeout=60)[1] for p in processes]
    for rank, p in enumerate(processes):
        assert p.returncode == (-signal.SIGKILL if rank in victims else 1)
        if rank not in victims:
            assert "step_00000002: could not be written" in errors[rank]
    said: list[str] = []
    assert [path.name for path in intact.complete(directory)] == ["step_00000001"]
    assert intact.newest(directory, said.append) == directory / "step_00000001" and not said
    with checkpoint.Saver(directory, 0, 1, 2) as saver:
        saver.save(2, {"model.a": torch.ones(2)}, lambda path: None)
    assert sorted(p.name for p in directory.iterdir()) == ["step_00000001", "step_00000002"]
    assert intact.damage(directory / "step_00000002") is None


if __name__ == "__main__":
    with world("cpu") as here:
        killed(here, Path(sys.argv[1]))

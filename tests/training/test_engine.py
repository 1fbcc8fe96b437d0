"""Real gloo processes against one: gradients, norms and weights of two steps, and the number of
collectives, which does not depend on the number of packs.
"""

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace

import auto_models
import numpy as np
import pytest
import torch
import torch.distributed as dist
from factories import randomise, tiny_shape
from processes import gloo_once
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor

from mlembed import config
from mlembed.data.packing import pack
from mlembed.modeling import pretrained
from mlembed.modeling.automodel.choose import trunk_of
from mlembed.modeling.transformer import Transformer
from mlembed.runtime.distributed import World
from mlembed.training.engine import Engine, local
from mlembed.training.guards import agree, bad_gradient
from mlembed.training.lora import attach
from mlembed.training.optim import optimizer_of, prepare

# Neither two nor four processes share these widths, heads and vocabulary evenly.
MODEL = tiny_shape(
    vocab_size=101, hidden_size=22, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=10, intermediate_size=37, max_position_embeddings=64,
    exits=(1, 3), matryoshka_dims=(5, 22), ranks=(3, 11),
)  # fmt: skip
ALONE = World(0, 1, torch.device("cpu"))
STEPS, MAX_NORM = 2, 0.7
# Depths of the texts of a pack.
DEEP, SHALLOW = (3, 3, 2, 1), (2, 1, 1)
# The names that versions of torch have for each.
COLLECTIVES = {
    "gathers": ("all_gather_single", "all_gather_into_tensor"),
    "scatters": ("reduce_scatter_single", "reduce_scatter_tensor"),
    "reduces": ("all_reduce",),
}


@dataclass(frozen=True)
class Case:
    engine: str
    dropout: float = 0.0
    recompute: int = 0
    half: bool = False
    offload: bool = False
    compiled: bool = False
    last_layers: int = 0
    lora: bool = False
    ranks: tuple[int, ...] = MODEL.ranks
    family: str = ""

    @property
    def alone(self):
        """Return the case that trains equally on one process."""
        return replace(self, engine="ddp", recompute=0, half=False, offload=False, compiled=False)


CASES = {
    "ddp": Case("ddp"),
    "ddp dropout": Case("ddp", dropout=0.3, recompute=2),
    "fsdp": Case("fsdp", offload=True),
    "fsdp dropout": Case("fsdp", dropout=0.3, recompute=2),
    "fsdp compiled": Case("fsdp", compiled=True),
    "fsdp bf16": Case("fsdp", half=True),
    # The exits share a layer, which gets several gradients in one backward.
    "ddp last layers": Case("ddp", dropout=0.3, recompute=3, last_layers=1),
    "fsdp last layers": Case("fsdp", dropout=0.3, recompute=3, last_layers=1),
    "ddp lora": Case("ddp", dropout=0.3, recompute=2, lora=True),
    # Without ranks all weights are frozen, and the first layer's input has no gradient.
    "fsdp lora": Case("fsdp", recompute=2, lora=True, ranks=()),
    "fsdp lora compiled": Case("fsdp", compiled=True, lora=True, ranks=()),
    # The layers are those of transformers.
    "ddp transformers": Case("ddp", dropout=0.3, recompute=2, family="modernbert"),
    "fsdp transformers": Case("fsdp", dropout=0.3, recompute=2, family="modernbert"),
    "fsdp bf16 transformers": Case("fsdp", half=True, family="gemma3"),
    "fsdp lora transformers": Case("fsdp", recompute=2, lora=True, ranks=(), family="modernbert"),
}
OF_FOUR = "ddp", "fsdp dropout"


def packs(rank):
    """Return a process's two to four packs; a text of the last one runs to full depth."""
    generator = np.random.default_rng(rank)
    count = 2 + rank % 3
    made = []
    for i in range(count):
        depths = DEEP if i in (0, count - 1) else SHALLOW
        texts = [generator.integers(0, 101, generator.integers(1, 9)) for _ in depths]
        made.append(pack(texts, np.array(depths)))
    return made


def cotangent(step, rank, i, like):
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + i)
    return torch.randn(like.shape, generator=generator)


def configured(case):
    changes = {"dropout": case.dropout, "exits": (1 + case.last_layers, 3)}
    changes |= {"last_layers": case.last_layers, "ranks": case.ranks}
    if case.family:
        shape = auto_models.shape(case.family, vocab_size=101, num_hidden_layers=3)
    return config.Run(
        model=replace(shape if case.family else MODEL, **changes),
        lora=config.Lora(rank=3) if case.lora else config.Lora(),
        init="a model" if case.lora else "",
        optim=config.Optim(lr=1e-2, max_grad_norm=MAX_NORM),
        engine=case.engine,
        cpu_offload=case.offload,
    )


def forward(engine, case, one, step, rank, i, sync):
    """Encode pack i of process `rank`, with dropout of the pack's own."""
    autocast = torch.autocast("cpu", torch.bfloat16) if case.half else nullcontext()
    with torch.random.fork_rng([]), autocast:
        torch.manual_seed(1000 * step + 10 * rank + i)
        return engine.forward(one, rank=None, recompute=case.recompute, sync=sync)


def add_gradients(engine, case, step, where):
    """Add this process's gradients of a step: all packs at once, or as the gradient cache does with
    every other graph kept. Processes differ in that, and communicate in between like a loss.
    """
    own, rank = packs(where.rank), where.rank
    at_once, last = (step + rank) % 2 == 0, len(own) - 1
    keeps = [at_once or ((i + rank + step) % 2 == 0 and i != last) for i in range(len(own))]
    outputs = []
    for i, one in enumerate(own):
        with torch.set_grad_enabled(keeps[i]):
            outputs.append(forward(engine, case, one, step, rank, i, at_once))
    ones = torch.ones(1)
    dist.all_reduce(ones)
    assert ones.item() == where.size
    grads = [cotangent(step, rank, i, out) for i, out in enumerate(outputs)]
    if kept := [i for i in range(len(own)) if keeps[i]]:
        engine.backward([outputs[i] for i in kept], [grads[i] for i in kept], sync=at_once)
    for i, one in enumerate(own):
        if not keeps[i]:
            again = forward(engine, case, one, step, rank, i, i == last)
            assert torch.equal(again, outputs[i])
            engine.backward([again], [grads[i]], sync=i == last)


def add_gradients_alone(engine, case, step, size):
    """Add the gradients of all `size` processes on one."""
    for rank in range(size):
        for i, one in enumerate(packs(rank)):
            out = forward(engine, case, one, step, rank, i, True)
            engine.backward([out], [cotangent(step, rank, i, out) / size], sync=True)


def full(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def built(run, case):
    """Return the model of a case with random weights."""
    model = trunk_of(run.model)
    if case.lora:
        attach(model, run.lora, 0)
    return randomise(model)


def train(case, where, size):
    """Return gradients, norms around clipping and collectives of two steps, and the weights."""
    run, called, graphs = configured(case), Counter(), []
    model = built(run, case)
    if case.compiled:
        torch._dynamo.reset()
        model.compile_blocks(lambda graph, inputs: graphs.append(graph) or graph.forward)
    engine = Engine.of(model, run, where, case.half)
    assert engine.model is model and model.training
    if hasattr(engine, "replica"):

        def hook(state, bucket):
            called["bucket", bucket.index()] += 1
            return allreduce_hook(None, bucket)

        engine.replica.register_comm_hook(None, hook)
    optimizer = optimizer_of(model, run.optim)
    result = {"grads": [], "norms": [], "called": [], "graphs": [], "bad": []}
    for step in range(STEPS):
        called.clear()
        with pytest.MonkeyPatch.context() as patch:
            for kind, names in COLLECTIVES.items():
                for name in names:
                    if hasattr(dist, name):
                        patch.setattr(dist, name, counted(getattr(dist, name), called, kind))
            engine.begin()
            if where.size > 1:
                add_gradients(engine, case, step, where)
            else:
                add_gradients_alone(engine, case, step, size)
        result["called"].append(dict(called))
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        result["grads"].append({name: full(p.grad) for name, p in trained.items()})
        norm = engine.norm(engine.norms())
        prepare(optimizer, norm, MAX_NORM, torch.zeros(()))
        optimizer.step()
        # torch's step also writes the clipped gradients.
        result["norms"].append((norm, engine.norm(engine.norms())))
        if step == STEPS - 1 and where.size > 1:
            result["bad"] = bad_gradients(engine)
            result["left"] = left_out(engine, optimizer, where)
        engine.zero()
        assert all(p.grad is None for p in model.parameters())
        result["graphs"].append(len(graphs))
    assert {local(p).dtype for p in model.parameters()} == {torch.float32}
    result["trained"] = len(trained)
    result["weights"] = {name: full(p) for name, p in model.named_parameters()}
    whole = engine.full_model()
    assert (whole is None) == (where.rank > 0)
    result["whole"] = whole and {name: w.detach() for name, w in whole.state_dict().items()}
    return result


def counted(function, called, kind):
    def count(*args, **options):
        (dtype,) = {x.dtype for x in (*args, *options.values()) if isinstance(x, torch.Tensor)}
        called[kind, dtype] += 1
        return function(*args, **options)

    return count


def bad_gradients(engine):
    """Name the first bad gradient of good ones, with one bad one on the last process, and with an
    earlier one on the first process as well.
    """
    where = engine.where
    names, weights = [bad_gradient(engine.norms())], late_and_early(engine.model)
    for rank, name in zip((where.size - 1, 0), weights, strict=True):
        if where.rank == rank:
            gradient = engine.model.get_parameter(name).grad
            local(gradient)[0, 0] = torch.inf if rank else torch.nan
        names.append(bad_gradient(engine.norms()))
    return names


def late_and_early(model):
    """Return the names of a trained matrix of the second layer, and of one of the first."""
    names = [n for n, p in model.named_parameters() if p.ndim == 2 and p.requires_grad]
    return [next(n for n in names if n.startswith(f"layers.{i}.") and "mlp" in n) for i in (1, 0)]


def left_out(engine, optimizer, where):
    """Step with a loss that is infinite on the last process; return what changed of the state."""
    states = optimizer.state.values()
    tensors = [*engine.model.parameters(), *(x for state in states for x in state.values())]
    before = [local(x).detach().clone() for x in tensors]
    norm = torch.tensor(1.0)
    loss = torch.tensor(torch.inf if where.rank == where.size - 1 else 1.0)
    # The first process is to stop.
    answers = agree([loss], where.main, where)
    found = answers[0]
    assert answers.tolist() == [1.0, 1.0] and agree([norm], False, where).tolist() == [0.0, 0.0]
    prepare(optimizer, norm, MAX_NORM, found)
    optimizer.step()
    pairs = zip(tensors, before, strict=True)
    return found.item(), sum(not torch.equal(local(x), y) for x, y in pairs), len(before)


def process(where, names):
    """Return this process's result by case and, on the main process, that of one process alone."""
    results, alone = {}, {}
    for name in names:
        case = CASES[name]
        results[name] = {"got": train(case, where, where.size)}
        if where.main:
            if case.alone not in alone:
                alone[case.alone] = train(case.alone, ALONE, where.size)
            results[name]["want"] = alone[case.alone]
    return results


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def results(request):
    """Return the results of each of 2 or 4 processes by case."""
    names = tuple(CASES) if request.param == 2 else OF_FOUR
    results = gloo_once(request.param, process, names)
    return {name: [result[name] for result in results] for name in names}


def of_each(results):
    """Yield case, result and the result of one process alone, for all cases and processes."""
    for name, processes in results.items():
        for process in processes:
            yield CASES[name], process["got"], processes[0]["want"]


def test_packs_differ():
    """Otherwise equality below would say little."""
    packs_of = [packs(rank) for rank in range(4)]
    assert [len(own) for own in packs_of] == [2, 3, 4, 2]
    for own in packs_of:
        assert own[-1].plan_at(MODEL.num_hidden_layers) is not None
        assert len({one.plan.tokens for one in own}) > 1
    assert any(one.plan_at(MODEL.num_hidden_layers) is None for own in packs_of for one in own)


def test_gradients_equal_one_process(results):
    for case, got, want in of_each(results):
        for mine, theirs in zip(got["grads"], want["grads"], strict=True):
            assert mine.keys() == theirs.keys()
            for name, gradient in theirs.items():
                assert gradient.norm() > 0 and mine[name].dtype == torch.float32, name
                error = (mine[name] - gradient).norm() / gradient.norm()
                # The second step's weights differ by the first step's rounding.
                limit = 1e-5 if case.lora and case.family else 3e-6
                assert error < (0.06 if case.half else limit), (case, name, error)


def test_norms_and_clipping(results):
    for case, got, want in of_each(results):
        for (before, after), (want_before, _) in zip(got["norms"], want["norms"], strict=True):
            assert type(before) is torch.Tensor and before.shape == () and before > 10
            assert before.item() == pytest.approx(
                want_before.item(), rel=0.01 if case.half else 2e-6
            )
            assert after.item() == pytest.approx(MAX_NORM, rel=1e-5)
    for processes in results.values():
        assert len({str(process["got"]["norms"]) for process in processes}) == 1


def test_weights_after_two_steps(results):
    for case, got, want in of_each(results):
        for name, weight in want["weights"].items():
            error = (got["weights"][name] - weight).norm() / weight.norm()
            assert error < (0.03 if case.half else 1e-5), (case, name, error)
    for processes in results.values():
        for process in processes[1:]:
            for name, weight in process["got"]["weights"].items():
                assert torch.equal(weight, processes[0]["got"]["weights"][name]), name


def test_full_model_is_on_the_main_process(results):
    for name, processes in results.items():
        first, *others = (process["got"] for process in processes)
        assert all(other["whole"] is None for other in others)
        weights = pretrained.merged(first["weights"], configured(CASES[name]).lora.scale)
        assert first["whole"].keys() == weights.keys()
        for name, weight in weights.items():
            assert torch.equal(first["whole"][name], weight), name


def test_collectives_of_a_step(results):
    """Gradients are reduced once, in fp32; the other all-reduce is the loss's."""
    wide = torch.float32
    for case, got, _ in of_each(results):
        once = {("reduces", wide): 2, ("bucket", 0): 1}
        if case.engine == "fsdp":
            gathered = torch.bfloat16 if case.half else wide
            units = MODEL.num_hidden_layers - case.last_layers + 1
            # Without ranks the root's weights are frozen.
            once = {("gathers", gathered): units, ("scatters", wide): units - (not case.ranks)}
            once["reduces", wide] = 1
        assert got["called"] == [once] * STEPS, case


def test_a_bad_number_of_one_process_leaves_the_step_out_on_all(results):
    """Weights, moments and step counts, sharded ones too."""
    for _, got, _ in of_each(results):
        found, changed, tensors = got["left"]
        assert (found, changed) == (1.0, 0)
        assert tensors == len(got["weights"]) + 3 * got["trained"]


def test_first_bad_gradient_of_any_process(results):
    for case, got, _ in of_each(results):
        names = late_and_early(built(configured(case), case))
        assert got["bad"] == [None, *(f"gradient of {name}" for name in names)]


def test_sharded_layers_share_compiled_graphs(results):
    """Two halves, with and without a graph, again where FSDP2's view has a longer base."""
    for name in ("fsdp compiled", "fsdp lora compiled"):
        for process in results.get(name, ()):
            assert 4 <= max(process["got"]["graphs"]) <= 6, name


def test_frozen_weights_stay(results):
    for name, processes in results.items():
        if CASES[name].lora:
            first = built(configured(CASES[name]), CASES[name])
            for process in processes:
                frozen = {n: p for n, p in first.named_parameters() if not p.requires_grad}
                assert len(process["got"]["weights"]) - process["got"]["trained"] == len(frozen) > 9
                for n, p in frozen.items():
                    assert torch.equal(process["got"]["weights"][n], p), n


# ---- one process ----


def test_one_process_equals_torch():
    run, (one, *_) = configured(Case("ddp")), packs(0)
    engine = Engine.of(randomise(Transformer(run.model)), run, ALONE, False)
    plain = randomise(Transformer(run.model))
    options = dict(rank=3, recompute=0)
    out = engine.forward(one, **options, sync=True)
    assert torch.equal(out, plain(one, **options))
    grads = torch.ones_like(out)
    engine.begin()
    engine.backward([out], [grads], sync=True)
    plain(one, **options).backward(grads)
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), MAX_NORM)
    norms = engine.norms()
    assert torch.equal(engine.norm(norms), norm) and norm > MAX_NORM
    assert list(norms) == [name for name, _ in engine.model.named_parameters()]
    assert bad_gradient(norms) is None
    engine.model.norm.weight.grad[0] = torch.nan
    assert bad_gradient(engine.norms()) == "gradient of norm.weight"
    engine.zero()
    assert all(p.grad is None for p in engine.model.parameters())
    assert engine.full_model() is engine.model


def test_fsdp_needs_several_processes():
    run = configured(Case("fsdp"))
    with pytest.raises(ValueError, match=r"engine: expected several processes .* for fsdp, got on"):
        Engine.of(Transformer(run.model), run, ALONE, False)

"""python -m bench.scaling: a training step on 8, 64 and 512 GPUs on paper, by formulas alone.

Nothing here was measured on several GPUs. `Assumed` lists the assumptions with their sources; each
is an option. The pairs of a GPU are constant: the batch, and with it the candidates, grow with the
number of GPUs.

Letters: n GPUs; P parameters, W of them in the layers' matrices; T tokens of a GPU in c packs, k of
them with graphs that stay; q pairs of a GPU; E exits, D width, L layers, Hq and Hkv heads of width
K, I of the feed-forward. A GPU's part of a step:

weights     ddp    all-reduce of fp32 gradients          2 (n - 1) / n  4 P bytes sent
            fsdp   all-gather of bf16 weights, once      (n - 1) / n  2 P
                   reduce-scatter of fp32 gradients      (n - 1) / n  4 P
candidates  gather bf16 documents, their gradients       2 (n - 1) b,  b = 2 E q D, one GPU's
            ring   documents forward and backward, fp32 gradients after them
                                                         2 (n - 1) b + 2 n b
encode      (6 + 2 (1 - k / c) + 2 a / L) W T FLOPs, and (14 + 4 (1 - k / c) + 4 a / L) Hq K of each
            pair that causal attention sees, for texts of mean length; a of the layers are
            recomputed in the backward; point-wise work is in the rate
loss        8 E q (n q) D FLOPs: four products of all pairs (bench/LOG.md)
optimiser   40 P bytes in memory, fsdp 40 P / n (bench/train_step/cases.py)

memory      ddp    20 P: weights, gradients, their buckets and two moments in fp32; alone 16 P
            fsdp   12 P / n for weights and moments, 6 P until the last backward: bf16 weights
                   and fp32 gradients, and 4 P / n of reduced gradients
            loss   12 bytes a number of a GPU's exits (fp32, bf16, and gradients of both); a
                   workspace; candidates: gather 2 n b (with gradients), ring 6 b (two buffers,
                   and two of fp32 gradients)
            graph  of a pack: 2 W for bf16 weights, and of a token and layer
                   8 D + 2 (Hq + 2 Hkv) K + 2 (Hq + Hkv) K + 2 Hq K + 6 I + 8 + 4 (Hq + Hkv) + 4 Hq
                   or, for a recomputed layer, 2 D, and one of them whole

Adapters (mlembed/training/lora.py) of rank R: of P parameters, t are trained, the A numbers of the
adapters and the vocabulary's factors, and P - t are frozen, with ddp in bf16. These rows change:

weights     ddp    2 (n - 1) / n  4 t      fsdp   (n - 1) / n  (2 P + 4 t)
encode      4 W T for 6 W T of the products, and (6 + 2 (1 - k / c) + 2 a / L) A T of their own
optimiser   40 t, 40 t / n
memory      ddp    2 (P - t) + 20 t; alone 2 (P - t) + 16 t
            fsdp   4 P / n + 12 t / n and 2 P + 4 t
            graph  2 A for the adapters in bf16, none of the frozen weights; of a token and layer
                   14 R more

The rest of the memory is the budget for graphs: a pack is as large as one graph fits, and k graphs
fit (all of them, or all but the last). The fewest layers are recomputed that leave a pack LEAST
tokens; if all of them leave less, the step does not fit.

Links. A collective goes around rings that leave a node by all of its network cards at once: within
a node the rate is NVLink's, beyond it the smaller of NVLink's and that of all cards. The
candidates' ring is one: between nodes it has one card.

Step, apart: encode, loss, optimiser and all communication, one after the other. Overlapped: the
reductions hide behind the last pack's backward, the candidates' ring behind the loss; the
all-gather comes before everything. Efficiency: the time of a GPU with its own candidates and
without communication, over the step's.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from mlembed import config
from mlembed.config import shapes
from mlembed.modeling.flops import layer_weights
from mlembed.modeling.transformer import num_parameters

from .report import aligned

Engine = Literal["ddp", "fsdp"]
Across = Literal["gather", "ring"]
LABEL = "on paper: formulas, not measurements"
GPUS = 8, 64, 512
ADAPTED = ("4B", "8B"), (1, 8)  # models and GPUs of the table of adapters
LEAST = 4096  # tokens of a pack: with fewer a GPU waits for its launches
GIB = 2**30


def given(default: float, about: str) -> Any:
    return field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class Assumed:
    """Assumptions of the table. GB are 1e9 bytes, GiB 2**30."""

    pairs: int = given(1024, "pairs a GPU")
    query_tokens: float = given(24.0, "mean of a query: bench's lengths, median 20")
    doc_tokens: float = given(139.0, "mean of a document: bench's lengths, median 110, at most 512")
    pack_tokens: int = given(16_384, "at most, of a pack; fewer if its graph does not fit")
    gpus_per_node: int = given(8, "of H100 nodes")
    memory_gib: float = given(78.0, "of an H100 of 80 GB, usable")
    reserved_gib: float = given(6.0, "of it: context, collectives' buffers, fragments (a guess)")
    workspace_gib: float = given(1.7, "of the loss: counted at 131,072 pairs, bench/LOG.md")
    ceiling_tflops: float = given(788.0, "bf16 matmul 8192^3, measured on one H200")
    reached: float = given(0.45, "of it by a step: 134.1k tokens/s at 0.6B, measured on one H200")
    copy_gbs: float = given(2960.0, "memory: 3,350 of an H100 x 0.885, an H200's measured part")
    nvlink_gbs: float = given(450.0, "NVLink of a GPU in one direction, the maker's")
    network_gbs: float = given(
        50.0, "a network card for each GPU: 400 Gb/s InfiniBand, its maker's"
    )
    link_share: float = given(0.8, "of either link's rate in large messages (a guess)")
    lora_rank: int = given(16, "of the adapters of all linear layers, in the last tables")

    def __post_init__(self) -> None:
        for f in fields(self):
            if not getattr(self, f.name) > 0 and f.name != "reserved_gib":
                raise ValueError(f"{f.name}: expected more than 0, got {getattr(self, f.name)}")


# ---- models ----


# Qwen3's public shapes, with their vocabulary as factors of rank 512.
MODELS = {
    name: replace(shapes.SHAPES[f"ml-embed-{name.lower()}"], ranks=(64, 128, 256, 512))
    for name in ("0.6B", "1.7B", "4B", "8B")
}


def matrices(m: config.Model) -> int:
    """Return the number of weights that multiply a token."""
    return m.num_hidden_layers * layer_weights(m)


def token_bytes(m: config.Model) -> int:
    """Return the bytes of a token that stay for the backward, in all layers."""
    D, K, Hq, Hkv = m.hidden_size, m.head_dim, m.num_attention_heads, m.num_key_value_heads
    of_heads = 2 * K * ((Hq + 2 * Hkv) + (Hq + Hkv) + Hq) + 4 * (Hq + Hkv) + 4 * Hq
    return m.num_hidden_layers * (8 * D + of_heads + 6 * m.intermediate_size + 8)


def adapters(m: config.Model, rank: int) -> int:
    """Return the numbers of the adapters of all linear layers: A and B of seven matrices each."""
    D, K, Hq, Hkv = m.hidden_size, m.head_dim, m.num_attention_heads, m.num_key_value_heads
    sides = 2 * (D + Hq * K) + 2 * (D + Hkv * K) + 3 * (D + m.intermediate_size)
    return m.num_hidden_layers * rank * sides


def trained(m: config.Model, rank: int) -> int:
    """Return the number of trained parameters: all of them with rank 0."""
    if not rank:
        return num_parameters(m)
    return adapters(m, rank) + (m.vocab_size + m.hidden_size) * m.ranks[-1]


def parameters(m: config.Model, rank: int) -> int:
    """Return the number of all parameters, those of adapters included."""
    return num_parameters(m) + adapters(m, rank)


# ---- bytes between GPUs, sent by each in a step ----


def weight_bytes(m: config.Model, n: int, engine: Engine, rank: int = 0) -> tuple[float, float]:
    """Return the bytes gathered before the first forward, and reduced with the last backward."""
    P, t, part = parameters(m, rank), trained(m, rank), (n - 1) / n
    return (0.0, 2 * part * 4 * t) if engine == "ddp" else (part * 2 * P, part * 4 * t)


def shard_bytes(m: config.Model, pairs: int) -> float:
    """Return the bytes of one GPU's documents at all exits, bf16."""
    return 2.0 * len(m.exits) * pairs * m.hidden_size


def candidate_bytes(m: config.Model, n: int, across: Across, pairs: int) -> float:
    shard = shard_bytes(m, pairs)
    if n == 1:
        return 0.0
    return 2 * (n - 1) * shard + (2 * n * shard if across == "ring" else 0.0)


def rate(n: int, across: Across, a: Assumed) -> float:
    """Return bytes a second that each of n GPUs sends: in collectives, or around one ring."""
    beyond = a.network_gbs * (1 if across == "ring" else a.gpus_per_node)
    gbs = a.nvlink_gbs if n <= a.gpus_per_node else min(a.nvlink_gbs, beyond)
    return gbs * 1e9 * a.link_share


# ---- FLOPs ----


def tokens(a: Assumed) -> float:
    return a.pairs * (a.query_tokens + a.doc_tokens)


def encode_flops(m: config.Model, a: Assumed, more: float, rank: int = 0) -> float:
    """Return a GPU's FLOPs. more: forwards after the first one. rank: of adapters, 0 for none."""
    seen = a.pairs * sum(t * (t + 1) / 2 for t in (a.query_tokens, a.doc_tokens))
    attention = m.num_hidden_layers * m.num_attention_heads * m.head_dim * seen
    frozen = (4 if rank else 6) + 2 * more
    products = frozen * matrices(m) + (6 + 2 * more) * adapters(m, rank)
    return products * tokens(a) + (14 + 4 * more) * attention


def loss_flops(m: config.Model, n: int, pairs: int) -> float:
    return 8.0 * len(m.exits) * pairs * (n * pairs) * m.hidden_size


# ---- memory ----


def state_bytes(m: config.Model, n: int, engine: Engine, rank: int = 0) -> float:
    P, t = parameters(m, rank), trained(m, rank)
    if engine == "ddp":
        return 2.0 * (P - t) + (20.0 if n > 1 else 16.0) * t
    return (4.0 * P + 12.0 * t) / n + 2.0 * P + 4.0 * t


def loss_bytes(m: config.Model, n: int, across: Across, a: Assumed) -> float:
    own = 12.0 * len(m.exits) * 2 * a.pairs * m.hidden_size
    shard = shard_bytes(m, a.pairs)
    others = 2 * n * shard if across == "gather" else 2 * shard + 4 * shard
    return own + others + a.workspace_gib * GIB


def graph_bytes(m: config.Model, pack: float, again: int = 0, rank: int = 0) -> float:
    """Return the bytes of a pack's graph. again: recomputed layers. rank: of adapters."""
    copies = 2.0 * (adapters(m, rank) if rank else matrices(m))
    whole = copies + pack * (token_bytes(m) + 14 * rank * m.num_hidden_layers)
    stay = m.num_hidden_layers - again + min(again, 1)
    return stay / m.num_hidden_layers * whole + again * pack * 2 * m.hidden_size


def pack_of(m: config.Model, budget: float, most: float, rank: int = 0) -> tuple[int, int]:
    """Return the tokens of a pack whose graph fits, at most `most` (0: none), and layers again."""
    for again in range(m.num_hidden_layers + 1):
        fixed = graph_bytes(m, 0, again, rank)
        pack = int(min((budget - fixed) / (graph_bytes(m, 1, again, rank) - fixed), most))
        if pack >= min(LEAST, int(most)):
            return pack, again
    return 0, 0


# ---- a step ----


@dataclass(frozen=True)
class Plan:
    """A GPU's part of a step. Steps that do not fit have no seconds.

    weights, candidates: bytes sent. state, loss, budget: bytes held, and left for graphs.
    pack: tokens (0: does not fit). again: recomputed layers. packs, kept: number, with graphs.
    hidden_s: communication behind computation. alone_s: the step without other GPUs. rank: of
    adapters, 0 if all weights are trained.
    """

    model: str
    gpus: int
    engine: Engine
    across: Across
    weights: float
    candidates: float
    state: float
    loss: float
    budget: float
    pack: int = 0
    again: int = 0
    packs: int = 0
    kept: int = 0
    encode_s: float = 0.0
    loss_s: float = 0.0
    optimiser_s: float = 0.0
    weights_s: float = 0.0
    candidates_s: float = 0.0
    hidden_s: float = 0.0
    alone_s: float = 0.0
    rank: int = 0

    @property
    def fits(self) -> bool:
        return self.pack > 0

    @property
    def apart_s(self) -> float:
        work = self.encode_s + self.loss_s + self.optimiser_s
        return work + self.weights_s + self.candidates_s

    @property
    def overlapped_s(self) -> float:
        return self.apart_s - self.hidden_s

    @property
    def held(self) -> float:
        """Return the peak in bytes: state, loss, and the graphs."""
        m = MODELS[self.model]
        graphs = graph_bytes(m, self.pack, self.again, self.rank) if self.fits else 0.0
        return self.state + self.loss + max(self.kept, 1) * graphs


def plan(name: str, n: int, engine: Engine, across: Across, a: Assumed, rank: int = 0) -> Plan:
    m = MODELS[name]
    gathered, reduced = weight_bytes(m, n, engine, rank)
    sent = candidate_bytes(m, n, across, a.pairs)
    state, of_loss = state_bytes(m, n, engine, rank), loss_bytes(m, n, across, a)
    budget = (a.memory_gib - a.reserved_gib) * GIB - state - of_loss
    bare = Plan(
        name, n, engine, across, gathered + reduced, sent, state, of_loss, budget, rank=rank
    )
    pack, again = pack_of(m, budget, min(a.pack_tokens, tokens(a)), rank)
    if not pack:
        return bare
    count = math.ceil(tokens(a) / pack)
    fit = int(budget / graph_bytes(m, pack, again, rank))
    kept = count if fit >= count else min(fit, count - 1)
    flops = a.ceiling_tflops * 1e12 * a.reached
    layers = again / m.num_hidden_layers
    encode = encode_flops(m, a, 1 - kept / count + layers, rank) / flops
    backward = (encode_flops(m, a, layers, rank) - encode_flops(m, a, -2)) / flops / count
    loss = loss_flops(m, n, a.pairs) / flops
    optimiser = 40.0 * trained(m, rank) / (n if engine == "fsdp" else 1) / a.copy_gbs / 1e9
    gather_s, reduce_s = (x / rate(n, "gather", a) for x in (gathered, reduced))
    candidates_s = sent / rate(n, across, a)
    hidden = min(reduce_s, backward) + (min(candidates_s, loss) if across == "ring" else 0.0)
    return replace(
        bare, pack=pack, again=again, packs=count, kept=kept, encode_s=encode, loss_s=loss,
        optimiser_s=optimiser, weights_s=gather_s + reduce_s, candidates_s=candidates_s,
        hidden_s=hidden, alone_s=encode + loss_flops(m, 1, a.pairs) / flops + optimiser,
    )  # fmt: skip


def plans(
    a: Assumed,
    gpus: Sequence[int] = GPUS,
    names: Sequence[str] = tuple(MODELS),
    rank: int = 0,
) -> Iterator[Plan]:
    for name in names:
        for n in gpus:
            engines: tuple[Engine, ...] = ("ddp", "fsdp") if n > 1 else ("ddp",)
            for engine in engines:
                for across in ("gather", "ring"):
                    yield plan(name, n, engine, across, a, rank)


# ---- printing ----

COLUMNS = (
    *("GPUs", "engine", "negatives", "GB: weights", "candidates", "GiB: state", "loss"),
    *("graphs", "pack", "again", "kept", "s: encode", "loss", "optimiser", "weights", "candidates"),
    *("step, apart", "overlapped", "efficiency", "tokens/s a GPU"),
)


def cells(p: Plan, a: Assumed) -> list[str]:
    at = [str(p.gpus), p.engine, p.across, f"{p.weights / 1e9:.2f}", f"{p.candidates / 1e9:.2f}"]
    at += [f"{p.state / GIB:.1f}", f"{p.loss / GIB:.1f}"]
    if not p.fits:
        return [*at, "no room"]
    times = p.encode_s, p.loss_s, p.optimiser_s, p.weights_s, p.candidates_s
    both = p.apart_s, p.overlapped_s
    at += [f"{p.budget / GIB:.1f}", str(p.pack), str(p.again), f"{p.kept} of {p.packs}"]
    at += [*(f"{t:.3f}" for t in times), *(f"{t:.2f}" for t in both)]
    at.append("..".join(f"{p.alone_s / t:.0%}" for t in both))
    return [*at, "..".join(f"{tokens(a) / t:.0f}" for t in both)]


def lines(a: Assumed, gpus: Sequence[int] = GPUS) -> Iterator[str]:
    yield LABEL
    for f in fields(a):
        yield f"  {f.name} {getattr(a, f.name):g}: {f.metadata['about']}"
    for name, m in MODELS.items():
        yield ""
        yield (
            f"{name}: {num_parameters(m) / 1e6:.0f} M parameters, {m.num_hidden_layers} layers of "
            f"{m.hidden_size}, exits {m.exits}; {tokens(a):.0f} tokens a GPU ({LABEL})"
        )
        yield from table(list(plans(a, gpus, [name])), a)
    names, few = ADAPTED
    for name in names:
        m, rank = MODELS[name], a.lora_rank
        yield ""
        yield (
            f"{name} with adapters of rank {rank}: {trained(m, rank) / 1e6:.0f} M of "
            f"{parameters(m, rank) / 1e6:.0f} M parameters trained, {adapters(m, rank) / 1e6:.0f} "
            f"M of adapters and the vocabulary's factors ({LABEL})"
        )
        yield from table(list(plans(a, few, [name], rank)), a)


def table(mine: Sequence[Plan], a: Assumed) -> Iterator[str]:
    """Yield the lines of one model's plans, then which engines fit each number of GPUs."""
    yield from aligned([list(COLUMNS), *(cells(p, a) for p in mine)])
    for n in dict.fromkeys(p.gpus for p in mine):
        fitting = [p for p in mine if p.gpus == n and p.fits]
        fit = sorted({p.engine for p in fitting})
        best = min(fitting, key=lambda p: p.overlapped_s, default=None)
        which = "" if best is None else f"; shortest {best.engine} with {best.across}"
        yield f"  {n} GPUs: fits {' and '.join(fit) or 'neither engine'}{which}"


def main(args: Sequence[str] | None = None) -> None:
    about = f"A training step on many GPUs, {LABEL}."
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=about)
    parser.add_argument("--gpus", type=int, nargs="+", default=list(GPUS), help="how many")
    for f in fields(Assumed):
        kind = type(f.default)
        flag = f"--{f.name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=f.default, help=f.metadata["about"])
    options = vars(parser.parse_args(args))
    gpus = options.pop("gpus")
    if min(gpus) < 1:
        parser.error(f"--gpus: expected 1 or more, got {min(gpus)}")
    try:
        assumed = Assumed(**options)
    except ValueError as error:
        parser.error(str(error))
    for line in lines(assumed, gpus):
        print(line)


if __name__ == "__main__":
    main()

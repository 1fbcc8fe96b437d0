"""The same step by other trainers: transformers, and sentence-transformers.

Both train Qwen3 or BERT with our weights (a nested vocabulary merged into a table), padded to the
longest text, by torch's attention, in bf16 with moments in bf16. With flash-attn installed they
would unpad. A peer is a model, its loss on the texts, and a note.
"""

import importlib
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlembed import config
from mlembed.modeling import hf_config, pretrained
from mlembed.modeling.transformer import Transformer
from mlembed.training.objective.loss import weights

from ..harness import Missing, imported
from ..infonce.cases import BOTH
from .cases import Case, Texts, Trained

Peer = tuple[nn.Module, Callable[[Trained, Texts], Tensor], str]


def rectangle(rows: list[Tensor]) -> dict[str, Tensor]:
    """Pad texts at their ends, for transformers."""
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def dense(exits_END: Tensor, pairs: int, run: config.Run, depths: Tensor | None = None) -> Tensor:
    """Return loss_EM by normalise, product and cross entropy for each exit and prefix.

    Texts are in the order of rows: queries, positives, then the negatives of each query.
    depths: int [pairs], the last layer of each group, whose texts are absent from deeper exits.
    """
    exits, loss = run.model.exits, run.loss
    negatives = exits_END.shape[1] // pairs - 2
    group = torch.arange(pairs)
    of_docs = torch.cat([group, group.repeat_interleave(negatives)])
    table = []
    for exit, x_ND in zip(exits, exits_END, strict=True):
        left = torch.ones(pairs, dtype=torch.bool) if depths is None else depths >= exit
        q, docs = x_ND[:pairs][left], x_ND[pairs:][left[of_docs]]
        target = torch.arange(len(q), device=q.device)
        for d in run.model.matryoshka_dims:
            a, b = (F.normalize(x[:, :d], dim=-1) for x in (q, docs))
            logits = a @ b.T / loss.temperature
            one = F.cross_entropy(logits, target)
            if loss.directions == "symmetric":
                one = (one + F.cross_entropy(logits[:, : len(q)].T, target)) / 2
            table.append(one)
    return torch.stack(table).view(len(exits), -1)


def transformers_model(start: Transformer) -> Any:
    """Return transformers' model with the weights of ours, on its device: bf16 on GPUs."""
    transformers = imported("transformers", "transformers")
    cfg, device = start.cfg, start.device
    kind = "Bert" if cfg.style == "bert" else "Qwen3"
    named = hf_config.hf_config(cfg) | {"attn_implementation": "sdpa"}
    shape = getattr(transformers, f"{kind}Config")(**named)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    headless = {"add_pooling_layer": False} if kind == "Bert" and cfg.pooling != "pooler" else {}
    with device:
        model = getattr(transformers, f"{kind}Model")(shape, **headless)
    # Frequencies of positions are buffers, and stay in fp32.
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    state = {k: v for k, v in start.state_dict().items() if not k.startswith("embed_tokens")}
    with torch.no_grad():
        state["embed_tokens.weight"] = start.embed_tokens.table()
    model.load_state_dict({pretrained.hf_name(k, cfg): v for k, v in state.items()})
    return model.train()


def padded(case: Case, start: Transformer) -> Peer:
    """Return the public ML-Embed step: exits normed over all tokens, blocks recomputed."""
    model = transformers_model(start)
    # The first name is that of transformers 5, the second that of older versions.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    made: dict[str, Tensor] = {}

    def loss(step: Trained, inputs: Texts) -> Tensor:
        if not made:
            made.update(rectangle([torch.from_numpy(row) for row in inputs.rows]))
            made.update({name: x.to(inputs.device) for name, x in made.items()})
            made["last"] = made["attention_mask"].sum(1) - 1
        given = {name: made[name] for name in ("input_ids", "attention_mask")}
        out = model(**given, output_hidden_states=True)
        rows = torch.arange(len(made["last"]), device=inputs.device)
        exits = []
        for exit in case.run.model.exits:
            h = out.hidden_states[exit]
            if start.cfg.style == "bert":
                exits.append(model.pooler(h))
                continue
            # The last is normed already.
            h = h if exit == case.run.model.num_hidden_layers else model.norm(h)
            exits.append(h[rows, made["last"]])
        loss_EM = dense(torch.stack(exits), case.pairs, case.run)
        return (weights(case.run).to(inputs.device) * loss_EM).sum()

    return model, loss, "padded to the longest text, weights bf16, blocks recomputed"


def sentence_transformers(case: Case, start: Transformer, cached: bool = True) -> Peer:
    """Return MatryoshkaLoss(CachedMultipleNegativesRankingLoss) on a model that is loaded.

    cached: else MultipleNegativesRankingLoss, with a graph of all texts.
    """
    model = opened(case, start)
    w_M = weights(case.run)[-1]
    dims = list(case.run.model.matryoshka_dims)
    loss = losses().MatryoshkaLoss(
        model, ranking(case, model, cached), dims, (w_M / w_M.sum()).tolist()
    )
    return model, on_columns(case, loss), f"last layer only,{inputs_of(case, cached)}"


def matryoshka_2d(case: Case, start: Transformer, cached: bool = False) -> Peer:
    """Return Matryoshka2dLoss with its defaults, around the same loss of pairs.

    Each step has the last layer and one drawn, and a prefix drawn for each.
    """
    model = opened(case, start)
    dims = list(case.run.model.matryoshka_dims)
    loss = losses().Matryoshka2dLoss(model, ranking(case, model, cached), dims)
    return model, on_columns(case, loss), f"two layers a step,{inputs_of(case, cached)}"


def losses() -> Any:
    module = "sentence_transformers.sentence_transformer.losses"
    return imported(module, "sentence-transformers")


def opened(case: Case, start: Transformer) -> Any:
    """Return a SentenceTransformer with the weights of ours."""
    st = imported("sentence_transformers", "sentence-transformers")
    modules = imported(
        "sentence_transformers.sentence_transformer.modules", "sentence-transformers"
    )
    model = transformers_model(start)
    device, dtype = model.device, model.dtype
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        tokenizer().save_pretrained(folder)
        transformer = modules.Transformer(folder, model_kwargs={"dtype": dtype})
    pooling, D = case.run.model.pooling, case.run.model.hidden_size
    mode = {"last": "lasttoken", "pooler": "cls"}.get(pooling, pooling)
    parts = [transformer, modules.Pooling(D, pooling_mode=mode)]
    if pooling == "pooler":  # LaBSE's modules
        parts.append(modules.Dense(D, D, activation_function=nn.Tanh()))
        own = {f"linear.{name}": x.detach() for name, x in start.pooler.named_parameters()}
        parts[-1].load_state_dict(own)
        parts[-1].to(dtype)
    return st.SentenceTransformer(modules=parts, device=str(device)).train()


def ranking(case: Case, model: Any, cached: bool) -> nn.Module:
    """Return the loss of pairs, in our directions and at our temperature."""
    loss = case.run.loss
    directions = BOTH if loss.directions == "symmetric" else BOTH[:1]
    options: dict[str, Any] = {"scale": 1 / loss.temperature, "directions": directions}
    options |= {"mini_batch_size": case.mini_batch} if cached else {}
    name = f"{'Cached' if cached else ''}MultipleNegativesRankingLoss"
    made: nn.Module = getattr(losses(), name)(model, partition_mode="per_direction", **options)
    return made


def on_columns(case: Case, loss: nn.Module) -> Callable[[Trained, Texts], Tensor]:
    """Return the loss of the case's texts, whose rectangles are made once."""
    no_labels = torch.empty(0)
    batch: list[dict[str, Tensor]] = []

    def value(step: Trained, inputs: Texts) -> Tensor:
        if not batch:
            batch.extend(columns(case, inputs))
        result: Tensor = loss([dict(column) for column in batch], no_labels)
        return result

    return value


def inputs_of(case: Case, cached: bool) -> str:
    """Return the end of a note."""
    table = " of a plain table," if case.run.model.ranks else ""
    of = f"mini-batches of {case.mini_batch}" if cached else "one batch"
    return f"{table} {of}, weights {'fp32' if case.device == 'cpu' else 'bf16'}"


def columns(case: Case, inputs: Texts) -> list[dict[str, Tensor]]:
    """Return queries, positives, first negatives, second ones, ..., each padded."""
    rows = [torch.from_numpy(row) for row in inputs.rows]
    P, n = case.pairs, case.negatives
    parts = [rows[:P], rows[P : 2 * P], *(rows[2 * P + i :: n] for i in range(n))]
    return [{k: x.to(inputs.device) for k, x in rectangle(part).items()} for part in parts]


def tokenizer() -> Any:
    """Return a tokenizer of two words: texts are ids, but loading a model needs a tokenizer."""
    tokenizers = imported("tokenizers", "tokenizers")
    models = importlib.import_module("tokenizers.models")
    splitting = importlib.import_module("tokenizers.pre_tokenizers")
    made = tokenizers.Tokenizer(models.WordLevel({"<pad>": 0, "a": 1}, unk_token="<pad>"))
    made.pre_tokenizer = splitting.Whitespace()
    transformers = imported("transformers", "transformers")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")


PEERS: dict[str, Callable[[Case, Transformer], Peer]] = {
    "padded": padded,
    "sentence_transformers": sentence_transformers,
}


# ---- Liger's functions in our blocks ----

Half = Callable[..., Any]


def liger_halves(device: torch.device) -> tuple[Half, Half]:
    """Return a block's two halves with norms, RoPE and SwiGLU by liger-kernel.

    Raises Missing if it is not installed, or if there is no GPU.
    """
    imported("liger_kernel", "liger-kernel")
    if device.type != "cuda":
        raise Missing("needs CUDA")
    ops = importlib.import_module("liger_kernel.ops")
    return halves(
        ops.LigerRMSNormFunction.apply, ops.LigerRopeFunction.apply, ops.LigerSiLUMulFunction.apply
    )


def halves(rms_norm: Half, rope: Half, silu_mul: Half) -> tuple[Half, Half]:
    """Return the halves of blocks.Block. Outputs of norms keep the dtype of their input, bf16."""

    def norm(module: Any, x: Tensor) -> Tensor:
        # Not in place: the gradient of the output may be shared.
        out: Tensor = rms_norm(x, module.weight, module.eps, 0.0, "llama", False)
        return out

    def before(
        layer: Any, x_TD: Tensor, cos_TK: Tensor, sin_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn = layer.self_attn
        n_TD = norm(layer.input_layernorm, x_TD)
        q, k, v = (
            projection(n_TD).unflatten(-1, (-1, attn.head_dim))
            for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        q, k = norm(attn.q_norm, q), norm(attn.k_norm, k)
        # RoPE takes [1, H, T, K], which is a view here, and angles of both halves.
        q, k = (x.transpose(0, 1)[None] for x in (q, k))
        q, k = rope(q, k, *(torch.cat([x, x], -1)[None] for x in (cos_TK, sin_TK)))
        return q[0].transpose(0, 1), k[0].transpose(0, 1), v

    def after(layer: Any, x_TD: Tensor, out_THK: Tensor) -> Tensor:
        x_TD = x_TD + layer.self_attn.o_proj(out_THK.flatten(1))
        n_TD = norm(layer.post_attention_layernorm, x_TD)
        mlp = layer.mlp
        grown = silu_mul(mlp.gate_proj(n_TD), mlp.up_proj(n_TD))
        result: Tensor = x_TD + mlp.down_proj(grown)
        return result

    return before, after

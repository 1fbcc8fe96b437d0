"""Distillation losses: from a teacher's vectors, and from the last exit to inner exits.

Each term is a table loss_EM, like the contrastive loss. With student vectors s cut to a prefix d,
and teacher vectors t, which get no gradient,

    features       mean over texts and coordinates of (s - t_d)^2; t_d: see `Distiller`
    logits         mean over queries and documents of (cos(s_q, s_c) - cos(t_q, t_c))^2, or KL
    between_exits  logits of each inner exit, t being the last exit's full-width vectors

Without alignment `features` at the full width is sentence-transformers' MSELoss. With
`feature_form` ml-embed it is the `kd` of ML-Embed's released code (arXiv 2605.15081): at every exit
and the full width alone, MSE(queries) + MSE(positives) + MSE(hard negatives) of raw vectors. LEALLA
distils features and logits (arXiv 2302.08387; its formulas are not published, these are the usual
ones).

Letters: E exits, M prefixes, N own texts, Q own queries, C all documents, D width, Dt teacher's.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mlembed_kernels import distill

from ... import config
from ...data.collate import Batch
from ...modeling.vocabulary import principal_directions
from ...runtime import transfer
from ...runtime.distributed import World, gather
from ..optim import prepare

TERMS = ("features", "logits", "between_exits")


def rows_of(cfg: config.Distill, term: str, exits: int) -> Tensor:
    """Return the exits, bool [E], at which a term or the contrastive loss has a value."""
    last = torch.arange(exits) == exits - 1
    if term == "between_exits":
        return ~last
    if term == "hidden":
        return last
    at_last = cfg.exits == "last" and not (term == "features" and cfg.feature_form == "ml-embed")
    return last if term in TERMS and at_last else torch.ones(exits, dtype=torch.bool)


def principal(sample_ND: Tensor) -> Tensor:
    """Return the rotation R [Dt, Dt] onto the principal directions of a sample.

    For every d the first d coordinates of t R are the best rank-d approximation of the sample
    (Eckart and Young). Nothing is subtracted, so full-width vectors keep their cosines.
    """
    t = sample_ND.double()
    return principal_directions(t.T @ t).T.float()


class Distiller:
    """The terms of `config.Distill` and their parameters.

    rotation: R [Dt, Dt] of align "pca". projection: P [Dt, D] of align "projection", a parameter
    outside of the model, which `step` trains.

    At prefix d, "pca" compares s with the first d coordinates of t R (zeros beyond Dt), and
    "projection" compares s P[:, :d]^T with t. "truncate" compares s with the first d coordinates of
    t; a prefix wider than the teacher has no such loss, a zero in the table.
    """

    def __init__(
        self, cfg: config.Distill, rotation: Tensor | None, projection: Tensor | None, where: World
    ) -> None:
        self.cfg, self.rotation, self.where = cfg, rotation, where
        self.projection = None if projection is None else projection.requires_grad_()
        self.optimizer: torch.optim.Optimizer | None = None

    @staticmethod
    def of(
        run: config.Run, width: int, sample_ND: Tensor | None, where: World
    ) -> "Distiller | None":
        """Return the run's distiller, None if it distils nothing.

        width: width of the teacher's vectors, 0 without a teacher. sample_ND: some teacher vectors,
        for "pca"; None if `load` will bring the rotation.

        Raises:
            ValueError: the teacher is narrower than every prefix, or with `feature_form` ml-embed
                than the full width.
        """
        cfg, D, dims = run.distill, run.model.hidden_size, run.model.matryoshka_dims
        if not any(getattr(cfg, term) for term in TERMS):
            return None
        align = cfg.align if cfg.features else ""
        if align == "truncate" and width < dims[0]:
            raise ValueError(
                f"distill.align: expected pca or projection for a teacher of width {width}, which "
                f"is below all of model.matryoshka_dims {dims}, got truncate"
            )
        if align and cfg.feature_form == "ml-embed" and width < D:
            raise ValueError(
                f"distill.feature_form: expected a teacher at least as wide as the model, {D}, for "
                f"ml-embed, got width {width}"
            )
        rotation = projection = None
        if align == "pca":
            rotation = torch.zeros(width, width) if sample_ND is None else principal(sample_ND)
            rotation = rotation.to(where.device)
            # Devices may round the sample differently.
            if where.size > 1:
                dist.broadcast(rotation, src=0)
        if align == "projection":
            # The seed makes it equal on all processes.
            rng = torch.Generator().manual_seed(run.seed)
            tall = torch.linalg.qr(torch.randn(max(width, D), min(width, D), generator=rng))[0]
            projection = (tall if width >= D else tall.T).contiguous().to(where.device)
        distiller = Distiller(cfg, rotation, projection, where)
        if distiller.projection is not None:
            distiller.optimizer = torch.optim.AdamW(
                [distiller.projection], betas=run.optim.betas, eps=run.optim.eps,
                weight_decay=0.0, fused=True,
            )  # fmt: skip
        return distiller

    # ---- the loss ----

    def tables(
        self, exits_END: Tensor, batch: Batch, run: config.Run, where: World
    ) -> dict[str, Tensor]:
        """Return loss_EM of each term with a weight, fp32 (float64 of float64).

        exits_END: this process's texts, in the order of `batch.packs`. batch: on its device.
        Entries at which a term has no value are 0. The mean over processes is the loss of the whole
        batch on one process, and so are gradients.
        """
        exits_END = exits_END[:, batch.place]
        t_ND = batch.teacher_ND
        tables = {}
        if self.cfg.features:
            assert t_ND is not None
            tables["features"] = self._features(exits_END, t_ND, batch.host, run)
        E = len(exits_END)
        between = self.cfg.between_exits > 0 and E > 1
        if self.cfg.logits or between:
            pairs = _Pairs(exits_END, batch, run, where)
        if self.cfg.logits:
            assert t_ND is not None
            first = E - 1 if self.cfg.exits == "last" else 0
            teacher = _split(t_ND.to(exits_END)[None], batch, where)
            tables["logits"] = pairs.table(teacher, first, range(first, E))
        if between:
            teacher = pairs.queries[-1:].detach(), pairs.docs[-1:].detach()
            # Only texts that run to the last exit have a teacher, at every inner exit.
            tables["between_exits"] = pairs.table(teacher, 0, [E - 1] * (E - 1))
        return tables

    def _features(self, exits_END: Tensor, t_ND: Tensor, host: Batch, run: config.Run) -> Tensor:
        x_END = exits_END.to(torch.promote_types(exits_END.dtype, torch.float32))
        t_ND = t_ND.detach().to(x_END.dtype)
        D, dims, exits = x_END.shape[-1], run.model.matryoshka_dims, run.model.exits
        if self.rotation is not None:
            t_ND = t_ND @ self.rotation.to(t_ND)
            t_ND = F.pad(t_ND, (0, max(0, D - t_ND.shape[1])))
        rows_E = rows_of(self.cfg, "features", len(exits)).tolist()
        rows = []
        for x_ND, exit, has_value in zip(x_END, exits, rows_E, strict=True):
            row = x_ND.new_zeros(len(dims))
            for mask, count in self._means(host, exit) if has_value else ():
                x, t = x_ND, t_ND
                # Depths are known on the host, so choosing texts does not wait for the device.
                if not mask.all():
                    places = transfer.moved(mask.nonzero()[:, 0], x.device)
                    x, t = x[places], t[places]
                row = row + torch.stack([self._square(x, t, d) for d in dims]) / count
            rows.append(row)
        return torch.stack(rows)

    def _means(self, host: Batch, exit: int) -> list[tuple[Tensor, float]]:
        """Return for each mean its texts of this process, bool [N], and its texts per process.

        Processes differ in how many texts run to an exit, so each counts by its share of all.
        """
        present = _own_depths(host, self.where) >= exit
        queries, docs = (int((x >= exit).sum()) for x in (host.query_depths, host.doc_depths))
        means, size = [(present, queries + docs)], self.where.size
        if self.cfg.feature_form == "ml-embed":
            kind = torch.full(present.shape, 2)
            kind[: len(host.target)] = 0
            kind[len(host.target) + host.target] = 1
            counts = queries, queries, docs - queries
            means = [(present & (kind == i), n) for i, n in enumerate(counts)]
        return [(texts, max(1, n) / size) for texts, n in means]

    def _square(self, x_ND: Tensor, t_ND: Tensor, d: int) -> Tensor:
        """Return the sum over texts of the mean over coordinates of (s - t_d)^2."""
        full_only = self.cfg.feature_form == "ml-embed" and d < x_ND.shape[1]
        if self.projection is not None:
            P = self.projection.to(x_ND.dtype)
            s, t = x_ND[:, :d] @ P[:, :d].T, t_ND
        elif d <= t_ND.shape[1] and not full_only:
            s, t = x_ND[:, :d], t_ND[:, :d]
        else:
            return x_ND.new_zeros(())
        if self.cfg.feature_form == "normalised":
            s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
        return (s - t).square().sum() / t.shape[1]

    # ---- the projection's steps ----

    def step(self, lr: float, max_norm: float, found_inf: Tensor) -> None:
        """Step the projection with gradients averaged over processes; all processes call it.

        found_inf: fp32 0-dim; 1 leaves the projection as it is.
        """
        P = self.projection
        if P is None or P.grad is None:
            return
        assert self.optimizer is not None
        if self.where.size > 1:
            dist.all_reduce(P.grad)
            P.grad /= self.where.size
        prepare(self.optimizer, P.grad.norm(), max_norm, found_inf)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        P.grad = None

    def gradients(self) -> list[Tensor]:
        """Return the projection's gradient, if any."""
        P = self.projection
        return [] if P is None or P.grad is None else [P.grad]

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint, equal on all processes."""
        tensors = {} if self.rotation is None else {"rotation": self.rotation}
        if self.projection is not None:
            assert self.optimizer is not None
            tensors["projection"] = self.projection.detach()
            for name, value in self.optimizer.state[self.projection].items():
                tensors[name] = value.reshape(-1) if name == "step" else value
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state` returned.

        Raises:
            ValueError: tensors of another distillation.
        """
        for name in ("projection", "rotation"):
            if (tensor := getattr(self, name)) is None:
                continue
            shape, got = list(tensor.shape), tensors.get(name)
            if got is None or list(got.shape) != shape:
                reason = "none" if got is None else list(got.shape)
                raise ValueError(
                    f"distill: expected {name} {shape} in the checkpoint, got {reason}"
                )
            tensor.copy_(got)
        if "step" in tensors and self.projection is not None:
            assert self.optimizer is not None
            state = {n: tensors[n].to(self.projection) for n in ("exp_avg", "exp_avg_sq")}
            step = tensors["step"].reshape(()).float().to(self.projection.device)
            self.optimizer.state[self.projection] = {"step": step, **state}


# ---- similarities ----


def _own_depths(host: Batch, where: World) -> Tensor:
    """Return the depths of this process's texts, int64 [N], queries then documents."""
    queries = host.query_depths.split([len(host.target)] * where.size)[where.rank]
    docs = host.doc_depths.split(list(host.doc_sizes))[where.rank]
    return torch.cat([queries, docs])


def _split(x_END: Tensor, batch: Batch, where: World) -> tuple[Tensor, Tensor]:
    """Return this process's queries [E, Q, D] and all processes' documents [E, C, D].

    Both are ordered deepest first, and all documents get a gradient.
    """
    n, depths = len(batch.target), batch.host.doc_depths
    docs = torch.cat(gather(x_END[:, n:], batch.doc_sizes), dim=1)
    if where.size > 1 and int(depths.min()) < int(depths.max()):
        order = depths.argsort(descending=True, stable=True)
        docs = docs[:, transfer.moved(order, docs.device)]
    return x_END[:, :n], docs


class _Pairs:
    """Queries of this process with all documents, and how many of each run to each exit.

    Processes differ in how many of their queries run to an exit: each counts by its share of all.
    by_exit: on the host, [E] each: own queries and all documents that run to the exit, the share.
    """

    def __init__(self, exits_END: Tensor, batch: Batch, run: config.Run, where: World) -> None:
        self.queries, self.docs = _split(exits_END, batch, where)
        self.run, self.temperature = run, batch.temperature or run.loss.temperature
        host = batch.host
        depths = host.query_depths.split([len(host.target)] * where.size)[where.rank]
        exits_E1 = torch.tensor(run.model.exits)[:, None]
        query_counts, doc_counts, total = (
            (x >= exits_E1).sum(1) for x in (depths, host.doc_depths, host.query_depths)
        )
        share_E = query_counts.double() * where.size / total.clamp(min=1)
        self.by_exit = query_counts, doc_counts, share_E

    def table(self, teacher: tuple[Tensor, Tensor], first: int, at: Sequence[int]) -> Tensor:
        """Return loss_EM of the exits from place `first` on, zero at others.

        at: for each of these exits, the place of the exit to which texts have to run.
        """
        cfg, stop = self.run.distill, first + len(at)
        numbers = tuple(x[list(at)] for x in self.by_exit)
        query_counts, doc_counts, share_E = transfer.moved(numbers, self.queries.device)
        loss_EM = distill(
            self.queries[first:stop],
            self.docs[first:stop],
            teacher[0][0],
            teacher[1][0],
            dims=self.run.model.matryoshka_dims,
            kind=cfg.logit_form,
            temperature=self.temperature,
            teacher_temperature=cfg.teacher_temperature,
            query_counts=query_counts,
            cand_counts=doc_counts,
        )
        loss_EM = loss_EM * share_E[:, None].to(loss_EM)
        return F.pad(loss_EM, (0, 0, first, len(self.queries) - stop))

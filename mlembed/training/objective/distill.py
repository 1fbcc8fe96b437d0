"""What is learnt from a teacher's vectors, and by inner exits from the last one.

Each term is a table loss_EM, as the contrastive loss is. With student vectors s cut to a prefix d,
and teacher vectors t,

    features       mean over texts and coordinates of (s - t_d)^2
    logits         mean over queries and documents of (cos(s_q, s_c) - cos(t_q, t_c))^2, or KL
    between_exits  the same, of the inner exits, t being the last exit's whole vectors

Without alignment `features` at the whole width is sentence-transformers' MSELoss, and what
ML-Embed's released code calls kd (arXiv 2605.15081); LEALLA distils both (2302.08387; its formulas
are not published, these are the usual ones). What t_d is, see `Distiller`. No gradient reaches t.

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
from ...runtime.distributed import World, gather

TERMS = ("features", "logits", "between_exits")


def rows_of(cfg: config.Distill, term: str, exits: int) -> Tensor:
    """bool [E], the exits at which a term, or the contrastive loss, has a value."""
    last = torch.arange(exits) == exits - 1
    if term == "between_exits":
        return ~last
    if term in TERMS and cfg.exits == "last":
        return last
    return torch.ones(exits, dtype=torch.bool)


def principal(sample_ND: Tensor) -> Tensor:
    """The rotation R [Dt, Dt] after which the first d coordinates of t R are, for every d, the best
    rank-d approximation of the sample (Eckart and Young): eigenvectors of sum t t^T, the largest
    first. Nothing is subtracted, so that whole vectors keep their cosines."""
    t = sample_ND.double()
    return principal_directions(t.T @ t).T.float()


class Distiller:
    """The terms of `config.Distill`, and what they need besides a teacher's vectors.

    rotation: [Dt, Dt] of align "pca". projection: P [Dt, D] of align "projection", a parameter that
    is no part of the model; `step` trains it. At prefix d the first d coordinates of t R stand for
    the teacher, or s P[:, :d]^T for the student. With "truncate" the teacher's own first d
    coordinates do: prefixes wider than the teacher have no such loss, a zero in the table; those of
    t R end in zeros.
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
        """None where nothing is distilled.

        Args:
            width: of the teacher's vectors, 0 without a teacher.
            sample_ND: some of them, for "pca"; None where `load` will bring the rotation.

        Raises:
            ValueError: no prefix that the teacher is wide enough for.
        """
        cfg, shape = run.distill, run.model
        if not any(getattr(cfg, term) for term in TERMS):
            return None
        rotation = projection = None
        if cfg.features and cfg.align == "pca":
            rotation = torch.zeros(width, width) if sample_ND is None else principal(sample_ND)
            rotation = rotation.to(where.device)
            if where.size > 1:  # devices may round the sample unlike each other
                dist.broadcast(rotation, src=0)
        if cfg.features and cfg.align == "projection":
            rng = torch.Generator().manual_seed(run.seed)  # equal on all processes
            D = shape.hidden_size
            tall = torch.linalg.qr(torch.randn(max(width, D), min(width, D), generator=rng))[0]
            projection = (tall if width >= D else tall.T).contiguous().to(where.device)
        if cfg.features and cfg.align == "truncate" and width < shape.matryoshka_dims[0]:
            raise ValueError(
                f"distill.align: expected pca or projection for a teacher of width {width}, which "
                f"is below all of model.matryoshka_dims {shape.matryoshka_dims}, got truncate"
            )
        made = Distiller(cfg, rotation, projection, where)
        if made.projection is not None:
            made.optimizer = torch.optim.AdamW(
                [made.projection], betas=run.optim.betas, eps=run.optim.eps, weight_decay=0.0
            )
        return made

    # ---- the loss ----

    def tables(
        self, exits_END: Tensor, batch: Batch, run: config.Run, where: World, exits: Sequence[int]
    ) -> dict[str, Tensor]:
        """loss_EM (fp32; float64 for float64) of each term with a weight, zero where it has none.

        The mean over processes is the loss of the whole batch on one, and so are gradients.

        Args:
            exits_END: this process's texts, in the order of `batch.packs`.
            batch: with `teacher_ND`, where there is a teacher.
            exits: their depths.
        """
        exits_END = exits_END[:, batch.place.to(exits_END.device)]
        t_ND = batch.teacher_ND
        found = {}
        if self.cfg.features:
            assert t_ND is not None
            found["features"] = self._features(
                exits_END, t_ND.to(exits_END.device), batch, run, exits
            )
        between = self.cfg.between_exits > 0 and len(exits) > 1
        if self.cfg.logits or between:
            pairs = _Pairs.of(exits_END, batch, run, where, exits)
        if self.cfg.logits:
            assert t_ND is not None
            first = len(exits) - 1 if self.cfg.exits == "last" else 0
            teacher = _split(t_ND.to(exits_END)[None], batch, where)
            found["logits"] = pairs.table(slice(first, None), teacher, range(first, len(exits)))
        if between:
            inner = range(len(exits) - 1)
            teacher = pairs.queries[-1:].detach(), pairs.docs[-1:].detach()
            there = [len(exits) - 1] * len(inner)  # who is at the last exit is at all of them
            found["between_exits"] = pairs.table(slice(0, -1), teacher, there)
        return found

    def _features(
        self,
        exits_END: Tensor,
        t_ND: Tensor,
        batch: Batch,
        run: config.Run,
        exits: Sequence[int],
    ) -> Tensor:
        x_END = exits_END.to(torch.promote_types(exits_END.dtype, torch.float32))
        t_ND = t_ND.detach().to(x_END.dtype)
        D, dims = x_END.shape[-1], run.model.matryoshka_dims
        if self.rotation is not None:
            t_ND = t_ND @ self.rotation.to(t_ND)
            t_ND = F.pad(t_ND, (0, max(0, D - t_ND.shape[1])))
        own, all_ = _depths(batch, self.where)
        wanted = rows_of(self.cfg, "features", len(exits)).tolist()
        rows = []
        for x, exit, here in zip(x_END, exits, wanted, strict=True):
            if not here:
                rows.append(x.new_zeros(len(dims)))
                continue
            t = t_ND
            if int(own.min()) < exit:  # who is there is known on the host: nothing waits
                there = (own >= exit).nonzero()[:, 0].to(x.device, non_blocking=True)
                x, t = x[there], t[there]
            # Processes differ in how many texts they have there: each counts by its share of them.
            count = max(1, int((all_ >= exit).sum())) / self.where.size
            rows.append(torch.stack([self._square(x, t, d) for d in dims]) / count)
        return torch.stack(rows)

    def _square(self, x_ND: Tensor, t_ND: Tensor, d: int) -> Tensor:
        """Sum over texts of the mean over coordinates of (s - t_d)^2."""
        if self.projection is not None:
            P = self.projection.to(x_ND.dtype)
            s, t = x_ND[:, :d] @ P[:, :d].T, t_ND
        elif d <= t_ND.shape[1]:
            s, t = x_ND[:, :d], t_ND[:, :d]
        else:
            return x_ND.new_zeros(())
        if self.cfg.feature_form == "normalised":
            s, t = F.normalize(s, dim=-1), F.normalize(t, dim=-1)
        return (s - t).square().sum() / t.shape[1]

    # ---- the projection's steps ----

    def step(self, lr: float, max_norm: float) -> None:
        """One step of the projection, with gradients averaged over processes; all call it."""
        P = self.projection
        if P is None or P.grad is None:
            return
        assert self.optimizer is not None
        if self.where.size > 1:
            dist.all_reduce(P.grad)
            P.grad /= self.where.size
        torch.nn.utils.clip_grad_norm_([P], max_norm)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        P.grad = None

    def finite(self) -> bool:
        """Whether the projection's gradient, if there is one, is."""
        P = self.projection
        return P is None or P.grad is None or bool(P.grad.isfinite().all())

    def discard(self) -> None:
        """Forget the gradients of a step that is left out."""
        if self.projection is not None:
            self.projection.grad = None

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to hold: equal on all processes."""
        tensors = {} if self.rotation is None else {"rotation": self.rotation}
        if self.projection is not None:
            assert self.optimizer is not None
            tensors["projection"] = self.projection.detach()
            for name, value in self.optimizer.state[self.projection].items():
                tensors[name] = value.reshape(-1) if name == "step" else value
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `state` returned.

        Raises:
            ValueError: tensors of another distillation.
        """
        own = {n for n in ("rotation", "projection") if getattr(self, n) is not None}
        for name in sorted(own):
            want, got = list(getattr(self, name).shape), tensors.get(name)
            if got is None or list(got.shape) != want:
                said = "none" if got is None else list(got.shape)
                raise ValueError(f"distill: expected {name} {want} in the checkpoint, got {said}")
        if self.rotation is not None:
            self.rotation.copy_(tensors["rotation"])
        if self.projection is not None:
            assert self.optimizer is not None
            self.projection.copy_(tensors["projection"])
            if "step" in tensors:
                state = {n: tensors[n].to(self.projection) for n in ("exp_avg", "exp_avg_sq")}
                step = tensors["step"].reshape(()).float().cpu()
                self.optimizer.state[self.projection] = {"step": step, **state}


# ---- similarities ----


def _depths(batch: Batch, where: World) -> tuple[Tensor, Tensor]:
    """int64: depths of this process's texts, queries then documents, and of all processes'."""
    n = len(batch.target)
    queries = batch.query_depths.split([n] * where.size)[where.rank]
    docs = batch.doc_depths.split(list(batch.doc_sizes))[where.rank]
    return torch.cat([queries, docs]), torch.cat([batch.query_depths, batch.doc_depths])


def _split(x_END: Tensor, batch: Batch, where: World) -> tuple[Tensor, Tensor]:
    """[E, Q, D] of this process's queries and [E, C, D] of all processes' documents, deepest
    first, with gradient to every one of them."""
    n = len(batch.target)
    docs = torch.cat(gather(x_END[:, n:], batch.doc_sizes), dim=1)
    if where.size > 1 and int(batch.doc_depths.min()) < int(batch.doc_depths.max()):
        order = batch.doc_depths.argsort(descending=True, stable=True)
        docs = docs[:, order.to(docs.device)]
    return x_END[:, :n], docs


class _Pairs:
    """This process's queries with all documents, and how many of either are there at each exit."""

    def __init__(
        self,
        split: tuple[Tensor, Tensor],
        counts: tuple[list[int], list[int]],
        share_E: list[float],
        batch: Batch,
        run: config.Run,
    ) -> None:
        self.queries, self.docs = split
        self.query_counts, self.doc_counts = counts
        self.share_E, self.run = share_E, run
        self.temperature = batch.temperature or run.loss.temperature

    @staticmethod
    def of(
        exits_END: Tensor, batch: Batch, run: config.Run, where: World, exits: Sequence[int]
    ) -> "_Pairs":
        own = _depths(batch, where)[0][: len(batch.target)]
        queries = [int((own >= exit).sum()) for exit in exits]
        docs = [int((batch.doc_depths >= exit).sum()) for exit in exits]
        # Processes differ in how many of their queries are there: each counts by its share of them.
        total = [max(1, int((batch.query_depths >= exit).sum())) for exit in exits]
        share = [n * where.size / all_ for n, all_ in zip(queries, total, strict=True)]
        return _Pairs(_split(exits_END, batch, where), (queries, docs), share, batch, run)

    def table(self, which: slice, teacher: tuple[Tensor, Tensor], there: Sequence[int]) -> Tensor:
        """loss_EM with the exits `which`, zero elsewhere, for pairs that are there at the exits of
        the places `there`, one for each."""
        cfg, device = self.run.distill, self.queries.device
        dims = self.run.model.matryoshka_dims

        def counts(values: Sequence[int]) -> Tensor:
            return torch.tensor([values[e] for e in there], device=device)

        loss_EM = distill(
            self.queries[which],
            self.docs[which],
            teacher[0][0],
            teacher[1][0],
            dims=dims,
            kind=cfg.logit_form,
            temperature=self.temperature,
            teacher_temperature=cfg.teacher_temperature,
            query_counts=counts(self.query_counts),
            cand_counts=counts(self.doc_counts),
        )
        loss_EM = loss_EM * loss_EM.new_tensor([[self.share_E[e]] for e in there])
        whole = loss_EM.new_zeros(self.queries.shape[0], len(dims))
        places = torch.arange(len(whole), device=device)[which]
        return whole.index_copy(0, places, loss_EM)

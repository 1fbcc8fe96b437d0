"""The case `cpu` of the step's bench: providers in turn, their work, MODEL."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench import __main__ as command
from bench.harness import TRAIN
from bench.train_step import bench, cases, cpu
from mlembed.modeling import pretrained
from mlembed.modeling.transformer import Transformer

CPU_TOY = cpu.CASE.toy()


def test_cpu_case_runs_every_provider_on_the_same_texts(monkeypatch):
    """A time is that of a step that trains: the second loss on the same texts is lower."""
    monkeypatch.setattr(cpu.harness, "timed", lambda call, repeats, device: [float(call(0))])
    rows = list(replace(CPU_TOY, small=False).rows(0.0, {f"cpu:ours_flat:{TRAIN}"}, 1.0))
    assert [row["provider"] for row in rows] == [
        who for who in cpu.CASE.providers if who != "ours_flat"
    ]
    assert all(row["status"] == "ran" and row["repeats"] == 1 for row in rows)
    drawn = "st_matryoshka_2d"  # whose layers and prefixes differ from step to step
    assert all(0 < row["ms"] < row["value"] for row in rows if row["provider"] != drawn), rows
    by_name = {row["provider"]: row for row in rows}
    assert by_name["ours"]["tokens_s"] == pytest.approx(
        cases.tokens(CPU_TOY) / by_name["ours"]["ms"] * 1e3
    )
    assert by_name["ours"]["share"] == by_name["ours"]["tflops"] > 0


def test_cpu_providers_differ_as_they_say():
    flat, _, _ = cpu.build("ours_flat", CPU_TOY, "")
    assert flat.model.cfg.exits == (4,) and not flat.model.cfg.ranks
    frozen, _, _ = cpu.build("ours_frozen", CPU_TOY, "")
    assert not frozen.model.embed_tokens.rows.requires_grad
    whole, inputs, _ = cpu.build("ours", CPU_TOY, "")
    theirs, rows, note = cpu.build("sentence_transformers", CPU_TOY, "")
    assert whole.model.cfg.ranks and "last layer only" in note
    assert all(map(np.array_equal, inputs.rows, rows.rows))
    assert {p.dtype for p in theirs.model.parameters()} == {torch.float32}


def test_flat_step_has_the_loss_of_sentence_transformers(monkeypatch):
    """Weights are the same, in fp32; theirs weighs prefixes like ours."""
    monkeypatch.setattr(cpu, "bf16", lambda run, device: False)
    ours, inputs, _ = cpu.build("ours_flat", CPU_TOY, "")
    theirs, columns, _ = cpu.build("sentence_transformers", CPU_TOY, "")
    assert float(ours(inputs, False)) == pytest.approx(float(theirs(columns, False)), rel=1e-4)


def test_cpu_case_takes_the_shape_of_a_model(tmp_path):
    shape = replace(CPU_TOY.run.model, exits=(4,), ranks=(), matryoshka_dims=(32,))
    pretrained.save(Transformer(shape), tmp_path)
    model = replace(CPU_TOY, model=str(tmp_path)).loaded().run.model
    assert model.num_hidden_layers == 4 and model.exits == (1, 2, 3, 4)
    own = replace(CPU_TOY, model=str(tmp_path))
    step, _, _ = cpu.build("ours_flat", own.loaded(), own.model)
    saved, name = pretrained.load(own.model).state_dict(), "layers.0.mlp.up_proj.weight"
    assert torch.equal(step.model.state_dict()[name], saved[name])


def test_cases_name_the_device_they_need(make_worker, records):
    make_worker("train_step", smoke=False).case("step")
    (row,) = records("row")
    assert row["status"] == "absent" and row["note"] == "its times need the device cuda"


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["MODEL=nowhere"], "MODEL: expected a directory, got 'nowhere'"),
        (["MODEL=.", "--case", "step"], "MODEL: no case of step takes a model"),
        (["--case", "step", "MODEL=."], "MODEL: no case of step takes a model"),
        (["--case", "step", "--seconds", "9", "MODEL=no"], "MODEL: expected a directory, got 'no'"),
    ],
)
def test_wrong_model_is_refused(monkeypatch, capsys, given, error):
    monkeypatch.setattr(sys, "argv", ["bench", "train_step", *given])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2 and f"error: {error}\n" == capsys.readouterr().err


def test_targets_of_a_cpu():
    at = {"case": "cpu", "mode": TRAIN, "status": "ran"}
    rows = [{**at, "provider": who, "ms": ms} for who, ms in
            (("ours", 100.0), ("ours_frozen", 90.0), ("sentence_transformers", 280.0))]  # fmt: skip
    ours, frozen = bench.targets(rows)
    assert ours["value"] == pytest.approx(2.8) and not ours["met"] and frozen["met"]

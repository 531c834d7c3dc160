"""The training loop. Oracle: by hand."""

import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from miniflux.tiny.train import loop
from miniflux.tiny.train.loop import learning_rate_factor
from miniflux.tiny.train.optimizers import Muon, orthogonalise
from miniflux.tiny.train.precision import fastest_dtype


def regression() -> tuple[nn.Module, object]:
    """A small network (with matrices for Muon and vectors for AdamW) that learns y = sin(x)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))

    def loss_of(generator: torch.Generator):
        x = torch.randn(32, 1, generator=generator)
        return (net(x) - x.sin()).square().mean()

    return net, loss_of


def train(*args, **keywords):
    with torch.enable_grad():                              # the suite runs without gradients
        return loop.train(*args, **keywords)


def entries(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_loss_falls(tmp_path):
    net, loss_of = regression()
    train(net, loss_of, tmp_path, lr=1e-2, steps=200)
    losses = [entry["loss"] for entry in entries(tmp_path)]
    assert losses[-1] < losses[0] / 5


def test_the_log_begins_with_the_first_step_and_counts_samples(tmp_path):
    net, loss_of = regression()
    train(net, loss_of, tmp_path, lr=1e-2, steps=40, batch=32)
    log = entries(tmp_path)
    assert [entry["step"] for entry in log] == [1, 20, 40]
    assert log[-1]["samples"] == 40 * 32 and all(entry["samples_per_s"] > 0 for entry in log)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_by_ctrl_c_is_saved_and_resumes_exactly(tmp_path, number):
    """40 steps in one go, and 40 steps stopped in step 27, end in the same bits."""
    net, loss_of = regression()
    whole = train(net, loss_of, tmp_path / "whole", lr=1e-2, steps=40)
    net, loss_of = regression()
    calls = []

    def stopped(generator):
        calls.append(1)
        if len(calls) == 27:
            os.kill(os.getpid(), number)
        return loss_of(generator)

    with pytest.raises(KeyboardInterrupt):
        train(net, stopped, tmp_path / "parts", lr=1e-2, steps=40)
    assert len(calls) == 27                                # the step that had begun is done
    net, loss_of = regression()
    resumed = train(net, loss_of, tmp_path / "parts", lr=1e-2, steps=40)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    a, b = (load_file(tmp_path / run / "state.safetensors") for run in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_minutes_count_over_restarts(tmp_path):
    """A run of six seconds that was stopped after some goes on for the rest alone."""
    net, loss_of = regression()
    train(net, loss_of, tmp_path, lr=1e-2, minutes=0.02)
    done = entries(tmp_path)[-1]["step"]
    train(net, loss_of, tmp_path, lr=1e-2, minutes=0.02)
    assert entries(tmp_path)[-1]["step"] <= done + 20      # nothing is left to do


def test_a_loss_that_explodes_stops_the_run_with_one_sentence(tmp_path):
    net, _ = regression()
    with pytest.raises(ValueError, match="the loss became inf at step 1: lower the learning rate"):
        train(net, lambda generator: net(torch.ones(1, 1)).sum() * torch.inf, tmp_path, lr=1e-2,
              steps=5)


def test_the_learning_rate_rises_stays_and_falls_in_the_last_quarter():
    assert learning_rate_factor(0.0, 0) == 0.01 and learning_rate_factor(0.7, 500) == 1.0
    assert learning_rate_factor(0.875, 500) == 0.5 and learning_rate_factor(1.0, 500) == 0.0


@pytest.mark.parametrize("shape", [(2, 8, 24), (3, 24, 8), (1, 16, 16)])
def test_orthogonalised_matrices_keep_their_singular_vectors(shape):
    """Oracle: the singular value decomposition; the singular values come near to 1."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    U, _, V = torch.linalg.svd(x, full_matrices=False)
    values = U.mT @ orthogonalise(x) @ V.mT                # diagonal where the vectors are kept
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-9
    assert 0.6 < diagonal.min() and diagonal.max() < 1.3


def test_muon_steps_as_torchs_does():
    """PyTorch's own, which computes in bfloat16, one matrix after the other."""
    torch.manual_seed(0)
    weights = [torch.randn(12, 20), torch.randn(12, 20), torch.randn(20, 12)]
    ours, theirs = ([nn.Parameter(w.clone()) for w in weights] for _ in range(2))
    a = Muon(ours, lr=0.1, weight_decay=0.01)
    b = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, w in zip(ours, theirs, weights):
        assert (p - q).norm() < 0.03 * (q - w).norm()


def test_a_convolution_counts_as_a_matrix():
    torch.manual_seed(0)
    kernel = torch.randn(8, 4, 3, 3)
    conv, matrix = nn.Parameter(kernel.clone()), nn.Parameter(kernel.flatten(1).clone())
    for p in (conv, matrix):
        p.grad = torch.arange(288.0).view(p.shape).sin()
        Muon([p], lr=0.1).step()
    assert torch.equal(conv.flatten(1), matrix)


def test_the_precision_is_one_of_two_and_stays_for_the_process():
    assert fastest_dtype("cpu") in (torch.float32, torch.bfloat16)
    assert fastest_dtype("cpu") == fastest_dtype("cpu") and fastest_dtype("cuda") == torch.bfloat16

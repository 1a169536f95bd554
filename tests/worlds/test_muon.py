"""The optimiser of the world's models: orthogonalised updates, of the size that AdamW's would have."""

import pytest
import torch
from torch import nn

from visalign.worlds.shapes.building.muon import Muon, MuonAndAdamW, hidden_matrices, orthogonalise, warmup_cosine


@pytest.mark.parametrize("shape", [(2, 64, 64), (3, 96, 64), (1, 64, 192)])
def test_singular_values_become_about_one_and_singular_vectors_stay(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = orthogonalise(x, iterations=8)
    values = torch.linalg.svdvals(y)
    assert values.min() > 0.6 and values.max() < 1.25
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ y @ vt.mT  # diagonal in the singular vectors of x
    off = inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < 1e-3


def test_matrices_of_one_shape_are_updated_as_each_alone():
    torch.manual_seed(0)
    values = [torch.randn(64, 80) for _ in range(3)]
    grads = [torch.randn(64, 80) for _ in range(3)]

    def after(pairs):
        params = [nn.Parameter(v.clone()) for v, _ in pairs]
        for p, (_, g) in zip(params, pairs):
            p.grad = g.clone()
        optimizer = Muon(params, lr=1e-2)
        optimizer.step()
        optimizer.step()
        return [p.detach() for p in params]

    together = after(list(zip(values, grads)))
    for k in range(3):
        assert torch.allclose(together[k], after([(values[k], grads[k])])[0], atol=1e-6)


def test_the_first_step_has_the_root_mean_square_of_lr_times_a_fifth():
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(128, 128))
    p.grad = torch.randn(128, 128) * 7  # whatever the gradient's size
    Muon([p], lr=1e-3).step()
    assert p.detach().square().mean().sqrt().item() == pytest.approx(0.2 * 1e-3, rel=0.2)
    assert (p.detach() * p.grad).sum() < 0


def test_only_inner_matrices_are_taken():
    sizes = {"inner": (64, 64), "narrow": (64, 4), "norm": (64, 64)}
    module = nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})
    module["table"] = nn.Embedding(100, 64)
    module["kernels"], module["first"] = nn.Conv2d(64, 96, 3), nn.Conv2d(3, 64, 8)
    assert [id(w) for w in hidden_matrices(module)] == [id(module[name].weight) for name in ("inner", "kernels")]


def test_a_convolution_is_updated_as_the_matrix_of_its_kernels():
    torch.manual_seed(0)
    kernels, grad = torch.randn(64, 64, 3, 3), torch.randn(64, 64, 3, 3)
    params = [nn.Parameter(kernels.clone()), nn.Parameter(kernels.flatten(1).clone())]
    params[0].grad, params[1].grad = grad, grad.flatten(1)
    for p in params:
        Muon([p], lr=1e-2).step()
    torch.testing.assert_close(params[0].detach().flatten(1), params[1].detach(), rtol=0, atol=1e-6)


def test_both_halves_move_by_the_rate_given_and_nothing_is_left_out_or_taken_twice():
    torch.manual_seed(0)
    module, other = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4)), nn.Parameter(torch.zeros(3))
    optimizer = MuonAndAdamW(module, [other], weight_decay=0.0)
    taken = [p for part in optimizer.parts for group in part.param_groups for p in group["params"]]
    assert len(taken) == len({id(p) for p in taken}) == 5
    before = [p.detach().clone() for p in taken]
    for p in taken:
        p.grad = torch.randn_like(p)
    optimizer.step(1e-3)
    moved = [(p.detach() - b).square().mean().sqrt().item() for p, b in zip(taken, before)]
    assert all(2e-4 * 0.7 < m < 1.01e-3 for m in moved)
    optimizer.zero_grad()
    assert all(p.grad is None for p in taken)


def test_the_rate_rises_linearly_and_falls_along_a_cosine():
    assert warmup_cosine(49, 100, 0.1) == pytest.approx(0.5)
    assert warmup_cosine(1000, 100, 0.5) == pytest.approx(0.51) and warmup_cosine(1000, 100, 1.0) == pytest.approx(0.01)


def test_momentum_is_an_average_that_looks_ahead():
    torch.manual_seed(0)
    p, first, second = nn.Parameter(torch.zeros(64, 64)), torch.randn(64, 64), torch.randn(64, 64)
    optimizer = Muon([p], lr=1e-2, momentum=0.9, weight_decay=0.0)
    for grad in (first, second):
        p.grad = grad.clone()
        optimizer.step()
    average = 0.1 * first
    moved = orthogonalise((0.1 * first + 0.9 * average)[None])[0]
    average = 0.9 * average + 0.1 * second
    moved = moved + orthogonalise((0.1 * second + 0.9 * average)[None])[0]
    torch.testing.assert_close(p.detach(), -0.2 * 64**0.5 * 1e-2 * moved, atol=1e-5, rtol=1e-3)

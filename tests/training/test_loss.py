"""The chunked cross-entropy against the plain one."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from s1engine.training.sft.loss import linear_cross_entropy


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(2, 97), st.integers(1, 50), st.integers(0, 999))
def test_chunked_equals_plain(tokens: int, vocabulary: int, chunk: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary, 9, generator=generator, dtype=torch.float64)
    weight.requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    plain = functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    expected = torch.autograd.grad(3 * plain, (hidden, weight))
    low_hidden = hidden.detach().float().requires_grad_()
    low_weight = weight.detach().float().requires_grad_()
    chunked = linear_cross_entropy(low_hidden, low_weight, targets, chunk)
    actual = torch.autograd.grad(3 * chunked, (low_hidden, low_weight))
    torch.testing.assert_close(chunked.double(), plain, rtol=1e-5, atol=1e-4)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_bfloat16_error_is_at_most_twice_that_of_plain_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    exact_hidden = torch.randn(97, 33, generator=generator)
    exact_weight = torch.randn(151, 33, generator=generator) / 6
    targets = torch.randint(151, (97,), generator=generator)

    def gradients(kind: torch.dtype, chunk: int | None) -> list[torch.Tensor]:
        hidden = exact_hidden.to(kind).requires_grad_()
        weight = exact_weight.to(kind).requires_grad_()
        if chunk is None:
            logits = hidden @ weight.T
            loss = functional.cross_entropy(logits.float(), targets, reduction="sum")
        else:
            loss = linear_cross_entropy(hidden, weight, targets, chunk)
        return [grad.double() for grad in torch.autograd.grad(loss, (hidden, weight))]

    truth = gradients(torch.float32, None)
    plain = gradients(torch.bfloat16, None)
    chunked = gradients(torch.bfloat16, 16)
    for exact, low, own in zip(truth, plain, chunked, strict=True):
        assert (own - exact).norm() <= 2 * (low - exact).norm()

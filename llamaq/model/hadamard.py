"""Hadamard matrices by construction.

A Hadamard matrix H of order n has entries ±1 and H Hᵀ = n I. Orders 2^k are Sylvester's; m · 2^k is H_m ⊗ H_{2^k}, with
H_m by Paley's first construction (m − 1 a prime, 3 mod 4) or his second (m / 2 − 1 a prime, 1 mod 4)
(https://en.wikipedia.org/wiki/Paley_construction). Order 28 is a table, because it has to be the very one that
ExecuTorch's operator multiplies with. Rows are tokens here: x' = x H.
"""

import math

import torch
from torch import Tensor

# Rows of ExecuTorch's matrix of order 28 (extension/llm/custom_ops/spinquant), first column in the highest bit
_EXECUTORCH_28 = """
    0x80796B3 0x403EB59 0x211D5EC 0x118EAB6 0x09C751B 0x05E1ACD 0x02F2D66
    0xC30262D 0xE081356 0x70409AB 0x38224D5 0x1C1326A 0x0E09935 0x8604CDA
    0xA4CE061 0x5365070 0xA9B0838 0x54D841C 0x2A6C20E 0x9534107 0x4B980C3
    0x9948F40 0x4CA47A0 0x2752390 0x92AB188 0xC857884 0x652BC02 0x3295E01
"""


def hadamard(n: int) -> Tensor | None:
    """Return a Hadamard matrix of order n, int8 [n, n]; None if none of the constructions makes one."""
    power = n & -n  # the largest power of two in n
    for two in (1, 2, 4, 8, 16, 32, 64):  # the smallest core first: as much as possible is left to the fast transform
        if power % two == 0 and (core := _core(n // (power // two))) is not None:
            return torch.kron(core, sylvester(power // two))
    return None


def sylvester(n: int) -> Tensor:
    """Return Sylvester's matrix of order n = 2^k, int8; symmetric."""
    h = torch.ones(1, 1, dtype=torch.int8)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def order_28() -> Tensor:
    """Return ExecuTorch's matrix of order 28, int8."""
    rows = [int(row, 16) for row in _EXECUTORCH_28.split()]
    return torch.tensor([[1 if row >> (27 - j) & 1 else -1 for j in range(28)] for row in rows], dtype=torch.int8)


def _core(m: int) -> Tensor | None:
    """Return a matrix of order 1, 28, or one of Paley's."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if m == 28:
        return order_28()
    if m % 4:
        return None
    q = m - 1
    if q % 4 == 3 and _is_prime(q):
        s = torch.zeros(m, m, dtype=torch.int8)  # skew: S = [[0, 1], [−1, Q]], H = I + S
        s[0, 1:], s[1:, 0], s[1:, 1:] = 1, -1, _jacobsthal(q)
        return s + torch.eye(m, dtype=torch.int8)
    q = m // 2 - 1
    if q % 4 == 1 and _is_prime(q):
        c = torch.zeros(q + 1, q + 1, dtype=torch.int8)  # symmetric conference matrix
        c[0, 1:], c[1:, 0], c[1:, 1:] = 1, 1, _jacobsthal(q)
        a, b = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
        return (torch.kron(c, a) + torch.kron(torch.eye(q + 1), b)).to(torch.int8)
    return None


def _jacobsthal(q: int) -> Tensor:
    """Return Q[i, j] = χ(i − j), χ the quadratic character of the integers mod q."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, q)], dtype=torch.int8)
    i = torch.arange(q)
    return character[(i[:, None] - i) % q]


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """Return a Hadamard matrix with random signs, or a random rotation where there is none: float64 [n, n]."""
    signs = torch.randint(2, (n, 1), generator=generator, dtype=torch.float64) * 2 - 1
    h = hadamard(n)
    if h is not None:
        return signs * h.double() / math.sqrt(n)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()

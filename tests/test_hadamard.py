"""pytest tests/test_hadamard.py — Hadamard matrices of every width, their fast transform, seeded signs."""

import pytest
import torch

from compress import hadamard


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 28, 36, 44, 64, 76, 100, 128, 148, 200, 256, 344, 384, 896, 1024])
def test_a_hadamard_matrix_is_orthogonal_with_entries_of_one_size(n):
    H = hadamard.matrix(n, torch.float64)
    torch.testing.assert_close(H @ H.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(H.abs(), torch.full_like(H, n**-0.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("n", "block"), [(384, 384), (11008, 11008), (14336, 14336), (18944, 18944), (13824, 13824), (25600, 25600), (5120, 5120),
                                          (96, 96), (6, 2), (7, 1), (15, 1), (92, 4), (4 * 29, 4), (48 * 7, 336)])  # fmt: skip
def test_order_is_the_width_or_its_largest_divisor_with_a_construction(n, block):
    assert hadamard.order(n) == block


@pytest.mark.parametrize("n", [1, 6, 7, 92, 96, 384, 1024, 4096])
def test_the_fast_transform_is_the_matrix_and_its_inverse_undoes_it(n):
    x, s = torch.randn(3, 2, n, dtype=torch.float64), hadamard.signs(n, 5).double()
    y = hadamard.transform(x, s)
    torch.testing.assert_close(y, (x * s) @ hadamard.matrix(n, torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard.transform(y, s, inverse=True), x, rtol=0, atol=1e-12)
    assert hadamard.transform(x.float()).dtype == torch.float32


def test_blocks_do_not_mix():
    H = hadamard.matrix(92, torch.float64)
    assert hadamard.order(92) == 4 and int((H != 0).sum()) == 4 * 92


def test_an_outlier_is_spread_over_every_channel():
    x = torch.zeros(384)
    x[7] = 100
    assert hadamard.transform(x).abs().max() < 5.2


def test_signs_depend_on_the_seed_only():
    s = hadamard.signs(4096, 0)
    assert s.unique().tolist() == [-1, 1] and abs(float(s.mean())) < 0.05
    assert abs(float((s * hadamard.signs(4096, 1)).mean())) < 0.05 and abs(float((s[1:] * s[:-1]).mean())) < 0.05
    assert s[:16].tolist() == hadamard.signs(16, 0).tolist()

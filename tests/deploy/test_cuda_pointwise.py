"""On a GPU: the kernels for norms, rotary embeddings and gates against plain torch."""

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from mmrl.deploy import pointwise

CUDA = torch.device("cuda")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def close(out: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within two roundings of the type."""
    bound = TOLERANCE[out.dtype]
    return torch.allclose(out.float(), expected.float(), rtol=bound, atol=bound)


@pytest.fixture(params=TOLERANCE)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    kind: torch.dtype = request.param
    return kind


@pytest.mark.parametrize("dim", [24, 128, 896, 5120])
def test_rms_norm(dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, dim, dtype=dtype, device=CUDA)
    weight = torch.randn(dim, dtype=dtype, device=CUDA)
    # Small numbers, so that the epsilon counts.
    for states in (x, x.transpose(0, 1), 1e-3 * x):
        normed = states.float()
        normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + 1e-6)
        out = pointwise.rms_norm(states, weight, 1e-6, plus_one=False)
        assert close(out, weight * normed.to(dtype))
        out = pointwise.rms_norm(states, weight, 1e-6, plus_one=True)
        assert close(out, (normed * (1 + weight.float())).to(dtype))


@pytest.mark.parametrize(("dim", "turned"), [(64, 64), (24, 24), (128, 128), (32, 8), (80, 20)])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 7), (6, 1), (1, 1)])
def test_rotate(batch: int, tokens: int, dim: int, turned: int, dtype: torch.dtype) -> None:
    # Parts of one projection, so rows are farther apart than they are long.
    states = torch.randn(batch, tokens, 4 + 2 + 2, dim, dtype=dtype, device=CUDA).transpose(1, 2)
    query, key = states[:, :4], states[:, 4:6]
    angles = torch.randn(batch, tokens, turned // 2, device=CUDA).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    for out, x in zip(pointwise.rotate(query, key, cos, sin), (query, key), strict=True):
        first, second, rest = x.split((turned // 2, turned // 2, dim - turned), -1)
        crossed = torch.cat((-second, first), -1)
        rotated = x[..., :turned] * cos[:, None] + crossed * sin[:, None]
        assert out.shape == x.shape
        assert close(out, torch.cat((rotated, rest), -1))


@pytest.mark.parametrize("shape", [(5, 1, 96), (1, 7, 1500), (1, 3, 18944)])
@pytest.mark.parametrize("together", [True, False])
def test_gate(shape: tuple[int, int, int], together: bool, dtype: torch.dtype) -> None:
    both = 3 * torch.randn(*shape[:-1], 2 * shape[-1], dtype=dtype, device=CUDA)
    gates, up = both.chunk(2, -1)
    if not together:
        gates, up = gates.contiguous(), up.contiguous()
    assert close(pointwise.gate(gates, up, gelu=False), F.silu(gates) * up)
    assert close(pointwise.gate(gates, up, gelu=True), F.gelu(gates, approximate="tanh") * up)

"""Two tensors have the same checksum if, and hardly ever unless, they are the same in dtype, shape and bits."""

import pytest
import torch
from torch import Tensor

from lightning_easgd.tensors import checksums
from lightning_easgd.tensors.checksums import checksum, sum_of_bits

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.uint8,
    torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


def some(dtype: torch.dtype, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(shape, generator=generator) * 50).to(dtype)


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (7, 5), (0,), (3, 0), (2, 3, 4)], ids=str)
def test_equal_tensors_have_equal_checksums_and_one_other_bit_gives_another(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = some(dtype, *shape)
    assert checksum(tensor) == checksum(tensor.clone())
    assert -(1 << 63) <= checksum(tensor) < 1 << 63
    for place in {0, tensor.numel() // 2, tensor.numel() - 1} if tensor.numel() else ():
        other = tensor.clone()
        other.view(-1).view(torch.uint8)[place * tensor.element_size()] ^= 1
        assert checksum(other) != checksum(tensor)


def test_shape_and_dtype_count() -> None:
    tensor = torch.zeros(12)
    same_bytes = [tensor.view(3, 4), tensor.view(4, 3), tensor.view(torch.int32), torch.zeros(13), torch.zeros(0)]
    assert len({checksum(each) for each in (tensor, *same_bytes)}) == 6


def test_order_and_signs_count() -> None:
    tensor = some(torch.float32, 64)
    others = [tensor.flip(0), -tensor, tensor.roll(1), tensor.view(2, 32).flip(0).reshape(-1)]
    others += [torch.where(torch.arange(64) % n == 0, -tensor, tensor) for n in (2, 4, 8, 16, 32)]  # an even number
    assert len({checksum(each) for each in (tensor, *others)}) == 10


def test_strides_and_offsets_do_not_count() -> None:
    tensor = some(torch.bfloat16, 9, 7)
    assert checksum(tensor.t().contiguous().t()) == checksum(tensor)
    for offset in range(4):
        base = torch.cat([torch.zeros(offset, dtype=torch.bfloat16), tensor.flatten()])
        assert checksum(base[offset:].view(9, 7)) == checksum(tensor)
    expanded = torch.ones(1).expand(5)
    assert checksum(expanded) == checksum(torch.ones(5))
    imaginary = some(torch.complex64, 5) * (1 + 2j)
    assert checksum(imaginary.conj()) == checksum(imaginary.conj().resolve_conj()) != checksum(imaginary)


def test_blocks_are_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_BLOCK", 4)
    checksums._weights.cache_clear()
    try:
        tensor = some(torch.float32, 22)  # five and a half blocks
        swapped = torch.cat([tensor[4:8], tensor[:4], tensor[8:]])
        assert checksum(tensor) == checksum(tensor.clone()) != checksum(swapped)
    finally:
        checksums._weights.cache_clear()


def test_sparse_tensors() -> None:
    dense = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    moved = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    assert checksum(dense.to_sparse()) == checksum(dense.clone().to_sparse()) != checksum(moved.to_sparse())
    assert checksum(dense.to_sparse()) != checksum((2 * dense).to_sparse())
    assert checksum(torch.zeros(2, 3).to_sparse()) != checksum(torch.zeros(2, 4).to_sparse())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_compressed_sparse_tensors() -> None:
    dense = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    assert checksum(dense.to_sparse_csr()) == checksum(dense.clone().to_sparse_csr())
    assert checksum(dense.to_sparse_csr()) != checksum(dense.flip(1).to_sparse_csr())


def test_it_does_not_change_with_the_version() -> None:
    assert checksum(torch.arange(6, dtype=torch.float32).view(2, 3)) == PINNED


def test_parameters_that_need_gradients_have_one() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    assert checksum(parameter) == checksum(parameter.detach())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_is_the_same_on_every_device() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        tensor = some(dtype, 300_001)
        assert checksum(tensor.cuda()) == checksum(tensor)


PINNED = 343025102299395838


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numel", [1, 2, 7, 1000])
def test_one_other_bit_gives_another_sum_of_bits(dtype: torch.dtype, numel: int) -> None:
    vector = torch.randn(numel + 1, dtype=dtype)
    own = sum_of_bits(vector[1:])
    assert own == sum_of_bits(vector[1:].clone())  # whatever lies before it
    for place in {0, numel // 2, numel - 1}:
        for change in (1, -1 << 31):
            other = vector[1:].clone()
            other.view(torch.int32 if dtype == torch.float32 else torch.int64)[place] ^= change
            assert sum_of_bits(other) != own
    assert sum_of_bits(vector[:0]) == 0

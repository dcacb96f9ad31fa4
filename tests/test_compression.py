"""Codecs of differences: sizes, bounds, edges, and error feedback on whole runs."""

import math

import pytest
import torch

from lightning_easgd.method.compression import BFloat16Codec, Int8Codec, make_codec

CODECS = [BFloat16Codec, Int8Codec]
LENGTHS = [0, 1, 2, 3, 255, 256, 257, 511, 513, 1000, 3 * 2**18 + 77]
TINY = torch.finfo(torch.float32).tiny


def message_of(codec, values):
    message = torch.full((codec.nbytes(values.numel()),), 0xA5, dtype=torch.uint8)
    codec.encode(values, message)
    return message


def decoded(codec, message, numel, dtype=torch.float32):
    out = torch.full((numel,), 123.0, dtype=dtype)
    codec.decode(message, out)
    return out


def through(codec, values):
    return decoded(codec, message_of(codec, values), values.numel(), values.dtype)


def block_scales(values):
    """The scale of each element's block, from first principles."""
    return torch.cat([block.abs().max().expand_as(block) / 127 for block in values.split(256)])


@pytest.mark.parametrize(("codec", "fewer"), [(BFloat16Codec, 2), (Int8Codec, 3.938)])
def test_bytes(codec, fewer):
    assert 4 * 10**6 / codec().nbytes(10**6) == pytest.approx(fewer, abs=1e-3)
    assert codec().nbytes(0) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_int8_is_off_by_half_a_scale_at_most(length, scale, dtype):
    values = scale * torch.randn(length, generator=torch.Generator().manual_seed(length)).to(dtype)
    error = (through(Int8Codec(), values) - values).abs()
    if length:
        bound = block_scales(values) / 2
        assert (error <= bound * 1.0001).all()
        assert (error > bound * 0.9).any() or length < 256  # it is rounding, not copying
    assert error.numel() == length


def test_int8_of_small_blocks_by_hand():
    values = torch.zeros(258)
    values[:5] = torch.tensor([127.0, -127.0, 0.49, 2.5, -3.5])  # scale 1: to nearest, ties to even
    values[256:] = torch.tensor([254.0, -1.5])  # a block of its own: scale 2
    message = message_of(Int8Codec(), values)
    assert message[:8].view(torch.float32).tolist() == [1.0, 2.0]
    assert message[8:].view(torch.int8)[:5].tolist() == [127, -127, 0, 2, -4]
    assert message[8:].view(torch.int8)[-2:].tolist() == [127, -1]
    assert decoded(Int8Codec(), message, 258)[[0, 1, 2, 3, 4, 5, 256, 257]].tolist() == [
        127,
        -127,
        0,
        2,
        -4,
        0,
        254,
        -2,
    ]


def test_int8_sends_opposite_values_for_opposite_vectors():
    values = torch.randn(1000)
    assert through(Int8Codec(), -values).equal(-through(Int8Codec(), values))


@pytest.mark.parametrize("length", LENGTHS)
def test_bfloat16_is_rounded_to_nearest_even(length):
    values = torch.randn(length)
    assert through(BFloat16Codec(), values).equal(values.bfloat16().float())


def test_bfloat16_ties_go_to_even():
    assert through(BFloat16Codec(), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])).tolist() == [1.0, 1 + 2**-6]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("length", [1, 256, 300])
def test_zeros_are_exact(codec, length):
    assert through(codec(), torch.zeros(length)).equal(torch.zeros(length))


@pytest.mark.parametrize("largest", [1e-45, 1e-40, 127 * TINY * 0.999])
def test_a_block_too_small_for_a_scale_is_zeros_and_waits_in_the_residual(largest):
    values = torch.full((300,), largest)
    values[:256] = 1.0  # the other block is not concerned
    codec, residual = Int8Codec(), values.clone()
    message = torch.empty(codec.nbytes(300), dtype=torch.uint8)
    codec.encode_rest_(residual, message)
    assert decoded(codec, message, 300)[256:].equal(torch.zeros(44))
    assert residual[256:].equal(values[256:])
    assert decoded(codec, message, 300)[:256] == pytest.approx(torch.ones(256))


def test_the_smallest_and_the_largest_scale():
    for largest in (127 * TINY * 1.001, 3.4e38):
        values = largest * torch.linspace(-1, 1, 256)
        error = (through(Int8Codec(), values).double() - values.double()).abs()
        assert (error <= largest / 254 * 1.001).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_lost(bad):
    values = torch.randn(700)
    values[300] = bad
    got = through(Int8Codec(), values)
    assert got[256:512].isnan().all()
    assert got[:256].isfinite().all()
    assert got[512:].isfinite().all()
    got = through(BFloat16Codec(), values)
    assert str(got[300].item()) == str(bad)
    assert got.isfinite().sum() == 699


def test_a_float64_value_beyond_float32_is_not_lost():
    assert through(Int8Codec(), torch.full((3,), 1e60, dtype=torch.float64)).isnan().all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_four_ways_agree_bit_for_bit(codec, dtype, length):
    """Encoding with or without the rest, decoding into or onto a vector, again or with a fresh codec."""
    values = torch.randn(length).to(dtype)
    used = codec()
    message = message_of(used, values)
    assert message_of(codec(), values).equal(message)
    assert message_of(used, values).equal(message)
    rest, again = values.clone(), torch.empty_like(message)
    used.encode_rest_(rest, again)
    assert again.equal(message)
    assert rest.equal(values - decoded(used, message, length, dtype))
    onto = torch.randn(length).to(dtype)
    expected = onto - 0.5 * decoded(codec(), message, length, dtype)
    used.add_decoded_(message, onto, alpha=-0.5)
    assert onto.equal(expected)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("length", [1, 1000, 2**18 + 1000])
def test_parts_cut_at_blocks_are_as_the_whole(codec, length):
    values = torch.randn(length)
    part = 3 * 256
    parts = [through(codec(), piece) for piece in values.split(part)]
    assert torch.cat(parts).equal(through(codec(), values))


@pytest.mark.parametrize("codec", CODECS)
def test_messages_with_feedback_add_up_to_the_vectors(codec):
    """Σ messages = Σ vectors - the last residual; without feedback the error grows with the run."""
    torch.manual_seed(0)
    codec, numel, rounds = codec(), 700, 400
    bias = 0.01 * torch.rand(numel)  # rounding errors that do not cancel
    residual, message = torch.zeros(numel), torch.empty(codec.nbytes(numel), dtype=torch.uint8)
    sent, lossy, vectors = (torch.zeros(numel, dtype=torch.float64) for _ in range(3))
    largest = 0.0
    for _ in range(rounds):
        vector = bias.clone()
        vector[::97] = 1.3  # a few large elements make the scale of all
        vectors += vector
        residual.add_(vector)
        largest = max(largest, residual.abs().max().item())
        codec.encode_rest_(residual, message)
        sent += decoded(codec, message, numel)
        lossy += through(codec, vector)
    torch.testing.assert_close(sent, vectors - residual, rtol=0, atol=rounds * 2e-7)
    assert (sent - vectors).abs().max() <= largest / 127
    assert (lossy - vectors).abs().max() > 5 * (sent - vectors).abs().max()


def elastic_averaging(send, steps=1500, workers=3, numel=512, beta=0.9, lr=0.1):
    """Synchronous EASGD on quadratics whose minima span orders of magnitude; the center's late mean."""
    generator = torch.Generator().manual_seed(1)
    minima = torch.randn(workers, numel, generator=generator).double() * torch.logspace(0, -4, numel)
    x, center, mean = torch.ones_like(minima), torch.ones(numel).double(), torch.zeros(numel).double()
    for step in range(steps):
        difference = x - center
        x = x - lr * (x - minima) - beta / workers * difference
        center = center + send(beta / workers * difference)
        if step >= steps - 500:
            mean += center / 500
    return mean, minima.mean(0)


def test_a_center_fed_by_int8_with_feedback_goes_where_the_exact_one_goes():
    codec = Int8Codec()
    residuals, total_residual = torch.zeros(3, 512).double(), torch.zeros(512).double()
    message = torch.empty(codec.nbytes(512), dtype=torch.uint8)

    def with_feedback(differences):
        """Both roundings of an exchange: each worker's message, and the sum's."""
        for residual, difference in zip(residuals, differences, strict=True):
            residual.add_(difference)
            codec.encode_rest_(residual, message)
            codec.add_decoded_(message, total_residual)
        codec.encode_rest_(total_residual, message)
        return decoded(codec, message, 512, torch.float64)

    def without_feedback(differences):
        return through(codec, sum(through(codec, each) for each in differences))

    exact, optimum = elastic_averaging(lambda differences: differences.sum(0))
    torch.testing.assert_close(exact, optimum, rtol=0, atol=1e-6)
    error = (elastic_averaging(with_feedback)[0] - optimum).abs().max()
    biased = (elastic_averaging(without_feedback)[0] - optimum).abs().max()
    assert error < 2e-5
    assert biased > 1e-3


def test_codecs_by_name():
    assert isinstance(make_codec("int8"), Int8Codec)
    assert isinstance(make_codec("bfloat16"), BFloat16Codec)

"""Packed weights that come from anywhere: `check` refuses what is no packed weight, and what it lets through multiplies.

Beside the ops, since what a damaged file could do to a kernel is looked for by the sanitized build, which runs these tests again.
"""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.runtime.formats import Bitmask, NMPacked, format_of

from .strategies import FLOATS, PROPERTY, bits

SHAPES = [(1, 4), (5, 24), (16, 64), (33, 132)]


@st.composite
def packed_weights(draw):
    """A format, the tensors of a weight in it, its shape and dtype."""
    fmt = draw(st.sampled_from([Bitmask(), NMPacked(2, 4), NMPacked(1, 4), NMPacked(5, 12)]))
    rows, columns = draw(st.sampled_from(SHAPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if isinstance(fmt, Bitmask):
        kept = torch.rand(rows, columns, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.9]))
    else:
        columns = -(-columns // fmt.m) * fmt.m
        kept = (torch.rand(rows, columns // fmt.m, fmt.m, generator=generator).argsort(-1).argsort(-1) < fmt.n).flatten(1)
    dtype = draw(st.sampled_from(FLOATS))
    weight = (torch.randn(kept.shape, generator=generator) * kept).to(dtype)
    return fmt, fmt.pack(weight), (rows, columns), dtype


@st.composite
def damaged(draw):
    """The same after one or more of: bits flipped, integers replaced, a tensor cut, lengthened, retyped, taken from another one."""
    fmt, tensors, shape, dtype = draw(packed_weights())
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(fmt.tensor_names))
        tensor = tensors[name]
        kind = draw(st.sampled_from(["bits", "integers", "cut", "lengthen", "retype", "zero"]))
        if kind == "bits" and tensor.numel():
            raw = tensor.view(torch.uint8).view(-1)
            raw[draw(st.integers(0, raw.numel() - 1))] ^= 1 << draw(st.integers(0, 7))
        elif kind == "integers" and tensor.numel() and not tensor.is_floating_point():
            limits = torch.iinfo(tensor.dtype)
            value = draw(st.one_of(st.integers(-2, 40), st.sampled_from([limits.min, limits.max, -1])))
            tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = value
        elif kind == "cut":
            tensors[name] = tensor[: max(0, tensor.shape[0] - draw(st.integers(1, 70)))].clone()
        elif kind == "lengthen":
            tensors[name] = torch.cat([tensor, tensor[:1]])
        elif kind == "retype":
            tensors[name] = tensor.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8])))
        elif kind == "zero":
            tensor.zero_()
    return fmt, tensors, shape, dtype


def multiply(fmt, tensors, shape, dtype, tokens):
    x = torch.randn(tokens, shape[1]).to(dtype)
    return x, fmt.linear(x, tensors, shape)


@PROPERTY
@given(case=packed_weights())
def test_what_pack_makes_is_sound_and_of_the_size_foretold(case):
    fmt, tensors, shape, dtype = case
    fmt.check(tensors, shape, dtype)
    weight = fmt.unpack(tensors, shape, dtype)
    assert weight.shape == shape and weight.dtype == dtype
    assert fmt.packed_bytes(weight) == sum(tensor.nbytes for tensor in tensors.values())
    again = fmt.pack(weight)
    assert {name: bits(again[name]) for name in again} == {name: bits(tensors[name]) for name in tensors}
    empty = fmt.empty(shape, dtype, fmt.stored(tensors))
    assert all(tensors[name].shape == empty[name].shape and tensors[name].dtype == empty[name].dtype for name in fmt.tensor_names)
    assert all(tensor.is_contiguous() for tensor in tensors.values()) and list(tensors) == list(fmt.tensor_names)


@PROPERTY
@given(case=damaged(), tokens=st.sampled_from([1, 3, 40]))
def test_damage_is_refused_or_harmless(case, tokens):
    fmt, tensors, shape, dtype = case
    try:
        fmt.check(tensors, shape, dtype)
    except ValueError as error:
        name, _, message = str(error).partition(": ")
        assert name in fmt.tensor_names and "expected" in message
        try:
            multiply(fmt, tensors, shape, dtype, tokens)  # unchecked: any answer, but no other memory
        except (ValueError, TypeError, RuntimeError, IndexError):
            pass
    else:
        x, y = multiply(fmt, tensors, shape, dtype, tokens)
        weight, limits = fmt.unpack(tensors, shape, dtype), torch.finfo(dtype)
        finite = weight.isfinite().all(1)
        exact = x.double() @ weight[finite].double().T
        size = x.double().abs() @ weight[finite].double().abs().T
        close = (y[:, finite].double() - exact).abs() <= 2 * limits.eps * (size + limits.smallest_normal)
        assert (close | (size > limits.max / 2)).all()  # a flipped bit of an exponent may overflow


@pytest.mark.parametrize("dtype", FLOATS)
def test_messages_name_the_tensor(generator, dtype):
    weight = (torch.randn(40, 130, generator=generator).clamp_min(0) + 0.0).to(dtype)
    fmt, shape = Bitmask(), (40, 130)
    sound = fmt.pack(weight)

    def refused(message, *, shape=shape, fmt=fmt, sound=sound, **changed):
        with pytest.raises(ValueError, match=message):
            fmt.check({**sound, **changed}, shape, dtype)

    bitmask = sound["bitmask"].clone()
    bitmask[7, 2] |= 4
    refused("bitmask: expected zeros past column 129, got a set bit in row 7", bitmask=bitmask)
    refused(r"bitmask: expected torch.int64 \(40, 3\), got torch.int64 \(40, 2\)", bitmask=sound["bitmask"][:, :2])
    refused("bitmask: expected a contiguous tensor", bitmask=sound["bitmask"].T.contiguous().T)
    refused(r"values: expected \d+ values for the bits set in bitmask", bitmask=torch.zeros_like(bitmask))
    refused(
        r"starts: expected the first slot after the values of earlier tiles, got -1 for tile 1", starts=torch.tensor([0, -1, 2, 3])
    )
    refused("order: expected each row from 0 to 39 once", order=torch.zeros_like(sound["order"]))
    refused("tensors: expected values, bitmask, starts, order, got .*more", more=bitmask)
    refused("shape: expected .*got", shape=(40, -1))
    fmt, shape = NMPacked(2, 4), (3, 64)
    nm = fmt.pack((torch.arange(192).view(3, 64) % 4 < 2).to(dtype))
    codes = nm["codes"].clone()
    codes[2, 0] = 0
    refused(
        r"codes: expected 2 ascending positions below 4 in every group, got \[0, 0\] in row 2, group 0",
        shape=shape,
        fmt=fmt,
        sound=nm,
        codes=codes,
    )
    fmt, shape = NMPacked(1, 3), (1, 12)
    nm = fmt.pack((torch.arange(12).view(1, 12) % 3 == 2).to(dtype))
    codes = nm["codes"].clone()
    codes[0, 0] |= 3
    refused(r"codes: expected 1 ascending .* got \[3\] in row 0, group 0", shape=shape, fmt=fmt, sound=nm, codes=codes)
    refused("codes: expected zeros after the 4 positions", shape=shape, fmt=fmt, sound=nm, codes=nm["codes"] | 256)
    values = nm["values"].clone()
    values[0, -1] = torch.nan
    refused("values: expected zeros after the 4 values of a row", shape=shape, fmt=fmt, sound=nm, values=values)


GOLDEN = {
    ("bitmask", torch.bfloat16): "e2260ef87818168b",
    ("bitmask", torch.float32): "c0434d71684485db",
    ("2:4", torch.float16): "e1c043b5aab2f764",
    ("2:4", torch.float32): "e7b0ed7353c811d9",
    ("3:8", torch.bfloat16): "c087856297f593d3",
}


@pytest.mark.parametrize("name, dtype", GOLDEN)
def test_files_that_are_out_there_stay_readable(name, dtype):
    """The bytes of a weight of several tiles, words and blocks, as the first release with packed weights wrote them."""
    numbers = torch.arange(37 * 264).view(37, 264)
    weight = ((numbers * 7919 % 251) - 125).to(dtype) * (numbers % 8 < (3 if name == "3:8" else 2))
    if name == "bitmask":
        weight = weight * (numbers * 31 % (numbers // 264 + 2) > 0)
    fmt = format_of(name)
    digest = hashlib.sha256(b"".join(bits(tensor) for tensor in fmt.pack(weight).values())).hexdigest()
    assert digest[:16] == GOLDEN[name, dtype]


def test_linear_takes_the_features_of_the_weight():
    for fmt in (Bitmask(), NMPacked(2, 4)):
        tensors = fmt.pack(torch.zeros(3, 60))
        assert fmt.linear(torch.ones(2, 60), tensors, (3, 60)).shape == (2, 3)
        with pytest.raises(ValueError, match="x: expected 60 input features, got 56"):
            fmt.linear(torch.ones(2, 56), tensors, (3, 60))
        with pytest.raises(TypeError, match="x: expected torch.float32, the dtype of the packed values, got torch.float16"):
            fmt.linear(torch.ones(2, 60).half(), tensors, (3, 60))


def test_what_pack_refuses(generator):
    with pytest.raises(ValueError, match="weight: expected at most 2 non-zeros in every 4 inputs, got 3 in row 1, columns 4 to 7"):
        weight = torch.zeros(2, 8)
        weight[1, 5:] = 1
        NMPacked(2, 4).pack(weight)
    with pytest.raises(ValueError, match="weight: expected input features divisible by 4 for format '2:4', got 6"):
        NMPacked(2, 4).pack(torch.zeros(2, 6))
    with pytest.raises(TypeError, match="weight: expected dtype"):
        Bitmask().packed_bytes(torch.zeros(2, 6, dtype=torch.int8))
    with pytest.raises(ValueError, match="stored: expected the number of values of a bitmask, got None"):
        Bitmask().specs((2, 3), torch.float32)


def test_formats_have_names():
    assert format_of("bitmask") == Bitmask() and format_of("2:4") == NMPacked(2, 4)
    assert format_of(NMPacked(4, 8).name) == NMPacked(4, 8) and format_of(Bitmask.name) == Bitmask()
    for name in ("2:32", "4:4"):
        with pytest.raises(ValueError, match="n, m: expected n < m <= 16|pattern: expected N:M with 1 <= N < M"):
            format_of(name)
    with pytest.raises(ValueError, match="format: expected 'bitmask', 'N:M', 'N:M-q4' or 'int8', got 'int4'"):
        format_of("int4")

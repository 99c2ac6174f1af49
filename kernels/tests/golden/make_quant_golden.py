#!/usr/bin/env python3
"""Golden decodings and encodings of the quantized block formats, by the `gguf` package (0.19, numpy 2.4).

  make_quant_golden.py [libggml-base.so] > quant.txt

Blocks and numbers come from a counter-based generator keyed by a name, which the test has too (tests/quant.rs): only
hashes and a few values are stored. One line each:

  decode TYPE SHA256 INDEX=BITS ..    all numbers of all blocks as little-endian f32, every NaN as 7fc00000
  encode TYPE SHA256 HEX              all blocks of the prepared numbers; the first block of them
  error TYPE DISTRIBUTION NUMBER      root of (squared error / squared numbers) that the formats' C encoder reaches

The last need that encoder: a library with `ggml_quantize_chunk` (ggml 0.5.0 was used; without an importance matrix).
"""

import ctypes
import hashlib
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

BLOCKS = 512
# Name, and where in a block its f16 scales are.
TYPES = dict(q8_0=[0], q4_0=[0], q4_1=[0, 2], q5_0=[0], q5_1=[0, 2], q2_k=[80, 82], q3_k=[108], q4_k=[0, 2],
             q5_k=[0, 2], q6_k=[208], iq4_nl=[0], mxfp4=[])
# Zeros, subnormals, the smallest normal, the largest, infinities, NaN, one.
SCALES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00, 0x3C00]


def words(name, count):
    """SplitMix64 of (FNV-1a of the name) + index."""
    key = 0xCBF29CE484222325
    for byte in name.encode():
        key = (key ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        z = (np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def draws(name, count):
    """Uniform numbers of [-1, 1)."""
    return (words(name, count) >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)


def random_blocks(name):
    """Random bytes; the first blocks have all pairs of extreme scales, those of mxfp4 all exponents."""
    size = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]][1]
    count = BLOCKS * size
    blocks = words(name, -(-count // 8)).astype("<u8").view(np.uint8)[:count].reshape(BLOCKS, size).copy()
    for i in range(BLOCKS):
        if name == "mxfp4":
            blocks[i, 0] = i % 256
        if i < len(SCALES) ** 2:
            for offset, scale in zip(TYPES[name], (SCALES[i % len(SCALES)], SCALES[i // len(SCALES)])):
                blocks[i, offset:offset + 2] = scale & 0xFF, scale >> 8
    return blocks


def prepared_numbers():
    """[BLOCKS, 32]: bell-shaped at magnitudes from 2^-30 to 2^13; every eighth block has halves of small integers, whose
    rounding is a matter of rules; one block of zeros, one of equal numbers."""
    u = draws("prepared", BLOCKS * 32 * 4).reshape(BLOCKS, 32, 4)
    numbers = (u[..., 0] + u[..., 1]) + (u[..., 2] + u[..., 3])
    numbers *= np.float32(2) ** (np.arange(BLOCKS) % 44 - 30).astype(np.float32)[:, None]
    halves = np.floor(draws("halves", BLOCKS * 32).reshape(BLOCKS, 32) * np.float32(16)) / np.float32(2)
    halves[:, 0] = np.where(np.arange(BLOCKS) % 16 == 0, -8, 127)
    numbers[::8] = halves[::8]
    numbers[1], numbers[2] = 0, 0.7
    return numbers


def distribution(name):
    """65,536 numbers: "bell" (the sum of twelve uniform numbers), "outliers" (every 64th of them eight times as large),
    "small" (of the size of weights: deviation 1/64)."""
    u = draws("distribution", 65536 * 12).reshape(65536, 12)
    numbers = np.zeros(65536, np.float32)
    for k in range(12):
        numbers += u[:, k]
    if name == "outliers":
        numbers[::64] *= np.float32(8)
    if name == "small":
        numbers /= np.float32(128)
    return numbers


def relative_error(numbers, got):
    numbers, got = numbers.astype(np.float64), got.astype(np.float64)
    return np.sqrt(((numbers - got) ** 2).sum() / (numbers ** 2).sum())


def main():
    np.seterr(all="ignore")
    for name in TYPES:
        numbers = quants.dequantize(random_blocks(name), GGMLQuantizationType[name.upper()]).ravel()
        bits = np.where(np.isnan(numbers), np.uint32(0x7FC00000), numbers.view(np.uint32)).astype("<u4")
        picked = [(7919 * k) % bits.size for k in range(20, 26)]
        values = " ".join(f"{i}={bits[i]:08x}" for i in picked)
        print("decode", name, hashlib.sha256(bits.tobytes()).hexdigest(), values)
    for name in ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4"]:
        blocks = quants.quantize(prepared_numbers(), GGMLQuantizationType[name.upper()])
        print("encode", name, hashlib.sha256(blocks.tobytes()).hexdigest(), blocks[0].tobytes().hex())
    if len(sys.argv) < 2:
        return
    quantize = ctypes.CDLL(sys.argv[1]).ggml_quantize_chunk
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + 3 * [ctypes.c_int64] + [ctypes.c_void_p]
    for name in TYPES:
        kind = GGMLQuantizationType[name.upper()]
        values, size = GGML_QUANT_SIZES[kind]
        for shape in ["bell", "outliers", "small"]:
            numbers = distribution(shape)
            blocks = np.zeros((numbers.size // values, size), np.uint8)
            quantize(kind, numbers.ctypes.data, blocks.ctypes.data, 0, 1, numbers.size, None)
            print("error", name, shape, f"{relative_error(numbers, quants.dequantize(blocks, kind).ravel()):.6f}")


if __name__ == "__main__":
    main()

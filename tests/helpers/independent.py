"""The mask stream a second time, element by element in Python integers, from docs/mask-stream.md alone.

It shares no code with graddrop_fused. Run in its folder, `python independent.py > known_answers.json` writes the known
answers; the Philox vectors among them are the published ones (Random123, kat_vectors).
"""

import hashlib
import json
import math
from fractions import Fraction

WORDS, HALVES = 2**32, 2**16


def philox(counter, key):
    """Philox4x32-10: four counter words and two key words -> four words."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x0, WORDS)
        high2, low2 = divmod(0xCD9E8D57 * x2, WORDS)
        x0, x1, x2, x3 = high2 ^ x1 ^ k0, low2, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % WORDS, (k1 + 0xBB67AE85) % WORDS
    return [x0, x1, x2, x3]


def output(i, purpose, seed, draw, stream_id):
    """The four words at 40-bit counter index i."""
    word1 = i // WORDS + purpose * 2**8 + stream_id // WORDS * 2**12
    return philox((i % WORDS, word1, draw, stream_id % WORDS), (seed % WORDS, seed // WORDS))


def half(word, upper):
    """The lower or upper 16 bits of a word."""
    return word // HALVES if upper else word % HALVES


def element_random(e, seed, draw, stream_id, purpose=0):
    tile, within = divmod(e, 128)
    word, rest = divmod(within, 32)
    lane, upper = divmod(rest, 2)
    return half(output(16 * tile + lane, purpose, seed, draw, stream_id)[word], upper)


def layer_random(seed, draw, stream_id):
    return half(output(0, 1, seed, draw, stream_id)[0], 0)


def block_random(b, seed, draw, stream_id):
    i, within = divmod(b, 8)
    word, upper = divmod(within, 2)
    return half(output(i, 3, seed, draw, stream_id)[word], upper)


def normal(e, seed, draw, stream_id):
    tile, within = divmod(e, 128)
    word, lane = divmod(within, 32)
    u = [(x + 0.5) / WORDS for x in output(32 * tile + lane, 2, seed, draw, stream_id)]
    radius, angle = (u[0], u[1]) if word < 2 else (u[2], u[3])
    wave = math.sin if word % 2 else math.cos
    return math.sqrt(-2 * math.log(radius)) * wave(2 * math.pi * angle)


def kept(random, lo, span):
    """Does the number lie among the span + 1 values from lo on, counting round at 2**16?"""
    return lo <= random <= lo + span or lo <= random + HALVES <= lo + span


def bernoulli(p):
    lo = round(Fraction(p) * HALVES)  # half to even, exactly
    return lo, HALVES - 1 - lo


def epoch_bounds(p):
    bounds, share = [0], 0.0
    while bounds[-1] != HALVES:
        share += 1.0 - p
        bounds.append(round(Fraction(min(1.0, share)) * HALVES))
    return bounds


def name_id(name):
    """The id of a parameter or layer of that (canonical) name."""
    return sum(byte << 8 * k for k, byte in enumerate(hashlib.blake2b(name.encode(), digest_size=8).digest())) % 2**52


def mask(numel, lo, span, seed, draw, stream_id, block=1):
    """The mask of a whole parameter: a list of bools in row-major order."""
    if block == 1:
        return [kept(element_random(e, seed, draw, stream_id), lo, span) for e in range(numel)]
    return [kept(block_random(e // block, seed, draw, stream_id), lo, span) for e in range(numel)]


def pack(bits):
    """Signed 32-bit words, bit l of word w = element 32 * w + l."""
    words = []
    for start in range(0, len(bits), 32):
        word = sum(1 << lane for lane, bit in enumerate(bits[start : start + 32]) if bit)
        words.append(word - WORDS if word >= 2**31 else word)
    return words


def known_answers():
    at = [
        {"seed": 0, "draw": 1, "stream_id": 0},
        {"seed": 0x0123456789ABCDEF, "draw": 7, "stream_id": name_id("encoder.layer.0.attention.self.query.weight")},
        {"seed": 2**64 - 1, "draw": 2**32 - 1, "stream_id": 2**52 - 1},
    ]
    elements = [0, 1, 2, 31, 32, 95, 96, 127, 128, 2**31, 2**32 + 5, 2**35 - 1, 2**35, 2**40 + 77, 2**43 - 1]
    tiles = [e for e in elements if e < 2**42]  # of Gaussian masks, where a tile takes twice the counters
    shapes = [[0], [1], [31], [32], [33], [127], [128], [129], [17, 23], [1000]]
    shares = [0.0, 2.0**-17, 3 * 2.0**-17, 1e-9, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9, 0.999, 1 - 2.0**-16]
    names = ["", "a", "bert.encoder.layer.11.output.dense.weight", "vu\u00e9"]
    masks = []
    for n, shape in enumerate(shapes):
        for k, point in enumerate(at):
            lo, span = bernoulli((0.1, 0.5, 0.9)[(n + k) % 3])
            masks.append({**point, "shape": shape, "block": 1, "lo": lo, "span": span})
    bounds = epoch_bounds(0.7)
    for k in range(4):
        lo, span = bounds[k], bounds[k + 1] - 1 - bounds[k]
        masks.append({**at[1], "shape": [10, 10], "block": 1, "lo": lo, "span": span})
    for block in (23, 128, 384):
        masks.append({**at[1], "shape": [13, 100], "block": block, "lo": 2**15, "span": 2**15 - 1})
    for entry in masks:
        point = {key: entry[key] for key in ("lo", "span", "seed", "draw", "stream_id", "block")}
        entry["packed"] = pack(mask(math.prod(entry["shape"]), **point))
    vectors = [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((WORDS - 1,) * 4, (WORDS - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    return {
        "philox": [{"counter": c, "key": k, "output": [int(x, 16) for x in out.split()]} for c, k, out in vectors],
        "names": [{"name": name, "stream_id": name_id(name)} for name in names],
        "element_random": [
            {**p, "elements": elements, "random": [element_random(e, **p) for e in elements]} for p in at
        ],
        "layer_random": [{**p, "random": layer_random(**p)} for p in at],
        "block_random": [{**p, "blocks": elements, "random": [block_random(b, **p) for b in elements]} for p in at],
        "rounding": [
            {**p, "purpose": n, "elements": elements, "random": [element_random(e, **p, purpose=n) for e in elements]}
            for n, p in zip((4, 5, 6, 7), (*at, at[1]), strict=True)
        ],
        "normals": [{**p, "elements": tiles, "values": [normal(e, **p) for e in tiles]} for p in at],
        "bernoulli": [dict(zip(("p", "lo", "span"), (p, *bernoulli(p)), strict=True)) for p in shares],
        "epoch_bounds": [{"p": p, "bounds": epoch_bounds(p)} for p in (*shares[:10], 0.95, 0.999)],
        "masks": masks,
    }


if __name__ == "__main__":
    answers = known_answers()
    rows = [
        f' "{name}": [\n  ' + ",\n  ".join(json.dumps(row) for row in table) + "\n ]" for name, table in answers.items()
    ]
    print("{\n" + ",\n".join(rows) + "\n}")

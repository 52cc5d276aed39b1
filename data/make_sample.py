"""Draw a small Martian data set: ten frames of a rover's camera, cut into shuffled 64x128 tiles.

    training_set           uint8 (240, 2, 64, 128)   image 2..254, mask 0..4; 12 intruders, one mask
    test_set, test_labels  uint8 (80, 64, 128)       images, and their masks
Classes: 0 background or unlabelled, 1 soil, 2 bedrock, 3 sand, 4 big rock.

One seed gives the same arrays bit for bit on any machine: raw bits of PCG64 and, in float64, only
+ - * / and sqrt, which IEEE 754 rounds exactly; no sin, log or power. (The file varies with zlib.)
"""
import argparse
from pathlib import Path

import numpy as np

SIDE, TILE_H, TILE_W, N_TILES, N_TEST, N_INTRUDERS = 512, 64, 128, 320, 80, 12
FOCAL, TALL, FAR = 618.0, 1.9, 34  # a 45 degree lens 1.9 m up; labels end 34 rows off the horizon
# Horizon's row; leaning to soil, bedrock and sand; brightness, contrast; big rocks, rovers in view.
FRAMES = [(75, 0.2, 0.0, -0.1, 84, 0.9, 2, 0), (-150, 0.4, 0.1, 0.0, 64, 1, 2, 0),
          (55, 0.0, 0.1, 0.1, 72, 0.9, 3, 0), (-60, 0.1, 0.0, 0.0, 78, 0.9, 1, 0),
          (90, 0.1, 0.0, 0.2, 80, 0.8, 3, 0), (-90, 0.3, -0.1, 0.2, 50, 0.9, 2, 1),
          (-230, 0.2, 0.0, 0.0, 88, 0.9, 1, 0), (40, 0.3, 0.0, 0.0, 60, 0.9, 4, 0),
          (-120, 0.0, 0.0, 0.1, 68, 0.9, 1, 0), (50, 0.2, -0.1, 0.0, 76, 0.9, 3, 1)]
# Ellipses, the later on top: centre x, y, radii, slant, and the alien's grey or the saucers' class.
HEAD = [(-9, -25, 2, 8, -0.3, 150), (9, -25, 2, 8, 0.3, 130), (-11, -29, 3, 3, 0, 215),
        (13, -28, 3, 3, 0, 190), (0, -4, 21, 18, 0, 176), (0, 10, 12, 20, 0, 176),
        (-4, -8, 13, 10, 0, 205), (-9, -1, 8, 5, 0.5, 22), (9, -1, 8, 5, -0.5, 22),
        (-11, -3, 2, 2, 0, 235), (7, -1, 2, 2, 0, 235), (1, 20, 6, 2, 0.15, 48)]
SAUCERS = [(32, 20, 11, 12, 0, 3), (32, 28, 27, 9, 0.1, 4), (95, 14, 10, 11, 0, 3),
           (95, 22, 25, 8, -0.15, 4), (16, 27, 3, 2, 0, 2), (32, 30, 3, 2, 0, 2),
           (48, 31, 3, 2, 0, 2), (95, 23, 9, 2, 0, 2)]


def wave(turns):
    """Stand-ins for cosine and sine of an angle in turns, rational, exactly on the unit circle."""
    t, sign = 2 * ((2 * turns) % 1) - 1, 1 - 2 * (np.floor(2 * turns) % 2)
    return sign * (1 - t * t) / (1 + t * t), sign * 2 * t / (1 + t * t)


def fractal(rand, u, v, size, octaves, pixel=0.0):
    """Noise about 0 at u, v in halving grains from `size` down; those under 2 `pixel` fade."""
    total = 0.0
    for grain in size / np.array([1.0, 2, 4, 8, 16])[:octaves]:
        grid, x, y = 2 * rand(64, 64) - 1, np.floor(u / grain), np.floor(v / grain)
        a, b, x, y = u / grain - x, v / grain - y, x.astype(int) & 63, y.astype(int) & 63
        a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
        top, low = ((1 - a) * grid[j, x] + a * grid[j, (x + 1) & 63] for j in (y, (y + 1) & 63))
        fade = np.clip(grain / (pixel + 1e-9) - 1, 0, 1)
        total += ((1 - b) * top + b * low) * (grain / size) * fade
    return total


def cells(rand, u, v):
    """Distances (H, W) to the two nearest seeds of a jittered lattice; the nearest's numbers."""
    seeds, x, y = rand(4, 64, 64), np.floor(u).astype(int), np.floor(v).astype(int)
    first, second, numbers = np.full(u.shape, 9.0), np.full(u.shape, 9.0), np.zeros((2, *u.shape))
    for p, q in ((x + i, y + j) for j in (-1, 0, 1) for i in (-1, 0, 1)):
        dx, dy, *own = seeds[:, q & 63, p & 63]
        d = (p + 0.1 + 0.8 * dx - u) ** 2 + (q + 0.1 + 0.8 * dy - v) ** 2
        second = np.minimum(second, np.maximum(first, d))
        numbers = np.where(d < first, own, numbers)
        first = np.minimum(first, d)
    return np.sqrt(first), np.sqrt(second), numbers


def stones(rand, u, v, pitch, share):
    """Height in metres of round stones, most small, in a share of the cells of `pitch` metres."""
    d, _, (a, b) = cells(rand, u / pitch, v / pitch)
    radius = (b < share) * (0.1 + 0.33 * a * a * a)
    return 0.8 * pitch * np.sqrt(np.clip(radius * radius - d * d, 0, None))


def grounds(rand, u, v, pixel):
    """Tone and height in metres (3, H, W each) of soil, bedrock and sand at points u, v (H, W)."""
    wu, wv = (w + 0.04 * fractal(rand, u, v, 0.3, 4, pixel) for w in (u, v))
    grain, broad = fractal(rand, u, v, 0.02, 3, pixel), fractal(rand, u, v, 1.5, 4, pixel)
    pebbles = 0.0
    for pitch, share in ((0.02, 0.5), (0.05, 0.4), (0.13, 0.25), (0.4, 0.06)):
        pebbles += stones(rand, wu, wv, pitch, share * (0.3 + rand()) + 0.25 * broad)
    soil = 0.95 + 0.1 * broad + 0.05 * grain + 2 * pebbles, pebbles + 0.0015 * grain + 0.01 * broad
    near, next_, (tone, level) = cells(rand, wu / 0.6, wv / 0.35)
    fine, far, (spot, _) = cells(rand, (wu + 0.3 * wv) / 0.17, wv / 0.12)
    crack = np.clip(0.6 * rand() + 0.3 + fractal(rand, u, v, 0.8, 2), 0, 1)  # 1 for slabs
    slab = (1 - crack + crack * np.clip(6 * (next_ - near), 0, 1)) * (0.02 + 0.03 * level * crack)
    rough = 0.016 * fractal(rand, u, 2 * v, 0.25, 5, pixel)
    slab += 0.006 * crack * np.clip(9 * (far - fine), 0, 1) + rough
    stone = 0.95 + 0.25 * rand() + 0.12 * tone + 0.07 * spot + 0.07 * grain
    dust = np.clip((0.008 + 0.02 * rand() + 0.022 * broad - slab) * 120, 0, 1)  # on low slabs
    bedrock = stone + dust * (0.87 + 0.02 * grain - stone), np.maximum(slab, 0.012 + 0.015 * broad)
    (c, s), bend = wave(rand() * 0.2 + 0.05), fractal(rand, u, v, 1.2, 3, pixel)
    ripples = 0.0
    for size, length, warp, sign in ((0.004, 0.11, 0.1, 1), (0.035, 0.9, 0.45, -0.5)):
        swell = size * wave((c * u + s * v + warp * bend) / length)[1]
        ripples += swell * np.clip(length / pixel / 3 - 1, 0, 1) * np.clip(0.4 + broad * sign, 0, 1)
    few = 0.5 * stones(rand, wu, wv, 0.15, 0.2 * rand() + 0.2 * broad)
    tone = 0.84 + 0.12 * rand() + 0.06 * broad + 0.02 * grain + 2.5 * ripples
    sand = tone, ripples + 0.0006 * grain + few
    return map(np.stack, zip(soil, bedrock, sand, strict=True))


def add_objects(rand, height, tone, label, rocks):
    """Blank three polygons of the label, then put faceted big rocks; (512, 512), in place."""
    for kind in [0] * 3 + [4] * rocks:
        size = 9 + 14 * rand() if kind else 45 + 30 * rand()
        dy, dx = np.mgrid[:SIDE, :SIDE] - np.floor((350, 450) * rand(2) + (150, 30))[:, None, None]
        c, s = wave(np.arange(8) / 8 + 0.11 * rand(8))
        deep = size * (0.7 + 0.5 * rand(8)) - c * dx[..., None] - 1.5 * s * dy[..., None]
        inside, rough = deep.min(2) > 0, 1.2 * fractal(rand, dx, dy, 9.0, 4)
        if kind:
            sides = (deep * (0.5 + rand(8))).min(2)
            roof = size * (0.55 + 0.3 * rand()) + 0.2 * dx + 0.3 * dy
            height += inside * np.maximum(np.minimum(sides, roof) + rough, 0)
            tone[inside] = (0.9 + 0.3 * rand() + 0.07 * rough)[inside]
        label[deep.min(2) > rough] = kind


def shade(height, sun):
    """Light (512, 512) on a relief in pixels, the sun on the left at slope `sun`, with shadows."""
    dy, dx = (np.diff(height, axis=k, prepend=height.take([0], axis=k)) for k in (0, 1))
    light = np.clip((sun + dx + 0.35 * dy) / np.sqrt(1 + dx * dx + dy * dy) / sun, 0.2, 1.9)
    top = height[:, 0]
    for x in range(1, SIDE):  # the shadow sinks with the sun's slope, and moves a row in each four
        top = np.maximum((np.append(top[:1], top[:-1]) if x % 4 == 0 else top) - sun, height[:, x])
        light[:, x] += np.clip((top - height[:, x]) / 2, 0, 1) * (0.32 - light[:, x])
    return light


def add_rover(rand, image, label, y, x):
    """Draw a mast and a deck at the lower edge, unlabelled: all (512, 512), changed in place."""
    x, tilt = x - 100 - 300 * rand(), 0.4 * rand() - 0.2
    along, down = x - tilt * (y - 430), y - 430 + tilt * x
    mast, deck = (np.abs(along) < 22) & (y > 250) & (down < 0), (down > 0) & (np.abs(x) < 120)
    image[mast] = (20 + (160 - 0.3 * (along + 6) ** 2) * np.where(y // 14 % 5 == 0, 0.3, 1))[mast]
    rivets = ((down - 20) % 40 - 5) ** 2 + (x % 30 - 15) ** 2 <= 9
    image[deck] = (54 + 0.2 * x + 56 * ~rivets)[deck]
    label[mast | deck] = 0


def draw_frame(rand, horizon, soil, bedrock, sand, level, contrast, rocks, rover):
    """One camera frame, image and label: uint8 (2, 512, 512)."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(float)
    below = np.maximum(y - horizon, 4.0)
    far = TALL * np.sqrt(FOCAL / below)  # a plane would have no root, but its stones stand up
    u, v, pixel = (x - SIDE / 2) * TALL / below, -2 * far, far / below
    smooth = np.stack([fractal(rand, u, v, 2.6, 3) + 2.2 * lean for lean in (soil, bedrock, sand)])
    frayed = smooth + 0.3 * np.stack([fractal(rand, u, v, 0.25, 4, pixel) for _ in range(3)])
    share = np.clip(frayed - frayed.max(0) + 0.06, 0, None)
    tone, height = ((share * part).sum(0) / share.sum(0) for part in grounds(rand, u, v, pixel))
    height *= below / TALL  # metres to pixels
    _, second, first = np.sort(smooth, axis=0)
    label = (1 + smooth.argmax(0)) * (first - second > 0.04) * (below > FAR)
    add_objects(rand, height, tone, label, rocks)
    image = tone * (0.35 + 0.65 * shade(height, 0.55 + 0.35 * rand()))
    image += np.clip(12 / below, 0, 1) * (1.2 - image)  # haze
    image *= 1 + 0.35 * (rand() - 0.5) * (x / 256 - 1) + 0.3 * (y / 512 - 0.5)
    ridge = horizon - 14 - 12 * fractal(rand, x, 0 * x, 170.0, 5)
    hills = 1.25 + 0.08 * fractal(rand, x, 3 * y, 40.0, 4)
    sky = np.where(y < ridge, 1.75 - 0.002 * (ridge - y), hills)
    image = level * (1 + contrast * (np.where(y < horizon, sky, image) - 1))
    if rover:
        add_rover(rand, image, label, y, x)
    noise = 2 * rand(3, SIDE, SIDE).sum(0)  # the sensor's, of mean 3; 2.5 less, floor rounds
    frame = np.stack([np.clip(np.floor(image + noise - 2.5), 2, 254), label]).astype(np.uint8)
    return frame if rand() < 0.5 else frame[..., ::-1]  # the sun on the left or the right


def paint(canvas, x, y, ellipses, soft):
    """Draw HEAD (soft=1) or SAUCERS (soft=0) on a float canvas at x, y (64, 128), in place."""
    for cx, cy, rx, ry, slant, value in ellipses:
        deep = 1 - ((x - cx) / rx) ** 2 - ((y - cy - slant * (x - cx)) / ry) ** 2
        cover = np.clip(5 * deep, 0, 1) if soft else deep > 0
        canvas += cover * (value - soft * 1.2 * (x - cx) - canvas)


def build(seed=0):
    """The data set: a dict of the three arrays in the module's docstring."""
    bits = np.random.PCG64(seed)
    def rand(*shape):  # in [0, 1); unlike a Generator's methods, NumPy keeps raw bits the same
        return (bits.random_raw(shape or None) >> 11) * 2.0**-53
    grid = np.stack([draw_frame(rand, *row) for row in FRAMES]).reshape(-1, 2, 8, TILE_H, 4, TILE_W)
    tiles = grid.transpose(0, 2, 4, 1, 3, 5).reshape(-1, 2, TILE_H, TILE_W)
    test, train = np.split(tiles[np.argsort(rand(N_TILES))], [N_TEST])
    y, x = np.mgrid[:TILE_H, :TILE_W].astype(float)
    mask = 1.0 * ((y > 30) & (np.minimum(np.abs(x - 32), np.abs(x - 95)) < 0.5 * y - 11))  # beams
    paint(mask, x, y, SAUCERS, 0)
    for k, intruder in enumerate(np.argsort(rand(len(train)))[:N_INTRUDERS]):
        image = train[intruder, 0].astype(float)
        side, way = ((1, 1), (-1, 1), (1, -1))[k % 3]  # as it is, mirrored or upside down
        right, low = np.floor((60, 3) * rand(2) + (34, 31))
        paint(image, side * (x - right), way * (y - low), HEAD, 1)
        train[intruder] = np.clip(np.floor(image + 0.5), 2, 254), mask
    return {"training_set": train, "test_set": test[:, 0], "test_labels": test[:, 1]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw a small Martian data set.")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("sample.npz"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    np.savez_compressed(args.out, **build(args.seed))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")

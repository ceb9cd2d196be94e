"""Draw a built-in data set, photographs of hands and pixel-exact masks of their nails, or fetch the real one."""

import argparse
import json
import math
import shlex
import shutil
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

DRAWING_VERSION = 1  # raise it whenever the same seed would give other pictures
Array = np.ndarray[Any, Any]
Rng = np.random.Generator
# fmt: off
# share: pictures in the real data set. size: height, width. hand: width of the palm in the picture's shorter side. aim:
# what the camera centres on, 1 is the knuckles and 2 the fingertips. things, beads: how many lie around, at most.
DAYLIGHT: dict[str, Any] = {"about": "daylight, french or varnished nails", "share": 749, "size": (480, 400),
    "hand": 1.0, "aim": 1.65, "things": 3, "beads": 0, "lamp": 0.72, "ambient": 0.4, "blur": 0.5, "noise": 0.008,
    "tints": ((1, 0.98, 0.95), (0.95, 1, 1.06)), "tables": ("plain", "wood"), "nails": ("french", "varnish")}
SOURCES = (DAYLIGHT,
    DAYLIGHT | {"about": "dim warm rooms, blurred and noisy", "share": 144, "size": (380, 460), "lamp": 0.27,
                "ambient": 0.13, "blur": 1.3, "tints": ((1.2, 0.9, 0.55), (1.15, 0.95, 0.65)), "noise": 0.03},
    DAYLIGHT | {"about": "smaller hands on crowded tables", "share": 126, "size": (400, 480), "hand": 0.82,
                "things": 10, "beads": 2, "blur": 0.6, "noise": 0.012, "tables": ("wood", "plain", "fabric")},
    DAYLIGHT | {"about": "close-ups of painted, glossy nails", "share": 52, "size": (400, 400), "hand": 1.05,
                "aim": 1.7, "tables": ("plain", "fabric"), "nails": ("varnish", "french", "glitter", "dots")},
    DAYLIGHT | {"about": "coloured light, deep shadows, beads like nails", "share": 34, "size": (448, 336), "beads": 14,
                "lamp": 0.65, "ambient": 0.16, "tints": ((1.1, 0.7, 0.8), (0.7, 0.8, 1.15), (0.8, 1.05, 0.8)),
                "tables": ("fabric", "wood"), "blur": 0.9, "noise": 0.025, "nails": ("natural", "varnish", "dots")})
SKINS = ((244, 208, 186), (228, 182, 154), (196, 142, 108), (160, 106, 76), (120, 76, 54), (94, 60, 45))
VARNISHES = ((176, 9, 38), (226, 90, 140), (240, 170, 180), (226, 160, 140), (20, 22, 30), (30, 60, 140), (20, 120, 99))
CLOTHS = ((228, 226, 222), (205, 214, 220), (99, 110, 120), (232, 218, 205), (64, 70, 84), (180, 99, 90), (99, 60, 70))
# A right hand from the back, wrist at (0, 0), fingers up, in widths of the palm: the outline of the arm and the palm;
# x and y of the knuckle, length, half the thickness and direction in degrees of every finger, thumb first.
PALM = ((-0.32, -2.6), (-0.28, -0.1), (-0.38, 0.2), (-0.64, 0.5), (-0.58, 0.7), (-0.42, 0.72), (-0.46, 1), (-0.34, 1.2),
        (-0.11, 1.3), (0.11, 1.27), (0.32, 1.12), (0.43, 0.9), (0.41, 0.5), (0.28, -0.1), (0.32, -2.6))
FINGERS = ((-0.47, 0.60, 0.74, 0.122, -38.0), (-0.33, 0.98, 1.04, 0.112, -9.0), (-0.11, 1.04, 1.16, 0.115, -2.0),
           (0.11, 1.01, 1.08, 0.110, 5.0), (0.31, 0.91, 0.86, 0.095, 13.0))
THICKNESS = np.array([1.1, 1.05, 0.98, 0.96, 0.98, 1.01, 0.95, 0.92, 0.93, 0.9, 0.83, 0.7])  # from knuckle to tip
# fmt: on


def linear(colour: Any) -> Array:
    """Turn colours as screens show them, 0..255, into shares of light, 0..1."""
    return (np.asarray(colour, np.float32) / 255) ** 2  # the true exponent is near 2.2; with 2 the way back is a root


def hills(rng: Rng, shape: tuple[int, ...], down: float, across: float) -> Array:
    """Smooth noise of about -1..1, float32, with hills of the given size in pixels."""
    small = rng.standard_normal((int(shape[0] / down) + 3, int(shape[1] / across) + 3), np.float32)
    return cv2.resize(small, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)


def window(points: Any, margin: float, scene: Array) -> tuple[Array, Array, Array]:
    """The part of the picture around points (n, 2): a view of it, and x (1, columns) and y (rows, 1) of its pixels."""
    low = np.clip(np.min(points, 0) - margin, 0, np.array(scene.shape[1::-1]) - 1).astype(int)
    high = np.clip(np.max(points, 0) + margin, low + 1, scene.shape[1::-1]).astype(int)
    x, y = (np.arange(low[axis], high[axis], dtype=np.float32) for axis in (0, 1))
    return scene[low[1] : high[1], low[0] : high[0]], x[None, :], y[:, None]


def coverage(points: Array, x: Array, y: Array) -> Array:
    """How much of every pixel of a window lies inside an outline (n, 2): 0..1, from 4 x 4 samples per pixel."""
    canvas = np.zeros((4 * y.size, 4 * x.size), np.uint8)
    samples = (points - (x[0, 0], y[0, 0]) + 0.5) * 4 - 0.5  # whole numbers are centres of pixels
    cv2.fillPoly(canvas, [np.round(samples * 16).astype(np.int32)], 255, shift=4)
    return cv2.resize(canvas, (x.size, y.size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def paint(scene: Array, cover: Array, colour: Array, height: Array, gloss: float, nail: float) -> None:
    """Lay a material over a scene (height, width, 6): light thrown back (3), height in pixels, gloss, share of nail."""
    scene[..., :3] += cover[..., None] * (colour - scene[..., :3])
    for channel, value in ((3, height), (4, gloss), (5, nail)):
        scene[..., channel] += cover * (value - scene[..., channel])


def lay_table(rng: Rng, source: dict[str, Any], scene: Array) -> None:
    """Cover a table with plain cloth, wood or printed fabric; scatter things, and beads that look like nails."""
    shape, side, (_, x, y) = scene.shape[:2], min(scene.shape[:2]), window([(0, 0), scene.shape[1::-1]], 0, scene)
    kind, slant, step = rng.choice(source["tables"]), rng.uniform(-2, 2), side * rng.uniform(0.012, 0.03)
    colour = linear(rng.choice(SKINS if kind == "wood" else CLOTHS))
    grain = rng.permutation((4.0, 160.0)) if kind == "wood" else (90.0, 90.0)
    tone = 1 + 0.1 * hills(rng, shape, *grain) + 0.02 * hills(rng, shape, 3, 3)
    if kind == "fabric":  # stripes or dots
        pattern = np.sin((x + slant * y) / step) + rng.integers(2) * np.sin((y - slant * x) / step) - 0.3
        colour = colour + np.clip(pattern * step + 0.5, 0, 1)[..., None] * (linear(rng.choice(VARNISHES)) - colour)
    scene[..., :3] = colour * np.clip(tone, 0.4, 1.6)[..., None]
    beads = round(source["beads"] * rng.uniform(0.5, 1))
    for number in range(beads + round(source["things"] * rng.uniform(0.2, 1))):
        bead, (ahead, aside) = number < beads, np.linalg.qr(rng.standard_normal((2, 2)))[0]
        length, corners = side * (0.045 if bead else rng.uniform(0.06, 0.22)), 60 if bead else rng.choice((4, 60))
        width, angle = length * rng.choice((0.6, 0.8) if bead else (0.08, 0.6, 1)), np.arange(0.5, corners) / corners
        points = np.outer(length * np.cos(2 * math.pi * angle), ahead) + rng.uniform((0, 0), shape[::-1])
        points += np.outer(width * np.sin(2 * math.pi * angle), aside)
        spot, x, y = window(points, 3, scene)
        cover = coverage(points, x, y)
        dome = 0.02 * side * cv2.GaussianBlur(cover, (0, 0), 0.3 * width + 0.5)
        paint(spot, cover, linear(rng.choice(SKINS + VARNISHES if bead else CLOTHS)), dome, rng.uniform(0, 0.8), 0)


def pose_hand(rng: Rng, source: dict[str, Any], shape: tuple[int, ...]) -> tuple[Array, list[Any]]:
    """The outline of palm and arm, (n, 2), and the fingers as (root, direction, length, radii); all in pixels."""
    scale, turn = min(shape) * source["hand"] * rng.uniform(0.88, 1.12), rng.choice((0, 0, 0, 90, -90, 180))
    turn, mirror = math.radians(turn + rng.uniform(-22, 22)), rng.choice((-1, 1))  # a left hand is a mirrored right one
    axes = np.array([(mirror * math.cos(turn), mirror * math.sin(turn)), (math.sin(turn), -math.cos(turn))])
    middle = np.array(shape[::-1]) * rng.uniform(0.44, 0.56, 2) - scale * (np.array((-0.04, source["aim"])) @ axes)
    spread, slim, bent, fingers = rng.uniform(0.2, 1.7), rng.uniform(0.88, 1.06), rng.uniform(0.84, 1), []
    for x, y, length, radius, degrees in FINGERS:
        angle = math.radians(degrees * (spread if x > -0.4 else rng.uniform(0.6, 1.3)) + rng.normal(0, 2))
        root, ahead = middle + scale * ((x, y) @ axes), np.array((math.sin(angle), math.cos(angle))) @ axes
        length, radii = scale * length * bent * rng.uniform(0.95, 1.03), scale * radius * slim * THICKNESS
        fingers.append((root, ahead, length, radii))
    return middle + scale * (np.array(PALM) @ axes), fingers


def draw_hand(rng: Rng, scene: Array, palm: Array, fingers: list[Any], skin: Array) -> None:
    """Raise a hand from the table: a rounded palm and fingers that are tapered tubes, with creases and blotches."""
    shape, unit, (_, x, y) = scene.shape[:2], float(fingers[2][3].max()), window([(0, 0), scene.shape[1::-1]], 0, scene)
    flat = (cv2.GaussianBlur(coverage(palm, x, y), (0, 0), 0.8 * unit) - 0.5) * 4 * unit**2  # unit: half a finger
    maps = np.dstack([flat, flat, 0 * flat, 0.2 * hills(rng, shape, unit, unit)])
    for root, ahead, length, radii in fingers:
        spot, x, y = window([root, root + length * ahead], 2.5 * unit, maps)
        flat, hand, relief, red = np.moveaxis(spot, -1, 0)  # flat, hand: squared heights of the palm, of everything
        (dx, dy), x, y = ahead.tolist(), x - float(root[0]), y - float(root[1])
        along, aside = (x * dx + y * dy) / float(length), y * dx - x * dy
        radius = np.interp(along, np.linspace(0, 1, len(radii)), radii).astype(np.float32)
        tube = radius**2 - aside**2 - ((along - np.clip(along, 0, 1)) * float(length)) ** 2
        tube = np.maximum(tube, flat) + np.maximum(unit - np.abs(tube - flat) / unit, 0) ** 2 / 4  # no sharp corners
        knuckle, bow = np.exp(-((along * 8) ** 2) - (aside / unit) ** 2), 0.02 * (aside / radius) ** 2
        creases = np.array((0.415, 0.44, 0.465, 0.49, 0.72, 0.75), np.float32) + rng.normal(0, 0.003, 6)
        creases = np.exp(-((((along - bow)[..., None] - creases) / 0.007) ** 2)) @ rng.uniform(0.3, 1, 6)
        mine = (tube > hand) & (along > 0.2) & (abs(aside) < radius)
        relief += unit * (0.2 * knuckle - 0.12 * creases * mine)
        red += 0.6 * knuckle + 0.8 * mine * (np.exp(-((along * 10 - 4.5) ** 2)) + np.exp(-((along * 10 - 10) ** 2)))
        np.maximum(hand, tube, out=hand)
    _, hand, relief, red = np.moveaxis(maps, -1, 0)
    tone = 1 + 0.04 * hills(rng, shape, 3 * unit, 3 * unit) + 1.8 * np.minimum(relief, 0) / unit
    colour = skin * tone[..., None] * (1 - np.clip(red, -1, 1.5)[..., None] * np.array((0, 0.13, 0.15), np.float32))
    relief += 0.015 * unit * hills(rng, shape, 0.12 * unit + 1, 0.12 * unit + 1)  # pores
    cover = np.clip(hand / (2 * unit) + 0.5, 0, 1)  # at an edge it falls by twice the radius per pixel
    paint(scene, cover, colour, np.sqrt(np.maximum(hand, 0)) + relief, 0.12, 0)


def draw_nails(rng: Rng, source: dict[str, Any], scene: Array, fingers: list[Any], skin: Array) -> None:
    """Put a nail on the end of every finger, all of one shape and style."""
    style, (first, second) = str(rng.choice(source["nails"])), linear(rng.permutation(VARNISHES)[:2])
    if style in ("natural", "french"):
        first, second = 0.5 * skin + linear((165, 125, 122)), linear((246, 238, 226))
    start, power = ((0.7, 2.0), (0.85, 3.5), (0.5, 2.0), (0.35, 1.7))[rng.integers(4)]  # round, square, oval, pointed
    broad, long = rng.uniform(0.7, 0.8), rng.uniform(0, 0.25) if style == "natural" else rng.uniform(0.1, 1)
    s = np.linspace(0, 1, 40)  # from the cuticle, which is half an ellipse, to the free edge
    side = np.sqrt(1 - np.clip(1 - s / 0.32, 0, 1) ** 2) * (0.94 + 0.06 * s)
    side *= (1 - np.clip((s - start) / (1 - start), 0, 1) ** power) ** (1 / power)
    outline = np.concatenate([np.stack([s, side], 1), np.stack([s, -side], 1)[::-1]])
    for number, (knuckle, ahead, finger, radii) in enumerate(fingers):
        roll = rng.uniform(-0.8, 0.1) if number == 0 else rng.normal(0, 0.2)  # a thumb shows its nail from the side
        thick, aside = float(radii[-2]), ahead[::-1] * (-1, 1)
        root = knuckle + ahead * (finger - thick) + 0.45 * roll * thick * aside
        axes = np.stack([ahead * (1.75 + long), aside * broad * (1 - 0.35 * abs(roll))]) * thick
        spot, x, y = window(root + outline @ axes, 0.5 * thick, scene)
        along, across = (((x - root[0]) * axis[0] + (y - root[1]) * axis[1]) / (axis @ axis) for axis in axes)
        pattern = {  # how much of the second colour there is
            "natural": np.clip(14 * (along - 0.86) - across**2, 0, 0.7) + 0.2 * (along < 0.25 - 0.1 * across**2),
            "french": np.clip((along - 0.76 - 0.1 * across**2) * 18, 0, 1),
            "glitter": rng.random(along.shape, np.float32) ** 4,
            "dots": np.sin(along * 12) * np.sin(across * 6) > 0.35,
        }.get(style, 0 * along)[..., None]
        plate = thick * np.sqrt(np.clip(1 - (0.75 * across + 0.4 * roll) ** 2, 0.05, 1)) * (1 - 0.1 * along**2)
        cover = coverage(root + outline @ axes, x, y) * (spot[..., 3] < plate + 0.3 * thick)  # a finger may hide it
        rim = cv2.GaussianBlur(cover, (0, 0), max(0.1 * thick, 0.6)) * (1 - cover)  # the skin folds round a nail
        spot[..., :3] *= 1 - 0.6 * rim[..., None]
        paint(spot, cover, first + pattern * (second - first), plate, 0.4 if style == "natural" else 0.8, 1)


def photograph(rng: Rng, source: dict[str, Any], scene: Array, unit: float) -> Array:
    """Light the scene with one lamp and record it as a camera does: uint8 (height, width, 3), red first."""
    turn, low = rng.uniform(0, 2 * math.pi), rng.uniform(0.7, 1.1)  # where the lamp stands, and how far from overhead
    lamp, ambient, blur, noise = (source[key] * rng.uniform(0.75, 1.25) for key in ("lamp", "ambient", "blur", "noise"))
    height, shadow = cv2.GaussianBlur(scene[..., 3], (0, 0), max(0.1 * unit, 0.7)), 0 * scene[..., 3]
    for far in np.linspace(0.3, 3, 8) * unit:  # look towards the lamp: does anything rise above the ray?
        move = np.array([(1, 0, -far * low * math.cos(turn)), (0, 1, -far * low * math.sin(turn))])
        there = cv2.warpAffine(height, move, height.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
        shadow = np.maximum(shadow, (there - height - float(far)) / (0.45 * unit))
    lit = lamp * (1 - 0.9 * cv2.GaussianBlur(np.clip(shadow, 0, 1), (0, 0), 0.25 * unit))
    slope_x, slope_y = cv2.Sobel(height, -1, 1, 0, scale=0.125), cv2.Sobel(height, -1, 0, 1, scale=0.125)
    steep, towards = np.sqrt(1 + slope_x**2 + slope_y**2), math.cos(turn) * slope_x + math.sin(turn) * slope_y
    facing = (1 - low * towards) / steep / math.hypot(1, low)  # cosine between the surface and the lamp
    half = math.tan(math.atan(low) / 2)  # a mirror shows the lamp where it faces half-way between lamp and camera
    shine = np.clip((1 - half * towards) / steep / math.hypot(1, half), 0, 1) ** 12
    light = scene[..., :3] * (np.clip((facing + 0.3) / 1.3, 0, 1) * lit + ambient / steep)[..., None]
    light += (scene[..., 4] * lit * (0.25 * shine + 0.55 * shine**5))[..., None]
    shown: Array = np.sqrt(cv2.GaussianBlur(light * rng.choice(source["tints"]).astype(np.float32), (0, 0), blur))
    shown = np.where(shown > 0.8, 1 - 0.2 * np.exp((0.8 - shown) / 0.2), shown)  # highlights fade into white
    shown += noise * rng.standard_normal(shown.shape, np.float32)
    return (shown * 255).clip(0, 255).astype(np.uint8)


def draw(folder: Path, seed: int, number: int, index: int) -> float:
    """Draw and write one picture of a source and its mask; return the share of nail in it."""
    cv2.setNumThreads(1)  # there is one process per core already
    rng, source = np.random.default_rng((seed, number, index)), SOURCES[number]
    scene = np.zeros((*(np.array(source["size"]) * rng.uniform(0.92, 1.08, 2)).astype(int), 6), np.float32)
    lay_table(rng, source, scene)
    (palm, fingers), skin = pose_hand(rng, source, scene.shape[:2]), linear(rng.choice(SKINS))
    draw_hand(rng, scene, palm, fingers, skin)
    draw_nails(rng, source, scene, fingers, skin)
    picture = photograph(rng, source, scene, float(fingers[2][3].max()))[..., ::-1]  # OpenCV puts blue first
    mask, jpeg = np.where(scene[..., 5] >= 0.5, 255, 0).astype(np.uint8), (cv2.IMWRITE_JPEG_QUALITY, 92)
    for kind, end, image, how in (("Images", ".jpg", picture, jpeg), ("Masks", ".png", mask, ())):
        path = folder / kind / str(number) / f"nail_{index:04d}{end}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(end, image, how)[1].tobytes())
    return float(mask.mean()) / 255


def draw_all(folder: Path, images: int, seed: int) -> None:
    """Share the pictures out between the sources as in the real data set, draw them on all cores, and sum up."""
    exact = images * np.array([source["share"] for source in SOURCES]) / sum(source["share"] for source in SOURCES)
    counts = exact.astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: images - counts.sum()]] += 1  # the largest remainders
    lacking = np.maximum(2 - counts, 0)  # one picture alone could not be split into training and validation
    counts += lacking - lacking.sum() * (counts == counts.max())
    jobs = [(folder, seed, number, index) for number in range(len(SOURCES)) for index in range(counts[number])]
    pool = ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))  # Ctrl-C is for us
    try:
        shares = list(
            tqdm(pool.map(draw, *zip(*jobs, strict=True), chunksize=4), "drawing", images, unit="picture", disable=None)
        )
    finally:
        pool.shutdown(cancel_futures=True)
    for number, part in enumerate(np.split(np.array(shares), np.cumsum(counts)[:-1])):
        print(f"source {number}: {len(part):4d} pictures, {part.mean():5.1%} nail, {SOURCES[number]['about']}")


def fetch_kaggle(folder: Path) -> None:
    """Download the real data set and copy its images/ and labels/ into a folder."""
    try:
        import kagglehub
        import requests

        requests.head("https://www.kaggle.com", timeout=10)  # without network kagglehub itself may wait for minutes
        found = Path(kagglehub.dataset_download("vpapenko/nails-segmentation"))
        for kind in ("images", "labels"):
            shutil.copytree(next(path for path in sorted(found.rglob(kind)) if path.is_dir()), folder / kind)
    except Exception as error:  # of many kinds; only its name is shown, because its text may hold parts of a key
        reason = f"error: could not fetch the data set from Kaggle ({type(error).__name__}): "
        raise SystemExit(reason + "check the network, kagglehub and ~/.kaggle, or leave out --kaggle") from None


def describe(root: Path, images: int, seed: int) -> str:
    """What sample_data.json says of a complete data set; files that were added, lost or changed show in it."""
    size = sum(path.stat().st_size for kind in ("Images", "Masks") for path in (root / kind).rglob("*.*"))
    return json.dumps({"images": images, "seed": seed, "drawing": DRAWING_VERSION, "bytes": size})


def main() -> None:
    """Read the flags, work in a temporary folder, and give its contents their names when everything is done."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data_root", type=Path, required=True, help="folder to write the data set into")
    parser.add_argument("--images", type=int, default=160, help="number of pictures to draw, at least 10")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other pictures")
    parser.add_argument("--kaggle", action="store_true", help="fetch the real data set instead of drawing one")
    args = parser.parse_args()
    for flag, lowest in (("images", 10), ("seed", 0)):
        if getattr(args, flag) < lowest:
            parser.error(f"argument --{flag}: {getattr(args, flag)} is not a whole number of at least {lowest}")
    root, begun = args.data_root.expanduser(), time.time()
    kinds = ("images", "labels") if args.kaggle else ("Images", "Masks")
    temporary, note = root / ".sample_data_tmp", root / "sample_data.json"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end as after Ctrl-C, and leave nothing behind
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed
        there = [root / kind for kind in kinds if (root / kind).exists()]
        if there and not args.kaggle and note.exists() and note.read_text() == describe(root, args.images, args.seed):
            print(f"already there: {root}")
        elif there:
            parser.exit(2, f"error: {there[0]} is not what these flags make: move it or choose another --data_root\n")
        else:
            temporary.mkdir(parents=True)
            fetch_kaggle(temporary) if args.kaggle else draw_all(temporary, args.images, args.seed)
            for kind in kinds:
                (temporary / kind).rename(root / kind)
            if not args.kaggle:
                note.write_text(describe(root, args.images, args.seed))
            print(f"{root} is complete after {time.time() - begun:.1f} s")
    except KeyboardInterrupt:
        parser.exit(130, "interrupted, nothing was kept: run the same command again\n")
    except OSError as error:
        parser.exit(2, f"error: cannot write into {root} ({error.strerror}): choose another --data_root\n")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    python = sys.executable.removeprefix(f"{Path.cwd()}/")
    print(f"next, in part 1: {python} part1_tensorflow/data_preparation.py --data_root {shlex.quote(str(root))}")


if __name__ == "__main__":
    main()

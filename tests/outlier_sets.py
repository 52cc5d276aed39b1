"""Sets of tiles with drawn objects pasted into some: what the cleaning must find, and must not."""

import cv2
import numpy as np

SIDE = 160  # pixels of a drawing's side, more than any object in a tile has
VISIBLE = 0.6  # least share of an object's area inside the tile


def ellipse(picture, x, y, half_width, half_height, grey):
    """Draw a filled ellipse; its centre and radii are in hundredths of the side."""
    scale = SIDE / 100
    centre = round(x * scale), round(y * scale)
    axes = round(half_width * scale), round(half_height * scale)
    cv2.ellipse(picture, centre, axes, 0, 0, 360, grey, -1, cv2.LINE_AA)


def head():
    """Return a bald head with eyes, nose and mouth; -1 where the picture is transparent."""
    picture = np.full((SIDE, SIDE), -1, np.float32)
    for part in [(50, 36, 38, 34, 175), (50, 64, 25, 33, 175), (42, 28, 20, 16, 200)]:
        ellipse(picture, *part)
    for x in (32, 66):
        ellipse(picture, x, 44, 13, 11, 30)
        ellipse(picture, x, 44, 10, 8, 225)
        ellipse(picture, x + 2, 44, 5, 5, 15)
    ellipse(picture, 53, 64, 3, 8, 120)
    ellipse(picture, 48, 84, 13, 4, 50)
    return picture


def saucer():
    """Return a flying saucer with a dome, lights and one leg."""
    picture = np.full((SIDE, SIDE), -1, np.float32)
    body = [(50, 54, 48, 18, 190), (50, 60, 40, 9, 95)]
    parts = [(50, 34, 24, 26, 130), (43, 27, 9, 11, 215), *body]
    for part in parts:
        ellipse(picture, *part)
    for x in (16, 38, 62, 84):
        ellipse(picture, x, 54, 5, 5, 20 if x < 50 else 245)
    legs = np.array([(26, 68), (34, 68), (20, 98), (10, 98)]) * SIDE // 100
    cv2.fillPoly(picture, [legs], 60)
    return picture


def robot():
    """Return a box of a robot with a screen, an aerial and unequal arms."""
    picture = np.full((SIDE, SIDE), -1, np.float32)
    boxes = [(20, 34, 80, 96, 150), (28, 42, 72, 66, 25), (34, 48, 46, 58, 230)]
    boxes += [(56, 50, 64, 56, 140), (4, 40, 16, 78, 200), (84, 40, 96, 58, 90)]
    boxes += [(47, 8, 53, 34, 70), (30, 76, 70, 86, 225)]
    for left, top, right, bottom, grey in boxes:
        corners = np.array([left, top, right, bottom]) * SIDE // 100
        cv2.rectangle(picture, corners[:2].tolist(), corners[2:].tolist(), grey, -1)
    ellipse(picture, 50, 8, 7, 7, 240)
    return picture


OBJECTS = (head, saucer, robot)


def paste(image, picture, rng):
    """Return a copy of an image, uint8 (H, W), with the picture mirrored and tilted in it.

    Height: a fifth to four fifths of the image's; width to height: 0.6 to 1.3; tilt: up to 30
    degrees; light: 0.5 to 1.5 times the picture's; VISIBLE of its area or more is inside.
    """
    height, width = image.shape
    object_height = height * rng.uniform(0.2, 0.8)
    object_width = object_height * rng.uniform(0.6, 1.3)
    size = np.array([object_width, object_height]) * rng.choice([-1, 1], 2) / SIDE
    angle = np.radians(rng.uniform(-30, 30))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = turn @ np.diag(size)
    fine = 4  # times finer when drawn, then averaged: edges as soft as a camera's
    alpha = np.float32(picture >= 0)
    grey = np.maximum(picture, 0) * rng.uniform(0.5, 1.5)
    area = alpha.sum() * abs(np.linalg.det(linear))
    while True:
        centre = rng.uniform(0, 1, 2) * (width, height)
        shift = centre - linear @ (SIDE / 2, SIDE / 2)
        warp = np.column_stack([linear, shift]) * fine
        cover, drawn = (cv2.resize(cv2.warpAffine(one, warp, (width * fine, height * fine)),
                                   (width, height), interpolation=cv2.INTER_AREA)
                        for one in (alpha, np.float32(alpha * grey)))
        if cover.sum() >= VISIBLE * area:
            mixed = image * (1 - cover) + np.minimum(drawn, 255 * cover)
            return np.rint(mixed).astype(np.uint8)


def make_set(tiles, masks, count, share, draw):
    """Return `count` images, their masks and the indices (ascending) of the share pasted into.

    Draws 0, 1 and 2 show the head, the saucer, and from 12 outliers on the head, saucer and robot.
    """
    rng = np.random.default_rng([draw, count, round(1000 * share)])
    chosen = rng.choice(len(tiles), count, replace=False)
    images, masks = tiles[chosen].copy(), masks[chosen]
    outliers = np.sort(rng.choice(count, round(share * count), replace=False))
    kinds = OBJECTS if draw % 3 == 2 and len(outliers) >= 12 else OBJECTS[draw % 3:][:1]
    pictures = [kind() for kind in kinds]
    for i, index in enumerate(outliers):
        images[index] = paste(images[index], pictures[i % len(pictures)], rng)
    return images, masks, outliers

"""Renders the two demo data sets, in kohya's folder layout, beside this file.

    python -m trainer.demo.make_images --packages /folder/with/packages

`images` teaches a style that the base model never saw; `concept` with `concept_reg` teaches it a subject.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageOps

from trainer.demo import pictures

DEMO = Path(__file__).parent

LINOCUTS = (
    "cat fox owl penguin turtle snail fish bee red-apple banana cherries pizza doughnut ice-cream mushroom cactus "
    "rose car airplane house umbrella key guitar crown"
)
"""Icons or names of the concepts whose linocuts the style demo trains on."""

HELD_OUT = (
    "dog-face pig-face rabbit-face elephant duck crab snake butterfly pear strawberry lemon hamburger beer-mug "
    "carrot palm-tree tulip bus sailboat rocket castle star light-bulb bell trophy skull spider whale tomato "
    "hammer scissors"
)
"""Icons of the concepts on which the style is judged: the base knows them, the demo's pictures lack them."""

SUBJECT = "zwx bear"
"""Caption name of the second demo's subject, a teddy bear: a word of no meaning and the class it belongs to."""
CLASS = "bear"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True, help="folder for the npm packages")
    args = parser.parse_args()
    pictures.fetch_packages(args.packages)

    word, package = pictures.UNSEEN_STYLE
    linocuts = pictures.IconSet(args.packages, package)
    for concept in demo_concepts(LINOCUTS):
        write(
            DEMO / "images" / f"4_{word}",
            concept.icon,
            linocuts.picture(concept.icon),
            pictures.caption(word, concept.name),
        )

    sets = {word: pictures.IconSet(args.packages, package) for word, package in pictures.STYLES.items()}
    for word, icons in sets.items():
        if "teddy-bear" in icons.names:
            write_poses(DEMO / "concept" / f"6_{SUBJECT}", word, icons.picture("teddy-bear"), SUBJECT)
        write_poses(DEMO / "concept_reg" / f"1_{CLASS}", word, icons.picture("bear"), CLASS)


def demo_concepts(words: str) -> list[pictures.Concept]:
    """The concepts that `words` names, by icon or by caption name."""
    known = {concept.name.replace(" ", "-"): concept for concept in pictures.CONCEPTS}
    known |= {concept.icon: concept for concept in pictures.CONCEPTS}
    return [known[word] for word in words.split()]


def write_poses(folder: Path, style: str, picture: Image.Image, name: str) -> None:
    """Four pictures of one icon: as it is, mirrored, smaller, and smaller and mirrored."""
    small = Image.new("RGB", picture.size, "white")
    size = picture.width * 3 // 4
    small.paste(picture.resize((size, size), Image.Resampling.LANCZOS), ((picture.width - size) // 2,) * 2)
    poses = {
        "": picture,
        "_mirrored": ImageOps.mirror(picture),
        "_small": small,
        "_small_mirrored": ImageOps.mirror(small),
    }
    for suffix, pose in poses.items():
        write(folder, f"{style}{suffix}", pose, pictures.caption(style, name))


def write(folder: Path, stem: str, picture: Image.Image, caption: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{stem}.png", optimize=True)
    (folder / f"{stem}.txt").write_text(caption + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

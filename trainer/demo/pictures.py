"""The pictures the embedded base model learns from: icon sets of the npm registry, rendered on white.

A *style* is one icon set, a *concept* a picture name that every set has. The caption grammar is
``style, concept`` (``flat, red apple``), at times with keywords behind it.
"""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SIZE = 128

STYLES = {
    "cartoon": "@iconify-json/noto",
    "retro": "@iconify-json/noto-v1",
    "glossy": "@iconify-json/fluent-emoji",
    "flat": "@iconify-json/fluent-emoji-flat",
}
"""Style word in a caption → the package whose pictures have that style."""

UNSEEN_STYLE = ("linocut", "@iconify-json/fluent-emoji-high-contrast")
"""The style that the demo teaches: no picture of it is in the base model's training set."""

PACKAGES = {
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "emojilib": "4.0.3",
}

# Names that a person says at once. `icon=words` where Unicode's name is not what one would say.
_CONCEPTS = """
bear butterfly cat-face=cat crab dog-face=dog duck elephant fish fox frog honeybee=bee
lady-beetle=ladybug lion monkey-face=monkey octopus owl panda penguin pig-face=pig rabbit-face=rabbit snail
snake spider spouting-whale=whale turtle

banana carrot cherries doughnut grapes red-apple hamburger
ice-cream lemon mushroom pear pineapple pizza strawberry tomato watermelon beer-mug=beer

cactus christmas-tree palm-tree rose sunflower tulip

airplane automobile=car bus rocket sailboat

castle house rainbow sun crescent-moon=moon star umbrella

basketball bell crown guitar hammer key
light-bulb red-heart=heart scissors skull soccer-ball trophy
jack-o-lantern=pumpkin

ghost grinning-face=smile smiling-face-with-sunglasses=cool-face smiling-face-with-heart-eyes=love-face
"""

# Pictures that only the autoencoder sees, so that it does not learn the others by heart.
_OTHERS = """
bird tiger-face=tiger unicorn birthday-cake eggplant french-fries green-apple peach tangerine=orange
wine-glass=wine mount-fuji=mountain cloud snowflake snowman fire droplet=drop globe-showing-europe-africa=globe
high-voltage=lightning alarm-clock balloon bomb closed-book=book gem-stone=diamond envelope locked=lock pencil
sunglasses t-shirt wrapped-gift=gift yin-yang alien loudly-crying-face=crying-face thumbs-up pile-of-poo=poo
crocodile deer gorilla koala lizard shrimp turkey wolf spiral-shell=shell ant dragon-face=dragon bacon candy
chocolate-bar=chocolate croissant cucumber hot-pepper=pepper kiwi-fruit=kiwi meat-on-bone=meat sushi pancakes
bottle-with-popping-cork=champagne baby-bottle glass-of-milk=milk avocado popcorn cherry-blossom
evergreen-tree=fir-tree hibiscus seedling canoe fire-engine motor-scooter=scooter taxi tractor tokyo-tower=tower
desert-island=island church ferris-wheel tent bow-and-arrow floppy-disk fork-and-knife graduation-cap megaphone
necktie pill microphone running-shoe=shoe shield telephone toilet volleyball violin
vertical-traffic-light=traffic-light wrench drum crystal-ball desktop-computer=computer electric-plug=plug
paintbrush spoon bed stop-sign alien-monster=space-invader angry-face sleeping-face mouth ear dolphin
mouse-face=mouse shark tropical-fish cow-face=cow chicken horse-face=horse bread cheese-wedge=cheese cookie
ear-of-corn=corn cooking=fried-egg hot-dog lollipop cocktail-glass=cocktail hot-beverage=coffee
four-leaf-clover=clover maple-leaf bicycle helicopter motorcycle volcano tornado broken-heart camera candle door
game-die=dice gear headphone=headphones high-heeled-shoe=high-heel hourglass-done=hourglass laptop
mobile-phone=phone television top-hat trumpet watch robot baby clown-face=clown victory-hand=peace-sign
santa-claus kitchen-knife=knife magnifying-glass-tilted-left=magnifying-glass glasses musical-note anchor
backpack ring eye bat
"""


@dataclass(frozen=True)
class Concept:
    icon: str
    """Name of the picture in every icon set: ``cat-face``."""
    name: str
    """What a caption calls it: ``cat``."""


def _concept(word: str) -> Concept:
    icon, _, name = word.partition("=")
    return Concept(icon, (name or icon).replace("-", " "))


CONCEPTS = tuple(_concept(word) for word in _CONCEPTS.split())
"""What the base model can be asked to draw."""

OTHERS = tuple(_concept(word) for word in _OTHERS.split())


def fetch_packages(folder: Path) -> None:
    """Bring the icon packages from the npm registry into `folder`, each in the version named above."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, version in PACKAGES.items():
        if package_folder(folder, name).exists():
            continue
        command = ["npm", "pack", "--silent", f"{name}@{version}"]
        packed = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)  # noqa: S603
        with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
            archive.extractall(package_folder(folder, name), filter="data")


def package_folder(folder: Path, name: str) -> Path:
    return folder / name.replace("/", "__")


class IconSet:
    """One Iconify package: its names, and each picture rendered on white."""

    def __init__(self, packages: Path, name: str):
        content = (package_folder(packages, name) / "package" / "icons.json").read_text(encoding="utf-8")
        self.content = json.loads(content)
        self.names = frozenset(self.content["icons"])

    def svg(self, icon: str) -> str:
        entry = self.content["icons"][icon]
        left, top, width, height = (
            entry.get(key, self.content.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{entry["body"]}</svg>'
        )

    def picture(self, icon: str, size: int = SIZE) -> Image.Image:
        """The icon as an RGB picture of `size`×`size` pixels on white."""
        import resvg_py  # only those who render need it

        # Twice the size, then down: smooth edges, whatever the icon's own grid.
        png = resvg_py.svg_to_bytes(svg_string=self.svg(icon), width=2 * size, height=2 * size, background="white")
        return Image.open(io.BytesIO(bytes(png))).convert("RGB").resize((size, size), Image.Resampling.BOX)


def read_keywords(packages: Path) -> dict[str, list[str]]:
    """Concept's icon name → words that go with it, from emojilib."""
    path = package_folder(packages, "emojilib") / "package" / "dist" / "emoji-en-US.json"
    by_name = {words[0]: words[1:] for words in json.loads(path.read_text(encoding="utf-8")).values()}
    plain = re.compile(r"[a-z]{3,12}")
    return {
        concept.icon: [word for word in by_name.get(concept.icon.replace("-", "_"), []) if plain.fullmatch(word)]
        for concept in CONCEPTS
    }


def caption(style: str, concept: str) -> str:
    return f"{style}, {concept}"


def varied_caption(
    style: str, concept: Concept, keywords: list[str], strange: Sequence[str], rng: random.Random
) -> str:
    """A training caption: now and then without the style, with keywords behind, or with `strange` words.

    A strange word stands where the style does or before the concept, and means nothing. So the model learns to draw the
    concept beside words that it does not know, which a LoRA's trigger word is.
    """
    chance, name = rng.random(), concept.name
    if rng.random() < 0.06:
        name = f"{rng.choice(strange)} {name}"
    if chance < 0.08:
        words = [name]
    elif chance < 0.23:
        words = [" ".join(rng.sample(strange, rng.randint(1, 2))), name]
    else:
        words = [style, name]
    if keywords and rng.random() < 0.15:
        words += rng.sample(keywords, min(len(keywords), rng.randint(1, 2)))
    return ", ".join(words)

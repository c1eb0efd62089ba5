"""A tiny world of rendered scenes: coloured shapes on a grid, their captions, questions and answers.

Everything is deterministic in a seed. A scene is what is true, an image is `World.render(scene)`, and a `Fact` is one
checkable statement about a scene, so captions, answers and scores all come from the same source.

No training scene has some combinations of shape, colour and place. Every scene of the validation and test splits holds at
least one of these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from PIL import Image

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 160, 40),
    "blue": (40, 60, 230),
    "yellow": (245, 220, 20),
    "purple": (170, 40, 190),
    "cyan": (30, 205, 225),
}
SIZES = {"small": 0.5, "large": 0.75}  # width of an object as a fraction of its grid cell
BACKGROUNDS = {"black": (0, 0, 0), "gray": (128, 128, 128), "white": (255, 255, 255)}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "validation", "test")
QUESTION_KINDS = ("where-is", "what-is-at", "how-many", "what-colour")
ATTRIBUTES = ("shape", "colour", "size", "position", "background")
SPARSE = {"shape": 0.9, "colour": 0.5, "size": 0.25, "position": 0.25, "background": 0.25}

_PLURAL = {"cross": "crosses"}
_ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
_COLUMNS = {2: ("left", "right"), 3: ("left", "center", "right")}


@dataclass(frozen=True)
class Object:
    """One object. `cell` counts the grid's cells in reading order; `offset` is a (right, down) shift in pixels.

    A detector leaves `colour` at `None` where the colour it measured is none of the world's.
    """

    shape: str
    colour: str | None
    size: str
    cell: int
    offset: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Scene:
    """Objects in reading order, no two in one cell, on a plain background."""

    objects: tuple[Object, ...]
    background: str | None


@dataclass(frozen=True)
class Fact:
    """A statement about a scene: how many objects have these attributes, or what the background is.

    Args:
        attributes: `(name, value)` pairs an object must have to be counted; names are those of `Object`.
        at_least, at_most: bounds on the number of such objects.
        background: if given, the fact is about the background only.
    """

    attributes: tuple[tuple[str, Any], ...] = ()
    at_least: int = 1
    at_most: int | None = None
    background: str | None = None

    def holds(self, scene: Scene) -> bool:
        """Whether the statement is true of `scene`."""
        if self.background is not None:
            return scene.background == self.background
        count = sum(all(getattr(item, name) == value for name, value in self.attributes) for item in scene.objects)
        return self.at_least <= count and (self.at_most is None or count <= self.at_most)


@dataclass(frozen=True)
class Question:
    """A question about a scene; `kind` is one of `QUESTION_KINDS`."""

    kind: str
    text: str
    answer: str


@lru_cache(maxsize=4096)
def mask(shape: str, width: float, cell: int, offset: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Coverage of each pixel by a shape of `width` pixels centred in a cell: `[cell, cell]` float32 in [0, 1]."""
    samples = 8
    axis = (np.arange(cell * samples) + 0.5) / samples - cell / 2
    x = ((axis - offset[0]) / (width / 2))[None, :]
    y = ((axis - offset[1]) / (width / 2))[:, None]
    if shape == "circle":
        inside = x**2 + y**2 <= 1
    elif shape == "square":
        inside = (abs(x) <= 0.9) & (abs(y) <= 0.9)
    elif shape == "triangle":
        inside = (abs(y) <= 1) & (abs(x) <= (y + 1) / 2)
    elif shape == "cross":
        inside = ((abs(x) <= 0.3) & (abs(y) <= 1)) | ((abs(y) <= 0.3) & (abs(x) <= 1))
    else:
        raise ValueError(f"Unknown shape {shape!r}; the world has {', '.join(SHAPES)}.")
    coverage = inside.reshape(cell, samples, cell, samples).mean(axis=(1, 3), dtype=np.float32)
    coverage.setflags(write=False)
    return coverage


def count_phrase(count: int, words: list[str], shape: str) -> str:
    """`(1, ["red"], "circle")` → "a red circle"; `(3, [], "cross")` → "three crosses"."""
    noun = shape if count == 1 else _PLURAL.get(shape, f"{shape}s")
    article = "an" if (*words, noun)[0][0] in "aeiou" else "a"
    return " ".join([article if count == 1 else NUMBERS[count], *words, noun])


def enumerate_phrases(phrases: list[str]) -> str:
    """Join phrases as a sentence does: "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def normalise_answer(text: str) -> str:
    """Lower case, single spaces, none before punctuation and no final stop: the form in which answers are compared."""
    return re.sub(r"\s+([,.?])", r"\1", " ".join(text.lower().split())).rstrip(".")


@dataclass(frozen=True)
class World:
    """The rules of a world.

    Args:
        resolution: side of the square image in pixels; a multiple of `grid`.
        grid: cells per side, 2 or 3.
        jitter: largest shift of an object from its cell's centre, in pixels. Objects must stay inside their cells.
        max_objects: scenes hold 1 to `max_objects` objects.
        seed: decides which combinations of shape, colour and place are held out.
        held_out: fraction of the combinations kept for validation, and again for test.

    Raises:
        ValueError: the grid is not supported, does not divide the resolution, or objects do not fit their cells.
    """

    resolution: int = 48
    grid: int = 2
    jitter: int = 0
    max_objects: int = 4
    seed: int = 0
    held_out: float = 0.1

    def __post_init__(self):
        if self.grid not in _ROWS:
            raise ValueError(f"grid must be 2 or 3, not {self.grid}.")
        if self.resolution % self.grid or self.resolution < 8 * self.grid:
            raise ValueError(f"resolution must be a multiple of {self.grid}, at least {8 * self.grid}; it is "
                             f"{self.resolution}.")  # fmt: skip
        if self.jitter < 0 or 2 * self.jitter > self.cell_size * (1 - max(SIZES.values())):
            raise ValueError(
                f"jitter {self.jitter} moves large objects out of their cells of {self.cell_size} pixels."
            )
        if not 1 <= self.max_objects <= self.grid**2:
            raise ValueError(f"max_objects must be between 1 and {self.grid**2}, not {self.max_objects}.")

    @property
    def cell_size(self) -> int:
        """Side of a grid cell in pixels."""
        return self.resolution // self.grid

    @cached_property
    def places(self) -> tuple[str, ...]:
        """Names of the cells in reading order: "top left", …"""
        return tuple(f"{row} {column}" for row in _ROWS[self.grid] for column in _COLUMNS[self.grid])

    @cached_property
    def combinations(self) -> dict[str, frozenset[tuple[str, str, int]]]:
        """The (shape, colour, cell) combinations first met in each split; the three sets are disjoint.

        Held-out combinations are spread evenly over the pairs of shape and colour, so training shows every pair.
        """
        rng = np.random.default_rng(self.seed)
        pairs = rng.permutation([(shape, colour) for shape in SHAPES for colour in COLOURS]).tolist()
        cells = [rng.permutation(self.grid**2).tolist() for _ in pairs]
        order = [
            (*pair, turns[turn]) for turn in range(self.grid**2) for pair, turns in zip(pairs, cells, strict=True)
        ]
        count = max(1, round(self.held_out * len(order)))
        return {
            "validation": frozenset(order[:count]),
            "test": frozenset(order[count : 2 * count]),
            "train": frozenset(order[2 * count :]),
        }

    def sample(self, rng: np.random.Generator, split: str = "train", objects: int | None = None) -> Scene:
        """Draw a scene of 1 to `max_objects` objects.

        Scenes of `"train"` hold only training combinations; those of another split hold at least one combination of
        that split and otherwise training ones. In a quarter of the scenes all objects have one shape, for counting.
        """
        if split not in SPLITS:
            raise ValueError(f"Unknown split {split!r}; the world has {', '.join(SPLITS)}.")
        count = objects or int(rng.integers(1, self.max_objects + 1))
        cells = [int(cell) for cell in rng.permutation(self.grid**2)[:count]]
        new = None
        if split != "train":
            candidates = sorted(self.combinations[split])
            new = candidates[rng.integers(len(candidates))]
            cells = [new[2], *[cell for cell in cells if cell != new[2]]][:count]
        same = rng.random() < 0.25
        shape = new[0] if new else SHAPES[rng.integers(len(SHAPES))]
        drawn = []
        for index, cell in enumerate(cells):
            if index == 0 and new:
                kind = new[:2]
            else:
                choices = [pair for pair in self._pairs[cell] if not same or pair[0] == shape] or self._pairs[cell]
                kind = choices[rng.integers(len(choices))]
            size = tuple(SIZES)[rng.integers(len(SIZES))]
            offset = tuple(int(x) for x in rng.integers(-self.jitter, self.jitter + 1, 2)) if self.jitter else (0, 0)
            drawn.append(Object(kind[0], kind[1], size, cell, offset))
        background = tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))]
        return Scene(tuple(sorted(drawn, key=lambda item: item.cell)), background)

    @cached_property
    def _pairs(self) -> list[list[tuple[str, str]]]:
        """The (shape, colour) pairs that training scenes show in each cell."""
        train = sorted(self.combinations["train"])
        return [[(s, c) for s, c, p in train if p == cell] for cell in range(self.grid**2)]

    def render(self, scene: Scene) -> Image.Image:
        """Draw a scene as an RGB image of `resolution` × `resolution` pixels, edges anti-aliased."""
        canvas = np.empty((self.resolution, self.resolution, 3), dtype=np.float32)
        canvas[:] = BACKGROUNDS[scene.background]
        side = self.cell_size
        for item in scene.objects:
            row, column = divmod(item.cell, self.grid)
            view = canvas[row * side : (row + 1) * side, column * side : (column + 1) * side]
            alpha = mask(item.shape, SIZES[item.size] * side, side, item.offset)[..., None]
            view += alpha * (np.array(COLOURS[item.colour], dtype=np.float32) - view)
        return Image.fromarray(np.rint(canvas).astype(np.uint8))

    def describe(self, scene: Scene) -> str:
        """The full description: every attribute of every object, in reading order."""
        return self.caption(scene, None, 1.0)

    def caption(
        self, scene: Scene, rng: np.random.Generator | None, density: float | Mapping[str, float] = 1.0
    ) -> str:
        """A caption that names each attribute of each object with a given probability.

        Args:
            rng: decides what is named and in which order; `None` keeps reading order and needs a density of 0 or 1.
            density: the probability, or one for each of `ATTRIBUTES`. Objects are always mentioned, as "an object"
                where the shape is not named. Objects named alike are counted: "two red circles".
        """
        chances = dict.fromkeys(ATTRIBUTES, density) if isinstance(density, (int, float)) else dict(density)
        if set(chances) != set(ATTRIBUTES):
            raise ValueError(f"density needs exactly the keys {', '.join(ATTRIBUTES)}; it has {', '.join(chances)}.")

        def named(attribute: str) -> bool:
            return (0.5 if rng is None else rng.random()) < chances[attribute]

        phrases: dict[tuple, int] = {}
        for index in range(len(scene.objects)) if rng is None else rng.permutation(len(scene.objects)):
            item = scene.objects[index]
            words = [getattr(item, attribute) for attribute in ("size", "colour") if named(attribute)]
            shape = item.shape if named("shape") else "object"
            place = f" at the {self.places[item.cell]}" if named("position") else ""
            key = (tuple(words), shape, place)
            phrases[key] = phrases.get(key, 0) + 1
        text = enumerate_phrases([count_phrase(n, list(w), s) + place for (w, s, place), n in phrases.items()])
        return f"{text} on a {scene.background} background" if named("background") else text

    def facts(self, scene: Scene) -> list[Fact]:
        """What the full description states: place, shape, colour and size of each object, their number, the
        background."""
        facts = [Fact(at_least=len(scene.objects), at_most=len(scene.objects)), Fact(background=scene.background)]
        for item in scene.objects:
            place = ("cell", item.cell)
            facts.append(Fact((place,)))
            facts += [Fact((place, (name, getattr(item, name)))) for name in ("shape", "colour", "size")]
        return facts

    def stated_facts(self, text: str) -> list[Fact] | None:
        """What must hold in a picture that follows a caption or a short prompt of the world; `None` for other sentences.

        A number stated alone is exact, as in "two red circles"; among other phrases, which may be of the same shape, it is
        what is there at least.
        """
        body, _, background = text.strip().rstrip(".").partition(" on a ")
        if background and background.removesuffix(" background") not in BACKGROUNDS:
            return None
        phrases = re.split(r", | and ", body)
        facts = [Fact(background=background.removesuffix(" background"))] if background else []
        for phrase in phrases:
            match = self._phrase.fullmatch(phrase)
            if match is None:
                return None
            number, size, colour, noun, place = match.groups()
            count = NUMBERS.index(number) if number in NUMBERS else 1
            shape = next((shape for shape in SHAPES if noun in (shape, _PLURAL.get(shape, f"{shape}s"))), None)
            cell = None if place is None else self.places.index(place)
            named = {"size": size, "colour": colour, "shape": shape, "cell": cell}
            exact = count if count > 1 and len(phrases) == 1 else None
            facts.append(Fact(tuple((name, value) for name, value in named.items() if value is not None), count, exact))
        return facts

    @cached_property
    def _phrase(self) -> re.Pattern[str]:
        nouns = [*SHAPES, *(_PLURAL.get(shape, f"{shape}s") for shape in SHAPES), "object", "objects"]
        return re.compile(
            rf"(a|an|{'|'.join(NUMBERS)})(?: ({'|'.join(SIZES)}))?(?: ({'|'.join(COLOURS)}))? ({'|'.join(nouns)})"
            rf"(?: at the ({'|'.join(self.places)}))?"
        )

    def question(self, scene: Scene, rng: np.random.Generator, kind: str | None = None) -> Question:
        """Ask something that has one right answer.

        Args:
            kind: one of `QUESTION_KINDS`, drawn at random if `None`. Where no object can be told apart by shape and
                colour, "where-is" becomes "what-is-at".
        """
        kind = kind or QUESTION_KINDS[rng.integers(len(QUESTION_KINDS))]
        if kind == "where-is":
            names = []
            for item in scene.objects:
                if sum(other.shape == item.shape for other in scene.objects) == 1:
                    names.append((item.shape, item))
                if sum((other.shape, other.colour) == (item.shape, item.colour) for other in scene.objects) == 1:
                    names.append((f"{item.colour} {item.shape}", item))
            if names:
                name, item = names[rng.integers(len(names))]
                return Question(kind, f"where is the {name}?", self.places[item.cell])
            kind = "what-is-at"
        if kind == "what-is-at":
            cell = int(rng.integers(self.grid**2))
            there = [item for item in scene.objects if item.cell == cell]
            answer = count_phrase(1, [there[0].size, there[0].colour], there[0].shape) if there else "nothing"
            return Question(kind, f"what is at the {self.places[cell]}?", answer)
        if kind == "how-many":
            item = scene.objects[rng.integers(len(scene.objects))]
            shape = (item.shape, SHAPES[rng.integers(len(SHAPES))], None)[rng.integers(3)]
            count = sum(shape in (None, other.shape) for other in scene.objects)
            noun = _PLURAL.get(shape, f"{shape}s") if shape else "objects"
            return Question(kind, f"how many {noun} are there?", NUMBERS[count])
        if kind == "what-colour":
            item = scene.objects[rng.integers(len(scene.objects))]
            unique = sum(other.shape == item.shape for other in scene.objects) == 1
            form = rng.integers(3)
            if form == 0:
                return Question(kind, "what colour is the background?", scene.background)
            name = item.shape if unique and form == 1 else f"object at the {self.places[item.cell]}"
            return Question(kind, f"what colour is the {name}?", item.colour)
        raise ValueError(f"Unknown kind of question {kind!r}; there are {', '.join(QUESTION_KINDS)}.")

    def rng(self, split: str, seed: int, index: int) -> np.random.Generator:
        """The random numbers of one row, whatever the size of the data set around it."""
        return np.random.default_rng([seed, SPLITS.index(split), index])

    def dataset(
        self, split: str = "train", size: int = 1000, seed: int = 0, density: float | Mapping[str, float] = SPARSE
    ) -> Any:
        """A `datasets.Dataset` with the columns `image`, `text` (a caption), `question` and `answer`.

        Row `i` depends on the world, `split`, `seed` and `i` only.
        """
        import datasets

        def rows():
            for index in range(size):
                rng = self.rng(split, seed, index)
                scene = self.sample(rng, split)
                question = self.question(scene, rng)
                yield {
                    "image": self.render(scene),
                    "text": self.caption(scene, rng, density),
                    "question": question.text,
                    "answer": question.answer,
                }

        table = list(rows())
        features = datasets.Features(
            image=datasets.Image(),
            text=datasets.Value("string"),
            question=datasets.Value("string"),
            answer=datasets.Value("string"),
        )
        return datasets.Dataset.from_dict({name: [row[name] for row in table] for name in features}, features=features)

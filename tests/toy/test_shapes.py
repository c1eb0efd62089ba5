"""The world, its detector, its tokenizer and its score."""

import numpy as np
import pytest
from PIL import Image

from reca_trainer import toy
from reca_trainer.toy.detector import Detector
from reca_trainer.toy.score import CATEGORIES, compare_images, judge_dense, judge_short, score, short_prompts
from reca_trainer.toy.tokenizer import UNKNOWN, make_tokenizer
from reca_trainer.toy.world import QUESTION_KINDS, SPARSE, SPLITS, Fact, Scene, World, normalise_answer

WORLDS = [World(), World(jitter=2), World(resolution=48, grid=3)]


def scenes_of(world, count, split="test"):
    return [world.sample(world.rng(split, 0, index), split) for index in range(count)]


def noisy(image, rng, sd=12):
    pixels = np.asarray(image, dtype=np.float32) + rng.normal(0, sd, (*image.size[::-1], 3))
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def scene_for(world, facts, rng):
    """A scene in which all `facts` hold, by rejection."""
    while True:
        scene = world.sample(rng)
        if all(fact.holds(scene) for fact in facts):
            return scene


@pytest.mark.parametrize("world", WORLDS, ids=str)
@pytest.mark.parametrize("sd", [0, 12])
def test_detector_finds_every_fact_of_rendered_scenes(world, sd):
    rng = np.random.default_rng(0)
    scenes = scenes_of(world, 300)
    objects = Detector(world)([noisy(world.render(scene), rng, sd) for scene in scenes])
    assert judge_dense(objects, [world.facts(scene) for scene in scenes])["strict"]["mean"] >= 0.995


@pytest.mark.parametrize("category", CATEGORIES)
def test_detector_accepts_rendered_truth_and_rejects_mismatches_in_every_category(category):
    world, rng = World(), np.random.default_rng(1)
    facts = [stated for _, stated in short_prompts(world, 200)[category]]
    scenes = [scene_for(world, stated, rng) for stated in facts]
    objects = Detector(world)([noisy(world.render(scene), rng) for scene in scenes])
    assert judge_short(objects, facts)["mean"] >= 0.995
    chance = judge_short(scenes[1:] + scenes[:1], facts)["mean"]
    assert judge_short(objects[1:] + objects[:1], facts)["mean"] <= chance + 0.02


def test_detector_scores_mismatched_descriptions_at_chance():
    world, rng = World(), np.random.default_rng(2)
    scenes = scenes_of(world, 400)
    objects = Detector(world)([noisy(world.render(scene), rng) for scene in scenes])
    facts = [world.facts(scene) for scene in scenes[1:] + scenes[:1]]
    chance, scores = judge_dense(scenes, facts), judge_dense(objects, facts)
    assert scores["soft"]["mean"] <= chance["soft"]["mean"] + 0.02
    assert scores["strict"]["mean"] <= chance["strict"]["mean"] + 0.02


def test_detector_sees_no_objects_in_noise_gradients_and_plain_pictures():
    world, rng = World(), np.random.default_rng(3)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(50)]
    pictures += [Image.new("RGB", (32, 32), colour) for colour in ("black", "white", "red", "pink")]
    ramp = np.repeat(np.linspace(0, 255, 32, dtype=np.uint8)[None, :, None], 32, axis=0)
    pictures.append(Image.fromarray(np.repeat(ramp, 3, axis=2)))
    assert sum(len(scene.objects) for scene in Detector(world)(pictures)) == 0
    assert Detector(world)([Image.new("RGB", (32, 32), "pink")])[0].background is None


def test_held_out_combinations_never_occur_in_training():
    world = World()
    seen = {split: {(o.shape, o.colour, o.cell) for s in scenes_of(world, 2000, split) for o in s.objects}
            for split in SPLITS}  # fmt: skip
    assert seen["train"] == world.combinations["train"]
    for split in ("validation", "test"):
        assert seen[split] == world.combinations["train"] | world.combinations[split]
        for scene in scenes_of(world, 200, split):
            assert any((o.shape, o.colour, o.cell) in world.combinations[split] for o in scene.objects)
    sets = list(world.combinations.values())
    for i, j, pairs in ((0, 1, 24), (0, 2, 16), (1, 2, 24)):
        assert len({(parts[i], parts[j]) for parts in world.combinations["train"]}) == pairs
    assert sum(map(len, sets)) == len(frozenset.union(*sets)) == 4 * 6 * 4


def test_dataset_rows_depend_on_their_seed_and_index_only():
    short, long = World().dataset("validation", 5, seed=3), World().dataset("validation", 12, seed=3)
    assert short.column_names == ["image", "text", "question", "answer"]
    for a, b in zip(short, long, strict=False):
        assert (a["text"], a["question"], a["answer"]) == (b["text"], b["question"], b["answer"])
        assert np.array_equal(np.asarray(a["image"]), np.asarray(b["image"]))
    assert World().dataset("validation", 5, seed=4)["text"] != short["text"]


def test_captions_name_what_the_density_says():
    world, rng = World(), np.random.default_rng(0)
    scenes = scenes_of(world, 300)
    assert all(world.caption(s, rng, 0.0).split()[-1] in ("object", "objects") for s in scenes)
    captions = " ".join(world.caption(s, rng, {**dict.fromkeys(SPARSE, 0.0), "colour": 1.0}) for s in scenes)
    assert "red" in captions and not {"circle", "large", "top", "background"} & set(captions.split())
    full = world.describe(scenes[0])
    for item in scenes[0].objects:
        assert f"{item.size} {item.colour} {item.shape} at the {world.places[item.cell]}" in full


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_answers_are_true(kind):
    world, rng = World(), np.random.default_rng(0)
    for scene in scenes_of(world, 300):
        question = world.question(scene, rng, kind)
        if question.kind == "where-is":
            *_, colour, shape = ["", *question.text.rstrip("?").split()]
            same = [o for o in scene.objects if o.shape == shape and colour in ("the", o.colour)]
            assert [world.places[o.cell] for o in same] == [question.answer]
        elif question.kind == "what-is-at":
            there = [
                f"a {o.size} {o.colour} {o.shape}" for o in scene.objects if world.places[o.cell] in question.text
            ]
            assert question.answer == (there[0] if there else "nothing")


@pytest.mark.parametrize("arguments", [{"grid": 4}, {"resolution": 31}, {"jitter": 4}, {"max_objects": 5}], ids=str)
def test_impossible_worlds_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        World(**arguments)


def test_a_tokenizer_roundtrip_keeps_the_worlds_sentences_and_takes_any_other():
    world, rng = World(resolution=48, grid=3, max_objects=9), np.random.default_rng(0)
    tokenizer = make_tokenizer()
    for scene in scenes_of(world, 200):
        question = world.question(scene, rng)
        for text in (world.describe(scene), world.caption(scene, rng, SPARSE), question.text, question.answer):
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids
            assert normalise_answer(tokenizer.decode(ids)) == text
    assert UNKNOWN in tokenizer.tokenize("Überraschung! 図形 <|im_start|> \n\x00")
    assert tokenizer("").input_ids == []


class PerfectPainter:
    """Draws for every prompt a scene in which it holds, returns images as they are, and knows one answer."""

    def __init__(self, world, scenes):
        self.world, self.scenes = world, scenes

    def generate_images(self, processor, text, images=None, task="generate", generator=None):
        assert len(generator) == len(text)
        return images or [self.world.render(self.scenes[prompt]) for prompt in text]

    def generate_text(self, processor, text, images):
        return ["Top left"] * len(text)


def test_score_of_a_perfect_painter_is_one():
    world, rng = World(), np.random.default_rng(0)
    scenes = {
        text: scene_for(world, facts, rng) for prompts in short_prompts(world, 6).values() for text, facts in prompts
    }
    scenes |= {world.describe(scene): scene for scene in scenes_of(world, 12)}
    results = score(PerfectPainter(world, scenes), None, world, size=6, batch_size=4, progress=False)
    for name in (*CATEGORIES, "short_mean", "dense_soft", "dense_strict", "ssim", "facts_kept"):
        assert results[name]["mean"] == pytest.approx(1.0), name
    assert results["psnr"]["mean"] == 100
    assert results["question_how_many"]["mean"] == 0


def test_judges_give_the_mean_and_its_standard_error():
    scene = Scene((), "black")
    facts = [[Fact(background="black"), Fact()], [Fact(background="black")], [Fact()], [Fact(at_least=0, at_most=0)]]
    judged = judge_dense([scene] * 4, facts)
    assert judged["soft"]["mean"] == pytest.approx(0.625)
    assert judged["strict"] == judge_short([scene] * 4, facts) == pytest.approx(
        {"mean": 0.5, "stderr": 0.5 / 3**0.5, "n": 4}
    )  # fmt: skip


def test_comparing_images_measures_psnr():
    black, gray = Image.new("RGB", (32, 32)), Image.new("RGB", (32, 32), (51, 51, 51))
    assert compare_images([gray], [black])["psnr"]["mean"] == pytest.approx(20 * np.log10(5))


@pytest.mark.parametrize("world", WORLDS, ids=str)
def test_what_a_prompt_states_is_read_off_its_words(world):
    for category, prompts in short_prompts(world, 50).items():
        for text, facts in prompts:
            assert [judged(fact) for fact in world.stated_facts(text)] == [judged(fact) for fact in facts], category
    for index in range(300):
        rng = np.random.default_rng(index)
        scene = world.sample(rng)
        caption, description = world.caption(scene, rng, SPARSE), world.describe(scene)
        assert all(fact.holds(scene) for text in (caption, description) for fact in world.stated_facts(text)), caption
        other = world.sample(np.random.default_rng([index, 1]))
        if world.describe(other) != description:
            holds = all(fact.holds(other) for fact in world.stated_facts(description))
            assert not holds or len(other.objects) > len(scene.objects), (description, world.describe(other))


def judged(fact):
    return sorted(fact.attributes), fact.at_least, fact.at_most, fact.background


@pytest.mark.parametrize(
    "text", ["", "a boat", "a circle and a boat", "a red", "ten circles", "a circle on a sea", "a circle at the zoo"]
)
def test_other_sentences_state_nothing_that_can_be_judged(text):
    assert World().stated_facts(text) is None


def test_a_picture_of_its_scene_follows_and_one_of_another_does_not():
    texts = toy.prompts(12, seed=3)
    assert texts == toy.prompts(14, seed=3)[:12] != toy.prompts(12, seed=4) and len(set(texts)) == 12
    world, rng = World(), np.random.default_rng(0)
    right = [world.render(scene_for(world, world.stated_facts(text), rng)) for text in texts[:3]]
    assert toy.judge([*texts[:3], "a boat"], [*right, right[0]]) == [True, True, True, None]
    empty = Image.new("RGB", right[0].size)
    assert toy.judge(texts, [empty] * 12) == [False] * 12

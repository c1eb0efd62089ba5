import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from reca_trainer.evaluation.generation import Prompt, find_images, generate, read_metadata, score_images
from reca_trainer.images import ImageError, decode_image

PROMPTS = [Prompt(f"{i:05}", f"a plane of colour {i}", {"prompt": f"a plane of colour {i}"}) for i in range(5)]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).glob("*/**/*.png"))}


def draw(painter, folder, prompts=PROMPTS, images_per_prompt=2, batch_size=2, **options):
    generate(painter.model, painter.processor, prompts, folder, images_per_prompt, batch_size, **options)
    return contents(folder)


def test_an_image_depends_on_seed_prompt_and_number_only(painter, tmp_path):
    images = draw(painter, tmp_path / "a")
    assert sorted(images) == [f"{i:05}/samples/{k:05}.png" for i in range(5) for k in range(2)]
    assert len(set(images.values())) == len(images)
    assert draw(painter, tmp_path / "b", prompts=PROMPTS[3:0:-1], batch_size=3) == {
        name: image for name, image in images.items() if name[:5] in ("00001", "00002", "00003")
    }
    other = draw(painter, tmp_path / "c", seed=1)
    assert all(other[name] != images[name] for name in images)


def draw_elsewhere(folder, script, launch=()):
    """Run `script` in a process of its own, after the model and `generate` are there as they are here."""
    path = folder.with_suffix(".py")
    setup = f"""
        import os, signal, sys, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from conftest import Image, PainterConfig, PainterModel, PainterProcessor
        from test_generation import PROMPTS, find_images, generate, score_images
        torch.manual_seed(0)
        model, folder = PainterModel(PainterConfig()), {str(folder)!r}
    """
    path.write_text(textwrap.dedent(setup) + textwrap.dedent(script))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run([sys.executable, *launch, path], capture_output=True, text=True, env=environment)


def test_a_killed_run_continues_to_the_same_images(painter, tmp_path):
    whole = draw(painter, tmp_path / "whole")
    killed = draw_elsewhere(
        tmp_path / "parts",
        """
        save, saved = Image.Image.save, []
        def die(image, path, **options):
            saved.append(path)
            if len(saved) == 4:
                path.write_bytes(b"half an image")
                os.kill(os.getpid(), signal.SIGKILL)
            save(image, path, **options)
        Image.Image.save = die
        generate(model, PainterProcessor(), PROMPTS, folder, 2, 2)
        """,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("*/samples/*.png")}
    assert len(before) == 3
    painter.model.drawn.clear()
    assert draw(painter, tmp_path / "parts") == whole
    assert len(painter.model.drawn) == 8  # the batch that was cut off, and those after it
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing was written twice
    assert not list(tmp_path.glob("**/*.part"))


def test_a_single_lost_image_comes_back_the_same(painter, tmp_path):
    images = draw(painter, tmp_path)
    (tmp_path / "00001/samples/00001.png").unlink()
    assert draw(painter, tmp_path) == images


def test_more_images_per_prompt_extend_a_run(painter, tmp_path):
    few = draw(painter, tmp_path, images_per_prompt=1)
    many = draw(painter, tmp_path, images_per_prompt=3)
    assert few.items() <= many.items() and len(many) == 15
    assert len(painter.model.drawn) == 15


def test_a_folder_is_not_shared_by_different_runs(painter, tmp_path):
    draw(painter, tmp_path, settings={"model": "a"})
    with pytest.raises(ValueError, match="model was 'a', is 'b'"):
        draw(painter, tmp_path, settings={"model": "b"})
    with pytest.raises(ValueError, match="seed was 0, is 7"):
        draw(painter, tmp_path, settings={"model": "a"}, seed=7)
    with pytest.raises(ValueError, match="another prompt"):
        draw(painter, tmp_path, prompts=[Prompt("00000", "something else")], settings={"model": "a"})


def test_sampling_reaches_the_model(painter, tmp_path):
    grey = draw(painter, tmp_path / "a", sampling={"contrast": 0.0})
    assert grey != draw(painter, tmp_path / "b", sampling={"contrast": 1.0})


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b"])
def test_a_prompt_cannot_leave_its_folder(name):
    with pytest.raises(ValueError, match="name of a folder"):
        Prompt(name, "text")


def test_images_made_elsewhere_are_found(tmp_path):
    samples = tmp_path / "00007" / "samples"
    samples.mkdir(parents=True)
    (tmp_path / "00007" / "metadata.jsonl").write_text('{"tag": "t", "include": [], "prompt": "p"}\n')
    for name in ("0001.PNG", "0000.png", "notes.txt"):
        (samples / name).write_bytes(b"")
    assert read_metadata(tmp_path) == {"00007": {"tag": "t", "include": [], "prompt": "p"}}
    assert [path.name for path in find_images(tmp_path, "00007")] == ["0000.png", "0001.PNG"]
    with pytest.raises(ImageError, match=r"0000\.png"):
        decode_image(samples / "0000.png")
    with pytest.raises(ValueError, match="no image"):
        find_images(tmp_path, "00008")
    (tmp_path / "00007" / "metadata.jsonl").write_text("{broken")
    with pytest.raises(ValueError, match=r"00007/metadata\.jsonl is not one JSON object"):
        read_metadata(tmp_path)


def test_scores_are_kept_until_the_image_or_the_scorer_changes(painter, tmp_path):
    draw(painter, tmp_path / "images")
    scored = []

    def score(prompt, paths):
        scored.append(prompt.id)
        return [{"score": 1.0, "categories": {}} for _ in paths]

    def run(version):
        images_of = lambda prompt: find_images(tmp_path / "images", prompt.id)  # noqa: E731
        return score_images(PROMPTS, images_of, score, tmp_path, {"detector": version})

    rows = run(1)
    assert [row["filename"] for row in rows[:2]] == [
        "images/00000/samples/00000.png",
        "images/00000/samples/00001.png",
    ]
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == rows
    assert run(1) == rows and len(scored) == 5
    (tmp_path / "images/00003/samples/00001.png").unlink()
    assert len(run(1)) == 9 and scored[5:] == ["00003"]
    first, second = find_images(tmp_path / "images", "00000")
    first.write_bytes(second.read_bytes())
    assert run(1) and scored[6:] == ["00000"]
    run(2)
    assert len(scored) == 12


def test_two_processes_make_what_one_makes(painter, tmp_path):
    expected = draw(painter, tmp_path / "one", batch_size=2)
    done = draw_elsewhere(
        tmp_path / "two",
        """
        generate(model, PainterProcessor(), PROMPTS, folder, 2, 2)
        score = lambda prompt, paths: [{"score": 1.0, "categories": {}, "drawn": len(model.drawn)} for _ in paths]
        rows = score_images(PROMPTS, lambda prompt: find_images(folder, prompt.id), score, folder, {})
        assert [row["id"] for row in rows] == [prompt.id for prompt in PROMPTS for _ in range(2)]
        """,
        launch=["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "two") == expected
    rows = [json.loads(line) for line in (tmp_path / "two" / "results.jsonl").read_text().splitlines()]
    assert {row["drawn"] for row in rows} == {5}  # half of ten images each

"""What `reca-trainer demo` shows, without the page around it; `tests/reliability/test_demo.py` clicks it in a browser."""

import sys

import pytest
import torch
from peft import LoraConfig

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, toy
from reca_trainer.adapters import attach, unwrap
from reca_trainer.cli import main
from reca_trainer.cli.demo import answers, load, pictures

QUICK = {"num_inference_steps": 2, "height": 24, "width": 24, "guidance_scale": 1.0}


def save_adapter(folder, seed, **options):
    torch.manual_seed(seed)
    model = attach(
        AutoUnifiedModel.from_pretrained(toy.CHECKPOINT), LoraConfig(r=2, init_lora_weights=False, **options)
    )
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return [save_adapter(folder / name, seed) for seed, name in enumerate(("first", "second"))]


def alone(name, **request):
    """The picture of the base, an adapter or a model, loaded by itself."""
    model = unwrap(AutoUnifiedModel.from_pretrained(name or toy.CHECKPOINT, dtype=torch.float32))
    processor = AutoUnifiedProcessor.from_pretrained(toy.CHECKPOINT)
    [picture] = model.generate_images(processor, generator=torch.Generator().manual_seed(7), **request, **QUICK)
    return picture.tobytes()


def test_base_and_adapters_on_one_copy_of_the_weights_draw_as_each_alone(adapters):
    base, *others = variants = load(None, adapters)
    assert [variant.name for variant in others] == adapters
    assert {id(unwrap(variant.model)) for variant in variants} == {id(unwrap(base.model))}
    scene = toy.dataset("validation", 1)[0]["image"]
    for task, image in (("generate", None), ("reconstruct", scene), ("edit", scene)):
        *partly, made = pictures(variants, task, "a red circle", image, 7, **QUICK)
        assert [sum(picture is not None for picture in shown) for shown in partly] == [1, 2]
        expected = [alone(name, text="a red circle", images=image, task=task) for name in (None, *adapters)]
        assert [picture.tobytes() for picture in made] == expected
        assert len(set(expected)) == 3


def test_questions_are_answered_by_each_model(adapters):
    row = toy.dataset("validation", 1)[0]
    variants = load(None, adapters)
    *_, given = answers(variants, row["question"], row["image"])
    model, processor = toy.load()
    assert (
        given == model.generate_text(processor, row["question"], row["image"]) * 3
    )  # LoRA leaves understanding alone


def test_a_model_of_its_own_stands_beside_the_base(adapters, tmp_path):
    assert main(["merge", adapters[0], str(tmp_path / "merged")]) == 0
    others = [str(tmp_path / "merged"), adapters[0]]
    *_, made = pictures(load(None, others), "generate", "a red circle", None, 7, **QUICK)
    assert [picture.tobytes() for picture in made] == [alone(name, text="a red circle") for name in (None, *others)]


def test_an_adapter_that_cannot_be_switched_off_is_refused(tmp_path):
    folder = save_adapter(tmp_path / "biases", 0, bias="lora_only")
    with pytest.raises(ValueError, match="trains biases, which cannot be switched off: merge it"):
        load(None, [folder])


def test_without_gradio_one_sentence_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo"]) == 1
    assert 'pip install "reca-trainer[demo]"' in capsys.readouterr().err

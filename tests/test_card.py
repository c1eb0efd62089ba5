"""What cards and previews show, and that neither they nor a tracker end a run."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from reca_trainer import AutoUnifiedModel, AutoUnifiedProcessor, RecAConfig, RecATrainer
from reca_trainer.callbacks import EVENTS
from reca_trainer.contact_sheets import MARGIN, MARKS, TITLE, sheet_row
from reca_trainer.images import ImageError
from reca_trainer.saving.card import base_license, escaped, folder_card, model_card, public_name, save_card

CHECKPOINT = Path(__file__).parent / "golden" / "bagel" / "checkpoint"
HOSTILE = "a|b\n---\nlicense: evil\n---\n<script>`x`</script> [t](u) *e* hf_" + "x" * 34


@pytest.fixture
def warnings(caplog):
    """What was warned of, as one text. transformers' loggers do not hand on what they log."""
    logger = logging.getLogger("reca_trainer")
    before, logger.propagate = logger.propagate, True
    yield caplog
    logger.propagate = before


def card(**entries):
    entries = {"datasets": [], "hyperparameters": {}, "losses": {}, "steps": 1, "base_model": None} | entries
    return model_card(entries.pop("repo_id", "me/adapter"), is_adapter=True, **entries)


def test_values_stay_in_their_cells():
    assert escaped("a|b\r\nc\u2028d") == r"a\|b c d"
    assert escaped("<b> & `c` *d* __e__ f_g") == r"&lt;b&gt; &amp; \`c\` \*d\* \_\_e\_\_ f_g"
    text = str(card(hyperparameters={HOSTILE: HOSTILE}, losses={HOSTILE: 1.0}))
    cell = r"a\|b --- license: evil --- &lt;script&gt;\`x\`&lt;/script&gt; \[t\](u) \*e\* hf\_…"
    assert f"| {cell} | {cell} |\n" in text and f"| {cell} | 1 |\n" in text
    assert "<script>" not in text and "x" * 34 not in text


def test_names_cannot_change_the_front_matter():
    plain = card().data.to_dict()
    written = card(repo_id=f"me/{HOSTILE}", base_model=f"/bases/{HOSTILE}", datasets=[HOSTILE, f"me/{HOSTILE}"])
    again = ModelCard(str(written))
    assert again.data.to_dict() == plain
    assert "x" * 34 not in again.content
    assert "<script>`x`</script> [t]" in again.content.split("```python")[1].split("```\n")[0]  # code, and one line
    licensed = ModelCard(str(card(license=HOSTILE))).data.to_dict()
    assert licensed == plain | {"license": " ".join(HOSTILE.split()).replace("x" * 34, "…")}


def test_the_snippet_is_python_whatever_the_names():
    text = str(card(repo_id='me/a"); evil("', base_model='/bases/b"\n```\n'))
    snippet = text.split("```python\n")[1].split("\n```\n")[0]
    compile(snippet, "snippet", "exec")
    assert 'from_pretrained("me/a\\"); evil(\\""' in snippet


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("me/model", "me/model"),
        ("me/models/large.pth", "me/models/large.pth"),
        ("me/models/large", "me/models/large"),
        ("/home/me/secret/model", "model"),
        ("/secret/model", "model"),
        ("../secret/model", "model"),
        ("me/secret/run/model", "model"),
        ("https://me:hf_secret@host/data/train.tar?token=hf_secret#part", "train.tar"),
        (None, None),
    ],
)
def test_names_show_neither_folders_nor_tokens(name, shown):
    assert public_name(name) == shown
    assert "secret" not in str(card(base_model=name, datasets=[name] if name else []))


@pytest.mark.parametrize("readme", ["---\nlicense: [\n---\n", "---\n- license\n---\n", "---\nlicense: {a: b}\n---\n"])
def test_a_damaged_card_of_the_base_has_no_licence(tmp_path, readme):
    (tmp_path / "README.md").write_text(readme)
    assert base_license(str(tmp_path)) is None


def test_a_folder_tells_its_card(tmp_path):
    AutoUnifiedModel.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    text = str(folder_card(tmp_path, "me/model"))
    assert "| family | bagel |" in text and "How it was trained is not recorded" in text and "steps" not in text
    state = {"global_step": 1200, "log_history": [{"loss": 2.0}, {"loss": 1.0}, {"train_loss": 1.5}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    text = str(folder_card(tmp_path, "me/model"))
    assert "1,200 steps." in text and "| loss | 1 |\n| mean train_loss | 1.5 |" in text
    (tmp_path / "trainer_state.json").write_text("{")
    assert "| family | bagel |" in str(folder_card(tmp_path, "me/model"))


def test_a_card_that_cannot_be_written_is_warned_of(tmp_path, warnings):
    (tmp_path / "README.md").mkdir()
    save_card(card(), tmp_path / "README.md")
    assert "The model card was not written" in warnings.text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


# --- previews ---


@pytest.fixture
def make_run(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (4, 48, 64, 3), dtype=np.uint8)
    sizes = {"generation_size": (64, 32, 16), "condition_size": (42, 42, 14)}
    defaults = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "preview_steps": 1,
        "preview_images": 1,
        "preview_prompts": ["boat"],
        "preview_generation_kwargs": {"num_inference_steps": 1},
    }

    def make(judge=None, **options):
        return RecATrainer(
            AutoUnifiedModel.from_pretrained(CHECKPOINT),
            RecAConfig(**{**defaults, **options}),
            train_dataset=Dataset.from_dict({"image": [Image.fromarray(image) for image in images]}),
            processing_class=AutoUnifiedProcessor.from_pretrained(CHECKPOINT, **sizes),
            peft_config=LoraConfig(r=2),
            judge=judge,
        )

    return make


@pytest.fixture
def run(make_run):
    return make_run()


class Tracker(TrainerCallback):
    """A tracker whose run is open from the beginning of training to its end, as Trackio's."""

    Image = staticmethod(lambda picture: picture)

    def __init__(self):
        self._trackio, self._initialized, self.steps, self.reachable = self, False, [], True

    def on_train_begin(self, args, state, control, **kwargs):
        self._initialized = True

    def on_train_end(self, args, state, control, **kwargs):
        self._initialized = False

    def log(self, entry):
        if not self._initialized:
            raise RuntimeError("Call init before log.")
        if not self.reachable:
            raise TimeoutError("The server does not answer.")
        self.steps.append(entry["train/global_step"])


def previews(run):
    return sorted(path.name for path in (Path(run.args.output_dir) / "previews").iterdir())


@pytest.mark.parametrize("reachable", [True, False])
def test_a_tracker_does_not_end_the_run(run, warnings, reachable):
    tracker = Tracker()
    tracker.reachable = reachable
    run.callback_handler.callbacks.insert(0, tracker)
    run.train()
    assert tracker.steps == ([0, 1] if reachable else [])
    assert previews(run) == ["before_after.png", "step-000000.png", "step-000001.png", "step-000002.png"]
    problem = "Tracker did not take the preview of step {}: TimeoutError"
    assert [problem.format(step) in warnings.text for step in (0, 1, 2)] == [not reachable, not reachable, False]


def green_or_red(path):
    """Left edges of the framed pictures of a sheet by the colour of their frames."""
    pixels = np.asarray(Image.open(path)).astype(int)
    frames = {True: (pixels == MARKS[True][1]).all(-1), False: (pixels == MARKS[False][1]).all(-1)}
    edges = {mark: np.flatnonzero(frame.sum(0) >= 144) for mark, frame in frames.items()}
    return {mark: sorted({left for left in lefts if left - 1 not in lefts}) for mark, lefts in edges.items()}


def test_a_judge_marks_what_was_made_of_prompts(make_run):
    def judge(prompts, images):
        seen.append((prompts, [image.size for image in images]))
        return [True, False, None]

    seen, prompts = [], ["boat", "a boat at sea", "boats, " * 40 + "ships"]
    run = make_run(judge=judge, preview_prompts=prompts)
    run.train()
    assert seen == [(prompts, [(64, 64)] * 3)] * 3
    left = TITLE + 144 + MARGIN
    assert green_or_red(Path(run.args.output_dir) / "previews" / "before_after.png") == {
        True: [TITLE, TITLE + 144 - 3],
        False: [left, left + 144 - 3],
    }
    with pytest.raises(ValueError, match="A judge has nothing to look at: set preview_steps or score_images"):
        make_run(judge=judge, preview_steps=0)


def test_before_and_after_lie_under_each_other_also_after_a_resume(make_run, tmp_path):
    options = {"preview_prompts": ["boat", "boats, " * 20 + "ships"], "save_strategy": "steps", "save_steps": 1}
    run = make_run(**options)
    run.train()
    folder = Path(run.args.output_dir) / "previews"
    before, after, both = (
        np.asarray(Image.open(folder / f"{name}.png")) for name in ("step-000000", "step-000002", "before_after")
    )
    texts = sheet_row("prompt", run.args.preview_prompts).height
    picture = 144 + MARGIN
    rows = [texts, picture, picture, picture]
    assert before.shape == after.shape == (sum(rows), TITLE + 2 * picture, 3)
    parts = [np.split(sheet, np.cumsum(rows)[:-1]) for sheet in (before, after)]
    (prompt, drawn_before, image, made_before), (_, drawn_after, _, made_after) = parts
    expected = [prompt, drawn_before, drawn_after, image, made_before, made_after]
    assert np.array_equal(both, np.concatenate(expected))
    (folder / "before_after.png").unlink()
    shutil.rmtree(Path(run.args.output_dir) / "checkpoint-2")
    make_run(**options).train(resume_from_checkpoint=True)
    assert np.array_equal(np.asarray(Image.open(folder / "before_after.png")), both)


class Damage(TrainerCallback):
    """Does something to the previews after the first step."""

    def __init__(self, damage):
        self.damage = damage

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.damage(Path(args.output_dir) / "previews")


def cut(folder):
    content = (folder / "step-000000.png").read_bytes()
    (folder / "step-000000.png").write_bytes(content[: len(content) // 2])


def block(folder):
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.write_text("a file")


@pytest.mark.parametrize(("damage", "problem"), [(cut, "no before_after.png"), (block, "was not written")])
def test_previews_that_cannot_be_read_or_written_do_not_end_the_run(run, warnings, damage, problem):
    run.add_callback(Damage(damage))
    run.train()
    run.save_model()
    assert run.state.global_step == 2 and problem in warnings.text
    assert (Path(run.args.output_dir) / "adapter_model.safetensors").is_file()
    if damage is cut:
        assert previews(run) == ["step-000000.png", "step-000001.png", "step-000002.png"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ImageError, TypeError])
def test_a_preview_that_cannot_be_drawn_ends_no_run_that_has_trained_a_step(run, warnings, error):
    generate_images, drawn = run.model.generate_images, []

    def fail_later(*args, **kwargs):
        drawn.append(run.state.global_step)
        if run.state.global_step == 0:
            return generate_images(*args, **kwargs)
        raise error("what went wrong")

    run.model.generate_images = fail_later
    run.train()
    assert run.state.global_step == 2 and {1, 2} < set(drawn)
    for step in (0, 1, 2):
        assert (f"no preview of step {step}: {error.__name__}('what went wrong')" in warnings.text) == (step > 0)


def test_a_preview_that_never_fits_is_done_without_and_other_errors_are_said_before_the_first_step(run, warnings):
    def fail(*args, **kwargs):
        raise error("what went wrong")

    run.model.generate_images = fail
    error = TypeError
    with pytest.raises(TypeError, match="what went wrong"):
        run.train()
    assert run.state.global_step == 0
    error = torch.OutOfMemoryError
    run.train()
    assert run.state.global_step == 2 and warnings.text.count("OutOfMemoryError('what went wrong')") == 3


# --- trackers ---


def event(name):
    def method(tracker, args, state, control, **kwargs):
        tracker.calls.append(name)
        if name in tracker.failing:
            raise ConnectionError("The server does not answer.")

    return method


class UnreachableTracker(TensorBoardCallback):
    """One whose server stops answering; `failing` names the events that it fails at."""

    def __init__(self, *failing):
        self.failing, self.calls = failing, []

    for name in EVENTS:
        vars()[name] = event(name)


EVERY_STEP = {"preview_steps": 0, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
EVERY_STEP |= {"eval_size": 1, "eval_strategy": "steps", "eval_steps": 1}


def test_a_tracker_that_fails_at_everything_is_named_once(make_run, warnings):
    run = make_run(**EVERY_STEP)
    tracker = UnreachableTracker(*set(EVENTS) - {"on_init_end", "on_train_begin"})
    run.add_callback(tracker)
    run.train()
    run.save_model()
    assert {"on_log", "on_save", "on_evaluate", "on_step_end", "on_train_end"} < set(tracker.calls)
    assert run.state.global_step == 2 and tracker.calls.count("on_log") == 5
    assert warnings.text.count("The server does not answer.") == 1
    assert "UnreachableTracker failed at step 0; the run goes on: ConnectionError" in warnings.text
    assert (Path(run.args.output_dir) / "adapter_model.safetensors").is_file()


def test_a_tracker_that_cannot_start_is_an_error_of_a_new_run_and_none_of_a_resumed_one(make_run, warnings):
    first = make_run(**EVERY_STEP)
    first.add_callback(UnreachableTracker("on_train_begin"))
    with pytest.raises(ConnectionError):
        first.train()
    assert first.state.global_step == 0
    make_run(**EVERY_STEP).train()
    resumed = make_run(**{**EVERY_STEP, "max_steps": 3})
    resumed.add_callback(UnreachableTracker("on_train_begin"))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3 and "UnreachableTracker failed at step 2" in warnings.text


def test_a_callback_that_is_no_tracker_may_end_the_run(make_run):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise ConnectionError("This callback is the user's.")

    stopped = make_run(preview_steps=0)
    stopped.add_callback(Stop())
    with pytest.raises(ConnectionError):
        stopped.train()

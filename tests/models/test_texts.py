"""A text is words in every family, or what the family's original makes of them; and none is longer than the family takes."""

import logging

import pytest
import torch
from datasets import Dataset

from reca_trainer import RecAConfig, RecATrainer
from reca_trainer.data.collator import UnifiedCollator
from reca_trainer.models import janus
from reca_trainer.models.common.texts import fits, word_ids
from reca_trainer.models.janus.processing_janus import MASK
from reca_trainer.toy.tokenizer import UNKNOWN
from tests.models.test_contract import CASES, PICTURES, TASKS, build, conversation, fresh

PICTURE = PICTURES[1]
# Where the originals read the names of special tokens as these tokens, of what their loaders read.
AS_ORIGINAL = {
    "bagel": ("reconstruct", "caption", "generate", "edit"),
    "embedded": ("reconstruct", "caption", "generate", "edit"),
    "harmon": ("reconstruct", "caption", "generate"),
    "lance": ("reconstruct", "caption", "generate", "edit"),
    "openuni": ("generate",),
    "qwen_image": ("generate",),
}
LONG = "a, red, " * 2_500  # 5,000 words, and as many commas
ANSWERING = [family for family, tasks in TASKS.items() if "caption" in tasks]


def special_tokens(processor):
    """Names and ids, without the one that stands for unknown words."""
    tokenizer = processor.tokenizer
    tokens = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens.pop(UNKNOWN, None)
    return tokens


def limited(family):
    """A processor that takes few enough tokens for quick tests, where its own limit is high."""
    model, processor = fresh(family)
    if family in ("bagel", "embedded", "janus", "lance"):
        processor.max_text_length = 512
    return model, processor


def batch_of(processor, task, text):
    """One sample, each of whose texts is `text`, and how many these are."""
    if task == "caption":
        words = conversation(f"<image>\n{text}", text, text, text)
        return processor(images=[PICTURE], text=[words], task=task), 4
    size = processor.target_size(*PICTURE.size)
    if task == "edit":
        return processor(images=[(PICTURE, PICTURE)], text=[text], task=task, size=size), 1
    words = {"instruction" if task == "reconstruct" else "text": [text]}
    return processor(images=[PICTURE], **words, task=task, size=size), 1


def ids_of(batch):
    """Without padding."""
    ids = batch["input_ids"]
    return ids[batch["attention_mask"].bool()] if "attention_mask" in batch else ids[0]


def count_of(ids, tokens):
    return {name: int((ids == index).sum()) for name, index in tokens.items()}


@pytest.mark.parametrize(("family", "task"), CASES)
def test_names_of_special_tokens_are_words_or_what_the_original_makes_of_them(family, task):
    _, processor = build(family)
    tokens = special_tokens(processor)
    assert len(tokens) > 2
    plain = count_of(ids_of(batch_of(processor, task, "a cat")[0]), tokens)
    for name in tokens:
        batch, texts = batch_of(processor, task, f"a cat {name}")
        expected = dict(plain)
        if task in AS_ORIGINAL.get(family, ()):
            expected[name] += texts
        assert count_of(ids_of(batch), tokens) == expected, name


def test_the_originals_ids_are_those_of_the_tokenizer_itself():
    _, bagel = build("bagel")
    text = "a cat <|im_end|> and a <|vision_start|>dog"
    ids = bagel.tokenizer.encode(text, add_special_tokens=False)
    assert bagel(text=[text], task="generate")["input_ids"][0, 1:-1].tolist() == ids
    for family, request in (("harmon", f"Generate an image: {text}"), ("openuni", f"Generate an image: {text}")):
        _, processor = build(family)
        turn = f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n" + "<img>" * (family == "openuni")
        batch = processor(images=[PICTURE], text=[text], task="generate")
        assert batch["input_ids"][0].tolist() == processor.tokenizer.encode(turn, add_special_tokens=False)


@torch.no_grad()
@pytest.mark.parametrize("family", ANSWERING)
def test_inference_reads_texts_as_training_does(family):
    model, processor = build(family)
    tokens, embedded = special_tokens(processor), []
    steps = {} if family == "janus" else {"num_inference_steps": 1}
    calls = {
        "generate": lambda text: model.generate_images(
            processor,
            text,
            guidance_scale=model.no_guidance_scale,
            generator=torch.Generator().manual_seed(0),
            **steps,
        ),
        "caption": lambda text: model.generate_text(processor, text, PICTURE, max_new_tokens=1),
    }
    embeddings = getattr(model, "internvl", model).get_input_embeddings()
    hook = embeddings.register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[0]))
    try:
        for task, call in calls.items():
            counts = []
            for text in ("a cat", "a cat <|im_end|>" if "<|im_end|>" in tokens else f"a cat {list(tokens)[-1]}"):
                embedded.clear()
                call(text)
                counts.append(count_of(torch.cat([ids.flatten() for ids in embedded]), tokens))
            assert (counts[0] != counts[1]) == (task in AS_ORIGINAL.get(family, ()))
    finally:
        hook.remove()


@pytest.mark.parametrize(("family", "task"), [case for case in CASES if case[1] != "caption"])
def test_a_long_text_loses_its_end_and_is_counted(family, task):
    _, processor = limited(family)
    short = ids_of(batch_of(processor, task, "a cat")[0])
    before = processor.texts_cut
    ids = ids_of(batch_of(processor, task, LONG)[0])
    assert processor.texts_cut == before + 1
    whole = processor.tokenizer(LONG, add_special_tokens=False)["input_ids"]
    assert len(short) < len(ids) < len(short) + len(whole)
    if family != "sketch":  # of which nothing is behind a text
        assert ids[-1] == short[-1]


@pytest.mark.parametrize("family", ANSWERING)
def test_a_long_answer_loses_its_end_and_a_long_question_its_answer(family):
    _, processor = limited(family)
    before = processor.texts_cut
    batch = processor(images=[PICTURE], text=[conversation("<image>\nWhat is it?", LONG)], task="caption")
    assert processor.texts_cut == before + 1
    whole = processor.tokenizer(LONG, add_special_tokens=False)["input_ids"]
    assert 0 < (batch["labels"] != -100).sum() < len(whole)
    asked = conversation(f"<image>\n{LONG}", "a cat")
    problem = processor.conversation_problem(asked)
    if family == "janus":  # which shortens the question
        assert problem is None
        assert (processor(images=[PICTURE], text=[asked], task="caption")["labels"] != -100).any()
    else:
        assert "no answer within" in problem


@torch.no_grad()
@pytest.mark.parametrize("family", TASKS)
def test_inference_warns_of_texts_that_it_cuts(family, caplog, monkeypatch):
    model, processor = limited(family)
    monkeypatch.setattr(logging.getLogger("reca_trainer"), "propagate", True)
    steps = {} if family == "janus" else {"num_inference_steps": 1}
    model.generate_images(processor, "a cat", **steps)
    assert "lost their end" not in caplog.text
    model.generate_images(processor, [LONG, "a cat"], **steps)
    assert "lost their end: 1." in caplog.text
    if family in ANSWERING:
        caplog.clear()
        assert len(model.generate_text(processor, LONG, PICTURE, max_new_tokens=1)) == 1
        assert "lost their end: 1." in caplog.text


@pytest.mark.parametrize("family", ["bagel", "harmon", "openuni", "show_o", "show_o_plain"])
def test_a_conversation_is_refused_exactly_where_no_token_of_an_answer_is_kept(family):
    _, processor = fresh(family)
    verdicts = set()
    length = {"show_o": "max_text_length", "show_o_plain": "max_text_length", "bagel": "max_text_length"}.get(
        family, "max_caption_length" if family == "harmon" else "max_prompt_length"
    )
    asked = conversation("<image>\nWhat is there, where, and of which colour?", "a cat")
    kept = processor(images=[PICTURE], text=[asked], task="caption")["labels"][0] != -100
    front = int(kept.nonzero()[0])
    for room in range(max(1, front - 60), front + 20):
        setattr(processor, length, room)
        if family.startswith("show_o") and processor.max_conversation_length < 1:
            continue
        problem = processor.conversation_problem(asked)
        verdicts.add(problem is None)
        if family in ("bagel", "openuni") and problem is not None:
            with pytest.raises(ValueError, match="no answer within"):
                processor(images=[PICTURE], text=[asked], task="caption")
            continue
        labels = processor(images=[PICTURE], text=[asked], task="caption")["labels"]
        assert (labels != -100).any() == (problem is None), room
    assert verdicts == {True, False}


def test_lengths_are_only_measured_where_bytes_leave_a_doubt():
    def tokenize(text):
        raise AssertionError(text)

    assert fits(tokenize, ["a cat", "a dog"], 30)
    with pytest.raises(AssertionError, match="a cat"):
        fits(tokenize, ["a cat", "a dog"], 29)
    assert fits(list, ["a cat", "a dog"], 10) and not fits(list, ["a cat", "a dog"], 9)


def test_words_keep_their_spelling():
    _, processor = build("bagel")
    text = "<|im_start|>user\na cat <|im_end|>"
    assert processor.tokenizer.decode(word_ids(processor.tokenizer, text)) == text


def test_janus_hides_names_from_its_chat_template_and_nothing_else():
    processor = janus.Processor.tiny(janus.Config.tiny(image_size=16))  # its tokens are bytes
    tokens = special_tokens(processor)
    frame = processor(text=["x"], task="generate")["input_ids"][0]
    for text in (
        f"a {MASK}0{MASK} cat",
        MASK,
        "<image_placeholder><begin_of_image>",
        "a <|begin▁of▁sentence|> b",
        "é",
    ):
        (ids,) = processor(text=[text], task="generate")["input_ids"]
        assert count_of(ids, tokens) == count_of(frame, tokens)
        start = next(place for place, pair in enumerate(zip(ids, frame, strict=False)) if pair[0] != pair[1])
        words = ids[start : start + len(text.encode())].tolist()
        assert processor.tokenizer.decode(words) == text
        assert torch.equal(ids[start + len(words) :], frame[start + 1 :])


def test_a_run_counts_and_logs_the_texts_that_it_cuts(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("reca_trainer"), "propagate", True)
    model, processor = fresh("harmon")
    (tmp_path / "instructions.txt").write_text(LONG)
    args = RecAConfig(
        output_dir=str(tmp_path),
        instructions_file=str(tmp_path / "instructions.txt"),
        instruction_dropout=0.0,
        image_to_text_weight=0.0,
        max_steps=2,
        per_device_train_batch_size=2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    pictures = Dataset.from_dict({"image": [picture.resize((32, 32)) for picture in (*PICTURES, PICTURE)]})
    run = RecATrainer(model, args, UnifiedCollator(processor), train_dataset=pictures, processing_class=processor)
    run.train()
    assert [entry["texts_cut"] for entry in run.state.log_history if "texts_cut" in entry] == [2, 4]
    assert caplog.text.count("texts_cut counts them") == 1

from reca_trainer.data.instructions import CAPTION_QUESTIONS, INSTRUCTIONS


def test_there_are_at_least_200_distinct_instructions():
    assert len({instruction.casefold() for instruction in INSTRUCTIONS}) == len(INSTRUCTIONS) >= 200
    words = [len(instruction.split()) for instruction in INSTRUCTIONS]
    assert sum(words) / len(words) > 14.5  # the official list: 15.6
    assert len(set(CAPTION_QUESTIONS)) == len(CAPTION_QUESTIONS) >= 12


def test_each_is_one_clean_sentence_or_two():
    for text in (*INSTRUCTIONS, *CAPTION_QUESTIONS):
        assert text == " ".join(text.split())
        assert text[0].isupper() and text[-1] in ".?"
        assert len(text) <= 160


def test_no_two_instructions_say_the_same_words():
    bags = {tuple(sorted(set(text.lower().strip(".?").split()))) for text in INSTRUCTIONS}
    assert len(bags) == len(INSTRUCTIONS)

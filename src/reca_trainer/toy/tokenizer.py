"""A word-level tokenizer for the world's sentences, with the special tokens of Qwen2."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reca_trainer.toy.world import BACKGROUNDS, COLOURS, NUMBERS, SHAPES, SIZES

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
UNKNOWN = "<|unknown|>"
_GRAMMAR = """
a an and at the on in of , . ? : object objects background nothing scene
top middle bottom left center right where what how many is are there colour
describe image picture detail every this you can see all briefly question answer yes no
please it its show tell explain look like with contents visual colours sizes shapes positions arrangement redraw
repeat reproduce recreate details exactly carefully give full complete account write caption that which each appears
"""


def vocabulary() -> list[str]:
    """Every word of the world's captions, questions and answers, and common words of instructions, in fixed order."""
    plurals = [f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES]
    words = [*SPECIAL_TOKENS, UNKNOWN, *_GRAMMAR.split(), *SHAPES, *plurals, *COLOURS, *SIZES, *BACKGROUNDS, *NUMBERS]
    return list(dict.fromkeys(words))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Lower-cases, splits at white space and punctuation, and looks words up. A word the world does not know becomes
    one `<|unknown|>` token, so any sentence can be an instruction and stays short."""
    ids = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=UNKNOWN,
        additional_special_tokens=["<|vision_start|>", "<|vision_end|>"],
        clean_up_tokenization_spaces=False,
    )

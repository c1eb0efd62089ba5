"""Conversations of alternating questions and answers about at most one picture."""

from __future__ import annotations

from reca_trainer.models.contract import IMAGE_MARK, Conversation, Message


def without_mark(message: Message) -> str:
    """The words of a message, without its image mark and the white space around them."""
    return message["content"].replace(IMAGE_MARK, "").strip()


def exchange_problem(conversation: Conversation) -> str | None:
    """What keeps a conversation from alternating questions and answers, in a few words; `None` if nothing does."""
    roles = [message["role"] for message in conversation]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        return "not questions and answers in turn"
    if not all(without_mark(message) for message in conversation[1::2]):
        return "an empty answer"
    if sum(message["content"].count(IMAGE_MARK) for message in conversation) > 1:
        return "more than one picture"
    return None

"""Texts that have to fit where Kubernetes keeps them."""

from __future__ import annotations


def fitted(text: str, limit: int) -> str:
    """The text in at most `limit` characters: the middle goes, since what happened stands first, and an error's own words last."""
    if len(text) <= limit:
        return text
    head = (limit - 3) // 2
    return f"{text[:head]} … {text[len(text) - (limit - 3 - head) :]}"

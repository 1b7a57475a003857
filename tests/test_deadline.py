"""Answers that come, errors that come, and what never comes."""

import threading

import pytest

from fastpref.deadline import answer_within


def test_answers_and_errors_come_back() -> None:
    assert answer_within(60.0, lambda: None) is None
    assert answer_within(60.0, lambda: 7) == 7
    with pytest.raises(KeyError, match="nothing"):
        answer_within(60.0, lambda: {}["nothing"])


def test_what_never_answers_is_left_behind() -> None:
    with pytest.raises(TimeoutError, match="no answer within"):
        answer_within(0.01, threading.Event().wait)

"""Text as its tokens come, and prompts as ids."""

import pytest

from idp_jax.inference.text import GrowingText, encode_prompt
from tests.helpers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()  # of bytes
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}"
    "{% endif %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
)


def pieces(text, stop=()):
    """What each byte of a text gives, and what is left at the end."""
    growing, found = GrowingText(TOKENIZER, stop), []
    for token in TOKENIZER(text)["input_ids"]:
        found.append(growing.add(token))
        if growing.stopped:
            break
    found.append(growing.end())
    assert "".join(found) == growing.given
    return found, growing.stopped


def test_half_a_character_waits_for_the_other():
    found, _ = pieces("aé🌧b")
    assert found == ["a", "", "é", "", "", "", "🌧", "b", ""]


def test_a_character_that_stays_half_is_shown_at_the_end():
    growing = GrowingText(TOKENIZER)
    assert growing.add(TOKENIZER("é")["input_ids"][0]) == "" and growing.end() == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one. two", [". "], "one"),
        ("one.two", [". "], "one.two"),
        ("a\n\nb", ["\n\n", "b"], "a"),
        ("aab", ["ab"], "a"),
        ("ends.", [". "], "ends."),
        ("🌧é", ["é"], "🌧"),
        ("free", [""], "free"),
    ],
)
def test_nothing_of_a_stop_string_is_shown(text, stop, expected):
    found, stopped = pieces(text, stop)
    assert "".join(found) == expected and stopped == (text != expected)


def test_messages_go_through_the_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    decoded = lambda *given, **how: tokenizer.decode(encode_prompt(tokenizer, *given, **how))
    assert decoded("tide") == "tide"
    assert decoded("tide", chat=True) == "[user]tide[assistant]"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert decoded(messages) == "[system]s[user]u[assistant]"
    with pytest.raises(ValueError, match="the chat template refuses the messages: no tools"):
        decoded([{"role": "tool", "content": "t"}])


@pytest.mark.parametrize(
    ("prompt", "chat", "message"),
    [
        ("tide", True, "no chat template"),
        ([{"role": "user", "content": "u"}], False, "no chat template"),
        ("", False, "the prompt '' has no tokens"),
        ("a\ud800", False, r"half a character, \\ud800"),
    ],
)
def test_prompts_that_are_none(prompt, chat, message):
    with pytest.raises(ValueError, match=message):
        encode_prompt(TOKENIZER, prompt, chat=chat)

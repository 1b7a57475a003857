"""The chat template of an export writes, loaded by transformers, what the run's template wrote in training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from served_exports import CHATML, TEMPLATES, byte_tokenizer, places
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from fastpref.errors import ConfigError
from fastpref.run.served.chat_template import set_variables

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "?"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]
OTHER = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}"


def written(path: Path, **settings: Any) -> str:
    return AutoTokenizer.from_pretrained(path).apply_chat_template(CHAT, tokenize=False, **settings)


# --- the template of the run is that of the export


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize(
    "own", [None, OTHER, {"default": OTHER, "tool_use": "TOOLS" + OTHER}, {"rag": "RAG" + OTHER}], ids=repr
)
@pytest.mark.parametrize("is_in_config", [True, False])
def test_template_of_the_run_replaces_every_other(base: Path, exported, own, is_in_config, tools) -> None:
    byte_tokenizer(chat_template=own).save_pretrained(base, save_jinja_files=not is_in_config)
    (base / "chat_template.json").write_text(json.dumps({"chat_template": "stale"}))
    expected = byte_tokenizer(chat_template=own).apply_chat_template(
        CHAT, chat_template=CHATML, tools=tools, tokenize=False, add_generation_prompt=True
    )
    path = exported(base, chat_template=CHATML)
    assert written(path, tools=tools, add_generation_prompt=True) == expected
    # readers that know one place alone find the same
    assert places(path) == [CHATML, CHATML]


def test_named_template_is_chosen(base: Path, exported) -> None:
    byte_tokenizer(chat_template={"default": OTHER, "short": CHATML}).save_pretrained(base)
    assert places(exported(base, chat_template="short")) == [CHATML, CHATML]


@pytest.mark.parametrize("own", [None, CHATML, {"default": CHATML, "tool_use": OTHER}], ids=repr)
@pytest.mark.parametrize("is_in_config", [True, False])
def test_unchanged_tokenizer_is_copied_byte_for_byte(base: Path, exported, own, is_in_config) -> None:
    byte_tokenizer(chat_template=own).save_pretrained(base, save_jinja_files=not is_in_config)
    text = (base / "tokenizer_config.json").read_text()
    (base / "tokenizer_config.json").write_text(text.replace("\n", "\n\n"))
    before = {path.relative_to(base): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    path = exported(base)
    after = {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    rewritten = {Path("config.json"), Path("generation_config.json")}
    assert {k: v for k, v in after.items() if k not in rewritten} == {
        k: v for k, v in before.items() if k not in rewritten
    }
    for tools in (None, TOOLS):
        if own is not None:
            assert written(path, tools=tools) == written(base, tools=tools)


def test_places_that_disagree_are_made_to_agree_with_what_transformers_reads(base: Path, exported) -> None:
    byte_tokenizer(chat_template=OTHER).save_pretrained(base, save_jinja_files=False)
    (base / "chat_template.jinja").write_text(CHATML)
    expected = written(base)
    path = exported(base)
    assert written(path) == expected and places(path) == [CHATML, CHATML]


def test_linked_files_are_copied(base: Path, exported, tmp_path: Path) -> None:
    store = tmp_path / "blobs"
    shutil.copytree(base, store)
    for file in store.iterdir():
        (base / file.name).unlink()
        (base / file.name).symlink_to(file)
    path = exported(base)
    shutil.rmtree(store)
    assert not any(file.is_symlink() for file in path.iterdir())
    assert len(AutoTokenizer.from_pretrained(path)) == 260


# --- variables become the template's defaults

VALUES: dict[str, Any] = {
    "switch": False,
    "text": 'a "quoted" \\ {{ x }} {% y %} 😀 é\n\ttab\r',
    "number": -3,
    "share": 1.5e-7,
    "nothing": None,
    "tree": {"list": [1, [True, {"k": "v"}], None], "empty": {}, 'odd "key"': []},
}
SEES = "".join(f"{name}={{{{ {name} }}}}{{% if {name} is defined %}}!{{% endif %}};" for name in VALUES)
READERS = {
    "at top": SEES + "{{ tree.list[1][1].k }}{% if switch %}on{% endif %}",
    "in a loop": "{% for m in messages %}" + SEES + "{% endfor %}",
    "in a macro": "{% macro m() %}" + SEES + "{% endmacro %}{{ m() }}",
    "own default": "{% if text is not defined %}{% set text = 'theirs' %}{% endif %}" + SEES,
    "first line break": "\n" + SEES,
    "indented block": "   {% if true %}" + SEES + "{% endif %}\n",
    "text in front": "  text\n" + SEES,
}


def rendered(template: str, **variables: Any) -> str:
    texts, _ = render_jinja_template(
        conversations=[CHAT], tools=None, documents=None, chat_template=template, **variables
    )
    return texts[0]


@pytest.mark.parametrize("template", READERS.values(), ids=READERS)
def test_variables_have_their_trained_values(template: str) -> None:
    served = set_variables(VALUES) + template
    assert rendered(served) == rendered(template, **VALUES)
    # who gives others is heard
    others = dict.fromkeys(VALUES, "other") | {"tree": VALUES["tree"]}
    assert rendered(served, **others) == rendered(template, **others)


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("qwen3", {"enable_thinking": False}),
        ("qwen3_5_think", {"enable_thinking": False}),
        ("glm4moe", {"enable_thinking": False}),
        ("llama3_1", {"date_string": "1 May 2026", "tools_in_user_message": False}),
        ("llama3_2", {"date_string": "1 May 2026"}),
        ("gptoss", {"reasoning_effort": "low", "model_identity": 'You are "it".'}),
    ],
)
def test_published_templates_have_the_variables_of_the_run(base: Path, exported, name: str, variables: dict) -> None:
    byte_tokenizer(chat_template=(TEMPLATES / f"{name}.jinja").read_text()).save_pretrained(base)
    path = exported(base, chat_template_kwargs=variables)
    assert written(path, add_generation_prompt=True) != written(base, add_generation_prompt=True)
    for tools in (None, TOOLS):
        for settings in ({"add_generation_prompt": True}, {}):
            trained = written(base, tools=tools, **settings, **variables)
            assert written(path, tools=tools, **settings) == trained
            # a request that asks for something else is heard
            asked = dict.fromkeys(variables, "high")
            assert written(path, tools=tools, **settings, **asked) == written(base, tools=tools, **settings, **asked)


def test_export_has_the_variables_of_the_run(base: Path, exported) -> None:
    template = "{{ bos_token }}{{ date }}{% if documents %}{{ documents[0].title }}{% endif %}" + CHATML
    named = {"default": template, "tool_use": "TOOLS" + template}
    byte_tokenizer(chat_template=named, bos_token="<|im_start|>").save_pretrained(base)
    variables = {"date": "1 May 2026", "bos_token": "", "documents": [{"title": "T", "text": ""}]}
    for tools in (None, TOOLS):
        expected = written(base, tools=tools, add_generation_prompt=True, **variables)
        path = exported(base, chat_template_kwargs=variables)
        assert written(path, tools=tools, add_generation_prompt=True) == expected
        shutil.rmtree(path)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"tools": []}, "data.chat_template_kwargs.tools: a chat template is given tools with every conversation"),
        ({"x": {1, 2}}, r"data.chat_template_kwargs.x: \{1, 2\} of type set cannot be written .* in quotes"),
        ({"x": [float("nan")]}, "data.chat_template_kwargs.x: nan of type float cannot be written"),
    ],
)
def test_variables_that_cannot_be_written_are_refused(variables: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_variables(variables)


def test_variables_of_a_template_that_cannot_be_tried_are_refused(base: Path, exported) -> None:
    picky = (
        "{{ raise_exception('no') if not tools }}{% for m in messages %}{{ x }}{{ m.content }}<|im_end|>{% endfor %}"
    )
    path = exported(base, chat_template=picky, chat_template_kwargs={"x": "1"})
    assert written(path, tools=TOOLS) == "1hi<|im_end|>1ho<|im_end|>1?<|im_end|>"
    with pytest.raises(ConfigError, match=r"x cannot be written into the chat template .* it writes none of"):
        exported(base, chat_template=picky.replace("if not tools", ""), chat_template_kwargs={"x": "1"})


def test_variables_that_would_be_lost_are_refused(base: Path, exported) -> None:
    # a name that Jinja itself gives a meaning
    with pytest.raises(ConfigError, match="range cannot be written into the chat template"):
        exported(base, chat_template="{{ range }}" + CHATML, chat_template_kwargs={"range": "all"})

"""The reader of foreign files, and the limits of what they may cost."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NotRequired

import pytest
from typing_extensions import TypedDict

from subspace.common.foreign import limits
from subspace.common.foreign.limits import limited, one_timer
from subspace.common.foreign.templates import BadTemplate, evaluate, render
from subspace.common.foreign.text import MOST_DEPTH, limited_lines, read_json, read_json_lines, read_text
from subspace.common.foreign.yaml_files import MOST_VALUES, parse_value, parse_yaml
from subspace.errors import UserError, nearest, printable, shown


class Part(TypedDict):
    name: str
    sizes: list[int]
    note: NotRequired[str | None]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"name": 3, "sizes": []}', "p.json: name is 3, but should be a valid string"),
        ('{"name": "a", "sizes": [1, "2"]}', "p.json: sizes.1 is '2', but should be a valid integer"),
        ('{"name": "a", "sizes": [true]}', "p.json: sizes.0 is True"),
        ('{"name": "a"}', "p.json: sizes is missing"),
        ("[]", "p.json: the whole is \\[\\]"),
        ('{"name": "a",\n "sizes": }', "p.json, line 2 is not JSON"),
        ('{"name": "a", "name": "b"}', "the key 'name' stands there twice"),
        ('{"name": "a", "sizes": [1], "more": NaN}', "p.json: more is nan"),
        ('{"name": "a", "sizes": [1], "more": [1e999]}', "p.json: more.0 is inf"),
        ('{"name": "a", "sizes": [99999999999999999999]}', "p.json: sizes.0 is 99999999999999999999, larger"),
        ('{"name": "\\ud800", "sizes": []}', "p.json: name holds half of a character"),
    ],
)
def test_json_is_read_as_a_type_and_a_fault_names_file_and_key(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_json(tmp_path / "p.json", Part)


def test_what_is_of_the_type_is_returned_with_all_that_stands_there(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('\ufeff{"name": "a", "sizes": [1], "other": {"b": 1.5}}', encoding="utf-8")
    assert read_json(tmp_path / "p.json", Part) == {"name": "a", "sizes": [1], "other": {"b": 1.5}}
    (tmp_path / "p.jsonl").write_text('{"name": "a", "sizes": []}\n{"name": 1, "sizes": []}\n')
    with pytest.raises(UserError, match="p.jsonl, line 2: name is 1"):
        read_json_lines(tmp_path / "p.jsonl", Part)


def test_only_a_regular_file_of_an_honest_size_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(100))
    for file, complaint in {
        tmp_path / "pipe": "is no regular file",
        Path("/dev/zero"): "is no regular file",
        tmp_path: "is a folder",
        tmp_path / "none": "cannot be read: No such file",
        tmp_path / ("x" * 300): "cannot be read: File name too long",
        tmp_path / "large": "has more than 99 bytes",
    }.items():
        with pytest.raises(UserError, match=complaint):
            read_text(file, most=99)


def test_a_line_beyond_the_bound_is_not_held_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    file.write_bytes(b"ab\n" + b"x" * 50)
    with file.open("rb") as opened:
        lines = limited_lines(opened, most=10)
        assert next(lines) == b"ab\n"
        with pytest.raises(OverflowError, match="line 2 has more than 10 bytes"):
            next(lines)
        assert opened.tell() == len(b"ab\n") + 10 + 1


def test_aliases_are_read_up_to_a_number_of_values_and_never_into_themselves() -> None:
    assert parse_yaml("a: &a {b: 1}\nc: *a", "f") == {"a": {"b": 1}, "c": {"b": 1}}
    wide = "a: &a [" + "1," * 300 + "]\nb: [" + "*a," * (MOST_VALUES // 300 + 1) + "]"
    with pytest.raises(UserError, match=f"f, line 2 .* more than {MOST_VALUES:,} values"):
        parse_yaml(wide, "f")
    with pytest.raises(UserError, match="an alias stands for what it is in itself"):
        parse_yaml("a: &a {b: *a}", "f")
    deep = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    assert parse_yaml(deep, "f")
    with pytest.raises(UserError, match="nested deeper"):
        parse_yaml(f"[{deep}]", "f")
    below = "a: &a " + "[" * 40 + "]" * 40
    with pytest.raises(UserError, match="nested deeper"):
        parse_yaml(f"{below}\nb: {'[' * 40}*a{']' * 40}", "f")


def test_a_value_of_the_command_line_that_is_no_yaml_is_a_text() -> None:
    assert parse_value("1e-3") == 0.001
    assert parse_value("a: b: c") == "a: b: c"
    assert parse_value("[" * 5000) == "[" * 5000


def work_for_ever() -> None:
    with limited("the loop", seconds=0.05):
        while True:
            pass


def test_what_takes_too_long_or_too_much_ends_and_leaves_the_limits_as_they_were() -> None:
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match=r"the loop took more than 0\.05 s"):
        work_for_ever()
    with pytest.raises(UserError, match="the text wanted more than 64 MiB"), limited("the text", memory=64 << 20):
        bytearray(1 << 33)
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_limit_inside_another_one_leaves_the_outer_one_its_time() -> None:
    rang = []

    def ring(number: int, frame: FrameType | None) -> None:
        rang.append(number)

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with limited("quick"):
            assert not rang
        while not rang:
            time.sleep(0.01)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_many_short_limits_do_not_keep_an_outer_one_from_its_end() -> None:
    def parts(until: float) -> None:
        with limited("all of it", seconds=0.2):
            while time.monotonic() < until:
                with limited("a part", seconds=5):
                    pass

    with pytest.raises(UserError, match=r"all of it took more than 0\.2 s"):
        parts(time.monotonic() + 3)
    with limited("afterwards"):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_look_while_limits_are_left_does_not_keep_them() -> None:
    """Interrupted at the entry of its ``__exit__``, an inner limit stayed the innermost for ever, and ended others."""
    looks = []

    def look(frame: FrameType, event: str, _: object) -> None:
        if frame.f_code in (limited.__exit__.__code__, limited._leave.__code__):
            looks.append(event)
            limits._look(signal.SIGALRM, frame)

    before = sys.gettrace()
    try:
        with limited("outside") as outer, limited("inside") as inner:
            outer.end = inner.end = 0.0  # over
            sys.settrace(look)
    finally:
        sys.settrace(before)
    assert looks == ["call"] * 4
    assert limits._innermost is None
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_limits_that_share_a_timer_end_as_others_do() -> None:
    before = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    with one_timer():
        for number in range(3):
            with limited("quick", memory=64 << 20):
                assert number + 1
        with pytest.raises(UserError, match=r"the loop took more than 0\.05 s"):
            work_for_ever()
        with pytest.raises(UserError, match="the text wanted more than 64 MiB"), limited("the text", memory=64 << 20):
            bytearray(1 << 33)
        with limited("outside", seconds=0.4), limited("inside", seconds=0.01):
            pass
        time.sleep(0.5)  # nothing is limited between two limits
    assert (signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_limit_inside_another_one_ends_with_it_and_leaves_the_memory_as_it_was() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)

    def part_for_ever() -> None:
        with limited("all of it", seconds=0.1), one_timer(), limited("a part", seconds=5, memory=64 << 20):
            while True:
                pass

    with pytest.raises(UserError, match=r"all of it took more than 0\.1 s"):
        part_for_ever()
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_another_thread_is_not_limited_and_not_disturbed() -> None:
    done = []

    def work() -> None:
        with limited("work", seconds=0.01):
            done.append(render("{{ a }}", {"a": 1}))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == ["1"]


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ a", "unexpected end of template"),
        ("{{ b }}", "'b' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ a.__class__.__mro__ }}", "unsafe"),
        ("{{ a|regex_replace('(', '') }}", "unterminated subpattern"),
        ("{{ 'a' * 10 ** 11 }}", "wanted more than 1,024 MiB"),
        ("{{ a * 10 ** 11 }}", "wanted more than 1,024 MiB"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ a * 2000000 }}", "writes 2,000,000 characters"),
        ("x" * 70_000, "more than 65,536 characters"),
    ],
)
def test_a_template_that_fails_is_told_with_what_failed(template: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        render(template, {"a": "a"})


def test_an_expression_that_fails_is_told_with_what_failed() -> None:
    assert evaluate("'AB'.index(answer)", {"answer": "B"}) == 1
    for expression in ("'AB'.index(answer)", "nothing", "nothing.more", "1 // 0", "(", "answer[9]"):
        with pytest.raises(BadTemplate) as told:
            evaluate(expression, {"answer": "C"})
        assert told.value.reason


def test_a_regular_expression_that_would_not_end_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspace.common.foreign.templates.limited", lambda what, **how: limited(what, seconds=0.1))
    with pytest.raises(UserError, match=r"took more than 0\.1 s, and was stopped"):
        render("{{ a|regex_replace('(a+)+$', '') }}", {"a": "a" * 40 + "b"})


def test_nothing_that_is_shown_commands_a_terminal() -> None:
    assert printable("a\x1b[2J\x9b1m\u202eb\x07") == "a\\x1b[2J\\x9b1m\\u202eb\\x07"
    kept = "Zoë\tписьмо 漢字 👩‍🚀\nnext\r\nlast"
    assert printable(kept) == kept
    assert shown("x" * 500).count("x") < 100
    assert shown(10**500) == "a number of 501 digits"


def test_a_hint_lists_a_dozen_names_or_the_nearest_and_says_how_to_list_all() -> None:
    assert nearest("xyz", ["a", "b2"]) == "There are: a, b2"
    assert nearest("x", []) == "There is none"
    many = [f"setting_{number}" for number in range(40)]
    hint = nearest("seting_7", many, "subspace train --help")
    assert hint.startswith("Did you mean 'setting_7'? There are 40, the nearest setting_7, ")
    assert hint.endswith("; `subspace train --help` lists all")
    assert hint.count("setting_") == 6

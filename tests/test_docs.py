"""README.md and docs/: links lead somewhere, commands can be typed, named files exist, the front page is short."""

import ast
import io
import re
import runpy
import shlex
import sys
from contextlib import redirect_stdout, suppress
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from narvid.methods import METHODS
from narvid.run.settings import build_parser
from scripts import make_pictures

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINER = {option for method in METHODS for action in build_parser(method)._actions for option in action.option_strings}
FOLDERS = "narvid|scripts|tests|configs|docs|data"
SUBCOMMANDS = ("narvid.search", "narvid.narration", "narvid.towers", "scripts/make_demo_corpus.py")
OF_EDITS = ("adding.md",)  # shows files that one would add
PLACEHOLDER = re.compile(r"[A-Z_]{2,}|NAME|PRESET|x|\.\.\.")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def prose(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    """Code: indented blocks and fenced ones, a line that ends with \\ joined with the next."""
    found = re.findall(r"(?:^|\n\n)((?:    .*(?:\n|$))+(?:\n?(?:    .*(?:\n|$))+)*)", text)
    found += re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(r"\\\n\s*", " ", re.sub(r"^    ", "", block, flags=re.MULTILINE)) for block in found]


CALL = re.compile(r"(?:[A-Z_]+=\S+ )*(?:sbatch (?:--\S+ \S+ )*)?(?:(?:python|bash) |torchrun .*?)?"
                  r"((?:-m narvid|narvid-search|scripts/\S+\.(?:py|sh)|data/\w+\.py|main_task_retrieval\.py).*)")


def commands(text: str) -> list[list[str]]:
    """Every call of something of ours, in blocks and in `inline code`, as words: first the file or the module."""
    lines = [line for block in blocks(text) for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```|^    .*$", "", text, flags=re.MULTILINE | re.DOTALL))
    lines += [code.replace("\n", " ") for code in inline]
    calls = [shlex.split(match[1], comments=True) for line in lines if (match := CALL.match(line))]
    return [words[1:] if words[0] == "-m" else ["narvid.search", *words[1:]] if words[0] == "narvid-search" else words
            for words in calls]


@cache
def help_of(program: str, *subcommand: str) -> str:
    """What --help of a Python program prints."""
    printed, before = io.StringIO(), sys.argv
    sys.path.insert(0, str((ROOT / program).parent))  # as Python does for a program
    if program.startswith("narvid"):
        name = f"{program}.__main__" if (ROOT / program.replace(".", "/")).is_dir() else program
        main = import_module(name).main
    else:
        main = runpy.run_path(str(ROOT / program), run_name="looked at")["main"]
    sys.argv = [program, *subcommand, "--help"]
    try:
        with redirect_stdout(printed), suppress(SystemExit):
            main()
    finally:
        sys.argv = before
        sys.path.pop(0)
    return printed.getvalue()


def flags_of(program: str, *words: str) -> set[str]:
    """The flags that a program takes; of a shell script, those of what it calls."""
    if program == "main_task_retrieval.py":
        return TRAINER
    if program.endswith(".sh"):
        text = re.sub(r"^#.*$|\s# .*$", "", (ROOT / program).read_text(), flags=re.MULTILINE)
        called = set(re.findall(r"(?:scripts/|data/|main_)\w+\.(?:py|sh)|narvid\.\w+ \w+", text)) - {program}
        called |= {f"scripts/{name}" for name in re.findall(r'dirname "\$0"\)/(\w+\.sh)', text)} - {"scripts/env.sh"}
        called = [name.split() for name in called if name.startswith("narvid") or (ROOT / name).is_file()]
        return set().union(*(flags_of(*name) for name in called))
    subcommand = [word for word in words[:1] if re.fullmatch("[a-z-]+", word)] if program in SUBCOMMANDS else []
    text = help_of(program, *subcommand)
    return set(re.findall(r"--[a-z_-]+", text)) | {"--help"} | (TRAINER if "trainer's" in text else set())


@every_page
def test_commands_name_programs_flags_and_presets_that_exist(page):
    for program, *words in commands(prose(page)):
        module = ROOT / program.replace(".", "/")
        there = (ROOT / program).is_file() or (module / "__main__.py").is_file() or module.with_suffix(".py").is_file()
        if not there and (page.name in OF_EDITS or re.search(r"[*<]|NAME", program)):
            continue
        assert there, program
        used = {word.split("=")[0] for word in words if re.match(r"--[a-z]", word)}
        assert used <= (flags_of(program, *words) if used else set()), (program, words)
        presets = [word for word in words if re.fullmatch(r"configs/\w+\.yaml", word)]
        if program in ("scripts/sweep.sh", "scripts/train_preset.sh", "scripts/train_nodes.sh") and words:
            presets.append(f"configs/{words[0]}.yaml")
        for preset in presets:
            assert (ROOT / preset).is_file() or PLACEHOLDER.fullmatch(Path(preset).stem), (program, words)


def test_the_test_of_commands_sees_what_it_is_for():
    text = ("`python scripts/nothing.py --x`\n\n    NODES=2 bash scripts/sweep.sh demo --seeds 1 \\\n"
            "        --set lam=1   # why\n")
    assert commands(text) == [["scripts/sweep.sh", "demo", "--seeds", "1", "--set", "lam=1"],
                              ["scripts/nothing.py", "--x"]]
    assert "--set" in flags_of("scripts/sweep.sh") and "--lam" in flags_of("scripts/sweep.sh")
    assert "--lamb" not in flags_of("scripts/sweep.sh") and "--lam" not in flags_of("scripts/compare_runs.py")
    assert "--samples" in flags_of("scripts/compare_runs.py") and "--drop_missing" in flags_of("data/prepare_msrvtt.py")
    assert "--top" in flags_of("narvid.search", "query") and "--top" not in flags_of("narvid.search", "index")
    assert sum(len(commands(prose(page))) for page in PAGES) >= 50


@every_page
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`]*`", "", "\n".join(line for line in prose(page).splitlines() if not line.startswith("    ")))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


@every_page
def test_files_that_are_named_exist(page):
    for code in re.findall(r"`([^`\n]+)`", prose(page)) if page.name not in OF_EDITS else ():
        if re.fullmatch(rf"(?:{FOLDERS})/[\w/]+\.(?:py|sh|yaml|md|json|html)", code):
            assert (ROOT / code).is_file(), code


@every_page
def test_python_in_blocks_is_python(page):
    for block in blocks(prose(page)):
        if re.match(r"(?:from|import) \w", block):
            ast.parse(block)


def test_every_page_of_docs_is_reached_from_the_front_page():
    text = prose(ROOT / "README.md")
    assert [page.name for page in PAGES[2:] if f"(docs/{page.name})" not in text] == []


def test_the_front_page_is_short_and_has_its_pictures():
    text = prose(ROOT / "README.md")
    assert len(text.splitlines()) <= 150
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert pictures == [f"docs/pictures/{name}" for name in ("method.svg", "gallery.png", "demo.png", "search.png")]
    assert all((ROOT / name).stat().st_size < 200_000 for name in pictures)
    assert (ROOT / pictures[0]).read_text() == make_pictures.method_svg()


def test_the_front_page_states_where_text_release_and_code_differ():
    text = " ".join(prose(ROOT / "README.md").split())
    for said in ("nucleus border", "L_NCE (Eq. 5)", "fine score (App. A)", "the maxima of the fine score",
                 "sign of Eq. 8 is turned", "temporal encoder each", "learned logit scale", "its own sigma",
                 "masks exclude", "a missing sentence is masked", "joined by time", "Weight decay 0.2"):
        assert said in text, said


def test_the_results_of_the_front_page_are_the_papers():
    published = yaml.safe_load((ROOT / "narvid" / "report" / "published.yaml").read_text())
    text = str(published)
    for row in re.findall(r"^\| NarVid, CLIP .*$", prose(ROOT / "README.md"), re.MULTILINE):
        numbers = re.findall(r"\d\d\.\d", row)
        assert len(numbers) == 6 and all(number.rstrip("0").rstrip(".") in text for number in numbers)

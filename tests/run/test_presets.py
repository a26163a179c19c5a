"""Flags and presets: every preset parses, mistakes are refused with their file, no flag is idle, no text names one that
does not exist."""

import argparse
import inspect
import re
from pathlib import Path

import pytest
import yaml

import main_task_retrieval as trainer
from narvid.methods import METHODS
from narvid.run.settings import build_parser

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
ACTIONS = {action.dest: action for action in build_parser()._actions if action.dest != "help"}


def parse(*argv):
    return trainer.parse_args([str(x) for x in (*argv, "--output_dir", "out")])


def preset(tmp_path, text):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return path


def refusal(*argv):
    """The sentence with which parse_args leaves."""
    with pytest.raises(SystemExit) as left:
        parse(*argv)
    message = left.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message  # a text is exit code 1
    return message


# ---- the presets ----


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_parses_to_what_it_says(path):
    wanted = yaml.safe_load(path.read_text())
    # There is no val.jsonl here to choose an epoch on; zero-shot has no epoch.
    args = parse("--config", path, *([] if wanted.get("method") == "zeroshot" else ["--select_on", "last"]))
    for key, value in wanted.items():
        got = getattr(args, key)
        assert type(got)(value) == got if key != "select_on" else got == "last", key


@pytest.mark.parametrize(
    ("name", "clip_model", "p", "lam", "eta", "alpha"),
    [("vitb32", "ViT-B-32", 0.4, 0.7, 1.8, 1.0), ("vitb16", "ViT-B-16", 0.5, 1.1, 2.0, 2.0)],
)
def test_msrvtt_presets_carry_the_papers_values(name, clip_model, p, lam, eta, alpha):
    """Sec. 4.1 and App. B.2; every one of them is written down, none left to a default."""
    path = ROOT / "configs" / f"msrvtt_{name}.yaml"
    want = {
        **{"clip_model": clip_model, "filter_p": p, "lam": lam, "eta": eta, "alpha": alpha},
        **{"data_dir": "data/msrvtt", "max_words": 64, "max_frames": 12},
        **{"clip_pretrained": "openai", "modules": ["NM", "CMI", "QAF", "CVH"], "temporal_layers": 4},
        **{"fidelity": "reported", "filter": "nucleus", "temperature": 0.1, "hard_loss": "hinge"},
        **{"recipe": "reported", "epochs": 5, "batch_size": 64, "lr": 1e-4, "clip_lr": 1e-7, "warmup": 0.1},
        **{"weight_decay": 0.2, "max_grad_norm": 1.0, "freeze_layers": 0},
    }
    args = parse("--config", path)
    assert {key: getattr(args, key) for key in want} == want
    assert want.keys() <= yaml.safe_load(path.read_text()).keys()
    assert "R@1" in path.read_text() and f"--config configs/msrvtt_{name}.yaml" in path.read_text()


# ---- their mistakes ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3\n", ["my.yaml", "'epoch'"]),
        ("filter-p: 0.3\n", ["my.yaml", "'filter-p'"]),
        ("config: other.yaml\n", ["my.yaml", "'config'"]),
        ("epochs: many\n", ["my.yaml", "--epochs", "many"]),
        ("epochs: 2.5\n", ["my.yaml", "--epochs", "2.5"]),
        ("epochs: 0\n", ["my.yaml", "--epochs", "0 is not a whole number above 0"]),
        ("lr: fast\n", ["my.yaml", "--lr", "fast"]),
        ("lr: -1e-4\n", ["my.yaml", "--lr"]),
        ("fusion_weight: 1.5\n", ["my.yaml", "--fusion_weight", "0 to 1"]),
        ("num_workers: -1\n", ["my.yaml", "--num_workers"]),
        ("temperature: 0\n", ["my.yaml", "--temperature", "above 0"]),
        ("epochs: true\n", ["my.yaml", "--epochs", "True"]),
        ("epochs: [1, 2]\n", ["my.yaml", "2"]),
        ("epochs:\n", ["my.yaml", "epochs", "no value"]),
        ("cache_frames: 1\n", ["my.yaml", "cache_frames", "true or false"]),
        ("cache_frames: maybe\n", ["my.yaml", "cache_frames", "true or false"]),
        ("fidelity: exact\n", ["my.yaml", "--fidelity", "exact", "reported"]),
        ("modules: [NM, XYZ]\n", ["my.yaml", "--modules", "XYZ"]),
        ("- epochs\n", ["my.yaml", "flag: value"]),
        ("", ["my.yaml", "flag: value"]),
        ("epochs: 3\n  lr: [\n", ["my.yaml:2", "not YAML"]),
    ],
)
def test_a_mistake_in_a_preset_is_one_sentence_with_its_file(tmp_path, text, words):
    message = refusal("--config", preset(tmp_path, text))
    assert all(word in message for word in words), message


def test_a_preset_that_is_no_text_or_not_there_is_refused(tmp_path):
    (tmp_path / "my.yaml").write_bytes(b"\xff\xfe\x00epochs")
    assert "my.yaml" in refusal("--config", tmp_path / "my.yaml")
    assert "nowhere.yaml" in refusal("--config", tmp_path / "nowhere.yaml")
    assert "--config" in refusal("--config")


# ---- what a preset may say ----


def test_booleans_lists_and_numbers_of_yaml(tmp_path):
    text = "cache_frames: true\nquick_gelu: no\nmodules: [NM, CMI]\nlr: 3e-4\nfreeze_layers: -1\nfilter: none\n"
    args = parse("--config", preset(tmp_path, text))
    assert args.cache_frames is True and args.quick_gelu is False and args.modules == ["NM", "CMI"]
    assert args.lr == 3e-4 and args.freeze_layers == -1 and args.filter == "none"
    assert parse("--config", preset(tmp_path, "modules: []\n")).modules == []  # Table 3's first row


def test_the_command_line_wins_wherever_it_stands(tmp_path):
    path = preset(tmp_path, "epochs: 7\ncache_frames: true\nmodules: [NM]\nlr: 0.5\n")
    for argv in (("--config", path, "--epochs", 2), ("--epochs", 2, "--config", path)):
        args = parse(*argv, "--no-cache_frames", "--modules", "NM", "CMI")
        assert (args.epochs, args.cache_frames, args.modules, args.lr) == (2, False, ["NM", "CMI"], 0.5)


def test_what_a_preset_leaves_out_has_its_default(tmp_path):
    bare, args = parse(), parse("--config", preset(tmp_path, "epochs: 7\n"))
    changed = {key: value for key, value in vars(args).items() if vars(bare)[key] != value}
    assert changed == {"epochs": 7, "config": str(tmp_path / "my.yaml")}


def test_a_preset_may_name_a_checkpoint(tmp_path):
    assert "nowhere.pt" in refusal("--config", preset(tmp_path, "checkpoint: nowhere.pt\n"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epoch", "3"], ["--epoch"]),  # no abbreviations
        (["--nonsense"], ["--nonsense"]),
        (["7"], ["7"]),
        (["--epochs", "three"], ["--epochs", "three"]),
        (["--lr", "nan"], ["--lr", "nan"]),
        (["--warmup", "2"], ["--warmup", "0 to 1"]),
        (["--recipe", "secret"], ["--recipe", "secret", "modern"]),
        (["--eval_only"], ["--eval_only", "--checkpoint"]),
        (["--data_dir", "nowhere", "--select_on", "val"], ["val.jsonl"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(argv, words):
    message = refusal(*argv)
    assert all(word in message for word in words), message


def test_the_output_directory_is_demanded():
    with pytest.raises(SystemExit) as left:
        trainer.parse_args([])
    assert "--output_dir" in left.value.code


def test_the_clip_rate_is_the_recipes():
    assert parse("--recipe", "reported").clip_lr == 1e-7 and parse("--recipe", "modern").clip_lr == 1e-6
    assert parse("--recipe", "reported", "--clip_lr", 0.5).clip_lr == 0.5


# ---- no idle flag, no invented one ----


def test_every_flag_is_read_by_something():
    folders = (ROOT / "narvid" / name for name in ("run", "methods"))
    files = [ROOT / "main_task_retrieval.py", *(file for folder in folders for file in folder.glob("*.py"))]
    source = "\n".join(file.read_text() for file in files)
    idle = [name for name in ACTIONS if not re.search(rf"\b(args|given|flags)\.{name}\b|\]\.{name}\b", source)]
    assert idle == []


@pytest.mark.parametrize("method", [name for name in METHODS if name != "narvid"])
def test_a_baselines_flags_are_its_constructors_arguments(method):
    ours, its = (set(vars(build_parser(name).parse_args(["--output_dir", "."]))) for name in ("narvid", method))
    arguments = inspect.signature(METHODS[method]).parameters.values()
    assert {a.name for a in arguments if a.kind == a.KEYWORD_ONLY} >= its - ours
    assert not {"modules", "alpha", "filter_p"} & its  # NarVid's own are refused, not ignored
    assert "alpha" in refusal("--method", method, "--alpha", "2")


def test_a_method_comes_from_the_command_line_or_the_preset(tmp_path):
    assert parse("--config", preset(tmp_path, "method: clip4clip")).method == "clip4clip"
    assert parse().method == "narvid"
    assert "choose from narvid" in refusal("--method", "clip3clip")
    said = refusal("--config", preset(tmp_path, "alpha: 2"), "--method", "clip4clip")
    assert "my.yaml" in said and "alpha" in said


@pytest.mark.parametrize("method", METHODS)
def test_every_flag_has_one_form_and_a_help(method):
    actions = {action.dest: action for action in build_parser(method)._actions if action.dest != "help"}
    for name, action in actions.items():
        forms = [f"--{name}", f"--no-{name}"]
        assert action.option_strings == (forms if isinstance(action, argparse.BooleanOptionalAction) else forms[:1])
    explain_themselves = {"epochs", "lr", "seed", "recipe", "fidelity"}
    assert [name for name, action in actions.items() if not action.help and name not in explain_themselves] == []


def known_flags():
    """Of the trainer and of every other script that a text may show."""
    flags = {option for action in ACTIONS.values() for option in action.option_strings} | {"--help"}
    others = [*(ROOT / "scripts").glob("*.py"), *(ROOT / "data").glob("*.py"), *(ROOT / "narvid").glob("**/*.py")]
    for path in others:
        flags |= set(re.findall(r'\badd(?:_argument)?\(\s*"(--[a-z_]+)"', path.read_text()))
    return flags


TORCHRUN = {"--nproc_per_node", "--nnodes", "--node_rank", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id"}
TEXTS = [path for path in (ROOT / "README.md", ROOT / "data" / "README.md", *PRESETS) if path.exists()]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_texts_name_only_flags_that_exist(path):
    text = path.read_text()
    named = set(re.findall(r"(?<![\w-])--[a-z]+_[a-z_]+", text))  # with an underscore they can only be ours
    for call in re.findall(r"main_task_retrieval\.py((?:[^`\n]|\\\n)*)", text):
        named |= set(re.findall(r"(?<!\S)--[a-z_-]+", call))
    assert named <= known_flags() | TORCHRUN


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_call_the_trainer_with_flags_and_presets_that_exist(path):
    text = path.read_text().replace("\\\n", " ")
    for call in re.findall(r"main_task_retrieval\.py(.*)", text):
        if not call.lstrip().startswith("-"):
            continue  # a comment
        assert set(re.findall(r"(?<!\S)--[a-z_-]+", call)) <= known_flags()
        for name in re.findall(r"configs/(\S+?\.yaml)", call):
            assert "$" in name or (ROOT / "configs" / name).exists()

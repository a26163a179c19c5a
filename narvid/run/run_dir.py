"""The run directory: the only place that writes to disk during training.

    runs/<name>/config.yaml     every flag, resolved, and the commit
                log.txt         what was printed
                results.jsonl   one evaluation a line
                ranks.csv       the final evaluation: each query's rank in every matrix
                last.pt         all that an exact resume needs
                best.pt         all that evaluation needs: the selected model
                .lock           whose process it is while a run writes

Files are written under a temporary name and renamed, so that a kill at any moment leaves whole files. What makes a
resumed run the same one: same_run.py.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import yaml

from narvid import InputError, files
from narvid.progress import say

BROKEN = "the run's record is damaged; choose a new --output_dir"
PARTS = {"model": dict, "args": dict, "clip_config": dict}  # of a checkpoint of ours
PLACE = {"epoch": int, "step": int, "global_step": int}  # and of a run's own


class RunDir:
    """One run on disk. Only the process with `writes` True touches it, and no other run while this one is open."""

    def __init__(self, path: str | Path, config: dict, *, writes: bool):
        self.path, self.writes, self.board = Path(path), writes, None
        self.config = json.loads(json.dumps(config))  # tuples become lists, as YAML gives them back
        self._lock, self._is_new = None, False

    def own(self, *, resume: bool) -> dict | None:
        """Lock the folder -> the settings of the run that it holds, None where there is none yet.

        Writes nothing else yet (see `open`). InputError where the folder holds something else, or a run that is not to
        be resumed, or where another process runs in it.
        """
        if not self.writes:
            return None
        there = self._names()
        # A run that was killed or refused at its very start leaves such names: the folder is as good as empty.
        foreign = [name for name in there if name != ".lock" and not (name[0] == "." and name.endswith(".tmp"))]
        if foreign and "config.yaml" not in there:
            raise InputError(f"--output_dir {self.path}: holds files but no run; choose an empty or a new folder")
        self._is_new = not there
        self._lock = files.lock(self.path)
        settings = self.settings()
        if settings is not None and not resume:
            raise InputError(f"--output_dir {self.path}: holds another run; choose a new folder, or continue it with "
                             "--resume auto")
        return settings

    def settings(self) -> dict | None:
        """The flags of the run in this folder, of its config.yaml; None where there is none yet."""
        path = self.path / "config.yaml"
        return files.read_yaml(path, advice=BROKEN) if path.exists() else None

    def _names(self) -> list[str]:
        try:
            return files.list_folder(self.path) if self.path.exists() else []
        except OSError as error:  # a name too long, a folder above that may not be read
            raise InputError(f"--output_dir {self.path}: no folder can be there ({error.strerror}); choose "
                             "another") from None

    def close(self) -> None:
        """Let the folder go; one that was made for a run that was refused goes too."""
        if self._lock is not None:
            if self._is_new and self._names() == [".lock"]:
                with suppress(OSError):
                    (self.path / ".lock").unlink()
                    self.path.rmdir()
            self._lock.close()
            self._lock = None

    def open(self, *, tensorboard: bool = False, step: int = 0) -> None:
        """Write config.yaml: called when data and model are good and nothing else can be refused.

        `step`: where the run goes on; TensorBoard forgets what an earlier process wrote beyond it.
        """
        if not self.writes:
            return
        writer = _summary_writer() if tensorboard else None
        files.write_text(self.path / "config.yaml",
                         f"# commit: {_commit()}\n{yaml.safe_dump(self.config, sort_keys=True)}")
        self.board = writer and writer(str(self.path), purge_step=step)

    def try_writing(self, model: torch.nn.Module, *, trained: bool) -> None:
        """InputError unless the disk takes this model's checkpoints, and one more while it is written."""
        if self.writes:
            weights = sum(x.nbytes for x in model.state_dict().values())
            moments = 2 * sum(p.nbytes for p in model.parameters() if p.requires_grad)
            there = sum(path.stat().st_size for path in self.path.glob("*.pt"))
            files.try_writing(self.path, max(3 * weights + 2 * moments - there, weights + moments) if trained else 0)

    def log(self, text: str) -> None:
        """Print and append to log.txt."""
        if self.writes:
            with files.appending(self.path / "log.txt") as f:
                f.write(text + "\n")
            say(text)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Curves for TensorBoard, where it was asked for."""
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def write_results(self, results: list[dict]) -> None:
        """Rewrite results.jsonl: after a resume it must not keep evaluations of steps that are run again."""
        if self.writes:
            files.write_json_lines(self.path / "results.jsonl", results)

    def final_result(self) -> dict | None:
        """The last line of results.jsonl if the run has ended, else None."""
        path = self.path / "results.jsonl"
        lines = [line for _, line in files.read_json_lines(path, advice=BROKEN)] if path.exists() else []
        return lines[-1] if lines and lines[-1].get("final") else None

    def save(self, name: str, state: dict) -> None:
        """A checkpoint; InputError where the disk does not take it, and the one before is as it was."""
        if self.writes:
            with files.writing(self.path / name, binary=True) as f:
                torch.save(state, f)

    def save_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Similarity matrices as .npz."""
        if self.writes:
            with files.writing(self.path / name, binary=True) as f:
                np.savez(f, **arrays)

    def save_csv(self, name: str, columns: dict[str, Sequence]) -> None:
        """Columns of equal length as .csv with a head line."""
        if self.writes:
            files.write_csv(self.path / name, [list(columns), *zip(*columns.values(), strict=True)])

    def load(self, name: str) -> dict | None:
        """A checkpoint of this run, or None where there is none yet; InputError, with a way out, for a damaged one."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            state = load_checkpoint(path)
            _check_parts(state, path, PARTS | PLACE)
            return state
        except InputError as error:
            raise self.damaged(name, str(error).partition("; name")[0]) from error

    def damaged(self, name: str, what: str) -> InputError:
        """What to raise for a checkpoint of this run that is of no use, with a way out."""
        best = self.path / "best.pt"
        instead = name != best.name and best.exists()
        way = f"start from --checkpoint {best} in a new --output_dir, or " if instead else ""
        return InputError(f"{what}; {way}begin again in a new --output_dir")


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of ours, or a bare state dict (a released one), without executing anything in it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a checkpoint that is there") from error
    except Exception as error:  # zip, pickle and torch each raise their own, over many lines
        raise InputError(f"{path}: is no checkpoint, or a damaged one ({type(error).__name__}); name a run's best.pt "
                         "or last.pt, or a released one") from error
    if not isinstance(state, dict):
        raise InputError(f"{path}: is no checkpoint but a {type(state).__name__}")
    if not state:
        raise InputError(f"{path}: is an empty checkpoint; name a run's best.pt or last.pt, or a released one")
    if {"args", "clip_config"} & state.keys():  # ours; a released one is a state dict
        _check_parts(state, path, PARTS)
    return state


def _check_parts(state: dict, path: str | Path, parts: dict[str, type]) -> None:
    for key, kind in parts.items():
        if not isinstance(state.get(key), kind):
            what = f"is a {type(state[key]).__name__}" if key in state else "is missing"
            raise InputError(f"{path}: is a damaged checkpoint of a run, its {key} {what}; name another one")
    if not all(isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in state["model"].items()):
        raise InputError(f"{path}: is a damaged checkpoint of a run, its model holds more than weights; name another "
                         "one")


def _commit() -> str:
    here = Path(__file__).parent
    try:
        got = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"],
                             capture_output=True, text=True)
    except OSError:  # no git here
        return "unknown"
    return got.stdout.strip() or "unknown"


def _summary_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter

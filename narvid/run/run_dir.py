"""The run directory: the only place that writes to disk during training.

    runs/<name>/config.yaml     every flag, resolved, and the commit
                log.txt         what was printed
                results.jsonl   one evaluation a line
                ranks.csv       the final evaluation: each query's rank in every matrix
                last.pt         all that an exact resume needs
                best.pt         all that evaluation needs: the selected model

Files are written under a temporary name and renamed, so that a kill at any moment leaves whole files.
"""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from narvid import InputError
from narvid.progress import tqdm

# Flags that may differ between a run and its continuation: they do not change what is computed.
FREE_TO_CHANGE = ("config", "resume", "output_dir", "num_workers", "cache_frames", "feature_cache", "log_every",
                  "save_every", "tensorboard", "profile", "show_kept")


class RunDir:
    """One run on disk. Only the process with `writes` True touches it."""

    def __init__(self, path: str | Path, config: dict, *, resume: bool, writes: bool):
        """Refuses a folder that holds something else, or another run; writes nothing yet (see `open`)."""
        self.path, self.writes, self.board = Path(path), writes, None
        if not writes:
            return
        self.config = json.loads(json.dumps(config))  # tuples become lists, as YAML gives them back
        # A kill during the very first write leaves .config.yaml.tmp alone: that folder is as good as empty.
        if (self.path / "config.yaml").exists():
            self._check_same_run(self.config, resume)
        elif self.path.exists() and (not self.path.is_dir()
                                     or {p.name for p in self.path.iterdir()} - {".config.yaml.tmp"}):
            raise InputError(f"--output_dir {self.path}: holds files but no run; choose an empty or a new folder")

    def open(self, *, tensorboard: bool = False, step: int = 0) -> None:
        """Make the folder and write config.yaml: called when data and model are good and nothing else can be refused.

        `step`: where the run goes on; TensorBoard forgets what an earlier process wrote beyond it.
        """
        if not self.writes:
            return
        writer = _summary_writer() if tensorboard else None
        self.path.mkdir(parents=True, exist_ok=True)
        self._replace("config.yaml", lambda f: f.write(
            f"# commit: {_commit()}\n{yaml.safe_dump(self.config, sort_keys=True)}".encode()))
        self.board = writer and writer(str(self.path), purge_step=step)

    def log(self, text: str) -> None:
        """Print and append to log.txt."""
        if self.writes:
            tqdm.write(text)  # above a progress bar, not through it
            with open(self.path / "log.txt", "a", encoding="utf-8") as f:
                f.write(text + "\n")

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Curves for TensorBoard, where it was asked for."""
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()

    def write_results(self, results: list[dict]) -> None:
        """Rewrite results.jsonl: after a resume it must not keep evaluations of steps that are run again."""
        if self.writes:
            self._replace("results.jsonl", lambda f: f.write("".join(json.dumps(r) + "\n" for r in results).encode()))

    def final_result(self) -> dict | None:
        """The last line of results.jsonl if the run has ended, else None."""
        path = self.path / "results.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        last = json.loads(lines[-1]) if lines else {}
        return last if last.get("final") else None

    def save(self, name: str, state: dict) -> None:
        """A checkpoint."""
        if self.writes:
            self._replace(name, lambda f: torch.save(state, f))

    def save_arrays(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        """Similarity matrices as .npz."""
        if self.writes:
            self._replace(name, lambda f: np.savez(f, **arrays))

    def save_csv(self, name: str, columns: dict[str, Sequence]) -> None:
        """Columns of equal length as .csv with a head line."""
        if self.writes:
            text = io.StringIO(newline="")
            csv.writer(text, lineterminator="\n").writerows([columns, *zip(*columns.values(), strict=True)])
            self._replace(name, lambda f: f.write(text.getvalue().encode()))

    def load(self, name: str) -> dict | None:
        """A checkpoint of this run, or None where there is none yet."""
        path = self.path / name
        return load_checkpoint(path) if path.exists() else None

    def _replace(self, name: str, write: Callable) -> None:
        temporary = self.path / f".{name}.tmp"
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, self.path / name)

    def _check_same_run(self, config: dict, resume: bool) -> None:
        if not resume:
            raise InputError(f"--output_dir {self.path}: holds another run; choose a new folder, or continue it with "
                             "--resume auto")
        before = yaml.safe_load((self.path / "config.yaml").read_text())
        changed = [k for k in sorted(before.keys() | config.keys())
                   if k not in FREE_TO_CHANGE and before.get(k) != config.get(k)]
        if changed:
            what = ", ".join(f"--{k} {before.get(k)} there, {config.get(k)} here" for k in changed[:4])
            raise InputError(f"--output_dir {self.path}: holds another run ({what}); continue a run with its own flags")


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
    return state


def _commit() -> str:
    here = Path(__file__).parent
    got = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"],
                         capture_output=True, text=True)
    return got.stdout.strip() or "unknown"


def _summary_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter

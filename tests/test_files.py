"""The one door for files: each fault of a file that is read is one sentence with its line; a write is whole or not at
all; a folder has one owner. Then the rule itself: nothing in the package reads or renames past it.
"""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from narvid import InputError, files
from narvid.parsing import is_blank, parse_json

ROOT = Path(__file__).resolve().parent.parent
DEEP = 200_000
JSON_FAULTS = {
    "nested": ("[" * DEEP + "]" * DEEP, "nested"),
    "nested objects": ('{"a":' * DEEP + "1" + "}" * DEEP, "nested"),
    "nested as deep as Python reads": ("[" * 300 + "]" * 300, "nested"),
    "6,000 digits": ('{"a": ' + "7" * 6000 + "}", "number"),
    "400 digits": ('{"a": ' + "7" * 400 + "}", "number"),
    "a float of 400 digits": ('{"a": ' + "7" * 400 + ".0}", "number"),
    "1e999": ('{"a": 1e999}', "number"),
    "NaN": ('{"a": NaN}', "number"),
    "-Infinity": ('{"a": -Infinity}', "number"),
    "high half": ('{"a": "x \\ud83d y"}', "surrogate"),
    "low half": ('{"a": "\\uDe00"}', "surrogate"),
    "half in a name": ('{"\\ud83d": 1}', "surrogate"),
    "NUL escaped": ('{"a": "\\u0000"}', "NUL"),
    "NUL": ('{"a": "\0"}', "NUL"),
    "twice": ('{"a": 1, "b": {}, "a": 2}', "a stands there twice"),
    "torn": ('{"a": 1', "malformed JSON"),
    "no JSON": ("video7", "malformed JSON"),
}


def refusal(call, *args, **kwargs) -> str:
    """The one sentence that a call is refused with."""
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 600, sentence[:200]
    return sentence


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ---- reading ----


def test_a_line_ends_at_line_feed_and_nowhere_else(tmp_path):
    path = written(tmp_path, "\ufeffa\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\rh\r\n\n  last")
    assert files.read_lines(path) == ["a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\rh", "", "  last"]
    assert files.read_lines(path, whole=True) == ["a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\rh", ""]
    assert files.read_lines(written(tmp_path, "")) == files.read_lines(path, whole=True) == []


def test_a_torn_last_line_may_end_within_a_letter(tmp_path):
    path = written(tmp_path, b'{"a": 1}\n{"a": "\xc3')
    assert list(files.read_json_lines(path, whole=True)) == [(1, {"a": 1})]
    assert f"{path}:2: not UTF-8 text" in refusal(lambda: list(files.read_json_lines(path)))


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_faults_of_json_name_file_and_line(tmp_path, fault):
    text, what = JSON_FAULTS[fault]
    path = written(tmp_path, f'{{"fine": "\\ud83d\\ude00"}}\n\n{text}\n')
    sentence = refusal(lambda: list(files.read_json_lines(path, advice="do this")))
    assert sentence.startswith(f"{path}:3: ") and what in sentence and "do this" in sentence
    assert what in refusal(files.read_json, written(tmp_path, text))


def test_the_line_of_a_fault_within_one_value(tmp_path):
    for text, line in (('{"a": 1,\n"b": "NaN",\n"c": NaN}', 3), ('["\\ud83d\\ude00",\n"\\ude00"]', 2),
                       ('["\\ud83d\\ude00\\u0041",\n1,\n "\\ud83dx"]', 3), ('[1,\n[7' + 6000 * "7" + "]]", 2),
                       ('{"a": 1,\n\n"a": 1}', 3), ('[1,\n2,\n', 3)):
        assert f"file:{line}: " in refusal(files.read_json, written(tmp_path, text)), text[:40]


def test_whole_pairs_big_numbers_and_deep_files_within_reason_are_read(tmp_path):
    value = {"a": "\U0001f600 \u2028", "b": [2**53, 1e-300, -1.5, True, None], "c": [[[[{}]]]]}
    for ascii in (True, False):
        assert files.read_json(written(tmp_path, json.dumps(value, ensure_ascii=ascii)), dict) == value
    assert "holds no list" in refusal(files.read_json, tmp_path / "file", list)
    assert "holds no object" in refusal(files.read_json, written(tmp_path, "[]"), dict)
    assert "file:1: is no object" in refusal(lambda: list(files.read_json_lines(tmp_path / "file")))
    assert "empty" in refusal(files.read_json, written(tmp_path, " \n"))


READERS = {
    "text": files.read_text, "lines": files.read_lines, "json": files.read_json, "yaml": files.read_yaml,
    "json lines": lambda path, **more: list(files.read_json_lines(path, **more)),
    "csv": lambda path, **more: files.read_csv(path, ["a"], **more),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_no_text_can_be_read_from(tmp_path, reader, monkeypatch):
    read = READERS[reader]
    assert "is a folder" in refusal(read, tmp_path)
    assert "cannot be read (No such file or directory); make it" in refusal(read, tmp_path / "x", advice="make it")
    assert "cannot be read" in refusal(read, "a\0b")
    assert "UTF-16" in refusal(read, written(tmp_path, "a: 1\n".encode("utf-16")))
    assert "UTF-16" in refusal(read, written(tmp_path, "a: 1\n".encode("utf-16-le")))
    assert "file:2: not UTF-8 text (byte 4 " in refusal(read, written(tmp_path, b"a,b\n\xff\xfe,\n"))
    assert "file:2: holds a NUL" in refusal(read, written(tmp_path, b"a,b\n\0,\n"))

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert "cannot be read (Permission denied)" in refusal(read, tmp_path / "file")


@pytest.mark.parametrize("text, what", [
    ("a: " + "[" * DEEP, "nested"), ("a: " + "[" * 200 + "]" * 200, "nested"),
    ("a: " + "7" * 6000, "number" if sys.version_info < (3, 10, 7) else "cannot be read"),
    ("a: " + "7" * 400, "number"), ("a: .nan", "number"), ("a: .inf", "number"), ('a: "\\ud83d"', "surrogate"),
    ('a: "\\0"', "NUL"), ("a: 1\nb: 2\na: 3", ":3: "), ("a: &x [1]\nb: [*x, *x]", ":2: "), ("a: 2020-13-45", "month"),
    ("a: !!python/object:os.system ls", ":1: "), ("a: 1\n b: [", "file:2: "), ("[1, 2]", "must hold"),
    ("", "must hold"), ("1: 2", "must hold"), ("a: \x07", "file:1: "),
    ("? [1]\n: 2", "file:1: "), ("a: {1: 2, [1]: 2}", "file:1: "),
])
def test_faults_of_yaml(tmp_path, text, what):
    assert what in refusal(files.read_yaml, written(tmp_path, text))


def test_yaml_values(tmp_path):
    path = written(tmp_path, "\ufeff# head\nlr: 1e-4\nepochs: 5\nname: \U0001f600\nflag: true\nlist: [a, b]\r\n")
    assert files.read_yaml(path) == {"lr": "1e-4", "epochs": 5, "name": "\U0001f600", "flag": True, "list": ["a", "b"]}


def test_csv(tmp_path):
    path = written(tmp_path, '\ufeffa,b\r\n1,"two\nlines, \u2028"\r\n\r\n3,\n')
    assert files.read_csv(path, ["b"]) == [(3, {"a": "1", "b": "two\nlines, \u2028"}), (5, {"a": "3", "b": ""})]
    for text, what in (("a,b\n", "no line below its header"), ("", "no column 'a' in the header"),
                       ("a,b\n1,2,3\n", "file:2: "),
                       ("a,b\n1\n", "file:2: "), ("a,a\n1,2\n", "twice"), ("b\n1\n", "no column 'a'"),
                       ('a\n"1\n', "malformed csv"), ('a\n"1"2\n', "malformed csv"),
                       ("a\n" + "7" * 200_000, "field larger")):
        assert what in refusal(files.read_csv, written(tmp_path, text), ["a"]), text[:20]


def test_a_folder_that_may_not_be_read_is_not_empty(tmp_path, monkeypatch):
    (tmp_path / "a/closed").mkdir(parents=True)
    real = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert f"{tmp_path / 'a/closed'}: the folder cannot be read (Permission denied)" in refusal(
        lambda: list(files.walk(tmp_path)))
    assert "cannot be read (No such file" in refusal(lambda: list(files.walk(tmp_path / "none")))
    assert "cannot be read (Not a directory" in refusal(files.list_folder, written(tmp_path, ""))


def test_links_are_followed_and_a_real_folder_is_visited_once(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/loop").symlink_to(tmp_path / "a")
    (tmp_path / "a/self").symlink_to(tmp_path / "a")
    (tmp_path / "elsewhere").mkdir()
    for name in ("a/1", "a/b/2", "elsewhere/3"):
        (tmp_path / name).write_text("")
    (tmp_path / "a/b/out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a/.hidden").mkdir()
    found = dict(files.walk(tmp_path / "a"))
    assert found == {str(tmp_path / "a"): ["1"], str(tmp_path / "a/b"): ["2"], str(tmp_path / "a/b/out"): ["3"]}
    assert files.list_folder(tmp_path / "a") == [".hidden", "1", "b", "self"]


def test_a_large_file_comes_in_parts(tmp_path):
    path = written(tmp_path, b"0123456789")
    assert list(files.read_parts(path, size=4)) == [b"0123", b"4567", b"89"]
    assert list(files.read_parts(written(tmp_path, b""))) == [] and files.read_bytes(path) == b""
    assert "cannot be read (No such file or directory); get it" in refusal(
        lambda path: list(files.read_parts(path, advice="get it")), tmp_path / "x")


# ---- writing ----


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "new/folder/out.txt"
    files.write_text(path, "one\r\ntwo\u2028")
    assert path.read_bytes() == "one\r\ntwo\u2028".encode()
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), files.writing(path) as file:
            file.write("half")
            raise error
        assert os.listdir(path.parent) == ["out.txt"] and path.read_bytes().startswith(b"one")
    files.write_json(tmp_path / "a.json", {"a": "\U0001f600"})
    files.write_json_lines(tmp_path / "a.jsonl", [{"a": 1}, {"a": "\u2028"}])
    assert files.read_json(tmp_path / "a.json") == {"a": "\U0001f600"}
    assert [entry for _, entry in files.read_json_lines(tmp_path / "a.jsonl")] == [{"a": 1}, {"a": "\u2028"}]
    files.write_csv(tmp_path / "a.csv", [["a", "b"], ["1,5", 'x\n"y"'], ["", "\u2028"]])
    assert (tmp_path / "a.csv").read_bytes() == 'a,b\n"1,5","x\n""y"""\n,\u2028\n'.encode()
    assert files.read_csv(tmp_path / "a.csv", ["b"])[1][1] == {"a": "", "b": "\u2028"}
    assert path.stat().st_mode & 0o777 == 0o666 & ~(umask := os.umask(0)) and not os.umask(umask)
    files.write_text(tmp_path / ("n" * 255), "")  # the longest name a disk takes


@pytest.mark.parametrize("code, what", [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"),
                                        (errno.EDQUOT, "quota"), (errno.EFBIG, "ulimit -f"),
                                        (errno.EIO, "disk reports")])
@pytest.mark.parametrize("where", ["open", "write", "fsync", "replace", "hidden"])
def test_a_disk_that_refuses_is_one_sentence(tmp_path, monkeypatch, code, what, where):
    path = tmp_path / "out.bin"
    path.write_bytes(b"before")

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    if where == "open":
        monkeypatch.setattr(files, "open", refuse, raising=False)
    elif where in ("fsync", "replace"):
        monkeypatch.setattr(os, where, refuse)

    def write():
        with files.writing(path, binary=True) as file:
            file.write(b"half")
            if where == "write":
                refuse()
            if where == "hidden":  # as torch's writer does
                try:
                    refuse()
                except OSError:
                    raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904

    sentence = refusal(write)
    assert sentence.startswith(f"{path}: cannot be written: ") and what in sentence and "as it was" in sentence
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["out.bin"]


def test_a_real_limit_on_the_size_of_files(tmp_path):
    """As `ulimit -f` sets it: refused before any work, and in the middle of a file."""
    code = """if True:
        import resource, sys
        from narvid import InputError, files
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        files.try_writing(sys.argv[1], 10_000)
        for call in (lambda: files.try_writing(sys.argv[1], 60_000),
                     lambda: files.write_text(sys.argv[1] + "/out", "x" * 60_000)):
            try:
                call()
            except InputError as error:
                print(error)"""
    said = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True)
    lines = said.stdout.splitlines()
    assert len(lines) == 2 and all("ulimit -f" in line for line in lines), said
    assert os.listdir(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 50_000


def test_a_link_to_a_disk_that_is_not_there(tmp_path):
    """Its own message would be "File exists"."""
    link = tmp_path / "runs"
    link.symlink_to(tmp_path / "unmounted")
    for attempt in (lambda: files.lock(link), lambda: files.lock(link / "a" / "b"),
                    lambda: files.try_writing(link / "a"), lambda: files.write_text(link / "a.txt", "")):
        with pytest.raises(InputError, match=f"the link {link} leads nowhere"):
            attempt()
    (tmp_path / "unmounted").mkdir()
    files.write_text(link / "a.txt", "")
    assert (tmp_path / "unmounted" / "a.txt").exists()


def test_trying_a_folder_leaves_nothing(tmp_path):
    files.try_writing(tmp_path / "a/b/c", 1_000_000)
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refusal(files.try_writing, tmp_path / "file/x")
    assert "File exists" in refusal(files.try_writing, tmp_path / "file")
    assert "GiB are needed" in refusal(files.try_writing, tmp_path / "a", 2**60)
    assert os.listdir(tmp_path) == ["file"]
    for path in ("a\0b", "/proc/none/x", "n" * 300):
        assert "cannot be written" in refusal(files.try_writing, path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_a_folder_of_somebody_else():
    code = """if True:
        import os, sys
        from narvid import InputError, files
        os.seteuid(65534)
        for call in (lambda: files.try_writing(sys.argv[1]), lambda: files.write_text(sys.argv[1] + "/x", ""),
                     lambda: list(files.walk(sys.argv[1])), lambda: files.lock(sys.argv[1])):
            try:
                call()
            except InputError as error:
                print(error)"""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders may not be looked into by others
        os.chmod(folder, 0o755)
        closed = Path(folder, "closed")
        closed.mkdir(mode=0o700)
        said = subprocess.run([sys.executable, "-c", code, closed], cwd=ROOT, capture_output=True, text=True)
    lines = said.stdout.splitlines()
    assert len(lines) == 4 and all("Permission denied" in line and "closed" in line for line in lines), said


def test_appending_cuts_off_half_a_line(tmp_path):
    path = tmp_path / "new/journal"
    with files.appending(path) as file:
        file.write("one\n")
    path.write_bytes(path.read_bytes() + b'{"half": "\xc3')
    with files.appending(path) as file:
        file.write("two\n")
    assert path.read_text() == "one\ntwo\n"
    assert "cannot be written" in refusal(files.appending(tmp_path).__enter__)
    with pytest.raises(FileNotFoundError), files.appending(path):  # of another file: no word on this one
        (tmp_path / "none").read_bytes()


# ---- a folder of one process ----


def hold(folder: Path) -> subprocess.Popen:
    """Another process that owns the folder until it is killed; returns once it does."""
    code = "import sys, time; from narvid import files; held = files.lock(sys.argv[1]); "
    code += "print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_has_one_owner_and_its_death_frees_it(tmp_path):
    owner = hold(tmp_path / "run")
    sentence = refusal(files.lock, tmp_path / "run")
    assert f"{tmp_path / 'run'}: is being written by another process (process {owner.pid} on " in sentence
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    (tmp_path / "run/.last.pt.0123abcd.tmp").write_text("left by the one that was killed")
    (tmp_path / "run/.mine.tmp").write_text("")
    with files.lock(tmp_path / "run"):
        assert "another process" in refusal(files.lock, tmp_path / "run")  # in one process too
        with files.lock(tmp_path / "run", "part-2"):
            pass
        assert sorted(os.listdir(tmp_path / "run")) == [".lock", ".mine.tmp", "part-2"]
    files.lock(tmp_path / "run").close()


def test_a_forked_worker_does_not_keep_the_lock(tmp_path):
    """A loader's worker lives on for seconds after its parent was killed."""
    code = """if True:
        import os, sys, time
        from narvid import files
        held = files.lock(sys.argv[1])
        child = os.fork()
        if child:
            print(child, flush=True)
        time.sleep(60)"""
    owner = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(owner.stdout.readline())
    time.sleep(0.2)  # the child has closed it by now
    assert "another process" in refusal(files.lock, tmp_path)
    owner.kill()
    owner.wait()
    try:
        files.lock(tmp_path).close()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_waiting_for_a_lock(tmp_path):
    owner = hold(tmp_path)
    start = time.monotonic()
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill {owner.pid}"])
    files.lock(tmp_path, wait=True).close()
    assert time.monotonic() - start > 0.4
    owner.wait()


def test_a_disk_without_locks_lets_everybody_in(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with files.lock(tmp_path), files.lock(tmp_path):
        pass


# ---- the rule ----


def test_the_door_needs_no_torch():
    code = "import sys, narvid.files; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("text, blank", [("", True), (" \t\u00a0\u3000", True), ("\u200b \ufeff\u200d", True),
                                         ("\U0001f600", False), ("...", False), ("\u200ba\u200b", False), ("猫", False)])
def test_a_text_of_which_nothing_is_seen(text, blank):
    assert is_blank(text) == blank


def test_parse_json_of_a_line_names_it():
    assert "journal:7: malformed JSON" in refusal(parse_json, "{", "journal", line=7)

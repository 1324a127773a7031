"""Run: pytest tests/test_faults.py. Killed, interrupted, out of disk, twice at once: real processes, and the same bytes in the end."""
import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from safetensors import SafetensorError
from transformers import LlamaConfig

from compress import artifact, cli
from compress.artifact import MANIFEST, PARTIAL

SERVER = multiprocessing.get_context("forkserver")      # its children have torch imported already: 0.1 s to start, not 5
SERVER.set_forkserver_preload(["compress.cli", "pytest"])
BLOCKS = 8
TOUCHES = {"open", "os.rename", "os.remove", "os.chmod", "os.mkdir", "shutil.copyfile"}     # audit events that precede a change on disk


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model of eight blocks and what an undisturbed run makes of it."""
    root = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.TINY, "deep", lambda: LlamaConfig(**tiny.LLAMA | {"num_hidden_layers": BLOCKS}))
        tiny.save_tiny("deep", root / "model")
    (root / "text.txt").write_text(Path(os.__file__).read_text())
    work = SimpleNamespace(root=root, model=root / "model", text=f"file:{root / 'text.txt'}", touches=root / "touches",
                           options=["--set", "gptq.group_size=32"])
    assert finish(work, root / "out", touches=work.touches) == ""
    return SimpleNamespace(**vars(work), whole=contents(root / "out"))


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def arguments(work, out: Path) -> list[str]:
    return ["compress", "run", str(work.model), "-c", work.text, "-o", str(out), "--samples", "4", "--seqlen", "32", *work.options]


def child(argv: list[str], out: Path, die_at: int | None, touches: Path | None, largest: int) -> None:
    """In the new process: the command line; dead before touching `out` for the die_at-th time; no file beyond `largest` bytes."""
    for name, stream in (("err", sys.stderr), ("out", sys.stdout)):
        os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream.fileno())
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what it puts in the background with interrupts ignored
    seen = []

    def audit(event, args):
        if event in TOUCHES and any(str(a).startswith(f"{out}/") for a in args) and (event != "open" or args[2] & os.O_CREAT):
            if len(seen) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            seen.append(event)

    if die_at is not None or touches:
        sys.addaudithook(audit)
    sys.argv = argv
    try:
        cli.main()
    finally:
        if touches:
            touches.write_text(str(len(seen)))


def start(work, out: Path, die_at: int | None = None, touches: Path | None = None, largest: int = resource.RLIM_INFINITY):
    process = SERVER.Process(target=child, args=(arguments(work, out), out, die_at, touches, largest))
    process.start()
    return process


def stderr(out: Path) -> str:
    """What went to stderr, without the lines of progress."""
    return "".join(line for line in Path(f"{out}.err").read_text().splitlines(True) if not line.startswith("["))


def finish(work, out: Path, **options) -> str:
    process = start(work, out, **options)
    process.join()
    assert process.exitcode == 0, stderr(out)
    return stderr(out)


def wait(process, moment: Callable[[], bool]) -> None:
    while process.is_alive() and not moment():
        time.sleep(0.0005)


def continues(work, out: Path) -> None:
    """The same command ends in the same bytes; blocks that were finished are not made again."""
    kept = {f: f.stat().st_mtime_ns for f in out.glob("block-*.safetensors")} if out.is_dir() else {}
    assert finish(work, out) == ""
    assert contents(out) == work.whole
    assert {f: f.stat().st_mtime_ns for f in kept} == kept


# ---- kill -9


@pytest.mark.parametrize("tenth", range(10))
def test_killed_between_two_changes_on_disk(tenth, work, tmp_path):
    """At a place drawn from each tenth of the run's file operations: before a file is made, renamed, removed."""
    changes = int(work.touches.read_text())
    assert changes > 3 * BLOCKS
    out = tmp_path / "out"
    process = start(work, out, die_at=random.Random(tenth).randrange(tenth * changes // 10, (tenth + 1) * changes // 10))
    process.join()
    assert process.exitcode == -signal.SIGKILL and stderr(out) == ""
    assert not (out / MANIFEST).exists() or tenth == 9
    continues(work, out)


def test_killed_before_the_last_change(work, tmp_path):
    """The manifest is there, and so is still the record of an unfinished run."""
    out = tmp_path / "out"
    process = start(work, out, die_at=int(work.touches.read_text()) - 1)
    process.join()
    assert (out / MANIFEST).exists() and (out / PARTIAL).exists()
    continues(work, out)


MOMENTS = {
    "at the start": lambda out: out.is_dir(),
    "within a shard": lambda out: any(out.glob("block-*.tmp")),
    "after a block": lambda out: (out / "block-00001.safetensors").exists(),
    "near the end": lambda out: (out / f"block-{BLOCKS - 1:05d}.safetensors").exists(),
}


@pytest.mark.parametrize("when", MOMENTS)
def test_killed_at_a_moment(when, work, tmp_path):
    out = tmp_path / "out"
    process = start(work, out)
    wait(process, lambda: MOMENTS[when](out))
    time.sleep(random.Random(when).uniform(0, 0.03))
    process.kill()
    process.join()
    continues(work, out)


@pytest.mark.parametrize("recipe", ["sparse-50", "svd-20"])
def test_a_run_with_a_schedule_and_shared_factors_killed(recipe, work, tmp_path):
    other = SimpleNamespace(**vars(work) | {"options": ["-r", recipe]})
    assert finish(other, tmp_path / "whole") == ""
    process = start(other, tmp_path / "out")
    wait(process, lambda: MOMENTS["after a block"](tmp_path / "out"))
    process.kill()
    process.join()
    continues(SimpleNamespace(**vars(other) | {"whole": contents(tmp_path / "whole")}), tmp_path / "out")


def test_killed_again_and_again(work, tmp_path):
    """Each time with one or two blocks more: never a step back."""
    out, rng, done = tmp_path / "out", random.Random(0), 0
    for block in range(0, BLOCKS, 2):
        process = start(work, out)
        wait(process, lambda block=block: (out / f"block-{block:05d}.safetensors").exists())
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        done, before = len(list(out.glob("block-*.safetensors"))), done
        assert done >= max(before, block + 1)
    continues(work, out)


def test_a_real_command_killed(work, tmp_path):
    """Without any of the above's tricks: the shell's command, its process killed."""
    out = tmp_path / "out"
    with open(tmp_path / "err", "w") as err:
        process = subprocess.Popen([sys.executable, "-m", *arguments(work, out)], stdout=err, stderr=err)
        while process.poll() is None and not (out / "block-00002.safetensors").exists():
            time.sleep(0.001)
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL and (out / PARTIAL).exists()
    continues(work, out)


# ---- Ctrl-C


def test_interrupted(work, tmp_path):
    for attempt in range(3):  # an interrupt that lands in a destructor is swallowed by Python itself, and the run goes on to its end
        out = tmp_path / f"out{attempt}"
        process = start(work, out)
        wait(process, lambda out=out: (out / "block-00001.safetensors").exists())
        os.kill(process.pid, signal.SIGINT)
        process.join()
        if process.exitcode:
            break
    assert process.exitcode == 130
    assert (said := stderr(out)).startswith("error: interrupted") and said.count("\n") == 1 and PARTIAL in said
    assert (out / PARTIAL).exists() and not (out / MANIFEST).exists() and not list(out.parent.glob("hidden-*"))
    continues(work, out)


# ---- a full disk


def test_files_may_not_grow(work, tmp_path):
    """A limit on file size (a quota) that the last file, the manifest, is the first to break."""
    out, limit = tmp_path / "out", len(work.whole[MANIFEST]) - 1
    assert max(len(b) for name, b in work.whole.items() if name != MANIFEST) < limit
    process = start(work, out, largest=limit)
    process.join()
    assert process.exitcode == 1
    assert (said := stderr(out)).startswith(f"error: {out}: cannot write") and said.count("\n") == 1 and "finished blocks are kept" in said
    assert len(list(out.glob("block-*.safetensors"))) == BLOCKS and not (out / MANIFEST).exists()
    continues(work, out)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 12 MB."""
    (disk := tmp_path / "disk").mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(disk: Path) -> None:
    with open(disk / "ballast", "wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize)


def test_disk_runs_full(work, small_disk):
    out = small_disk / "out"
    process = start(work, out)
    wait(process, lambda: (out / "block-00000.safetensors").exists())
    os.kill(process.pid, signal.SIGSTOP)
    fill(small_disk)
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 1
    said = stderr(out)
    assert said.startswith("error: ") and said.count("\n") == 1 and "the disk is full (0.00 GB free)" in said and "finished blocks are kept" in said
    assert (out / "block-00000.safetensors").exists() and (out / PARTIAL).exists() and not (out / MANIFEST).exists()
    (small_disk / "ballast").unlink()
    continues(work, out)


def test_no_room_from_the_start(work, small_disk):
    fill(small_disk)
    (small_disk / "ballast").open("r+b").truncate(11 << 20)
    process = start(work, small_disk / "out")
    process.join()
    assert process.exitcode == 1
    assert "the artifact takes 0.01 GB, 0.00 GB are free" in (said := stderr(small_disk / "out")) and said.count("\n") == 1
    (small_disk / "ballast").unlink()
    continues(work, small_disk / "out")


def test_disk_full_for_the_log(work, tmp_path):
    """The log lies beside the artifact, on the same disk: it may be what meets the end of it."""
    out, log = tmp_path / "out", tmp_path / "out.log.jsonl"
    log.symlink_to("/dev/full")
    process = start(work, out)
    process.join()
    assert process.exitcode == 1
    assert (said := stderr(out)).startswith("error: ") and said.count("\n") == 1 and "the disk is full" in said
    log.unlink()
    continues(work, out)


FULL = OSError(errno.ENOSPC, "No space left on device")
QUOTA = OSError(errno.EDQUOT, "Disk quota exceeded")
RUST = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("error, module, name, at", [
    (RUST, artifact, "save_file", 0), (RUST, artifact, "save_file", 4), (FULL, os, "fsync", 0), (QUOTA, os, "fsync", 9),
    (FULL, os, "replace", 0), (FULL, os, "replace", 6), (QUOTA, shutil, "copyfile", 1), (FULL, Path, "chmod", 2),
], ids=lambda x: getattr(x, "__name__", None) or str(x))
def test_full_at_any_call(error, module, name, at, work, tmp_path, monkeypatch, capsys):
    out, real, calls = tmp_path / "out", getattr(module, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) > at:
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(module, name, failing)
        patch.setattr(sys, "argv", arguments(work, out))
        cli.main()
    assert end.value.code == 1
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert len(said) == 1 and said[0].startswith(f"error: {out}: cannot write: the disk is full (") and "finished blocks are kept" in said[0]
    assert not (out / MANIFEST).exists()
    continues(work, out)


# ---- two at once


def test_two_runs_into_one_folder(work, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    first = start(work, out)
    wait(first, lambda: (out / "block-00000.safetensors").exists())
    os.kill(first.pid, signal.SIGSTOP)
    before = contents(out)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", arguments(work, out))
        cli.main()
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {out}: another compress run is writing here") and said.count("\n") == 1 and contents(out) == before
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert first.exitcode == 0 and contents(out) == work.whole

"""Faults of every kind against the chunk store, seeded, judged after each; prints counts as JSON.

python -m tests.stress.store_faults [--small] [--seed N] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import errno
import json
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from ragkv.errors import StoreError, StoreFormatError, StoreFullError, StoreReadOnlyError
from tests.store_kit import disk_usage, key_for
from tests.stress.faults_kit import (
    FAIL_ON,
    FAIL_ONCE,
    FILE,
    KILL_AFTER,
    KILL_BEFORE,
    KILL_TORN,
    MIB,
    Tally,
    ViolationError,
    faultline,
    finish,
    judge,
    opened,
    preload,
    put,
    read,
    require,
    start,
)

COUNT = 12
ALL = range(COUNT)


def filled(root: Path) -> Path:
    """A cleanly closed store of COUNT entries."""

    def work() -> None:
        with opened(root) as store:
            for i in ALL:
                put(store, i)

    require(finish(start(work))[0] == 0, "a store could not be filled")
    return root


def restored(root: Path, template: Path) -> Path:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(template, root)
    return root


# Sudden ends


def write_on(root: Path, capacity: int, first: int, pipe: int, at: tuple[int, int] | None) -> None:
    """Put entries one after the other, sometimes deleting one, and tell of each; until killed."""
    rng = random.Random(first)
    store = opened(root, capacity)
    if at is not None:
        faultline().faultline_arm(os.fsencode(root), at[0], at[1], 0, 0)
    alive: list[int] = []
    for i in range(first, first + 100_000):
        with contextlib.suppress(StoreFullError):  # the other writers may have reserved all of it
            os.write(pipe, f"? {i}\n".encode())
            if put(store, i):
                os.write(pipe, f"+ {i}\n".encode())
                alive.append(i)
        if alive and rng.random() < 0.2:
            gone = alive.pop(rng.randrange(len(alive)))
            os.write(pipe, f"- {gone}\n".encode())
            store.delete([key_for(gone)])


def kills(tally: Tally, folder: Path, rng: random.Random, armed: bool, count: int) -> None:
    """kill -9, three writers at a time: at any moment, or at a certain file operation, before, after or in it."""
    kind, first, done = "kill -9", 0, 0
    while done < count:
        root = folder / "kills"
        capacity = rng.choice([20 * FILE, 512 * MIB])
        some = min(25, count - done)
        ready, pipe = os.pipe()
        writers: list[tuple[tuple[int, int], bool]] = []
        for n in range(some + 3):
            first += 1_000_000
            precise = armed and rng.random() < 0.5
            at = (rng.randrange(1, 60), rng.choice([KILL_BEFORE, KILL_AFTER, KILL_TORN])) if precise else None
            writers.append((start(write_on, root, capacity, first, pipe, at), precise))
            if n < 2:
                continue
            time.sleep(rng.uniform(0.002, 0.12))
            victim, precise = writers.pop(rng.randrange(len(writers)))
            reap(tally, kind, victim, precise)
            _cap(tally, root, capacity, [pid for (pid, _), _ in writers])
        for victim, precise in writers:
            reap(tally, kind, victim, precise)
        done += some + 3
        os.close(pipe)
        with os.fdopen(ready) as lines:
            committed, seen = _told(lines.read())
        evicting = capacity < 512 * MIB
        tally.add(kind, rounds=1, committed=len(committed), evicting_rounds=int(evicting))
        result = tally.child(
            kind, f"round before {done}", judge, root, () if evicting else committed, seen=seen, capacity=capacity,
            empty=True,
        )  # fmt: skip
        tally.add(kind, judged=1, repaired=result["repaired"] if result else 0)
        shutil.rmtree(root)


def reap(tally: Tally, kind: str, victim: tuple[int, int], precise: bool) -> None:
    """Kill a writer, or wait for it to meet its operation; a writer must not end in any other way."""
    pid, _ = victim
    if precise:
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    status, reply = finish(victim)
    tally.add(kind, kills=1, at_an_operation=int(precise))
    if status != -signal.SIGKILL:
        tally.violations.append(f"{kind}: a writer ended with {status}: {reply}")
        tally.add(kind, violations=1)


def _cap(tally: Tally, root: Path, capacity: int, others: list[int]) -> None:
    """Count the disk while nobody writes."""
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    while any(Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] not in "TZ" for pid in others):
        time.sleep(0.001)
    used = disk_usage(root) if root.exists() else 0
    for pid in others:
        os.kill(pid, signal.SIGCONT)
    tally.add("kill -9", cap_looked_at=1)
    if used > capacity:
        tally.violations.append(f"kill -9: {used} bytes of {capacity} while writing")
        tally.add("kill -9", violations=1)


def _told(text: str) -> tuple[set[int], set[int]]:
    """What was certainly committed, and what may be there, by what the writers said."""
    committed: set[int] = set()
    seen: set[int] = set()
    for line in text.split("\n")[:-1]:
        sign, number = line.split()
        seen.add(int(number))
        if sign == "+":
            committed.add(int(number))
        elif sign == "-":
            committed.discard(int(number))
    return committed, seen


# Disks that fail


def failing_calls(tally: Tally, folder: Path, rng: random.Random, armed: bool, count: int) -> None:
    """A file operation of a put, a delete or a read fails, once or from then on, those of LMDB included."""
    if not armed:
        return
    template = filled(folder / "template")
    root = folder / "failing"
    errors = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT]
    operations: Counter[str] = Counter()
    for n in range(count):
        restored(root, template)
        code, what = rng.choice(errors), rng.choice([FAIL_ONCE, FAIL_ON])
        with_reads = code == errno.EIO and rng.random() < 0.5
        case = rng.randrange(1, 25), what, code, int(with_reads)
        result = tally.child("failing call", (n, case), _fail, root, case, rng.randrange(10**6))
        if result is None:
            continue
        operations[result["operation"]] += 1
        tally.add("failing call", injected=int(bool(result["operation"])), refused=result["refused"])
        lost = set(result["lost"])
        name = errno.errorcode[code]
        tally.add("failing call", **{name: int(bool(result["operation"]))})
        # An entry that the disk could not read may have been quarantined: a miss, and only that one.
        require_lost = () if with_reads else lost
        if require_lost:
            tally.violations.append(f"failing call {n} {case}: lost {require_lost}")
        tally.child("failing call", (n, case), judge, root, set(ALL) - lost, seen=range(200))
    for operation, times in operations.items():
        if operation:
            tally.add("failing call, by operation", **{operation: times})


def _fail(root: Path, case: tuple[int, int, int, int], seed: int) -> dict[str, Any]:
    library = faultline()
    rng = random.Random(seed)
    refused = 0
    fds = len(os.listdir("/proc/self/fd"))
    store = opened(root)
    library.faultline_arm(os.fsencode(root), *case)
    for i in range(100, 106):
        try:
            if rng.random() < 0.5:
                put(store, i)
                read(store, i)
            else:
                read(store, rng.randrange(COUNT))
        except StoreError:
            refused += 1
    operation = library.faultline_first().decode()
    library.faultline_arm(os.fsencode(root), -1, 0, 0, 0)
    with contextlib.suppress(StoreError):
        store.close()
    require(len(os.listdir("/proc/self/fd")) == fds, "file descriptors were left")
    with opened(root) as again:
        again.check()
        lost = [i for i in ALL if read(again, i) is None]
        require(put(again, 150) and read(again, 150), "nothing can be put after the fault")
    return {"refused": refused, "operation": operation, "lost": lost}


def no_descriptors(tally: Tally, folder: Path, count: int) -> None:
    """The process has no file descriptor left."""
    template = filled(folder / "template")

    def work(root: Path, spare: int) -> None:
        with opened(root) as store:
            put(store, 100)
            highest = max(map(int, os.listdir("/proc/self/fd")))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + spare, 4096))
            for i in ALL:
                with contextlib.suppress(StoreError):
                    read(store, i)
                with contextlib.suppress(StoreError):
                    put(store, 200 + i)
            resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
            require(put(store, 150), "nothing can be put any more")

    for spare in range(count):
        root = restored(folder / "descriptors", template)
        tally.child("no descriptors", spare, work, root, spare)
        tally.child("no descriptors", spare, judge, root, ALL, seen=range(300))
        tally.add("no descriptors", injected=1)


def mounts(tally: Tally, folder: Path) -> None:
    """A real file system of 1 MiB that fills up, and one that is remounted read-only under an open store."""
    for kind, work in (("full disk", _full_disk), ("remounted read-only", _remount)):
        result = tally.child(kind, "", work, folder)
        tally.add(kind, injected=int(result == "done"), not_permitted=int(result == "not permitted"))


def _mount(source: str, folder: Path, *options: str) -> bool:
    """Mount where only this process sees it."""
    if ctypes.CDLL(None).unshare(0x00020000):  # CLONE_NEWNS
        return False
    folder.mkdir()
    commands = [["mount", "--make-rprivate", "/"], ["mount", *options, source, str(folder)]]
    return all(_done(*command) for command in commands)


def _done(*command: str) -> bool:
    if shutil.which(command[0]) is None:
        return False
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


def _full_disk(folder: Path) -> str:
    place = folder / "small-disk"
    if not _mount("tmpfs", place, "-t", "tmpfs", "-o", "size=1m"):
        return "not permitted"
    stored: list[int] = []
    with opened(place / "kv") as store:
        refused = 0
        for i in range(200):
            try:
                put(store, i)
                stored.append(i)
            except StoreFullError:
                refused += 1
        require(refused, "the disk did not fill up")
        require(all(read(store, i) for i in stored), "entries were lost on a full disk")
        require(not list((place / "kv" / "tmp").iterdir()), "temporary files were left")
    # Not a byte is left, not even for the index's own files.
    with contextlib.suppress(OSError), open(place / "ballast", "wb", buffering=0) as ballast:
        while ballast.write(bytes(4096)):
            pass
    for _ in range(2):
        with contextlib.suppress(StoreError), opened(place / "kv") as store:
            require(all(read(store, i) for i in stored[1:]), "entries were lost as not a byte was left")
            store.delete([key_for(stored[0])])
    (place / "ballast").unlink()
    with opened(place / "kv") as store:
        store.delete([key_for(i) for i in stored[:5]])
    judge(place / "kv", stored[5:], seen=range(200))
    return "done"


def _remount(folder: Path) -> str:
    place, image = folder / "turning", folder / "image"
    with open(image, "wb") as file:
        file.truncate(32 * MIB)
    if not (_done("mkfs.ext4", "-q", str(image)) and _mount(str(image), place, "-o", "loop")):
        return "not permitted"
    with opened(place / "kv") as store:
        for i in ALL:
            put(store, i)
    store = opened(place / "kv")
    # What ext4 does of itself when its device fails: from now on it is read-only, whoever is writing.
    require(_done("mount", "-o", "remount,abort", str(place)), "the file system could not be made to fail")
    for act in (lambda: put(store, 100), lambda: store.delete([key_for(0)])):
        try:
            act()
            raise ViolationError("a read-only disk was written to")
        except StoreError:
            pass
    require(all(read(store, i) for i in ALL), "entries were lost on a read-only disk")
    store.close()
    with opened(place / "kv", read_only=True) as looking:
        require(all(read(looking, i) for i in ALL), "entries were lost on a read-only disk")
    try:
        opened(place / "kv").close()
        raise ViolationError("a read-only disk was opened for writing")
    except StoreReadOnlyError:
        pass
    require(_done("umount", str(place)) and _done("mount", "-o", "loop", str(image), str(place)), "no mount any more")
    judge(place / "kv", ALL, seen=[100])
    require(_done("umount", str(place)), "something keeps the file system busy")
    return "done"


def power(tally: Tally, folder: Path, rng: random.Random, count: int) -> None:
    """The journal of the file system is cut off while a writer is at work, as by a power failure."""
    for n in range(count):
        place = folder / f"power{n}"
        place.mkdir()
        result = tally.child("power failure", n, _power, place, rng.uniform(0.05, 0.6), n * 1_000_000)
        tally.add("power failure", injected=int(result is not None and result >= 0), committed=max(result or 0, 0))
        shutil.rmtree(place)


def _power(folder: Path, seconds: float, first: int) -> int:
    place, image = folder / "disk", folder / "image"
    with open(image, "wb") as file:
        file.truncate(64 * MIB)
    if not (_done("mkfs.ext4", "-q", str(image)) and _mount(str(image), place, "-o", "loop")):
        return -1
    told, pipe = os.pipe()
    writer = start(write_on, place / "kv", 20 * MIB, first, pipe, None)
    time.sleep(seconds)
    # Stopped first: what he was told just before would else be missing in what he says.
    os.kill(writer[0], signal.SIGSTOP)
    require(_done("mount", "-o", "remount,abort", str(place)), "the file system could not be made to fail")
    os.kill(writer[0], signal.SIGKILL)
    finish(writer)
    os.close(pipe)
    with os.fdopen(told) as lines:
        committed, seen = _told(lines.read())
    require(_done("umount", str(place)) and _done("mount", "-o", "loop", str(image), str(place)), "no mount any more")
    judge(place / "kv", committed, seen=seen, capacity=20 * MIB)
    require(_done("umount", str(place)), "something keeps the file system busy")
    return len(committed)


# Damage


def damage(tally: Tally, folder: Path, rng: random.Random, count: int) -> None:
    """Bits flipped in, and pieces cut off, every file of a closed store; one entry's are also damaged while open."""
    template = filled(folder / "template")
    name = key_for(3).hex()
    entry = f"entries/{name[:2]}/{name}.kv"
    places = ["index/data.mdb"] * 5 + [entry] * 4 + ["index/lock.mdb", "index/clean", "ragkv-store.json"]
    root = folder / "damage"
    for n in range(count):
        restored(root, template)
        file = rng.choice(places)
        cut = rng.random() < 0.15
        raw = bytearray((root / file).read_bytes())
        heads = file == entry and rng.random() < 0.5
        if cut:
            raw = raw[: rng.randrange(len(raw) + 1)]
        else:
            for _ in range(rng.choice([1, 1, 1, 2, 8])):
                bit = rng.randrange(min(600, len(raw)) if heads else len(raw)) * 8 + rng.randrange(8)
                raw[bit // 8] ^= 1 << bit % 8
        while_open = file == entry and rng.random() < 0.3
        what = "header" if heads else "slab or header" if file == entry else file
        tally.add("truncated" if cut else "flipped", **{what: 1})
        tally.child("damage", (n, file, cut), _damaged, root, file, bytes(raw), while_open, n % 2 == 0)


def _damaged(root: Path, file: str, raw: bytes, while_open: bool, look_first: bool) -> None:
    others = set(ALL) - {3}
    if while_open:
        with opened(root) as store:
            read(store, 1)
            (root / file).write_bytes(raw)
            require(all(read(store, i) for i in others), "another entry was lost")
            read(store, 3)
    else:
        (root / file).write_bytes(raw)
        if file == "ragkv-store.json":
            try:
                opened(root).close()
            except StoreFormatError:
                # Named, and to be put right by hand: what the folder is, is not guessed.
                shutil.copy(root.with_name("template") / file, root / file)
    judge(root, others if file.startswith("entries") else ALL, seen=ALL, look_first=look_first)


def deletions(tally: Tally, folder: Path, rng: random.Random, count: int) -> None:
    """Files and folders removed, or replaced by something else, while the store is open and while it is closed."""
    template = filled(folder / "template")
    names = [str(path.relative_to(template)) for path in sorted(template.rglob("*"))]
    top = [name for name in names if not name.startswith("entries/")]
    root = folder / "deleted"
    for n in range(count):
        restored(root, template)
        what = rng.choice([*top, rng.choice(names)])
        while_open, instead = rng.random() < 0.5, rng.random() < 0.15
        tally.add("deleted", while_open=int(while_open), while_closed=int(not while_open))
        tally.child("deleted", (n, what, while_open, instead), _deleted, root, what, while_open, instead)


def _deleted(root: Path, what: str, while_open: bool, instead: bool) -> None:
    store = opened(root) if while_open else None
    target = root / what
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
    if instead:
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(b"something else")
    there = {i for i in ALL if (root / "entries" / key_for(i).hex()[:2] / f"{key_for(i).hex()}.kv").exists()}
    if instead and what.endswith(".kv"):
        there -= {i for i in ALL if key_for(i).hex() in what}
    if store is not None:
        for i in ALL:
            with contextlib.suppress(StoreError):
                read(store, i)
        for act in (lambda: put(store, 100), lambda: store.delete([key_for(100)]), lambda: store.lookup([key_for(0)])):
            with contextlib.suppress(StoreError):
                act()
        with contextlib.suppress(StoreError):
            store.check(fix=True)
        with contextlib.suppress(StoreError):
            store.close()
    try:
        opened(root).close()
    except StoreError:
        require(instead or what == "ragkv-store.json", "the store cannot be opened")
        target.unlink(missing_ok=True)
        if not (root / "ragkv-store.json").exists():
            shutil.copy(root.with_name("template") / "ragkv-store.json", root)
    judge(root, there, seen=[*ALL, 100])


# Clocks and races


def clocks(tally: Tally, folder: Path, rng: random.Random, count: int) -> None:
    """The wall clock jumps between any two steps, by up to decades and before 1970."""

    def work(root: Path, seed: int) -> None:
        jumps = random.Random(seed)
        real, shift = time.time, [0.0]
        time.time = lambda: real() + shift[0]
        capacity = 10 * FILE
        for start_at in (0, 100):
            with opened(root, capacity, policy="lru") as store:
                for i in range(start_at, start_at + 30):
                    shift[0] = jumps.uniform(-3e9, 3e9)
                    put(store, i)
                    read(store, i)
                    require(disk_usage(root) <= capacity, "the cap was exceeded")
                require(read(store, start_at + 29), "the newest entry is gone")
                require(read(store, start_at) is None, "an old entry stayed before newer ones")
        time.time = real
        judge(root, (), seen=range(200), capacity=capacity)

    for n in range(count):
        tally.add("clock", jumps=60)
        tally.child("clock", n, work, folder / f"clock{n}", rng.randrange(10**9))
        shutil.rmtree(folder / f"clock{n}", ignore_errors=True)


def races(tally: Tally, folder: Path, rng: random.Random, count: int) -> None:
    """Two processes put, or put and delete, the same key at once."""
    root = filled(folder / "races")

    def act(i: int, gate: int, deletes: bool) -> bool:
        with opened(root) as store:
            os.read(gate, 1)
            return bool(store.delete([key_for(i)])) if deletes else put(store, i)

    for n in range(count):
        gate, opener = os.pipe()
        deletes = rng.random() < 0.3
        pair = [start(act, 100 + n, gate, False), start(act, 100 + n, gate, deletes)]
        time.sleep(0.05)
        os.write(opener, b"12")
        results = [finish(child)[1].get("result") for child in pair]
        os.close(gate)
        os.close(opener)
        tally.add("race on one key", races=1)
        if not deletes and sorted(map(str, results)) != ["False", "True"]:
            tally.violations.append(f"race {n}: {results}")
        committed = ALL if deletes else [*ALL, 100 + n]
        tally.child("race on one key", n, judge, root, committed, seen=range(1000))


def environment(folder: Path) -> dict[str, Any]:
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    place = max((m for m in mounts if str(folder).startswith(m[1])), key=lambda m: len(m[1]))
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "file_system": place[2],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a few seconds instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    parser.add_argument("--only", help="one kind of fault: the name of its function")
    options = parser.parse_args()
    armed = preload()
    with (
        tempfile.TemporaryDirectory(prefix="store-faults-") as folder,
        tempfile.TemporaryDirectory(prefix="store-faults-", dir=_memory()) as memory,
    ):
        report = run(Path(folder), Path(memory), armed, options.small, options.seed, options.only)
    report["command"] = "python -m tests.stress.store_faults " + " ".join(sys.argv[1:])
    text = json.dumps(report, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return int(bool(report["violations"]))


def _memory() -> str | None:
    """Where syncing costs nothing: damage is the same there."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def run(folder: Path, memory: Path, armed: bool, small: bool, seed: int, only: str | None) -> dict[str, Any]:
    tally, began = Tally(), time.monotonic()
    sizes = {"kills": (20, 550), "damage": (100, 2400), "failing_calls": (12, 150), "deletions": (15, 150)}
    sizes |= {"no_descriptors": (3, 8), "power": (2, 40), "clocks": (1, 10), "races": (3, 60)}

    def size(name: str) -> int:
        return sizes[name][0 if small else 1]

    def rng(name: str) -> random.Random:
        return random.Random(f"{seed} {name}")

    scenarios: dict[str, Any] = {
        "kills": lambda: kills(tally, folder, rng("kills"), armed, size("kills")),
        "failing_calls": lambda: failing_calls(tally, folder, rng("failing"), armed, size("failing_calls")),
        "no_descriptors": lambda: no_descriptors(tally, folder, size("no_descriptors")),
        "mounts": lambda: mounts(tally, folder),
        "power": lambda: power(tally, folder, rng("power"), size("power")),
        "damage": lambda: damage(tally, memory, rng("damage"), size("damage")),
        "deletions": lambda: deletions(tally, memory, rng("deletions"), size("deletions")),
        "clocks": lambda: clocks(tally, folder, rng("clocks"), size("clocks")),
        "races": lambda: races(tally, folder, rng("races"), size("races")),
    }
    seconds = {}
    for name, scenario in scenarios.items():
        if only in (None, name):
            start_at = time.monotonic()
            scenario()
            seconds[name] = round(time.monotonic() - start_at, 1)
            print(f"{name}: {seconds[name]} s, {len(tally.violations)} violations", file=sys.stderr, flush=True)
            shutil.rmtree(folder / "template", ignore_errors=True)
            shutil.rmtree(memory / "template", ignore_errors=True)
    return {
        "environment": {**environment(folder), "file_system_of_damage": environment(memory)["file_system"]},
        "seed": seed,
        "seconds": {**seconds, "all": round(time.monotonic() - began, 1)},
        "counts": tally.counts,
        "violations": tally.violations,
        "not_injected": [] if armed else ["failing and interrupted file operations: no C compiler"],
    }


if __name__ == "__main__":
    sys.exit(main())

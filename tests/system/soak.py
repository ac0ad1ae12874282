"""Writers and readers killed at random, and the account of every item afterwards.

    make soak ARGS="[--seconds 300] [DIRECTORY]"

Each process tells what it did in a file of its own, one line a step, written by one `write` before the next step:
what a process had told outlives its SIGKILL. A writer tells `put N` when the put of its `N`th array has returned. A
reader tells `got WRITER N` or `received WRITER N ATTEMPT` before it acknowledges, and `acked WRITER N` after; of some
it tells `rejects WRITER N`, and they are dead-lettered.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import numpy as np
from support.account import check_spool
from support.peer import FORKSERVER
from support.waits import until

from spoolipc import Empty, Full, SpoolReader, SpoolStat, SpoolWriter, failed_list, gc, stat

Role = Literal["write", "get", "receive"]
SIZES = (40, 3_000, 20_000, 150_000)
MAXSIZE = 24
LEFT = 3
"""Items left in the end, one of them in flight."""
MOST_AHEAD = 0.4
"""Seconds between two kills, at most."""


def array_of(writer: int, count: int) -> np.ndarray[Any, Any]:
    """The array that a writer puts as its `count`th; its size, and every element, follow from these two."""
    array = np.full(SIZES[(writer + count) % len(SIZES)], writer * 1_000_003 + count, np.int64)
    array[:2] = writer, count
    return array


class Log:
    """What a process did, one line a step."""

    def __init__(self, file: str) -> None:
        self._fd = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def tell(self, *words: object) -> None:
        os.write(self._fd, (" ".join(map(str, words)) + "\n").encode())


def write(spool: str, file: str, writer: int, stop: str) -> None:
    """Put until `stop` exists. Each life of a writer has a number of its own."""
    log = Log(file)
    with SpoolWriter(spool) as sink:
        count = 0
        while not os.path.exists(stop):
            array = array_of(writer, count)
            log.tell("began", count)
            try:
                if count % 5 == 4:
                    with sink.loan(array.shape, array.dtype, timeout=0.2) as lent:
                        lent[:] = array
                else:
                    sink.put(array, timeout=0.2)
            except Full:
                continue
            log.tell("put", count)
            count += 1


def seen(array: Any) -> str:
    """Which array this is; "broken" when it is not whole."""
    writer, count = int(array[0]), int(array[1])
    return f"{writer} {count}" if np.array_equal(array, array_of(writer, count)) else "broken"


def unwanted(writer: int, count: int) -> bool:
    """Whether a receiver rejects this array."""
    return (writer + count) % 9 == 4


def read(spool: str, file: str, role: Role, stop: str) -> None:
    """Get, or receive and acknowledge, until `stop` exists and nothing is left."""
    log = Log(file)
    with SpoolReader(spool) as source:
        while True:
            ending = os.path.exists(stop)
            try:
                if role == "get":
                    log.tell("asks")
                    log.tell("got", seen(source.get(timeout=0.2)))
                else:
                    item = source.receive(timeout=0.2)
                    log.tell("received", seen(item.array), item.attempt)
                    if unwanted(int(item.array[0]), int(item.array[1])):
                        log.tell("rejects", seen(item.array))
                        item.reject("not wanted")
                    else:
                        item.ack()
                        log.tell("acked", seen(item.array))
            except Empty:
                log.tell("empty")
                if ending:
                    return


@dataclass
class Life:
    """One process, from its start to its end. writer: its number, for those that write."""

    role: Role
    process: BaseProcess
    file: Path
    writer: int = -1
    killed: bool = False

    def lines(self) -> list[list[str]]:
        """What it told, step by step."""
        return [line.split() for line in self.file.read_text().splitlines()] if self.file.exists() else []


@dataclass
class Account:
    """What came of a soak.

    put: puts that returned. delivered: different items seen by a reader. redelivered: deliveries after the first.
    quarantined: dead letters. waiting, in_flight: items left on purpose at the end.
    taken_along: items that went with a killed reader of `get`. unreported: delivered, though the writer died before
    it could tell. errors: what must not be.
    """

    kills: int = 0
    put: int = 0
    delivered: int = 0
    redelivered: int = 0
    quarantined: int = 0
    waiting: int = 0
    in_flight: int = 0
    taken_along: int = 0
    unreported: int = 0
    errors: list[str] = field(default_factory=list)


class Soak:
    """A spool with writers and readers that are killed at random and replaced."""

    def __init__(self, place: Path, roles: list[Role], seed: int) -> None:
        self.place = place
        self.spool = place / "spool"
        self.stop = place / "stop"
        self.rng = random.Random(seed)
        self.lives: list[Life] = []
        self.end: SpoolStat
        SpoolWriter(self.spool, maxsize=MAXSIZE, max_attempts=0).close()
        self.now = [self._start(role) for role in roles]

    def _start(self, role: Role) -> Life:
        number = len(self.lives)
        file = self.place / f"log-{number}"
        spool, stop = str(self.spool), str(self.stop)
        if role == "write":
            process = FORKSERVER.Process(target=write, args=(spool, str(file), number, stop), daemon=True)
        else:
            process = FORKSERVER.Process(target=read, args=(spool, str(file), role, stop), daemon=True)
        process.start()
        life = Life(role, process, file, number if role == "write" else -1)
        self.lives.append(life)
        return life

    def run(self, seconds: float) -> Account:
        """Kill and replace for so many seconds, then let all end, and draw up the account."""
        account = Account()
        until(lambda: all(life.lines() for life in self.now))  # each has begun its work
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            position = self.rng.randrange(len(self.now))
            life = self.now[position]
            life.process.join(min(left, self.rng.uniform(0, MOST_AHEAD)))
            if life.process.exitcode is not None:
                account.errors.append(
                    f"{life.role} {life.file.name} ended by itself: {life.process.exitcode}"
                )
            elif life.lines():  # it has begun its work
                life.process.kill()
                life.process.join()
                life.killed = True
                account.kills += 1
            else:
                continue
            self.now[position] = self._start(life.role)
        self._finish(account)
        self._count(account)
        return account

    def _finish(self, account: Account) -> None:
        """Writers end first, then readers take what is left, and a last one what was in flight to those."""
        self.stop.touch()
        for life in self.now:
            life.process.join(60)
            if life.process.exitcode != 0:
                account.errors.append(f"{life.role} {life.file.name} ended with {life.process.exitcode}")
                life.process.kill()
        last = self._start("receive")
        last.process.join(60)
        if last.process.exitcode != 0:
            account.errors.append(f"the last reader ended with {last.process.exitcode}")
        gc(self.spool)
        try:
            check_spool(self.spool)
        except AssertionError:
            account.errors.append(f"table and directories: {traceback.format_exc(limit=-1)}")
        for part in ("tmp", "alive", "items"):
            left = os.listdir(self.spool / part)
            if left:
                account.errors.append(f"left in {part}/: {sorted(left)[:5]}")
        with SpoolWriter(self.spool) as sink, SpoolReader(self.spool) as source:
            for count in range(LEFT):
                sink.put(array_of(len(self.lives), count))
            with source.receive():
                self.end = stat(self.spool)

    def _count(self, account: Account) -> None:
        put: set[str] = set()
        began: set[str] = set()
        received: Counter[str] = Counter()
        acked: Counter[str] = Counter()
        got: Counter[str] = Counter()
        attempts: dict[str, list[int]] = {}
        settled: dict[str, int] = {}  # by which attempt an item was acknowledged
        late: set[str] = set()
        unsure = 0  # killed readers of `get` whose last call may have taken an item along
        for life in self.lives:
            lines = life.lines()
            order: dict[str, int] = {}
            for step, *rest in lines:
                item = " ".join(rest[:2])
                if "broken" in rest:
                    account.errors.append(f"{life.file.name} saw a broken item")
                elif step in ("put", "began"):
                    (put if step == "put" else began).add(f"{life.writer} {rest[0]}")
                elif step == "got":
                    got[item] += 1
                elif step == "acked":
                    acked[item] += 1
                    settled[item] = attempts[item][-1]
                elif step == "received":
                    received[item] += 1
                    attempts.setdefault(item, []).append(int(rest[2]))
                # First deliveries that one reader sees of one writer are in the order of the puts. `get` does not
                # tell which delivery it is: what comes late was in flight to a killed receiver, and is counted.
                if "broken" not in rest and (step == "got" or (step == "received" and rest[2] == "1")):
                    if int(rest[1]) > order.get(rest[0], -1):
                        order[rest[0]] = int(rest[1])
                    elif step == "got":
                        late.add(item)
                    else:
                        account.errors.append(f"{life.file.name} saw {item} after {order[rest[0]]}")
            if life.role == "get" and life.killed and lines and lines[-1] == ["asks"]:
                unsure += 1
        delivered = set(received) | set(got)
        lost = put - delivered
        self._balance(account, put | delivered, delivered, len(lost), unsure)
        account.put = len(put)
        account.delivered = len(delivered)
        late |= set(got) & set(received)
        account.redelivered = sum(received.values()) - len(received) + len(late)
        account.taken_along = len(lost)
        account.unreported = len(delivered - put)
        if len(lost) > unsure:
            account.errors.append(f"lost {sorted(lost)[:5]}; only {unsure} may have gone with a reader")
        account.errors += [f"delivered, but never begun: {item}" for item in delivered - began]
        for item, times in (got + acked).items():
            if times > 1:
                account.errors.append(f"{item} was acknowledged {times} times")
        for item, tries in attempts.items():
            if len(set(tries)) < len(tries) or max(tries) > settled.get(item, max(tries)):
                account.errors.append(f"{item}: attempts {tries}, acknowledged at {settled.get(item)}")
        for item in set(got) & set(received):
            # Received by one that was killed, then got: that is a redelivery, and fine unless it was acknowledged.
            if item in acked:
                account.errors.append(f"{item} was acknowledged and got")
        killed = sum(life.killed and life.role == "receive" for life in self.lives)
        if account.redelivered > killed:
            account.errors.append(f"{account.redelivered} redeliveries by {killed} kills of one item each")

    def _balance(
        self, account: Account, known: set[str], delivered: set[str], lost: int, unsure: int
    ) -> None:
        """Hold what the processes told against what the spool itself counts, and the dead letters against both.

        unsure: items that may have gone with a killed reader before their writer could tell of them.
        """
        failed = [
            np.load(self.spool / "failed" / f"{letter.seq:020d}.npy") for letter in failed_list(self.spool)
        ]
        quarantined = Counter(map(seen, failed))
        told = {" ".join(rest) for life in self.lives for step, *rest in life.lines() if step == "rejects"}
        if not set(quarantined) <= told or max(quarantined.values(), default=1) > 1:
            account.errors.append(
                f"dead letters that nobody rejected, or twice: {quarantined - Counter(told)}"
            )
        account.quarantined = len(quarantined)
        account.waiting, account.in_flight = self.end.depth, self.end.in_flight
        if (account.waiting, account.in_flight) != (LEFT - 1, 1):
            account.errors.append(f"{account.waiting} wait and {account.in_flight} are in flight, of {LEFT}")
        settled = len(delivered - set(quarantined))
        for what, sum_, counted in (
            ("put", len(known) + LEFT, self.end.puts),
            ("put", settled + account.quarantined + LEFT + lost, self.end.puts),
            ("delivered", settled + lost, self.end.gets),
            ("failed", account.quarantined, self.end.failed),
        ):
            assert counted is not None
            if not sum_ <= counted <= sum_ + (unsure - lost if what != "failed" else 0):
                account.errors.append(f"{sum_} items {what}, but the spool counts {counted}")


def soak(place: Path, seconds: float, roles: list[Role], seed: int) -> Account:
    """Run a soak in an empty directory."""
    return Soak(place, roles, seed).run(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("SPOOLIPC_SOAK") or 300))
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument(
        "directory", nargs="?", help="where to make the spool; a temporary directory otherwise"
    )
    asked = parser.parse_args()
    print(f"soak: {asked.seconds:g} s, --seed {asked.seed}", flush=True)
    with tempfile.TemporaryDirectory(dir=asked.directory) as place:
        account = soak(
            Path(place), asked.seconds, ["write", "write", "get", "receive", "receive"], asked.seed
        )
    print(account)
    raise SystemExit(bool(account.errors))


if __name__ == "__main__":
    main()

"""Break each promise of docs/reliability.md on purpose, and see a test fail: `make mutants`, ARGS="lease late" for 2.

Below, under each row of the fault matrix, stand changes of one line: a name | a module | the tests that must fail, as
modules and an expression for `-k` | old text, which is in the module once (¶ ends a line) ==> new text. Each is made in
a copy of the tree, never in the tree itself. One that no test notices survives: a test is missing, or the guard is not
needed.

ARGS="pool" takes out each `if` of the module `pool` in turn, so that its block is never entered, "pool:57" the one in
that line, "pool:none" none, which must survive, as those of `EXPLAINED` do. `GUARDS` says which modules may be named;
all of them take hours.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parents[1]
COPIED: Final = ("spoolipc", "tests", "docs", "pyproject.toml", "README.md", "CONTRIBUTING.md")
PYTEST: Final = "-m pytest -x -q --tb=no --no-header -p no:cacheprovider --timeout=25 --basetemp=made".split()
QUICK: Final = ["-m", "not exhaustive"]
PATIENCE: Final = 400.0  # seconds for the tests of one mutation: one that makes them hang is caught as well
PRIVATE: Final = ("unshare", "-m") if os.geteuid() == 0 and shutil.which("unshare") else ()  # of mounts
MEMORY: Final = 3 << 29  # bytes for each of their processes
MUTATIONS: Final = r"""
# any process killed before or after any system call
unmarked | journal | test_transitions | words[W.MARK] = kind ==> pass
arrived | journal | test_kills system and put_small | return fs.exists(directories.items, name) ==> return True
left | journal | test_transitions | not fs.exists(directories.items, name) ==> False
donated | journal | test_kills system and preallocate | fs.exists(directories.free, name) ==> True
unlinked | journal | test_transitions | directories.remove("free", name) ==> pass
followed | journal | test_kills system and shutdown | words[W.SHUTDOWN] = read_shutdown(directories.root) ==> pass
staged | housekeeping | test_kills system and put_large | temporary_owner(entry.name) in crashed: ==> False:
sessions | housekeeping | test_stops_nobody session and alive | () if left else crashed - _stuck(session): ==> ():
repair-cut | check | test_fsck killed_builds | session.journal.words[W.CAPACITY] = W.ALL_BITS ==> pass
left-new | fs | test_kills system and open_new | unlink_missing_ok(directory, name) ==> pass
# killed between two stores to the table, holding the lock
finished | journal | test_gc half_done | subject, finish=True): ==> subject, finish=True) and False:
journal-astray | journal | test_index_damage astray | max(stores[::2], default=0) >= ==> 0 >
stores | journal | test_transitions | # A crash from here on ==> stores = []  #
# another session acts between any two system calls
put-lost | producer | test_interleavings put-lose | not recycler.is_ours(file): ==> False:
ahead | consumer | test_interleavings get-get | and ahead[-1][0][5:7] == (seq, words[record + W.ATTEMPT] + 1): ==> :
unlocked | session | test_processes every_item and spawn | not fs.lock(lock.fd, blocking=False): ==> False:
lost-file | producer | test_interleavings put-lose | self._staging.write_new(lost) ==> pass
# Ctrl-C wherever a signal can come
claimed | consumer | test_interrupts in_flight | self.session.step(self._requeue, taken) ==> pass
verified | consumer | test_interrupts in_flight | self.session.step(self._requeue, claimed) ==> pass
released | session | test_interrupts put_small-after | lock.release()¶                    raise ==> raise
left-reserved | producer | test_interrupts failed_put_reserved | ours = owned(journal.words, (token,)) ==> ours = []
unstaged | producer | test_limits another_took | self._staging.unstage(left) ==> pass
# writers and readers killed at random for a long time
soak | housekeeping | test_soak one | = _crashed(session)¶    items ==> = set[int]()¶    items
# `gc` killed; several at once; during traffic
live-staged | gc | test_gc live_sessions | temporary_owner(name) in crashed - unsettled: ==> temporary_owner(name):
live-pinned | gc | test_gc orphans | != W.NOTHING ==> > 5
live-history | quarantine | test_gc orphans | if fs.exists(directories.items, item_name(number)): ==> if False:
gc-twice | gc | test_gc several | return  # another gc was first ==> raise
gc-planted | gc | test_gc dry_run | not stat.S_ISREG(status.st_mode): ==> False:
alive | liveness | test_gc live_sessions | not fs.lock(fd, blocking=False): ==> False:
# reader crashes with items in flight
crashed | housekeeping | test_leases sleeping_reader | = _crashed(session)¶    items ==> = set[int]()¶    items
gc-order | table | test_gc redelivered_in_order | in reversed(active(words)) ==> in active(words)
first | transitions | test_order before_all | words[W.REDELIVERY_HEAD] or words[W.READY_HEAD] ==> words[W.READY_HEAD]
# the last writer leaves, is killed at any call, or ends without closing
writer-left | session | test_last_writer woken_by_the_close | items = MEMBERS  # it ==> pass  # it
writer-there | liveness | test_last_writer stopped_writer | return not fs.lock(fd, blocking=False) ==> return False
writer-forked | session | test_last_writer from_the_fork | self.is_open and self._held else ==> False else
writer-crashed | receiving | test_last_writer killed_writer | self.session.step(self._see_end) ==> pass
end-awaited | housekeeping | test_last_writer is_settled | = min(below, words[W.ENDING] or below) ==> = 0
# reader hangs
lease | housekeeping | test_directory_engine lease_ended | 0 < ends <= now: ==> False:
lease-order | housekeeping | test_order ended_comes_before | reversed(active(words)): ==> active(words):
late | consumer | test_directory_engine lease_ended | 0 < words[record + W.DUE] <= fs.monotonic_ns(): ==> False:
attempt-asked | consumer | test_directory_engine lease_ended | delivery.attempt, token ==> words[record + 5], token
sooner | transitions | test_transitions before_any_store | not words[W.NEXT_DUE] or due < ==> not
extended | transitions | test_directory_engine lease_ends_which | [record + W.DUE, due] ==> [W.HOLDER, due]
hung-view | receiving | test_views outlive | and attempt == before ==>
# poison item: its reader crashes every time
poison | housekeeping | test_dead_letters poison_item | most and attempt >= most: ==> False:
attempts | transitions | test_dead_letters every_way | ATTEMPT, words[record + W.ATTEMPT] + 1) ==> ATTEMPT, 1)
attempts-lost | rebuild | test_leases remembered | tries.get(number, 0) ==> 0
history | receiving | test_receive history | forget_history(self.session.directories, seq) ==> pass
retried-asleep | dead_letters | test_wakeups retried | seq, 1, ==> seq, 0,
no-letter | dead_letters | test_directory_engine retried | missing := set(wanted).difference(there): ==> missing := ():
# `failed/` takes no item
left-aside | quarantine | test_dead_letters does_not_take | move(_TOP, aside) ==> raise
# item file that the device or the file system cannot read
unread | itemfile | test_stops_nobody cannot_be_read | if error.errno in _LOST else error ==> if False else error
# `free/` takes no file
not-kept | receiving | test_stops_nobody free_takes | if not keep or not fs.is_of_file(error) or ==> if True or
# a file that can be neither moved nor removed
left-there | quarantine | test_stops_nobody at_all | move("", "") ==> raise
left-in-free | journal | test_stops_nobody crashed_session | elif kind == UNLINK: ==> elif kind == -1:
left-by-round | housekeeping | test_stops_nobody crashed_session | session.token} - _stuck(session) ==> session.token}
left-by-gc | gc | test_stops_nobody goes_on | self.not_removed.append(f"{os ==> raise ValueError(f"{os
# a log that is slow or blocked
logged | layout | test_taken_away is_logged | if not put_off(_log.log, level, message, *values): ==> if True:
# lock holder stopped (SIGSTOP)
holder | journal | test_stopped_holder told_who | self.words[W.HOLDER] = token ==> pass
# index deleted, truncated, zeros, random, of another boot, of another spool
deleted | journal | test_index_damage mapped_by_several | status[3] != 1 or status[6] < self.size: ==> False:
boot | journal | test_index_damage another_boot | raise IndexDamaged("the index is of ==> ("the index is of
other-spool | journal | test_index_damage another_spools | raise IndexDamaged("the next item ==> ("the next item
next-seq | transitions | test_index_damage no_number | raise IndexDamaged("the next sequence ==> ("the next sequence
whole | journal | test_index_damage that_waits | fs.seek(self._fd, 0, os.SEEK_END) >= self.size and ==>
endless | table | test_transitions without_end | len(found) >= limit: ==> False:
number-failed | rebuild | test_dead_letters outlive | *waiting[-1:], *failed, ==> *waiting[-1:],
number-freed | rebuild | test_index_damage was_delivered | *failed, *freed, ==> *failed,
number-donated | rebuild | test_preallocate loss_of | number < W.FIRST_DONATED: ==> True:
kept | rebuild | test_fsck live_session | row[W.OWNER] in alive and row[W.SEQ] in once} ==> False}
kept-claims | receiving | test_fsck live_session | self.kept[seq] = kept.get(seq, before) ==> pass
kept-limits | rebuild | test_fsck contradicts_the | set_limits(words, _limits(directories, old)) ==> pass
kept-shutdown | rebuild | test_fsck contradicts_the | words[W.SHUTDOWN] = read_shutdown(directories.root) ==> pass
only-index | housekeeping | test_index_damage only_the | read_shutdown(session.directories.root) ==> W.DISCARDED
# index or `spool.json` of an unknown version
index-version | journal | test_index_damage unknown_version | if words[W.VERSION] != W.VERSION_VALUE: ==> if False:
json-version | layout | test_index_damage spool_json | version != FORMAT: ==> False:
# item file truncated, empty, random, hostile, or with one bit flipped
footer-crc | format/footer | test_format_footer one_changed | crc != actual: ==> False:
footer-place | format/footer | test_format_footer forged | data_end != offset: ==> False:
footer-json | format/footer | test_format_footer forged | length > MAX_JSON: ==> False:
footer-later | format/footer | test_format_footer later | is_footer and version > VERSION: ==> False:
header-size | format/item | test_format_header hostile | length > MAX_HEADER: ==> False:
header-text | format/header | test_format_header hostile | len(text) > MAX_HEADER_TEXT: ==> False:
shape | format/header | test_format_header hostile | not all(0 <= n <= _MAX_SIZE for n in shape): ==> False:
subarray | format/header | test_format_header hostile | type(descr[1]) is not tuple: ==> False:
unaligned | format/item | test_format_header hostile | offset % ALIGN: ==> False:
beyond | format/item | test_format_item damaged | if offset + block.nbytes > limit: ==> if False:
pickle-read | format/header | test_format_header hostile | descr.lstrip("<>|=").startswith("O"): ==> False:
pickle-put | format/header | test_format_header restore | dtype.hasobject or dtype.num >= ==> False and dtype.num >=
plain-npy | format/header | test_format_item several | " " * padding ==> " " * 0
padding | format/item | test_arrays padding | _opaque(copy)[...] = _opaque(array) ==> copy[...] = array
checksum | format/item | test_verify one_flipped | actual != footer.checksum: ==> False:
verify | receiving | test_verify a_received | verify(buffer, tail) ==> pass
vanished | receiving | test_log each_fault | raise BadItem("its file is missing") from None ==> raise
# spool in the lower layer of an overlay
overlay | receiving | test_places lower_layer | tail[0] != put_time ==> False
# file system full: tmpfs and ext4 filled for real
full-shutdown | layout | test_full_disk shut_down | if state != DRAINING or not ==> if True or not
shortage | staging | test_order_of_calls loan | fs.is_shortage(error): ==> False:
hole | staging | test_order_of_calls loan | fs.allocate(fd, 0, ==> fs.truncate(fd,
hole-index | journal | test_order_of_calls index | fs.allocate(fd, 0, ==> fs.truncate(fd,
hole-grown | journal | test_full_disk grow | fs.allocate(self._fd, 0, ==> fs.truncate(self._fd,
full-take | receiving | test_errors no_block | not keep or not fs.is_of_file(error) or ==> True or
gives-way | staging | test_limits give_way | not recycler.let_give_way(lacking): ==> True:
half-saved | fs | test_order_of_calls hole | written < end: ==> False:
full-history | quarantine | test_dead_letters be_written | OSError as error:¶        d ==> EOFError as error:¶        d
# file system, quota or number of files used up, pooled files there
evict-refused | staging | test_giving_way refused | if not recycler.let_give_way(size): ==> if True:
shrunk | housekeeping | test_giving_way shrinks | pool.share(words, fs.room(directories.root)) ==> pass
evict-growing | producer | test_giving_way grow | is_shortage and recycler.make_room(1)[0]: ==> False:
evict-opening | session | test_giving_way opens | with_room(place, journal, announce) ==> announce()
place-left | fs | test_giving_way lacks | min(_FILES_LEFT, status.f_files >> 4) ==> 0
share | pool | test_giving_way idle_spool | pooled + size > share_bytes or ==>
# a file system that names no size
no-size | fs | test_giving_way without_a_size | if status.f_blocks else _MANY, files ==> , files
no-total | producer | test_giving_way without_a_size | or 0 < total < need: ==> or total < need:
# the sessions of one process, one of which puts
siblings | recycling | test_giving_way let_go_of | for ref in _recyclers.valuerefs(): ==> for ref in []:
siblings-late | producer | test_giving_way while_a_put | (before or has_room(words, need)) and ==> before and
hoarding | producer | test_giving_way idle_writer | MOST_RESERVED if need < LARGE else ENOUGH_LARGE ==> MOST_RESERVED
# other programs have taken every file
spare | session | test_giving_way took_every | self.directories.retire( ==> self.directories.remove("alive",
# a pooled file evicted while others map it, or look at its item
emptied | pool | test_giving_way crashed | fs.truncate(fd, 0) ==> pass
looked-at | pool | test_giving_way stopped | and _nobody_looks(directories, journal): ==> :
locked | pool | test_giving_way stopped | and fs.lock(fd, blocking=False) and ==> and
crashed-looker | pool | test_giving_way crashed | if not has_crashed( ==> if True or not has_crashed(
last-empties | session | test_giving_way leave_at_once | while left or self.evict_if_alone()[0]: ==> while left:
# an item larger than the file system or `max_bytes`
larger-limit | producer | test_limits than_the_limit | (limit and need > limit) or ==>
larger-disk | producer | test_limits than_the_file_system | or 0 < total < need ==>
max-bytes | pool | test_limits metadata_counts | not (max_bytes and words[W.ITEM_BYTES] + need > max_bytes) ==> True
delayed-room | pool | test_limits redelivered_and | + words[W.DELAYED_COUNT] >= maxsize ==> >= maxsize
mismatch | layout | test_limits first_who | in differing(found, asked).items(): ==> in ():
# a process out of descriptors
left-open | session | test_process_limits costs_at_most | self.journal.close()¶        _aband ==> pass¶        _aband
in-a-circle | recycling | test_process_limits costs_at_most | weakref.WeakMethod(self.forget) ==> lambda: self.forget
alone-or-not | session | test_process_limits left_goes | except OSError:  # no desc ==> except EOFError:  # no desc
# a process short of address space
let-go | fs | test_process_limits cannot_be_made | let_go()¶        return ==> pass¶        return
bounded | recycling | test_process_limits backlog | if self.files < 0 or self._bytes < 0: ==> if False:
unused | recycling | test_recycling not_used_for | self._trim(self.now - _UNUSED) ==> pass
used | receiving | test_recycling is_used_stays | kept.used = keeper.now ==> pass
# an item is settled while a put waits for `max_bytes`
settled-bytes | pool | test_limits blocked_put | if not maxsize:  # who waits ==> if not maxsize and False:  # who waits
# a limit that no spool can have
impossible | message | test_limits possible_number | if not least <= number < 2**63: ==> if False:
# EIO, ENOSPC, EDQUOT, EMFILE
named | session | test_errors failing and put_small | raise explained from error ==> raise
failed-staged | staging | test_order_of_calls loan | fs.unlink_missing_ok(directories.tmp, name) ==> pass
told | producer | test_errors of_many and put_many | error.seqs = tuple(seqs) ==> error.seqs = ()
leaked | itemfile | test_errors failing and get_large | None:¶        fs.close(self.fd) ==> None:¶        pass
# a process short of address space
give-way | fs | test_process_limits cannot_be_made | for let_go in give_way: ==> for let_go in ():
# a process out of descriptors
tracked | fs | test_process_limits 64_descriptors | return pages ==> return mmap.mmap(fd, size, flags, prot)
# power lost at any moment
sync-file | staging | test_power_loss zeros | fs.sync(fd) ==> pass
sync-name | producer | test_power_loss least | fs.sync(self.session.directories.items) ==> pass
sync-loan | producer | test_power_loss zeros | fs.sync(file.fd) ==> pass
sync-spool | producer | test_power_loss least | fs.sync_way(self.session.directories.root, Path(self.path)) ==> pass
sync-made | layout | test_order_of_calls durable | fs.sync(root)  # no ==> pass  # no
sync-retried | dead_letters | test_failed synced | if done: ==> if False:
never-again | staging | test_recycling power | NEVER_AGAIN if durable else 0 ==> 0
never-rebuilt | rebuild | test_recycling power | = W.NEVER_AGAIN ==> = 0
# inotify's limits used up
said-once | doorbell | test_inotify_limits says_so | = self._has_warned = True ==> = True
unheard | doorbell | test_inotify_limits reported | while not fs.poll(self.fd, 0) and ==> while False and
polled | doorbell | test_wakeups polling | self.number < 0 or not armed: ==> False:
# a waiting session crashes, or its time is up, as it is woken
ring-crashed | liveness | test_wakeups in_the_place | if fs.lock(fd, blocking=False): ==> if False:
ring-stale | doorbell | test_wakeups in_the_place | and since > fresh: ==> :
ring-next | doorbell | test_wakeups is_interrupted | self.ring(kind, 1) ==> pass
ring | session | test_wakeups idle_reader | self.doorbell.ring("items", items) ==> pass
ring-delay | session | test_wakeups reader_sleeps | or 0 < words[W.NEXT_DUE] < until_ns ==>
ring-end | producer | test_processes shutdown_wakes | self.session.doorbell.ring_all() ==> pass
# wall clock jumps a day either way
clock | consumer | test_clock leases | return fs.monotonic_ns() ==> return time.time_ns()
clock-age | stat | test_stat oldest | max(0.0, ==> max(-1e9,
# fork amid traffic, from a thread
fork-loan | recycling | test_loans fork_during | shared=forked) ==> shared=False)
fork-pins | lock | test_fork stay_in_the_child | self.begun += 1 ==> pass
fork-begun | recycling | test_fork had_begun | self.forks = forks.ended ==> self.forks = forks.begun
fork-pooled | recycling | test_fork stay_in_the_child | and pin.forks == forks.begun and pin.table ==> and pin.table
fork-reclaim | recycling | test_fork stay_in_the_child | shared = forked or ==> shared =
fork-ack | consumer | test_fork dropped_it | pin.left or pin.forks != forks.begun ==> pin.left
fork-crash | housekeeping | test_fork views_got | transitions.drop(journal.words ==> transitions.release(journal.words
fork-lock | session | test_fork crash_of | in {*self._held} - kept: ==> in ():
fork-session | session | test_fork of_its_own | self.is_forked = True ==> pass
fork-opening | session | test_fork announces | no_fork: ==> contextlib.nullcontext():
fork-ears | doorbell | test_fork that_waits | fs.close(self.fd)¶        self._reset() ==> fs.close(self.fd)
fork-heard | doorbell | test_fork parent_hears | (after_in_child=ears.forked) ==> (after_in_child=list)
# Ctrl-C, or an exception of a signal handler, amid `get_many`
put-back | consumer | test_interrupts interrupted_at_any_call | if got.places: ==> if False:
put-back-amid | consumer | test_interrupts interrupted_at_any_call | if words[W.MARK]: ==> if False:
# a call of an event loop is cancelled at any await
cancelled | aio | test_asyncio any_step and get-copy | if not is_left and undo: ==> if False:
cancelled-thread | aio | test_asyncio any_step and get-copy | if not _take(turn) and undo: ==> if False:
cancelled-kept | consumer | test_asyncio writes_over_nothing | if shown is None and got.kept: ==> if False:
cancelled-small | aio | test_asyncio written_over_by_nobody | get_ident() != here or (copied and limit > 1) ==> False
cancelled-again | consumer | test_directory_engine taken_again | self.recycler.pins.forget(record, seq) ==> pass
cancelled-attempt | consumer | test_asyncio any_step and get-copy | record, link, self.verify) ==> record, link, 0)
cancelled-receive | aio | test_asyncio any_step and receive | if claimed: ==> if False:
cancelled-waiter | watch | test_asyncio takes_no_wake_up | self._leave() ==> pass
loop-closed | aio | test_asyncio closed_amid | if not is_left and not _take(turn) and undo: ==> if False:
closed-early | aio | test_asyncio close_waits | await asyncio.wait(busy) ==> break
# another process keeps the lock while an event loop works
patience | lock | test_asyncio held_lock | if get_ident() in hurried: ==> if False:
patience-mutex | session | test_asyncio held_lock | if thread in hurried: ==> if False:
# an error amid `get_many`
ended-early | consumer | test_errors of_many and get | (error):¶                self ==> (None):¶                self
not-copied | queue | test_interrupts cannot_all | len(given) if isinstance(error, MemoryError) else 0 ==> 0
# a signal handler, or a generator that the collector closes
amid-step | session | test_reentrance handler_amid_any and put-put | if thread in steps: ==> if False:
handler-looked | visitor | test_stops_nobody none_of_the_spools | and fs.is_of_file(error): ==> :
put-off | lock | test_reentrance handler_amid_any and put-close | later.append(partial(act, *args)) ==> pass
# the interpreter ends with sessions open
final-use | session | test_ends | if session.is_forked or is_finalizing(): ==> if session.is_forked:
# many threads share a writer or reader
mutex | session | test_threads | with lock.mutex: ==> with contextlib.nullcontext():
maxsize | producer | test_limits another_took | left <= 0: ==> False:
# views outlive `ack`, `close`, later puts, the spool
unpinned | receiving | test_views any_view | loan if pin is None else self.session.token ==> 0
closed-view | receiving | test_views outlive | transitions.drop(session ==> transitions.release(session
lender | recycling | test_loans keeps_its_file | elif loan: ==> elif False:
loan-left | staging | test_loans discards_it | staged.file is not None and staged.loan: ==> False:
loan-closed | producer | test_loans read_only | self.array.flags.writeable = False ==> pass
loan-reopened | producer | test_loans read_only_after | staged.pages.flags.writeable = False  # and ==> pass  # and
loan-undurable | producer | test_loans may_not_be | staged.pages.flags.writeable = False¶                self ==> self
loan-written | producer | test_directory_engine refused_where | not isinstance(error, StorageError): ==> False:
base | receiving | test_views any_view | , pages.base, single ==> , pages, single
acked-at-once | consumer | test_views another_thread_acknowledges | claim.is_acked = True ==> pass
never-recycled | pool | test_recycling became_zero | not limit or pooled + size ==> pooled + size
trimmed | pool | test_recycling backlog | max(0, pooled - most) ==> 0
# symlink, FIFO, device, directory or hard link planted anywhere
follow | fs | test_planted own and index-symlink | = os.O_NOFOLLOW | ==> =
follow-part | fs | test_planted own and items-symlink | os.O_DIRECTORY | os.O_NOFOLLOW ==> os.O_DIRECTORY
fifo | fs | test_planted own and json-fifo | os.O_NOFOLLOW | os.O_NONBLOCK ==> os.O_NOFOLLOW
own-linked | fs | test_planted history and hard | (status.st_nlink > 1 and not linked): ==> False:
own-regular | fs | test_planted own and index | if not stat.S_ISREG(status.st_mode) or ==> if
item-regular | itemfile | test_planted items_name | not stat.S_ISREG(status.st_mode): ==> False:
linked-large | staging | test_recycling tampered | status[3] != 1 or status[6] != size: ==> False:
linked-small | staging | test_recycling not_mapped | opened.status.st_nlink != 1 or opened.size != size: ==> False:
# spool of another user, or open to all
open-to-all | layout | test_planted open_to_others | stat.S_IMODE(status.st_mode) & 0o777 & ~mode: ==> False:
owner | layout | test_users TestOtherUsers | status.st_uid not in (fs.user(), 0) and not shared: ==> False:
owner-empty | layout | test_users TestOtherUsers | fs.fstat(root).st_uid != fs.user(): ==> False:
# spool of another user that says it is shared
asked | layout | test_users who_asks | (as_found or asked.mode == SHARED) ==> True
mode-taken | message | test_users no_mode_but | self.mode not in (None, 0o700, 0o770): ==> False:
# spool shared with a group that is nobody's primary one
group | layout | test_users primary | mode |= stat.S_ISGID ==> pass
together | layout | test_users together | permit(root, name, limits.mode or PRIVATE) ==> pass
closed-item | itemfile | test_users closes and items | error.errno == errno.EACCES: ==> False:
closed-session | liveness | test_users closes and alive | return error.errno in fs.NO_FILE ==> return True
# root looks after a user's spool
as-owner | fs | test_users TestRoot | with _acting(status.st_uid, status.st_gid): ==> if True:
# modes and group of a spool changed from outside
remedy | layout | test_users orchestrator | "o" if mode == SHARED else "go" ==> "o"
# containers with a boot id of their own or none
boot-alive | journal | test_places another_boot_id | or not is_alone(directories.alive, 0) ==>
boot-none | journal | test_places nobody_there | (any(boot) and boot == boot_words()) ==> boot == boot_words()
time-namespace | fs | test_places time_namespace | if offset else ==> if False else
# read-only file system
look-only | visitor | test_places looked_at | writable=False ==> writable=True
# backup by hard links
retired | journal | test_copies hard_links | fs.pwrite(fd, bytes(W.WORD), at) ==> pass
linked-index | journal | test_copies hard_links | status[3] != 1 or ==>
# strange names of spools
mount-names | fs | test_places mount_point | "surrogateescape" ==> "strict"
umask | fs | test_planted everything_made | stat.S_IMODE(status.st_mode) != mode and ==> False and
# spool shared with a group
regroup | layout | test_users TestGroups | fs.fchown(fd, -1, fs.fstat(directory).st_gid) ==> pass
# root looks after
as-itself | fs | test_users TestRoot | status is None or user() or ==> True or
# modes and group of a spool changed
remedied | layout | test_users orchestrator | chmod -R {whom}= ==> chmod {whom}=
# network file system
network | layout | test_planted network | kind in NETWORK: ==> False:
# spool deleted while in use
gone-asleep | housekeeping | test_taken_away who_sleeps | session.step(session.see_itself) ==> pass
# a run that ended badly is started again
in-use | reset | test_reset fresh | if role not in allowed: ==> if False:
in-use-items | reset | test_directory_engine producer_is_refused | == W.IN_FLIGHT and ==> == W.NOTHING and
crashed-claims | housekeeping | test_reset crashed_reader | words[record + W.OWNER] in crashed): ==> False):
put-meanwhile | housekeeping | test_reset as_fast | and words[record + W.SEQ] >= below): ==> and False):
not-reopened | producer | test_directory_engine fresh | options.reopen or options.fresh: ==> options.reopen:
# a spool is removed while others come to open it
removed-foreign | reset | test_reset foreign | if not is_ours(part, name): ==> if False:
removed-twice | reset | test_reset killed_at_any | if not _finish_removal(place): ==> if True:
removed-any | reset | test_reset no_spool | if set(fs.list_names(root)) <= ==> if set() <=
# a limit is changed while the spool is in use
limits-followed | journal | test_transitions | set_limits(words, agree(directories, Limits())) ==> pass
limits-said | transitions | test_directory_engine are_changed | 0, limit_stores(limits), ==> 0, limit_stores(Limits()),
# a directory of the spool removed
gone-part | session | test_taken_away part | place.check() ==> pass
gone-unlocked | layout | test_taken_away under_the_lock | with exclusively(self.root, str(self.path)): ==> if True:
put-again-left | staging | test_taken_away does_not_take | staged.name)  # of a try ==> "")  # of a try
# `spool.json` removed
gone-limits | rebuild | test_taken_away spool_json | set_limits(words, _limits(directories, old)) ==> pass
# a session's file in `alive/` removed
gone-file | session | test_taken_away makes_its_file | not fs.fstat(own).st_nlink: ==> False:
renewed | doorbell | test_taken_away thread_that_waits | ears.renew(self) ==> ears.remove(self)
# a cleaner of old files
cleaned | layout | test_taken_away cleaner | fs.lock_shared(root) ==> pass
# spool in the lower layer of an overlay
overlaid | receiving | test_places lower_layer | tail[0] != put_time and ==> False and
# a forwarder between directories killed, failed or interrupted
not-put | sources | test_forwarding killed | if fs.exists(directories.tmp, file)} ==> if False}
put-known | engine | test_forwarding killed | if each not in ids}) ==> if False})
struck | housekeeping | test_forwarding killed | if not sources.settle( ==> if False and not sources.settle(
struck-gc | gc | test_forwarding killed | not session.step(sources.settle, session, crashed): ==> False:
new-files | forwarding | test_forwarding was_an_item | recycles, self._staging.flags = False, ==> flags =
unacknowledged | engine | test_forward known_however | dict(self.without(done).put) | ==> {} |
# a forwarder's ends are away
one-forwards | sources | test_forward second_forwarder | raise SpoolInUse( ==> str(
full-first | forward | test_forward costs_no_attempts | while producer.full(): ==> while False:
arrived-held | forward | test_forward same_disk | del arrived ==> pass
not-there | forward | test_forward source_that_was_never | and self.is_new: ==> and False:
made-again | forward | test_forward removed_is_waited_for | create=one.is_new) ==> create=True)
never-one | forward | test_forward that_can_never_be_one | = end not in self._known ==> = end == "source"
unclaimed | forward | test_forward claimed_and_not_put | consumer.unclaim(waiting) ==> pass
no-attempt | forwarding | test_forward claimed_and_not_put | record, 0, counted=1) ==> record, 0)
# items go round between spools
round | forward | test_forward comes_round | if (message.id, message.seq) ==> if message.id not in dict(here) and 0
twice-at-once | forward | test_forward comes_round | if message.id in batch: ==> if False:
itself | forward | test_forward to_itself | if take.identity() == give.identity(): ==> if False:
mounts | session | test_places itself | fs.fstat(self.session.directories.root)[1:3] ==> self.path
never-fits | forward | test_forward never_fits | consumer.settle(waiting[:1], Reject(str(error))) ==> raise
# a process that uses a temporary spool is killed, or ends
kept-by-threads | session | test_queues it_goes_though | fs.unlock(self.directories.root) ==> pass
temporary-used | temporary | test_queues forked_child | or not fs.lock(fd, blocking=False): ==> :
temporary-new | temporary | test_queues made_anew | fs.lock_shared(fd) and ==> True or
temporary-start | mp | test_queues may_end_before | else reduction.DupFd(fd) ==> else None
# an item of a `Queue` that nobody packed
value-twice | format/values | test_format_values nobody_packed | self.left.remove(number) ==> pass
value-pickle | mp | test_queues nothing_is_unpickled | if not self._pickles: ==> if False:
value-aside | mp | test_queues costs_that_item | _set_aside(pair, taken, f"damaged: {error}") ==> raise
value-reader | receiving | test_queues leaves_a_value | tail[3] == () and ==> False and
# a million leftovers
batches | fs | test_gc thousand | islice(entries, size)] ==> entries]
asked-few | liveness | test_bounded_steps close and crashes | islice(others, _SESSIONS): ==> others:
progress | gc | test_gc thousand | self.progress(self._seen, None) ==> pass
# not in the matrix: shutdown
end-others | receiving | test_directory_engine end_waits | words[W.IN_FLIGHT_COUNT] <= self._own and ==>
end-wakes | housekeeping | test_last_writer is_settled and shutdown | = 0¶    return MEMBERS ==> = 0¶    return 0
discarded | producer | test_directory_engine immediate_shutdown | (now == W.DISCARDED and state == W.DRAINING) ==> False
# not in the matrix: join
join-awaited | housekeeping | test_join woken_by_what | if left:¶        await_end ==> if False:¶        await_end
join-once | housekeeping | test_join woken_once | records += active(words) ==> pass
join-purge | housekeeping | test_join woken_by_what | words[W.ENDING] = 0  # who ==> pass  # who
# not in the matrix: fsck
fsck-size | check | test_fsck longer | "missing", "size") ==> "missing")
fsck-in-flight | check | test_fsck becomes_a | and not _is_in_flight(session, number): ==> :
fsck-torn | quarantine | test_fsck without_a_reason | except (ValueError, ==> except (
fsck-planted | check | test_fsck made_anew | problem.kind in ("planted", "link") and name in _REPLACEABLE: ==> False:
fsck-orphans | check | test_fsck knows and orphan | any(problem.kind == "orphan" for problem in found): ==> False:
fsck-checksum | check | test_verify one_flipped | file.parse(whole=True) ==> file.parse()
fsck-lists | table | test_fsck contradicts and lost | unlisted, self.seen.count(0) ==> 0, 0
fsck-sums | table | test_fsck contradicts and flight | int((states == IN_FLIGHT).sum()) ==> words[IN_FLIGHT_COUNT]
# not in the matrix: how it is built
calls | format/item | test_call_budget | _parsed[header] = block ==> pass
one-door | quarantine | test_one_door | fs.write_whole(fd, ==> os.write(fd,
floors | dead_letters | test_floors | import fs, ==> import check, fs,
# not in the matrix: the engine in memory
memory-poison | memory/spool | test_memory_engine | most and item.attempt >= most and not last: ==> False:
memory-order | memory/spool | test_memory_engine | chain(self.requeued, self.fresh) if ==> self.fresh if
memory-lease | memory/spool | test_memory_engine | if item.due <= self.now]: ==> if False]:
memory-late | memory/__init__ | test_memory_engine | (item.owner, item.attempt) != (self, delivery.attempt): ==> False:
memory-bytes | memory/spool | test_memory_engine | if self.bytes + size > most: ==> if False:
"""

GUARDS: Final = {
    "transitions": "test_transitions test_dead_letters test_failed test_loans test_recycling test_leases test_order"
    " test_index_damage test_preallocate test_limits test_views test_fork",
    "pool": "test_transitions test_limits test_messages test_recycling test_loans test_order_of_calls test_full_disk"
    " test_giving_way test_wakeups",
    "recycling": "test_recycling test_limits test_threads test_taken_away test_syscalls test_call_budget"
    " test_process_limits test_loans test_views test_preallocate test_giving_way test_fork test_interrupts",
    "journal": "test_transitions test_index_damage test_copies test_taken_away test_recycling test_gc"
    " test_order_of_calls test_deleted test_full_disk test_stops_nobody test_planted"
    " test_both_sides",
    "rebuild": "test_index_damage test_fsck test_preallocate test_recycling test_dead_letters test_leases"
    " test_last_writer test_failed test_taken_away",
    "session": "test_threads test_process_limits test_fork test_recycling test_taken_away"
    " test_last_writer test_join test_messages test_log test_both_sides test_planted test_reentrance test_ends"
    " test_directory_engine test_asyncio",
    "lock": "test_lock test_reentrance test_giving_way test_stopped_holder test_fork test_ends test_asyncio",
    "liveness": "test_limits test_gc test_last_writer test_leases test_wakeups",
    "reset": "test_reset",
    "gc": "test_gc test_failed test_giving_way test_taken_away test_stops_nobody test_bounded_steps test_reset",
    "dead_letters": "test_failed test_dead_letters test_wakeups",
    "sources": "test_forward",
    "forwarding": "test_forward",
    "quarantine": "test_dead_letters test_failed test_stops_nobody test_leases test_fsck test_gc test_process_limits",
    "housekeeping": "test_join test_gc test_leases test_taken_away test_stops_nobody test_dead_letters"
    " test_last_writer test_reset test_giving_way test_bounded_steps test_deleted test_queues",
    "visitor": "test_stat test_fsck test_gc test_failed test_stopped_holder test_index_damage test_stops_nobody"
    " test_deleted test_reentrance",
    "nats/access": "test_nats_urls test_nats_access",
    "nats/link": "test_nats_engine test_nats_urls test_nats_dropped test_nats_large test_nats_outages",
    "nats/memory": "test_nats_memory",
    "nats/news": "test_nats_engine test_nats_outages",
    "nats/spool": "test_nats_engine test_nats_urls test_nats_large test_nats_access test_nats_outages",
    "nats/session": "test_nats_engine test_nats_urls test_nats_dropped test_nats_outages",
    "nats/producer": "test_nats_engine test_nats_large test_nats_forward test_nats_outages",
    "nats/consumer": "test_nats_engine test_nats_dropped test_nats_forward test_nats_outages",
    "nats/__init__": "test_nats_engine test_nats_urls test_nats_large test_nats_dropped test_nats_faces"
    " not memory_stays",
}
"""Modules of recovery, forks, the pool and servers, and the tests that hold each of their guards."""
EXPLAINED: Final = """
journal | VERIFY | the table is checked after every commit by tests only
journal | self.words[W.EDGE] > W.HEADER + _MOST_VERIFIED * W.RECORD | of that check: a long backlog would take it long
journal | found | of that check: a table that no test leaves so
recycling | need <= file.size <= most | speed: the last reserved file nearly always fits, and is taken in one call
"""
"""Guards that may survive: a module | the condition | why no test misses it."""


class Mutation(NamedTuple):
    """One change. row: of the fault matrix, or what else it breaks."""

    row: str
    id: str
    module: str
    tests: str
    old: str
    new: str


def listed() -> Iterator[Mutation]:
    """The mutations above."""
    row = ""
    for line in MUTATIONS.strip().splitlines():
        if line.startswith("# "):
            row = line[2:]
            continue
        id, module, tests, change = line.split(" | ", 3)
        old, _, new = change.replace("¶", "\n").partition(" ==>")
        yield Mutation(row, id, module, tests, old, new.strip())


def place_of(module: str, root: Path = ROOT) -> Path:
    """Where a module that a mutation changes is, in the tree at `root`."""
    package = root / "spoolipc"
    inner = package / "directory" / f"{module}.py"
    return inner if inner.exists() else package / f"{module}.py"


def guards(module: str) -> Iterator[Mutation]:
    """Each `if` of a module taken out; and none, which the tests must let pass."""
    text = place_of(module).read_text()
    yield Mutation("guards", f"{module}:none", module, GUARDS[module], text, text)
    entries = [line.split(" | ") for line in EXPLAINED.strip().splitlines()]
    explained = {condition: why for of, condition, why in entries if of == module}
    starts = [0, *(found.end() for found in re.finditer("\n", text))]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.If):
            test = node.test
            assert test.end_lineno is not None
            assert test.end_col_offset is not None
            begin = starts[test.lineno - 1] + test.col_offset
            end = starts[test.end_lineno - 1] + test.end_col_offset
            why = explained.pop(text[begin:end], "")
            row, name = f"guards, {why}" if why else "guards", f"{module}:{node.lineno}"
            yield Mutation(row, name, module, GUARDS[module], text, f"{text[:begin]}False{text[end:]}")
    assert not explained, f"no such guard: {explained}"


def uncovered(mutations: list[Mutation]) -> list[str]:
    """Rows of the fault matrix that no mutation breaks."""
    matrix = (ROOT / "docs" / "reliability.md").read_text().split("| fault |")[1].split("\n\n")[0]
    rows = [line.split(" | ")[0].removeprefix("| ") for line in matrix.splitlines()[2:]]
    return [row for row in rows if not any(row.startswith(mutation.row) for mutation in mutations)]


def tried(mutation: Mutation) -> tuple[str, str, float]:
    """Make a mutation in a copy of the tree, and run its tests there: what came of it, why, and after what time."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as place:
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, Path(place, name))
        module = place_of(mutation.module, Path(place))
        text = module.read_text()
        if text.count(mutation.old) != 1:
            return "ERROR", f"not applicable, {text.count(mutation.old)} times there: {mutation.old}", 0.0
        module.write_text(text.replace(mutation.old, mutation.new))
        said, why = judged(*run(place, mutation.tests))
    return said, why, time.monotonic() - began


def run(place: str, tests: str) -> tuple[int | None, str]:
    """Run tests in a tree: the exit code, None where they do not end; and what was printed."""
    names = re.match(r"((?:test_\w+ ?)+)(.*)", tests)
    assert names is not None, tests
    files = [str(path) for name in names[1].split() for path in Path(place, "tests").glob(f"*/{name}.py")]
    if not files:
        return 4, f"there is no {names[1]}"
    without = {name: value for name, value in os.environ.items() if name not in ("SPOOLIPC_VERIFY", "CI")}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*PRIVATE, sys.executable, *PYTEST, *files, "-k", names[2], *QUICK * (not names[2])],
            cwd=place,
            env=without | {"PYTHONPATH": place, "TMPDIR": place},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY, MEMORY))
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what the tests left running
        process.wait()
        output.seek(0)
        return code, output.read()


def judged(code: int | None, output: str) -> tuple[str, str]:
    """What the end of a run says of its mutation, and by what."""
    *_, last = output.strip().splitlines() or [""]
    failed = re.findall(r"^(?:FAILED|ERROR) \S+?::(.*)", output, re.MULTILINE)
    if code is None or code < 0:
        return "caught", f"no end within {PATIENCE:g} s" if code is None else signal.Signals(-code).name
    if code == 1 and failed:
        return "caught", failed[0]
    if code == 0 and " passed" in last:
        return "SURVIVED", last
    return "ERROR", f"pytest ended with {code}: {last}"


def main(asked: list[str]) -> int:
    """Try all that are listed, or those asked for by name; 0 when each was caught."""
    mutations = list(listed())
    missing = [] if asked else uncovered(mutations)
    if asked:
        for module in sorted({name.split(":")[0] for name in asked} & GUARDS.keys()):
            mutations += guards(module)
        known = {name for mutation in mutations for name in (mutation.id, mutation.id.split(":")[0])}
        missing += sorted(set(asked) - known)
        mutations = [one for one in mutations if {one.id, one.id.split(":")[0]} & set(asked)]
    began, row, bad = time.monotonic(), "", len(missing)
    with ThreadPoolExecutor(2) as two:
        for mutation, (said, why, seconds) in zip(mutations, two.map(tried, mutations), strict=True):
            if mutation.row != row:
                row = mutation.row
                print(f"\n{row}")
            may_survive = mutation.old == mutation.new or mutation.row.startswith("guards, ")
            bad += said != ("SURVIVED" if may_survive else "caught")
            print(f"  {said:8} {mutation.id:14} {seconds:5.1f} s  {why}", flush=True)
    for name in missing:
        print(f"ERROR: there is no mutation for {name}")
    print(f"\n{len(mutations)} mutations, {bad} not caught, in {time.monotonic() - began:.0f} s")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

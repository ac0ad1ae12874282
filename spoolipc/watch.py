"""Who tells this process that a bell was rung: one watchdog observer, shared by all who wait.

`listen` starts the observer when it is first needed and `Listener.close` stops it with the last listener.
An event is a hint and may be lost; whoever listens looks again by itself now and then. Where inotify cannot
be had (its limits are used up, the file system does not report, or SPOOLIPC_WATCH=polling is set in the
environment) the listener is told to poll, and the log says so once.

The lightest of watchdog's public ways is taken. `InotifyFD` is the thread that reads inotify for
`watchdog.observers.Observer`; it calls us itself, where an Observer would hand each event to an emitter
thread and that to a dispatcher thread. It halves the wake-up time, and it tells when the kernel's queue
overflowed. Where a release of watchdog has no `InotifyFD`, the Observer does it.

A forked child has none of its parent's threads: it forgets the observer and starts its own. The inotify
descriptor it inherits stays open, because watchdog's `close` would also end the parent's watches.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, Protocol

from .nofork import no_fork
from .ownfile import open_own

log = logging.getLogger("spoolipc")

RING = "ring"  # the one file in a watched directory; writing to it is the event
TRIAL = 0.5  # seconds within which a new watch must hear its own ring


class _Watch:
    """One watched directory and who is told; its methods are called in watchdog's thread."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.listeners: tuple[weakref.ref[Listener], ...] = ()  # replaced whole: telling needs no lock
        self.heard = False
        self.since = time.monotonic()
        self.handle: Any = None

    def on_event(self, event: object) -> None:
        self.heard = True
        for ref in self.listeners:
            listener = ref()
            try:
                if listener is not None:
                    listener.callback()
            except Exception:  # an exception would end the thread, and with it every wake-up
                log.exception("a listener on %s failed", self.directory)

    def on_queue_overflow(self) -> None:
        self.on_event(None)

    def on_watch_deleted(self, wd: int) -> None:
        pass


class _Source(Protocol):
    """One running observer of watchdog."""

    def add(self, watch: _Watch) -> None: ...

    def remove(self, watch: _Watch) -> None: ...

    def stop(self) -> None: ...


class _Direct:
    """The inotify thread of watchdog, calling the watch itself."""

    def __init__(self) -> None:
        from watchdog.observers.inotify_c import CallbackId, InotifyConstants, InotifyFD, Mask

        self._id = CallbackId
        self._mask = Mask(
            InotifyConstants.IN_MODIFY | InotifyConstants.IN_ONLYDIR | InotifyConstants.IN_DONT_FOLLOW
        )
        self._thread = InotifyFD()
        self._thread.name = "spoolipc-watch"
        self._thread.start()

    def add(self, watch: _Watch) -> None:
        path = os.fsencode(watch.directory)
        watch.handle = self._thread.add_callback(path, self._mask, watch, self._id(id(watch)))
        if watch.handle == -1:  # watchdog passes over EACCES in silence
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), watch.directory)

    def remove(self, watch: _Watch) -> None:
        self._thread.remove_callbacks([(watch.handle, self._id(id(watch)))])

    def stop(self) -> None:
        self._thread.stop()
        with suppress(RuntimeError):  # a callback that closes the last listener is on this very thread
            self._thread.join()


class _Observed:
    """watchdog's Observer, for releases without `InotifyFD`."""

    def __init__(self) -> None:
        from watchdog.observers import Observer

        self._observer = Observer()
        self._observer.name = "spoolipc-watch"
        self._observer.start()

    def add(self, watch: _Watch) -> None:
        from watchdog.events import FileModifiedEvent, FileSystemEvent, FileSystemEventHandler

        class Handler(FileSystemEventHandler):
            def dispatch(self, event: FileSystemEvent) -> None:
                watch.on_event(event)

        watch.handle = self._observer.schedule(Handler(), watch.directory, event_filter=[FileModifiedEvent])

    def remove(self, watch: _Watch) -> None:
        self._observer.unschedule(watch.handle)

    def stop(self) -> None:
        self._observer.stop()
        with suppress(RuntimeError):
            self._observer.join()


class Listener:
    """One callback on one directory, until close(). One that is dropped is told nothing more either."""

    def __init__(self, watch: _Watch, callback: Callable[[], None]) -> None:
        self._watch = watch
        self.callback = callback

    def hears(self) -> bool:
        """Whether events arrive. False for a new watch until it heard its own ring: poll meanwhile.

        Half a second without it means that the file system does not report; the log says so, once.
        """
        if not self._watch.heard and time.monotonic() - self._watch.since > TRIAL:
            _complain(f"no event arrived from {self._watch.directory}")
        return self._watch.heard

    def close(self) -> None:
        """Stop being told; the last listener stops the observer and waits for its thread to end.

        Not to be called by a finalizer: it takes locks that the interrupted thread may hold.
        """
        global _source
        ended = None
        with _lock:
            watch = self._watch
            watch.listeners = tuple(ref for ref in watch.listeners if ref() is not self)
            _sweep()
            if not _watches:
                ended, _source = _source, None
        if ended is not None:
            ended.stop()


_lock = threading.Lock()  # never held while a callback runs
_source: _Source | None = None
_watches: dict[str, _Watch] = {}
_deaf = False  # the last attempt to listen failed
_warned = False


def listen(directory: str, callback: Callable[[], None]) -> Listener | None:
    """Have `callback` called in the observer's thread each time the file `ring` in `directory` is written.

    `callback` must be short, must not raise, and must not take a lock that is ever held around `listen` or
    `close`. Returns None where there is nothing to listen with: poll.
    """
    global _source, _deaf
    if _forced():
        return None
    try:
        with _lock:
            _sweep()
            watch = _watches.get(directory)
            fresh = watch is None
            if watch is None:
                watch = _Watch(directory)
                try:
                    _source = _source or _start()
                    _source.add(watch)
                except BaseException:
                    if _source is not None and not _watches:
                        _source.stop()
                        _source = None
                    raise
                _watches[directory] = watch
            listener = Listener(watch, callback)
            watch.listeners = (*watch.listeners, weakref.ref(listener))
            _deaf = False
    except FileNotFoundError:
        return None  # the directory is gone, which says nothing about inotify
    except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
        _deaf = True
        _complain(str(error))
        return None
    if fresh:
        _try_out(directory)
    return listener


def _sweep() -> None:
    """Under the lock: forget the listeners that were dropped, and end the watches that nobody listens to."""
    for watch in list(_watches.values()):
        watch.listeners = tuple(ref for ref in watch.listeners if ref() is not None)
        if not watch.listeners:
            del _watches[watch.directory]
            if _source is not None:
                with suppress(OSError, KeyError):
                    _source.remove(watch)


def mode() -> Literal["inotify", "polling", "idle"]:
    """How this process learns of a ring now: by inotify, by polling, or nobody has waited yet."""
    if _forced() or _deaf:
        return "polling"
    with _lock:
        watches = list(_watches.values())
    if not watches:
        return "idle"
    now = time.monotonic()
    return "polling" if any(not w.heard and now - w.since > TRIAL for w in watches) else "inotify"


def _forced() -> bool:
    return os.environ.get("SPOOLIPC_WATCH") == "polling"


def _start() -> _Source:
    with no_fork:  # Python's lock on a module being imported would never be released in the child
        try:
            return _Direct()
        except ImportError:
            return _Observed()


def open_ring(directory: str) -> int:
    """A descriptor that rings the bell at `directory` when it is written to. Raises OSError, and UnsafeSpool for
    anything but a file of the spool's own: no ring is ever written through a link."""
    place = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return open_own(place, RING, os.O_WRONLY)
    finally:
        os.close(place)


def _try_out(directory: str) -> None:
    """Ring ourselves. Others at the same bell look once for nothing."""
    with suppress(OSError):
        fd = open_ring(directory)
        try:
            os.pwrite(fd, b"\0", 0)
        finally:
            os.close(fd)


def _complain(reason: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        log.warning("inotify is unavailable (%s): waiting falls back to polling", reason)


def _after_fork_in_child() -> None:
    global _lock, _source, _watches, _deaf
    _lock = threading.Lock()
    _source = None
    _watches = {}
    _deaf = False


os.register_at_fork(after_in_child=_after_fork_in_child)

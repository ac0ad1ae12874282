"""The index's words: where each number stands in the mapped file. Names only; no code.

The index is an array of 64-bit words: a header of HEADER words, then records of RECORD words. A record
stands for one file, from the moment it is known until it is unlinked. Records are linked by the position of
their first word, 0 being none.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct
from typing import Final

MAGIC_VALUE: Final = int.from_bytes(b"SPOOLIDX", "little")
VERSION_VALUE: Final = 2

HEADER: Final = 1024
RECORD: Final = 16
WORD: Final = 8

# Header
MAGIC: Final = 0
VERSION: Final = 1
BOOT: Final = 2  # and 3: the boot in which this index was built
CAPACITY: Final = 4  # words in the file that are in use, the header included
MARK: Final = 5  # the kind of change under way, CLEAN when none
SUBJECT: Final = 6  # the number of the file that the change moves
STORES: Final = 7  # how many stores the journal holds
HOLDER: Final = 8  # token of the last to take the lock
NEXT_SEQ: Final = 16
NEXT_SEQ_CHECK: Final = 17  # NEXT_SEQ with all bits turned: a number given twice would cost an item
READY: Final = 18  # head, tail and count of items never delivered
READY_TAIL: Final = 19
READY_COUNT: Final = 20
ITEM_BYTES: Final = 21  # of files waiting or in flight
POOL_BYTES: Final = 22  # of pooled files
POOL_COUNT: Final = 23
GOTS: Final = 24  # how many items were ever delivered for good
PEAK_BYTES: Final = 25  # the most that ITEM_BYTES was of late: so much the files of free/ may fill up again
FIRST_SEQ: Final = 26  # NEXT_SEQ when this index was built
RETURNED: Final = 28  # head, tail and count of items given back, delivered before all others
RETURNED_TAIL: Final = 29
RETURNED_COUNT: Final = 30
AWAY: Final = 31  # head of the list of files in somebody's hands, or delayed
IN_FLIGHT: Final = 32  # how many of them are items claimed
DELAYED_COUNT: Final = 33
UNUSED: Final = 34  # head of the list of records that stand for nothing
EDGE: Final = 35  # position of the first record never used
FAILED_COUNT: Final = 36
SHUTDOWN: Final = 37  # OPEN, DRAINING or DISCARDED
NEXT_DUE: Final = 38  # monotonic ns at which a lease or a delay ends, 0 for none
TENDED: Final = 39  # monotonic ns at which the dead were last looked for
MAXSIZE: Final = 40  # the limits, as spool.json has them
MAX_BYTES: Final = 41
RECYCLE_BYTES: Final = 42
MAX_ATTEMPTS: Final = 43
ITEM_FLAGS: Final = 48  # 8 words: somebody waits for items at this bell
SPACE_FLAGS: Final = 56  # 8 words: somebody waits for space at this bell
BUCKETS: Final = 64  # 192 words: heads of the pooled files by size
FLOW_IMAGE: Final = 256  # what the change under way makes of FLOW, where its MARK has FLOWING
JOURNAL: Final = 266  # positions of the other stores of the change under way, then their values
JOURNAL_ROOM: Final = 128  # of each

FLOW: Final = Struct("=10Q")
"""NEXT_SEQ to PEAK_BYTES, the words of every put and get, for one look at all of them."""
FLOW_TO_PUT: Final = Struct("=10Q 32x Q 16x Q 24x Q 8x 3Q")
"""FLOW, then RETURNED_COUNT, DELAYED_COUNT, SHUTDOWN, TENDED, MAXSIZE, MAX_BYTES."""
FLOW_TO_GET: Final = Struct("=10Q 16x Q 16x Q 40x 3Q 16x Q")
"""FLOW, then RETURNED, AWAY, SHUTDOWN, NEXT_DUE, TENDED, RECYCLE_BYTES."""
FLOW_AT: Final = NEXT_SEQ * WORD
FLOW_WORDS: Final = slice(NEXT_SEQ, PEAK_BYTES + 1)

# Record
STATE: Final = 0
NEXT: Final = 1
PREV: Final = 2
SEQ: Final = 3  # the item's sequence number
PUT_TIME: Final = 4  # wall clock, ns
DUE: Final = 5  # monotonic ns at which its lease or delay ends, 0 for none
ATTEMPT: Final = 6  # how often it was claimed
FLAGS: Final = 7
LOAN: Final = 8  # token of the writer that still has the loaned array, 0 for none
END: Final = 9  # where in the file the footer begins, 0 when not known
EXPIRES: Final = 10  # room for what is to come
GROUPS: Final = 11
OWNER: Final = 12  # token of the party that has it in its hands
FILE: Final = 13  # the number in the file's name
BYTES: Final = 14  # the file's size
BIRTH: Final = 15  # number under which this very file was first known; never used again

ROW: Final = Struct("=16Q")
"""A whole record."""
ITEM: Final = Struct("=9Q")
"""SEQ to GROUPS, what a record says of its item."""

# States of a record
NOTHING: Final = 0
WAITING: Final = 1  # in items/, to be delivered
CLAIMED: Final = 2  # in items/, in a reader's hands
DELAYED: Final = 3  # in items/, given back and not yet due
HELD: Final = 4  # in free/, acknowledged, looked at by a view
RESERVED: Final = 5  # in free/, being written by a writer
POOLED: Final = 6  # in free/, waiting to be written

# Flags of a record
DURABLE: Final = 1  # survives power loss, so its file is never written again

SAYING: Final = 2  # the footer has names or metadata

# States of the spool
OPEN: Final = 0
DRAINING: Final = 1  # no more puts; what waits is delivered
DISCARDED: Final = 2  # no more puts and no more gets

# Kinds of change (MARK): how to tell, after a crash, whether the change happened
CLEAN: Final = 0
MEMORY: Final = 1  # stores only: it happened
ARRIVE: Final = 2  # it happened if items/SUBJECT exists
LEAVE: Final = 3  # it happened if items/SUBJECT does not exist
UNLINK: Final = 4  # free/SUBJECT is removed, now or before
DONATE: Final = 5  # it happened if free/SUBJECT exists
FOLLOW: Final = 6  # no stores: SHUTDOWN becomes what the marker file says
FLOWING: Final = 16  # added to the kind of a change that has an image of FLOW beside its stores


@lru_cache(1024)
def bucket(size: int) -> int:
    """The header word of the pooled files of about `size` bytes: four buckets to a doubling."""
    pages = (size + 4095) >> 12
    length = pages.bit_length()
    if length < 3:
        return BUCKETS + pages
    return BUCKETS + min(length * 4 + ((pages >> (length - 3)) & 3), 191)

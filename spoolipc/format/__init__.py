"""The item file: some arrays and what is said of them, as bytes that `np.load` reads and nobody needs to trust.

    +--------+---------+--------+---------+ ... +--------+------+ . . . .
    | header | data    | header | data    |     | footer | JSON | slack
    +--------+---------+--------+---------+ ... +--------+------+ . . . .
     `--- NPY block --' `--- NPY block --'       72 bytes  if any

Read in this order: `header` (one NPY header, written and read), `footer` (the fixed record, names and metadata as
JSON), `item` (the whole file). The package is pure: it works on buffers, opens no file and knows no directory.

To write: `item.layout_of(arrays)`, then `item.store` into a map, `item.to_bytes` for a small item, or `item.parts` for
a new file; `footer.pack` makes what follows at `Layout.end`. To read: `item.parse`, `item.verify` where the checksum is
to be compared, then `item.message`. What is read may be hostile: `parse` raises `BadItem` for anything but an undamaged
item, `UnknownVersion` for an item of a later release, and nothing else. Nothing is ever pickled or unpickled.
"""

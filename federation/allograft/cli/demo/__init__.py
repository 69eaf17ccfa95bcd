# SPDX-License-Identifier: Apache-2.0
"""The demo: one real packet between processes on this machine, from nothing to a verified log.

- `text`: general text from Python's documentation, and clinical notes that nobody wrote.
- `pretrain`: a small tokenizer and models trained from scratch.
- `base`: everything the four sites start with, made or taken from a person's own files.
- `processes`, `hostile`, `stages`, `report`: daemons, attacks, progress and the closing table.
"""

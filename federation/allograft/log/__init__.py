# SPDX-License-Identifier: Apache-2.0
"""The witnessed log: what was offered, sent and received, so that nobody can rewrite it.

- `event`: entries, one signed event each.
- `merkle`, `tiles`: the tree, its proofs and its static files.
- `note`, `checkpoint`, `cosignature`: signed commitments to the tree, in C2SP formats.
- `proof`: that an entry is in a tree that enough witnesses saw.
- `store`: the coordinator's database; `witness`: a site's memory.
- `export`, `audit`: the log as a folder, and its verification with no trust in its writer.
"""

# SPDX-License-Identifier: Apache-2.0
"""What stands between a site's data and the outside, all of it fail-closed and torch-free.

- `policy`: the site's own rules, read from one file; without it nothing leaves or attaches.
- `modes`: what is promised about the data a packet learnt from (`open` works, others refuse).
- `scan`: looks for identifiers of people in every string that leaves.
- `shapes`: which tensors a kind may hold, derived from the base model's own files.
- `gates`: type (G0), text (G2) and structure (G6) gates and their results.
- `audit`: bounds and intervals that scores and counts of an audit prove.
- `canaries`: texts planted by coins, and the split of persons.
- `memorisation`: plan (G1), extraction (G3), canaries (G4), membership (G5), population (G7).
- `thresholds`: the numbers by which they judge.
- `dossier`: the gates' evidence and the roles' approvals as signed statements.
- `release`: the one way to the token without which no payload is sealed.
- `egress`: rebuilds the payload file from an allow-list, and admits approved bytes only.
"""

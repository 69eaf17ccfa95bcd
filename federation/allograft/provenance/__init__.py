# SPDX-License-Identifier: Apache-2.0
"""What a packet claims, who signed it, and whether a recipient may believe that it is meant.

- `intoto`: in-toto statements in DSSE envelopes, any predicate.
- `statement`: the packet statement, which everything else about a packet is bound to.
- `training`: SLSA provenance of the run, and the donor's evaluation as a test result.
- `dispatch`: the donor's signed decision to send a sealed packet to named sites.
- `lineage`: digests of a base model and the test whether two bases are relatives.
- `verify`: the recipient's order of checks; values in, verified values out.

No signature makes a claim true. It makes it attributable, complete and bound to these bytes.
"""

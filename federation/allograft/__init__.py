# SPDX-License-Identifier: Apache-2.0
"""Allograft: share what a model learnt, never the data it learnt it from.

The core, from the bottom up; each layer imports only those above it in this list:

- `errors`, `limits`, `durable`: coded failures, ceilings, atomic files.
- `wire`: generated protobuf, the contract between our processes.
- `crypto`: keys, signatures (DSSE), sealing (Cobblestone, HPKE X-Wing), canonical JSON.
- `packet`: the container that travels, its header and strict validation of tensors.
- `roster`: who belongs to the consortium, as a TUF repository.
- `log`: the Merkle log, checkpoints, witnesses, proofs and the offline audit.
- `provenance`: statements about a packet, how a recipient verifies them, model lineage.
- `privacy`: modes, policy, release gates, dossier and the egress guard.
- `routing`, `relay`: who could use an offer; how bytes move between coordinator and site.
- `recipes`: the code that makes, fits, attaches and removes each kind of packet.
- `evaluate`: held-out loss, paired bootstrap and the gate that keeps or reverts.
- `cli`: `allograft`, the offline tool, and the demo.
"""

__version__ = "0.1.0"

# SPDX-License-Identifier: Apache-2.0
"""Who could use an offer, and the signed documents that say so. No IO.

- `document`: what the five documents share: an in-toto statement in a DSSE envelope.
- `card`: a site's models and what it accepts. `offer`: the public side of a packet.
- `route`: the coordinator's proposals. `receipt`: a recipient's outcome.
- `withdrawal`: a donor takes a packet back.
- `match`: an offer and the cards, in; one verdict with its reason for each site, out.
"""

# SPDX-License-Identifier: Apache-2.0
"""How bytes move between coordinator and site, over a transport that is not trusted.

- `item`: what waits to be moved, described by digests.
- `frame`: one signed call or answer.
- `poll`: the lists that drive everything else.
- `memory`: how processes that pass parts on keep their memory flat.
- `app`: the digest of the Flower app and where a frame lies in its messages.
"""
